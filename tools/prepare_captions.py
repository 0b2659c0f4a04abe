"""Write the one caption format (tools/captions.py) from what the data came as, checked before anything is written.

In:  a folder of pictures and one source: a Karpathy JSON, a published `<dataset>_split_captions.json`, COCO
     `captions_*.json`, a CSV or JSONL table of image, caption(s) and optionally split, or nothing but the pictures; or
     webdataset shards, which hold both (tools/shards.py).
Out: `<output>/captions.jsonl`, `<output>/manifest.json`; of shards, `<output>/pictures/`.
Command: python -m tools.prepare_captions --images DIR --source FILE --output RQ-VAE/data/<dataset>/01_captions
"""

import csv
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import runs
from .captions import FILE_NAME, SPLITS, Record, leaves_folder, portable, write_captions
from .command_line.commands import run_command
from .command_line.options import RunOptions
from .errors import BadInput
from .files import read_json, read_json_lines
from .logs import table
from .picture_listing import NOT_FOLLOWED, Listing, summary_of
from .pictures import find_unreadable, list_pictures
from .shards import Unpacking, list_shards, shards_of
from .texts import clean, is_unicode, printable

Format = Literal["karpathy", "published", "coco", "table", "folder", "webdataset"]
UNPACKED = "pictures"  # the folder, below the output, of what was in shards
NAMED_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Where the pictures and captions are, and how pictures without a split are divided."""

    images: Path | None = None
    """Folder of the pictures; file names are relative to it. Not for shards, which hold the pictures."""
    source: tuple[Path, ...] = ()
    """Caption file, or several for COCO; none for a bare folder of pictures. Of webdataset shards the folder, the .tar
    files, or a pattern of their names with *, ? or {000..012}."""
    format: Format | None = None
    """Format of the source; by default recognised from the file."""
    split_rule: str = "random:0.8,0.1,0.1"
    """For sources without splits: "random:TRAIN,VAL,TEST" shares (by a hash of the image id, so that a picture keeps
    its split when others come or go), one split name, or for COCO one "FILE=SPLIT or rule" per source, joined by
    semicolons."""
    expect: tuple[int, int, int] | None = None
    """Pictures of train, val and test that a complete copy of the data has; others are an error."""
    skip_bad: bool = False
    """Leave out what is wrong with the data, and go on."""
    follow_links: bool = False
    """Take pictures behind links that lead out of --images too."""
    workers: int = 4
    """Processes that open the pictures."""

    def __post_init__(self) -> None:
        shards = self.shards
        if self.format == "webdataset" and not shards:
            raise BadInput("--format webdataset takes --source: .tar files, or a folder that has some")
        if shards and self.images is not None:
            raise BadInput(f"--images {self.images}: the pictures are in the shards, leave it out")
        if not shards and (self.images is None or not self.images.is_dir()):
            raise BadInput(
                "name a folder of --images" if self.images is None else f"--images {self.images} is not a folder"
            )
        for path in self.source:
            if not shards and path.is_dir():
                beside = list_shards(path, follow_links=self.follow_links).summary() or "the folder is empty"
                raise BadInput(f"--source {path}: there is no shard below this folder ({beside})")
            if not shards and not path.is_file():
                raise BadInput(f"--source {path} does not exist")
        if len(self.source) > 1 and self.format not in (None, "coco", "webdataset"):
            raise BadInput(f"--format {self.format} takes one --source, not {len(self.source)}")
        if self.format == "folder" and self.source:
            raise BadInput("--format folder takes no --source")
        if self.workers < 0:
            raise BadInput("--workers must be at least 0")

    @property
    def shards(self) -> list[Path]:
        """The shards that the sources stand for.

        Raises:
            BadInput: there are shards and something else.
        """
        read = self.format in (None, "webdataset")
        found = [shards_of(path, follow_links=self.follow_links) if read else [] for path in self.source]
        if any(found) and not all(found):
            other = next(path for path, shards in zip(self.source, found, strict=True) if not shards)
            raise BadInput(f"--source {other} has no webdataset shards, as the others have: name one kind of source")
        named = [shard for shards in found for shard in shards]
        if twice := [shard for shard, count in Counter(_real(each) for each in named).items() if count > 1]:
            raise BadInput(f"--source names the shard {twice[0]} more than once: leave one out")
        return named

    @property
    def picture_folder(self) -> Path:
        """Where the pictures lie."""
        return self.output / UNPACKED if self.images is None else self.images

    @property
    def listings(self) -> dict[str, Path]:
        """Folders whose pictures make another run when they change: that of the pictures, and those it has links to."""
        if self.images is None:
            return {}
        linked = list_pictures(self.images, follow_links=True).linked if self.follow_links else {}
        return {"images": self.images} | {f"images/{path}": folder for path, folder in linked.items()}


class Found(NamedTuple):
    """A picture as its source names it, before any check; split None is decided by the rule."""

    image: str
    file: str
    split: str | None
    captions: list[Any]
    """Texts, unless the source is wrong."""
    where: str
    problem: str = ""
    """What is known to be wrong with it."""


class Problem(NamedTuple):
    """What is wrong with one picture or caption, and where."""

    kind: str
    where: str


def read_karpathy(path: Path, value: Any) -> Iterator[Found]:
    """Karpathy and Fei-Fei's `dataset_flickr30k.json`, `dataset_coco.json`; `restval` counts as train."""
    for number, row in enumerate(value["images"]):
        try:
            file = str(Path(row.get("filepath", "")) / row["filename"])
            captions = [sentence["raw"] for sentence in row["sentences"]]
            split = {"restval": "train"}.get(row["split"], row["split"])
        except KeyError as error:
            raise BadInput(f"{path}, images[{number}]: no {error} in it; is this a Karpathy file?") from None
        except (TypeError, AttributeError):
            raise BadInput(f"{path}, images[{number}]: not as in a Karpathy file: name another --format") from None
        yield Found(row["filename"], file, split, captions, f"{path.name}, images[{number}]")


def read_published(path: Path, value: Any) -> Iterator[Found]:
    """The `<dataset>_split_captions.json` of the method's authors: file name -> {"split", "caption": [...]}."""
    for file, row in value.items():
        captions = row.get("caption", row.get("captions")) if isinstance(row, dict) else None
        if captions is None or "split" not in row:
            raise BadInput(f'{path}, entry "{file}": expected {{"split": ..., "caption": [...]}}')
        captions = captions if isinstance(captions, list) else [captions]
        yield Found(file, file, row["split"], captions, f'{path.name}, entry "{file}"')


def read_coco(path: Path, value: Any) -> Iterator[Found]:
    """COCO's `captions_*.json`: `images` (id, file_name) and `annotations` (image_id, caption)."""
    captions: dict[int, list[str]] = {row["id"]: [] for row in value["images"]}
    for number, row in enumerate(value["annotations"]):
        if row["image_id"] not in captions:
            raise BadInput(f"{path}, annotations[{number}]: image_id {row['image_id']} is not among the images")
        captions[row["image_id"]].append(row["caption"])
    for number, row in enumerate(value["images"]):
        file = str(row["file_name"])
        yield Found(file, file, None, captions[row["id"]], f"{path.name}, images[{number}]")


def read_table(path: Path) -> Iterator[Found]:
    """A CSV, TSV or JSONL of `image`, `caption` (or `captions`) and optionally `split`; one row per caption is fine."""
    found: dict[str, Found] = {}
    for number, row in _table_rows(path):
        where = f"{path.name}, line {number}"
        captions = row.get("captions", row.get("caption"))
        if not row.get("image") or captions is None:
            raise BadInput(f"{path}, line {number}: needs `image` and `caption` (or `captions`), has {', '.join(row)}")
        captions = captions if isinstance(captions, list) else [captions]
        image, split = str(row["image"]), row.get("split") or None
        known = found.get(image)
        if known is None:
            found[image] = Found(image, str(row.get("file") or image), split, captions, where)
        elif known.split == split:
            known.captions.extend(captions)
        else:  # two splits: kept apart, so that the check names it
            found[f"{image} {split}"] = Found(image, image, split, captions, where)
    yield from found.values()


def read_folder(images: Path, *, follow_links: bool) -> Iterator[Found]:
    """Every picture below a folder, without captions: in split test, so that it can be found but trains nothing.

    Raises:
        BadInput: there is none.
    """
    listing = list_pictures(images, follow_links=follow_links)
    if not listing.pictures and not listing.lost:
        raise BadInput(listing.why_empty(images))
    for file in listing.pictures:
        yield Found(file, file, "test", [], file)
    yield from _not_found(images, listing)


def read_shards(shards: list[Path], config: Config) -> Iterator[Found]:
    """Every sample of webdataset shards, whose pictures are unpacked.

    Raises:
        BadInput: there is no picture.
    """
    for folder in (source for source in config.source if source.is_dir()):
        yield from _not_found(folder, list_shards(folder, follow_links=config.follow_links))
    config.picture_folder.mkdir(exist_ok=True)
    unpacking = Unpacking(shards, config.picture_folder)
    pictures = bare = 0
    for shard, sample in unpacking.samples():
        pictures, bare = pictures + sample.has_picture, bare + (sample.has_picture and not sample.captions)
        split = sample.split or _rule_for(shard, config.split_rule)(sample.name)
        problem = sample.problem or ("" if sample.has_picture else "sample without a picture")
        yield Found(sample.name, sample.name, split, sample.captions, sample.where, problem)
    members = summary_of(unpacking.others)
    if not pictures:
        raise BadInput(f"there is no picture in the shards ({members or 'they are empty'})")
    if members:
        print(f"in the shards: {members}")
    if bare:
        print(f"{bare:,} of {pictures:,} pictures have no caption in the shards: they can be found, and train nothing")


def _not_found(folder: Path, listing: Listing) -> Iterator[Found]:
    """The problems of a folder that was listed; printed lines account for what else lies there."""
    for line in listing.notes():
        print(f"{printable(str(folder))}: {line}")
    for file, reason in listing.lost.items():
        advice = " (--follow-links lets it)" if reason in NOT_FOLLOWED else ""
        yield Found(file, file, "test", [], str(folder), reason + advice)


def tell_unnamed(found: list[Found], config: Config) -> None:
    """Print what lies in the folder of pictures that no source names."""
    if config.images is None or not config.source:
        return
    listing = list_pictures(config.images, follow_links=config.follow_links)
    named = {os.path.normpath(row.file) for row in found}
    by_link = [file for file in named.difference(listing.pictures) if is_unicode(file) and not leaves_folder(file)]
    folder = _real(config.images)
    named |= {os.path.relpath(_real(folder / file), folder) for file in by_link}
    unnamed = [file for file in listing.pictures if file not in named]
    if unnamed:
        print(printable(f"{config.images}: {len(unnamed):,} pictures are named by no source, the first: {unnamed[0]}"))


def recognise(path: Path, value: Any) -> Format:
    """Tell a JSON source's format by its keys."""
    if isinstance(value, dict) and "annotations" in value and "images" in value:
        return "coco"
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        return "karpathy"
    if isinstance(value, dict):
        return "published"
    raise BadInput(f"{path}: not one of {', '.join(get_args(Format))}: name its --format")


def read_sources(config: Config) -> list[Found]:
    """Read all sources, splits decided."""
    if not config.source:
        return list(read_folder(config.picture_folder, follow_links=config.follow_links))
    found = []
    if shards := config.shards:
        return list(read_shards(shards, config))
    for path in config.source:
        rule = _rule_for(path, config.split_rule)
        found += [row if row.split else row._replace(split=rule(row.image)) for row in _read_source(path, config)]
    return found


def check(found: list[Found], config: Config) -> tuple[list[Record], list[Problem]]:
    """Split what was found into good records and problems; every picture is opened and decoded."""
    problems: list[Problem] = []
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(row.image, set()).add(str(row.split))
    outside = files_outside(found, config)
    inside = sorted({row.file for row in found} - outside.keys())
    unreadable = outside | find_unreadable(inside, workers=config.workers, folder=config.picture_folder)
    records: dict[str, Record] = {}
    for row in found:
        captions, wrong = check_captions(row)
        problems += wrong
        reason = row.problem or unreadable[row.file] or ("" if is_unicode(row.image) else "id not UTF-8")
        if row.split not in SPLITS:
            problems.append(Problem(f"split is not one of {', '.join(SPLITS)}", f"{row.where}: {row.split!r}"))
        elif len(splits[row.image]) > 1:
            problems.append(Problem("picture in two splits", f"{row.where}: {row.image}"))
        elif row.image in records:
            problems.append(Problem("duplicate id", f"{row.where}: {row.image}"))
        elif reason:
            problems.append(Problem(reason, f"{row.where}: {row.file}"))
        elif row.captions and not captions:
            problems.append(Problem("picture without a caption", f"{row.where}: {row.image}"))
        else:
            records[row.image] = Record(row.image, row.file, row.split, captions)
    return list(records.values()), problems


def check_captions(row: Found) -> tuple[tuple[str, ...], list[Problem]]:
    """The good captions of a picture, each on one line without control characters; what is wrong with the others."""
    good, problems = [], []
    for caption in row.captions:
        if caption is not None and not isinstance(caption, str):
            problems.append(Problem(f"caption is no text but {type(caption).__name__}", row.where))
        elif not caption or not (text := clean(caption)):
            problems.append(Problem("empty caption", row.where))
        elif not is_unicode(caption):
            problems.append(Problem("caption with half a character (a lone surrogate)", row.where))
        else:
            good.append(text)
    return tuple(good), problems


def files_outside(found: list[Found], config: Config) -> dict[str, str]:
    """Files that a source names and that lie, or whose links lead, outside the folder of pictures, with the reason."""
    folder = config.picture_folder.resolve()
    outside = {}
    for file in {row.file for row in found}:
        if leaves_folder(file):
            outside[file] = "file outside --images"
        elif not config.follow_links and is_unicode(file) and not _real(folder / file).is_relative_to(folder):
            outside[file] = "link that leads out of --images (--follow-links lets it)"
    return outside


def report(problems: list[Problem], images: Path) -> str:
    """Counts by kind and the first ten of them, with the way out."""
    counts = Counter(problem.kind for problem in problems)
    lines = [f"{sum(counts.values())} problems in the data ({images}):"]
    lines += [f"  {count:,} × {kind}" for kind, count in counts.most_common()]
    lines += [f"  {problem.kind}: {problem.where}" for problem in problems[:NAMED_PROBLEMS]]
    return "\n".join(printable(line) for line in lines)


def main(config: Config) -> None:
    sources = {f"source{number}": path for number, path in enumerate(config.shards or config.source)}
    run = runs.begin("tools.prepare_captions", config, inputs=sources, listings=config.listings)
    if run is None:
        return
    read = read_sources(config)
    tell_unnamed(read, config)
    records, problems = check(read, config)
    if problems and not config.skip_bad:
        if config.images is None:
            shutil.rmtree(config.picture_folder)  # else the folder would be held to be this run's, without --skip-bad
        raise BadInput(report(problems, config.picture_folder) + "\nMend them, or go on without them with --skip-bad.")
    if problems:
        print(report(problems, config.picture_folder) + "\nLeft out (--skip-bad).")
    if not records:
        raise BadInput(f"no usable picture: nothing in {config.picture_folder} matches the source")
    pictures = Counter(record.split for record in records)
    found = tuple(pictures[split] for split in SPLITS)
    if config.expect is not None and found != config.expect:
        raise BadInput(f"train, val, test have {found} pictures, --expect says {config.expect}: is the data complete?")
    write_captions(run.folder / FILE_NAME, records)
    captions = Counter(dict.fromkeys(SPLITS, 0))
    for record in records:
        captions[record.split] += len(record.captions)
    rows = [{"split": split, "pictures": pictures[split], "captions": captions[split]} for split in SPLITS]
    manifest = run.finish(
        facts={"images": portable(config.picture_folder), "pictures": pictures, "captions": captions},
        metrics={"problems": len(problems)},
    )
    if config.images is None:  # unpacked pictures are not read again by every later stage, as others are not
        runs.replace_outputs(manifest, [run.folder / FILE_NAME], manifest.facts)
    print(table(rows))


def _real(path: Path) -> Path:
    """Where links lead; links that go round in circles lead nowhere, and stay what they are."""
    return Path(os.path.realpath(path))


def _read_source(path: Path, config: Config) -> Iterator[Found]:
    kind = config.format
    if kind == "table" or path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        return read_table(path)
    value = read_json(path)
    readers: dict[Format, Callable[[Path, Any], Iterator[Found]]] = {
        "karpathy": read_karpathy,
        "published": read_published,
        "coco": read_coco,
    }
    kind = kind or recognise(path, value)
    if kind not in readers:
        raise BadInput(f"--format {kind} does not read {path}")
    return _rows_of_shape(readers[kind](path, value), path, kind)


def _rows_of_shape(rows: Iterator[Found], path: Path, kind: Format) -> Iterator[Found]:
    try:
        yield from rows
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is not of format {kind} ({type(error).__name__}: {error}): name another --format"
        ) from None


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".jsonl":
        yield from read_json_lines(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in rows:
                yield rows.line_num, {key: value for key, value in row.items() if key and value is not None}
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}, after line {rows.line_num}: cannot be read ({error}); save it as UTF-8") from None
        except csv.Error as error:
            raise BadInput(f"{path}, after line {rows.line_num}: not readable as a table ({error}): mend it") from None


def _rule_for(path: Path, rules: str) -> Callable[[str], str]:
    """The split rule of one source, as a function of the image id."""
    rule = rules
    for part in rules.split(";"):
        name, equals, own = part.partition("=")
        if equals and name.strip() in (path.name, path.stem):
            rule = own.strip()
        elif equals and rule == rules:
            rule = ""
    if rule in SPLITS:
        return lambda image: rule
    kind, _, shares = rule.partition(":")
    try:
        train, val, test = (float(share) for share in shares.split(","))
    except ValueError:
        kind = ""
    if kind != "random" or not abs(train + val + test - 1) < 1e-6 or min(train, val, test) < 0:
        raise BadInput(
            f"--split-rule {rules!r} gives no rule for {path.name}: write train, val or test, or "
            '"random:0.8,0.1,0.1" with shares that sum to 1, or "FILE=RULE;FILE=RULE"'
        )
    return partial(_random_split, bounds=(train, train + val))


def _random_split(image: str, bounds: tuple[float, float]) -> str:
    draw = int.from_bytes(hashlib.blake2b(image.encode(errors="surrogatepass"), digest_size=8).digest(), "big") / 2**64
    return "train" if draw < bounds[0] else "val" if draw < bounds[1] else "test"


if __name__ == "__main__":
    run_command(main, Config)
