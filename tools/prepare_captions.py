"""Write the one caption format (tools/captions.py) from what the data came as, checked before anything is written.

In:  a folder of pictures and the source of their captions: a table (CSV, TSV, JSON lines), a JSON file (Karpathy,
     COCO, BLIP, or file name -> captions), parquet, text files beside the pictures, or nothing but the pictures; or
     webdataset shards or parquet files, which hold both. docs/layouts.md shows each.
Out: `<output>/captions.jsonl`, `<output>/manifest.json`; of shards and parquet, `<output>/pictures/`.
Command: python -m tools.prepare_captions --images DIR --source FILE --output RQ-VAE/data/<dataset>/01_prepare_captions
"""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import UseAppendAction

from . import runs
from .captions import FILE_NAME, SPLITS, Record, leaves_folder, portable, write_captions
from .command_line.commands import run_command
from .command_line.options import RunOptions
from .data.columns import Wanted
from .data.foreign import refuse_foreign
from .data.found import Found, Problem, check_captions, note, report, some
from .data.identity import file_key, join, resolve, tell_copies
from .data.json_sources import Reader, read_coco, read_karpathy, read_published, read_value
from .data.metadata import in_its_folder
from .data.parquet import parquet_files, read_parquet
from .data.sidecars import SIDECARS, count_sidecars, read_sidecars
from .data.splits import rule_for, split_named
from .data.tables import ENDINGS, found_in_objects, read_table
from .errors import BadInput
from .logs import table
from .picture_listing import NOT_FOLLOWED, Listing, summary_of
from .pictures import find_unreadable, list_pictures
from .shards import Unpacking, list_shards, shards_of
from .texts import BYTE_ORDER_MARK, is_unicode, plural, printable

Format = Literal["karpathy", "published", "coco", "table", "parquet", "sidecar", "folder", "webdataset"]
UNPACKED = "pictures"  # the folder, below the output, of what was in shards
FOLDERS = (None, "parquet", "sidecar", "webdataset")  # formats that may come as a folder
SEVERAL = (None, "coco", "table", "parquet", "webdataset")  # formats that may come in several files


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Where the pictures and captions are, and how pictures without a split are divided."""

    images: Path | None = None
    """Folder of the pictures; file names are relative to it. Not for shards, which hold the pictures."""
    source: tuple[Path, ...] = ()
    """Caption file, or several of one kind; none for a bare folder of pictures. A folder of parquet files, or one with
    text files beside the pictures. Of webdataset shards the folder, the .tar files, or a pattern of their names with
    *, ? or {000..012}."""
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
    image_column: str | None = None
    """Column of a table that names the pictures; by default recognised by its name."""
    caption_column: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Column of a table that holds captions; by default recognised by its name. For several, give it several times."""
    workers: int = 4
    """Processes that open the pictures."""

    def __post_init__(self) -> None:
        shards = self.shards
        if self.format == "webdataset" and not shards:
            raise BadInput("--format webdataset takes --source: .tar files, or a folder that has some")
        if shards and self.images is not None:
            raise BadInput(f"--images {self.images}: the pictures are in the shards, leave it out")
        for path in self.source:
            if not shards and not path.is_file() and not path.is_dir():
                raise BadInput(f"--source {path} does not exist")
        if self.images is None and not shards and not (self.source and all(map(parquet_files, self.source))):
            for path in self.source:
                refuse_foreign(path, nothing_else=True)
            raise BadInput("name a folder of --images")
        if self.images is not None and not self.images.is_dir():
            raise BadInput(f"--images {self.images} is not a folder")
        self._check_format()
        if self.workers < 0:
            raise BadInput("--workers must be at least 0")

    def _check_format(self) -> None:
        """Refuse sources that are not of the format that is named."""
        if len(self.source) > 1 and self.format not in SEVERAL:
            raise BadInput(f"--format {self.format} takes one --source, not {len(self.source)}")
        if self.format == "folder" and self.source:
            raise BadInput("--format folder takes no --source")
        if self.format == "sidecar" and not self.source:
            raise BadInput("--format sidecar takes --source: the folder, or one below it")
        for path in self.source:
            if self.format == "parquet" and not parquet_files(path):
                raise BadInput(f"--source {path} is no .parquet file and no folder that has some")
            if self.format == "sidecar" and not path.is_dir():
                raise BadInput(f"--source {path} is no folder, as --format sidecar takes")
            if path.is_dir() and self.format not in FOLDERS:
                raise BadInput(f"--source {path} is a folder: name the file that --format {self.format} reads")

    @property
    def shards(self) -> list[Path]:
        """The shards that the sources stand for.

        Raises:
            BadInput: there are shards and something else, or a source stands twice.
        """
        read = self.format in (None, "webdataset")
        found = [shards_of(path, follow_links=self.follow_links) if read else [] for path in self.source]
        if any(found) and not all(found):
            other = next(path for path, shards in zip(self.source, found, strict=True) if not shards)
            raise BadInput(f"--source {other} has no webdataset shards, as the others have: name one kind of source")
        named = [shard for shards in found for shard in shards]
        files = named or [file for path in self.source for file in parquet_files(path) or [path]]
        if twice := [file for file, count in Counter(_real(each) for each in files).items() if count > 1]:
            raise BadInput(f"--source names {twice[0]} more than once: leave one out")
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


def read_folder(images: Path, *, follow_links: bool, read: Collection[str] = ()) -> Iterator[Found]:
    """Every picture below a folder, without captions: in split test, so that it can be found but trains nothing.

    Args:
        read: endings of other files that are read elsewhere, and so are not counted here.

    Raises:
        BadInput: there is none.
    """
    listing = list_pictures(images, follow_links=follow_links)
    if not listing.pictures and not listing.lost:
        raise BadInput(listing.why_empty(images))
    for ending in read:
        listing.others.pop(ending, None)
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
    pictures = bare = texts = 0
    for shard, sample in unpacking.samples():
        pictures, bare = pictures + sample.has_picture, bare + (sample.has_picture and not sample.captions)
        texts += sample.has_unread_text
        split = sample.split or rule_for(shard, config.split_rule)(sample.name)
        problem = sample.problem or ("" if sample.has_picture else "sample without a picture")
        yield Found(sample.name, sample.name, split, sample.captions, sample.where, problem)
    members = summary_of(unpacking.others)
    if not pictures:
        raise BadInput(f"there is no picture in the shards ({members or 'they are empty'})")
    if members:
        print(f"in the shards: {members}")
    if texts:
        note(f"in the shards: JSON with a text beside its captions, which is not read: {texts:,}")
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
        note(f"{config.images}: pictures that no source names: {len(unnamed):,} ({some(unnamed)})")


def recognise(path: Path, value: Any) -> Format:
    """Tell a JSON source's format by its keys."""
    if isinstance(value, dict) and "annotations" in value and "images" in value:
        return "coco"
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        return "karpathy"
    if isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
        if named := [key for key, rows in lists.items() if any(isinstance(row, dict) for row in rows)]:
            raise BadInput(f'{path}: the objects below its key "{named[0]}" are not read there: save their list alone')
        return "published"
    if isinstance(value, list) and (not value or any(isinstance(row, dict) for row in value)):
        return "table"
    raise BadInput(f"{path}: not one of {', '.join(get_args(Format))}: name its --format")


def read_sources(config: Config) -> list[Found]:
    """Read all sources, splits decided."""
    if not config.source:
        return _read_pictures(config)
    if shards := config.shards:
        return [row._replace(split=split_named(row.split)) for row in read_shards(shards, config)]
    found = []
    for path in config.source:
        files, rows = [], []
        for file, read in groupby(_read_source(path, config), itemgetter(0)):
            for row in in_its_folder(file, (row for _, row in read), config.picture_folder):
                files.append(file)
                rows.append(row._replace(split=split_named(row.split)))
        resolved = resolve(rows, config.picture_folder, follow_links=config.follow_links)
        found += _with_splits(files, resolved, config.split_rule)
    return found


def check(found: list[Found], config: Config) -> tuple[list[Record], list[Problem]]:
    """Split what was found into good records and problems; every picture is opened and decoded."""
    problems: list[Problem] = []
    good, without_caption = [], set()
    for row in found:
        if row.problem:
            problems.append(Problem(row.problem, row.place))
            continue
        captions, wrong = check_captions(row)
        problems += wrong
        good.append(row._replace(captions=list(captions)))
        if row.captions and not captions:
            without_caption.add(row.file)
    rows = join(good)
    outside = files_outside(rows, config)
    inside = sorted({row.file for row in rows} - outside.keys())
    unreadable = outside | find_unreadable(inside, workers=config.workers, folder=config.picture_folder)
    keys = {file: file_key(file, config.picture_folder) for file in inside}
    splits: dict[Hashable, set[str]] = {}
    for row in rows:
        splits.setdefault(keys.get(row.file, row.file), set()).add(str(row.split))
    records: dict[str, Record] = {}
    for row in rows:
        reason = unreadable[row.file] or ("" if is_unicode(row.image) else "id not UTF-8")
        if row.split not in SPLITS:
            problems.append(Problem(f"split is not one of {', '.join(SPLITS)}", f"{row.where}: {row.split!r}"))
        elif len(splits[keys.get(row.file, row.file)]) > 1:
            problems.append(Problem("picture in two splits", f"{row.where}: {row.image}"))
        elif row.image in records:
            problems.append(Problem("duplicate id", f"{row.where}: {row.image}"))
        elif reason:
            problems.append(Problem(reason, row.place))
        elif row.file in without_caption and not row.captions:
            problems.append(Problem("picture without a caption", f"{row.where}: {row.image}"))
        else:
            records[row.image] = Record(row.image, row.file, row.split, tuple(row.captions))
    return list(records.values()), problems


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


def main(config: Config) -> None:
    files = config.shards or [file for path in config.source for file in parquet_files(path) or [path]]
    sources = {f"source{number}": path for number, path in enumerate(files) if path.is_file()}
    folders = {f"source{number}": path for number, path in enumerate(files) if not path.is_file()}
    run = runs.begin("tools.prepare_captions", config, inputs=sources, listings=config.listings | folders)
    if run is None:
        return
    read = read_sources(config)
    tell_unnamed(read, config)
    records, problems = check(read, config)
    if problems and not config.skip_bad:
        if config.images is None and config.picture_folder.is_dir():
            shutil.rmtree(config.picture_folder)  # else the folder would be held to be this run's, without --skip-bad
        raise BadInput(report(problems, config.picture_folder) + "\nMend them, or go on without them with --skip-bad.")
    if problems:
        print(report(problems, config.picture_folder) + "\nLeft out (--skip-bad).")
    if not records:
        raise BadInput(_why_none(problems, config))
    pictures = Counter(record.split for record in records)
    found = tuple(pictures[split] for split in SPLITS)
    if config.expect is not None and found != config.expect:
        raise BadInput(f"train, val, test have {found} pictures, --expect says {config.expect}: is the data complete?")
    tell_copies(records, config.picture_folder)
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


def _why_none(problems: list[Problem], config: Config) -> str:
    """The error of data of which nothing is left."""
    if problems:
        return "no usable picture: everything that was found has a problem"
    return f"no usable picture: there are no rows in {', '.join(map(str, config.source))}"


def _real(path: Path) -> Path:
    """Where links lead; links that go round in circles lead nowhere, and stay what they are."""
    return Path(os.path.realpath(path))


def _read_pictures(config: Config) -> list[Found]:
    """The pictures of a bare folder; that captions lie beside them is said."""
    found = list(read_folder(config.picture_folder, follow_links=config.follow_links))
    beside = count_sidecars([row.file for row in found if not row.problem], config.picture_folder)
    if beside:
        advice = f"--source {config.picture_folder} reads them as captions"
        note(f"{plural(beside, 'picture')} with a text file beside it, which is not read: {advice}")
    return found


def _read_source(path: Path, config: Config) -> Iterator[tuple[Path, Found]]:
    """What one source names, each with the file whose split rule counts."""
    wanted = Wanted(config.image_column, config.caption_column)
    if not parquet_files(path):
        refuse_foreign(path, nothing_else=False)
    if config.format in (None, "parquet") and (files := parquet_files(path)):
        yield from read_parquet(files, wanted, config.images, config.picture_folder)
    elif path.is_dir():
        found = list(read_folder(config.picture_folder, follow_links=config.follow_links, read=SIDECARS))
        pictures = [row.file for row in found if not row.problem]
        yield from ((path, row) for row in found if row.problem)
        yield from ((path, row) for row in read_sidecars(pictures, config.picture_folder, path))
    elif config.format in (None, "table") and not _is_json(path):
        yield from ((path, row) for row in read_table(path, wanted))
    else:
        yield from ((path, row) for row in _read_json(path, config.format, wanted))


def _is_json(path: Path) -> bool:
    """Whether a caption file is JSON and no table, by its name's ending or else by its first character."""
    ending = path.suffix.lower()
    if ending in ENDINGS or ending == ".json":
        return ending == ".json"
    with path.open("rb") as file:
        return file.read(1024).lstrip(BYTE_ORDER_MARK.encode() + b" \t\r\n")[:1] in (b"{", b"[")


def _read_json(path: Path, kind: Format | None, wanted: Wanted) -> Iterator[Found]:
    value = read_value(path)
    kind = kind or recognise(path, value)
    readers: dict[Format, Reader] = {"karpathy": read_karpathy, "published": read_published, "coco": read_coco}
    if kind == "table" and isinstance(value, list):
        rows = [(f"{path.name}, entry {number}", row) for number, row in enumerate(value)]
        yield from found_in_objects(rows, wanted, path.name)
    elif kind in readers:
        yield from readers[kind](path, value)
    else:
        raise BadInput(f"--format {kind} does not read {path}")


def _with_splits(files: list[Path], rows: list[Found], rules: str) -> list[Found]:
    """Rows of one source with their splits; those of a source without splits have them by the rule of their file."""
    has_splits = any(row.split is not None for row in rows)
    first: dict[str, str] = {}  # file -> id that its split is drawn by
    decided = []
    for path, row in zip(files, rows, strict=True):
        if row.problem or row.split is not None:
            decided.append(row)
        elif has_splits:
            decided.append(row._replace(problem="row without a split, where others have one"))
        else:
            image = first.setdefault(row.file, row.image)
            decided.append(row._replace(split=rule_for(path, rules)(image)))
    return decided


if __name__ == "__main__":
    run_command(main, Config)
