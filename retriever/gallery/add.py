"""Add a folder of pictures to the index, without training: the next search finds them.

In:  a `retriever.gallery.build` folder, and any folder; every picture below it is added.
Out: the index's next version (retriever/gallery/publish.py). An added picture's id is its path below the folder.
Command: python -m retriever.gallery.add --index DIR ~/new_photos
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from models.compute import Precision, pick_device
from models.options import DeviceOptions
from models.rqvae import RqVae, tokenize
from tools.captions import portable
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.features import Floats, Rows
from tools.logs import progress
from tools.picture_listing import NOT_FOLLOWED
from tools.pictures import Listing, find_unreadable, list_pictures
from tools.texts import plural, printable
from tools.vokens import Codes

from .advice import rebuild
from .compact import stored_features
from .contents import read_contents
from .gallery import Folder, Gallery
from .options import IndexOptions
from .pictures import Picture
from .publish import changing, replace_pictures
from .segments import Block

NAMED = 10  # files that are left out, in lines of their own


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(DeviceOptions):
    """How pictures are found, read and encoded."""

    follow_links: bool = False
    """Add what lies behind links that lead out of the folder, too."""
    batch_size: int = 64
    """Pictures that are encoded at once."""
    precision: Precision = "auto"
    """Arithmetic of the image tower; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32."""
    workers: int = 2
    """Processes that read pictures; 0 for the main one alone."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise BadInput("--batch-size must be at least 1 and --workers at least 0")


@dataclass(frozen=True, kw_only=True)
class Options(ReadingOptions):
    """How pictures are added."""

    prefix: str = ""
    """Put before each new picture's id, to tell two folders' IMG_0001.jpg apart."""
    replace: bool = False
    """Let pictures take the place of those that have the same id in the index."""
    skip_known: bool = False
    """Leave out pictures whose id is in the index."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read."""

    def __post_init__(self) -> None:
        if self.replace and self.skip_known:
            raise BadInput("--replace and --skip-known contradict each other: give one")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Config(Options, IndexOptions):
    """What is added to which index."""

    folder: tyro.conf.Positional[Path]
    """Folder of the new pictures; folders below it are read too."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is not a folder")
        super().__post_init__()


class Choice(NamedTuple):
    """What changes."""

    added: list[Picture]
    replaced: Rows
    """Rows of the gallery that leave for them."""


class Offered(NamedTuple):
    """What lies in the places that are added."""

    pictures: list[Picture]
    problems: dict[str, str]
    """File, link or folder -> why it gives no picture."""


class Added(NamedTuple):
    """What changed."""

    images: list[str]
    """Ids of the pictures that were added."""
    replaced: int
    """Pictures that left for them."""
    total: int
    """Pictures that can be found."""


def pictures_of(gallery: Gallery, places: Sequence[Path], config: Options) -> Offered:
    """Pictures as the gallery will have them: files, whose id is their name, and all files below folders, whose id is
    their path below it. Printed lines account for what else lies in the folders.

    Raises:
        BadInput: a place is neither, or has no picture, or two pictures would have the same id.
    """
    found: list[Picture] = []
    problems: dict[str, str] = {}
    for place in places:
        if place.is_dir():
            folder = Path(gallery.recorded(place))
            listing = list_below(place, follow_links=config.follow_links)
            found += [Picture(config.prefix + file, str(folder / file)) for file in listing.pictures]
            advice = dict.fromkeys(NOT_FOLLOWED, " (--follow-links adds what is there)")
            problems |= {str(folder / path): why + advice.get(why, "") for path, why in listing.lost.items()}
        elif place.is_file():
            found.append(Picture(config.prefix + place.name, str(Path(gallery.recorded(place.parent)) / place.name)))
        else:
            raise BadInput(f"{place} does not exist; nothing was added")
    first: dict[str, Picture] = {}
    for picture in found:
        if first.setdefault(picture.image, picture) is not picture:
            raise BadInput(
                f"{first[picture.image].file} and {picture.file} would both get the id {picture.image!r}: add them "
                "one after the other, each with a prefix of its own; nothing was added"
            )
    return Offered(found, problems)


def list_below(folder: Path, *, follow_links: bool) -> Listing:
    """What lies below a folder; printed lines account for what is neither picture nor lost picture.

    Raises:
        BadInput: there is no picture, and no problem that keeps one out.
    """
    listing = list_pictures(folder, follow_links=follow_links)
    if not listing.pictures and not listing.lost:
        raise BadInput(listing.why_empty(folder))
    for line in listing.notes():
        print(f"{printable(str(folder))}: {line}")
    return listing


def choose(gallery: Gallery, offered: Offered, config: Options) -> Choice:
    """Check that pictures are new and can be read.

    Raises:
        BadInput: one is in the index already or cannot be read, and nothing says what to do then.
    """
    new = offered.pictures
    known = known_rows(gallery, new)
    if known and not (config.replace or config.skip_known):
        first, rows = next(iter(known.items()))
        old = gallery.picture(rows[0])
        raise BadInput(
            f"{len(known)} of {len(new)} pictures are in the index already, the first: {first.file} (there: id "
            f"{old.image!r}, file {old.file}); leave them out with --skip-known, put them in the old ones' place with "
            "--replace, or tell other pictures of the same names apart with --prefix"
        )
    kept = [picture for picture in new if not (config.skip_known and picture in known)]
    added = readable(gallery, kept, config, problems=offered.problems)
    replaced = {row for picture in added for row in known.get(picture, [])}
    return Choice(added, np.array(sorted(replaced), dtype=np.int64))


def known_rows(gallery: Gallery, new: Sequence[Picture]) -> dict[Picture, list[int]]:
    """Those of the new pictures whose id or file is in the gallery, with the rows that have it."""
    images, files = ({getattr(picture, name): picture for picture in new} for name in Picture._fields)
    known: dict[Picture, list[int]] = {}
    old = gallery.with_images(list(images)) | gallery.with_files(list(files))
    for row, there in sorted(old.items()):
        for picture in dict.fromkeys((images.get(there.image), files.get(there.file))):
            if picture is not None:
                known.setdefault(picture, []).append(row)
    return known


def readable(
    gallery: Gallery, pictures: list[Picture], config: Options, *, problems: dict[str, str] | None = None
) -> list[Picture]:
    """The pictures that can be read; without --skip-bad, all of them must be, and no file may have a problem."""
    workers = config.workers if len(pictures) > config.batch_size else 0
    reasons = find_unreadable([picture.file for picture in pictures], workers=workers, folder=gallery.files_below)
    reasons |= problems or {}
    bad = {file: reason for file, reason in reasons.items() if reason}
    if bad and not config.skip_bad:
        file, reason = next(iter(bad.items()))
        raise BadInput(
            f"{printable(f'{file}: {reason}')} ({len(bad)} of {len(reasons)} pictures cannot be used): mend it, or go "
            "on without it with --skip-bad; nothing was added"
        )
    tell_left_out(bad)
    return [picture for picture in pictures if not reasons[picture.file]]


def tell_left_out(reasons: dict[str, str]) -> None:
    """Name files that are left out, and why: the first of many."""
    for file, reason in islice(reasons.items(), NAMED):
        print(printable(f"left out: {file}: {reason}"))
    if len(reasons) > NAMED:
        counts = Counter(reason.partition(": ")[0] for reason in reasons.values())
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in counts.most_common(NAMED))
        print(printable(f"left out: {len(reasons):,} in all, of which {NAMED} are named: {kinds}"))


def again(gallery: Gallery) -> str:
    """What to do where a model of the gallery has changed."""
    return f"new pictures would get codes of another meaning: {rebuild(gallery, 'add them again')}"


def encode(gallery: Gallery, new: Sequence[Picture], config: ReadingOptions, device: torch.device) -> Floats:
    """Features (pictures, width) of new pictures, by the model that encoded the gallery's."""
    gallery.check_clip(again(gallery))
    from models.clip import Pictures, encode_images, feature_dtype, load_recorded  # slow to load

    clip = load_recorded(gallery.clip_facts)
    clip.model.to(device=device, dtype=feature_dtype(config.precision, device), memory_format=torch.channels_last)
    pictures = Pictures([picture.file for picture in new], clip.preprocess, folder=gallery.files_below)
    workers = config.workers if len(new) > config.batch_size else 0
    batches = DataLoader(pictures, batch_size=config.batch_size, num_workers=workers)
    with torch.inference_mode():
        blocks = [encode_images(clip, batch).cpu() for batch in progress(batches, "encoding", total=len(batches))]
    return torch.cat(blocks).numpy()


def code(
    gallery: Gallery, features: Floats, taken: Callable[[Codes], NDArray[np.integer]], device: torch.device
) -> Codes:
    """Codes (pictures, levels) of features (pictures, width), collisions resolved where the gallery's were.

    Args:
        taken: gives the codes (others, levels) that the pictures beside these have behind prefixes (any number,
            levels - 1), as `Gallery.codes_behind` does.
    """
    folder = gallery.check_rqvae(again(gallery))
    groups = [np.arange(len(features))] if gallery.facts["resolve_collisions"] else None
    return tokenize(RqVae.from_pretrained(folder).to(device), features, groups=groups, taken=taken).codes


def add(index: Path, places: Sequence[Path], config: Options, *, source: str) -> Added:
    """Publish a version of the index with further pictures; without any, it stays as it is.

    Args:
        places: files and folders, see `pictures_of`.
        source: where they come from, for the index's history.

    Raises:
        BadInput: see `pictures_of` and `choose`; or a model has changed, or another process changes the index.
    """
    device = pick_device(config.device)
    with changing(index) as gallery:
        choice = choose(gallery, pictures_of(gallery, places, config), config)
        if not choice.added:
            return Added([], 0, len(gallery))
        contents = read_contents(gallery.files_below / picture.file for picture in choice.added)
        features = encode(gallery, choice.added, config, device)
        codes = code(gallery, features, partial(gallery.codes_behind, without=choice.replaced), device)
        kept = stored_features(features, gallery.segments[0].codec) if gallery.keeps_features else None
        total = replace_pictures(
            gallery,
            removed=choice.replaced,
            added=Block(codes, choice.added, kept, contents),
            source=source,
            folders=[Folder(gallery.recorded(place), config.prefix) for place in places if place.is_dir()],
        )
    return Added([picture.image for picture in choice.added], len(choice.replaced), total)


def main(config: Config) -> None:
    began = time.monotonic()
    added = add(config.index, [config.folder], config, source=portable(config.folder))
    if not added.images:
        print(f"nothing to add: no other readable pictures are below {config.folder}; the index stays as it is")
        return
    replaced = f" in the place of {added.replaced:,}" if added.replaced else ""
    seconds = time.monotonic() - began
    print(f"{plural(len(added.images), 'picture')} added{replaced}, {added.total:,} can be found, {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, Config)
