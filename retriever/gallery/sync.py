"""Bring the index in line with a folder whose pictures came, changed, moved, were renamed or went.

In:  a `retriever.gallery.build` folder, and folders whose pictures are in it; by default all that they came from.
Out: the index's next version (retriever/gallery/publish.py). Only pictures whose content is new are encoded; a picture
     that was moved or renamed keeps its code and gets the id of its new path. Pictures of other folders stay.
Command: python -m retriever.gallery.sync --index DIR [FOLDER ...]
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from models.compute import pick_device
from tools import runs
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.features import Rows
from tools.pictures import Listing, find_unreadable, list_pictures
from tools.texts import plural, printable

from .add import ReadingOptions, code, encode, tell_left_out
from .changes import Changes, Target, compare, folder_of, leave_out, of_pictures, rows_below
from .compact import stored_features
from .contents import Contents
from .gallery import Folder, Gallery, read_gallery
from .options import IndexOptions
from .publish import HISTORY, changing, replace_pictures
from .segments import Block

AGAIN = "start again with scripts/quickstart.sh --overwrite"


@dataclass(frozen=True, kw_only=True)
class Config(ReadingOptions, IndexOptions):
    """Which index follows which folders."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders whose pictures are in the index, or folders below these; by default all that pictures came from."""
    rqvae: Path | None = None
    """Run folder of the tokenizer that the index must have been coded with; another one is refused."""
    dry_run: bool = False
    """Show what would change, and change nothing."""
    allow_empty: bool = False
    """Let all pictures of a folder go, where it is empty or not there."""


class Synced(NamedTuple):
    """What changed, as numbers of pictures."""

    came: int
    changed: int
    moved: int
    went: int
    same: int
    total: int
    """Pictures that can be found."""


def folders_of(gallery: Gallery, places: Sequence[Path]) -> list[Folder]:
    """The folders that are named, or all that the gallery's pictures came from.

    Raises:
        BadInput: no picture came from a folder; or none is named, and the gallery does not know where they came from.
    """
    if places:
        return list(dict.fromkeys(folder_of(gallery, place) for place in places))
    known = [each for each in gallery.folders if rows_below(gallery, each.path)]
    if not known:
        raise BadInput(f"{gallery.folder} does not say which folders its pictures came from: name the folder")
    return known


def look(gallery: Gallery, folder: Folder, config: Config) -> Changes:
    """What has changed below a folder; files that cannot be read are left out of it.

    Raises:
        BadInput: the folder is empty or not there, and nothing says that this is meant.
    """
    place = gallery.files_below / folder.path
    listing = list_pictures(place, follow_links=config.follow_links) if _may_be_there(place) else Listing()
    if summary := listing.summary():
        print(f"{printable(str(place))}: {summary}")
    changes = compare(gallery, folder, listing, before=_made_at(gallery))
    new = [each.picture.file for each in changes.targets if each.row is None]
    workers = config.workers if len(new) > config.batch_size else 0
    changes = leave_out(changes, find_unreadable(new, workers=workers, folder=gallery.files_below))
    if not changes.targets and changes.gone:
        _refuse_loss(gallery, place, changes, allowed=config.allow_empty)
    return changes


def _may_be_there(folder: Path) -> bool:
    """Whether there is a folder, or something keeps one from asking: its listing then says what."""
    try:
        return folder.is_dir()
    except OSError:
        return True


def _refuse_loss(gallery: Gallery, place: Path, changes: Changes, *, allowed: bool) -> None:
    there = "there is no picture below" if place.is_dir() else "there is no folder"
    if len(changes.gone) == len(gallery):
        raise BadInput(
            f"{there} {place}, where all pictures of {gallery.folder} came from: is its disk mounted? An index holds "
            f"at least one picture; to search another folder, start again with {of_pictures('FOLDER')}"
            "scripts/quickstart.sh --overwrite"
        )
    if not allowed:
        raise BadInput(
            f"{there} {place}, where {len(changes.gone):,} pictures of {gallery.folder} came from: is its disk "
            "mounted? --allow-empty lets them go; nothing was changed"
        )


def _made_at(gallery: Gallery) -> int:
    """Nanoseconds since 1970 when the index was made; 0 where that is forgotten."""
    history = gallery.facts["history"]
    if len(history) >= HISTORY:
        return 0
    return int(datetime.fromisoformat(history[0]["time"]).timestamp()) * 10**9


def apply(gallery: Gallery, changes: Changes, config: Config) -> int:
    """Publish the version after the changes. Returns the number of its pictures."""
    below = np.array(list(gallery.below(changes.folder.path)), dtype=np.int64)
    noted = dict(zip(below.tolist(), gallery.read_contents(below), strict=True))
    places, stay = [], set()
    for place, (each, record) in enumerate(zip(changes.targets, changes.contents, strict=True)):
        if each.row is not None and each.row == each.own and noted[each.row] == record:
            stay.add(each.row)
        else:
            places.append(place)
    removed = np.array([row for row in below.tolist() if row not in stay], dtype=np.int64)
    added = written(gallery, [changes.targets[place] for place in places], changes.contents[places], removed, config)
    folder = Path(changes.folder.path)
    is_new = not any(folder.is_relative_to(each.path) for each in gallery.folders)
    return replace_pictures(
        gallery,
        removed=removed,
        added=added if places else None,
        source=f"sync of {folder}",
        folders=[changes.folder] if is_new else [],
    )


def written(gallery: Gallery, targets: Sequence[Target], contents: Contents, removed: Rows, config: Config) -> Block:
    """Pictures that have come, changed or moved: with the codes and features of the rows that hold their content, or
    encoded where no row does.

    Args:
        removed: rows that go; the codes of those that no target takes are free.
    """
    held = np.array([-1 if each.row is None else each.row for each in targets], dtype=np.int64)
    moved, new = np.flatnonzero(held >= 0), np.flatnonzero(held < 0)
    known = gallery.read_codes(held[moved])
    codes = np.empty((len(targets), known.shape[1]), dtype=np.int32)
    codes[moved] = known
    features = None
    if gallery.keeps_features:
        known_features = gallery.stored_features(held[moved])
        features = np.empty((len(targets), known_features.shape[1]), dtype=known_features.dtype)
        features[moved] = known_features
    if len(new):
        device = pick_device(config.device)
        encoded = encode(gallery, [targets[place].picture for place in new.tolist()], config, device)
        taken = partial(gallery.codes_behind, without=np.setdiff1d(removed, held))
        codes[new] = code(gallery, encoded, taken, device)
        if features is not None:
            features[new] = stored_features(encoded, gallery.segments[0].codec)
    return Block(codes, [each.picture for each in targets], features, contents)


def sync(index: Path, places: Sequence[Path], config: Config) -> Synced:
    """Bring an index in line with folders, one after the other; each change is published whole or not at all.

    Raises:
        BadInput: see `folders_of` and `look`; a model has changed, or another process changes the index.
    """
    gallery = read_gallery(index)
    if config.rqvae is not None:
        _check_tokenizer(gallery, config.rqvae)
    told = Counter[str]()
    total = len(gallery)
    for folder in folders_of(gallery, places):
        if config.dry_run:
            changes = look(gallery, folder, config)
            show(gallery, changes)
        else:
            with changing(index) as gallery:
                changes = look(gallery, folder, config)
                if changes.any():
                    total = apply(gallery, changes, config)
        tell_left_out(changes.left_out)
        told.update(changes.counts())
    return Synced(**told, total=total)


def _check_tokenizer(gallery: Gallery, rqvae: Path) -> None:
    recorded = gallery.facts["rqvae"]["content"]
    if runs.fingerprint(runs.read_manifest(rqvae, "RQ-VAE.train").folder) != recorded:
        raise BadInput(f"{gallery.folder} was coded by another tokenizer than {rqvae}: {AGAIN}")


def show(gallery: Gallery, changes: Changes) -> None:
    """Print what would change, a line a picture."""
    for each in changes.came():
        print(printable(f"came: {each.picture.file}"))
    for each in changes.changed():
        print(printable(f"changed: {each.picture.file}"))
    for each in changes.moved():
        assert each.row is not None, "a picture that moved has its row"
        print(printable(f"moved: {gallery.picture(each.row).file} -> {each.picture.file}"))
    for picture in changes.gone:
        print(printable(f"went: {picture.file}"))


def main(config: Config) -> None:
    done = sync(config.index, config.folders, config)
    found = f"{plural(done.total, 'picture')} can be found"
    if not any(done[:4]):
        print(f"nothing has changed; {found}")
    elif config.dry_run:
        print(
            f"{done.came:,} would come, {done.changed:,} change, {done.moved:,} move, {done.went:,} go, "
            f"{done.same:,} stay as they are; now {found}"
        )
    else:
        print(
            f"{done.came:,} came, {done.changed:,} changed, {done.moved:,} moved, {done.went:,} went, "
            f"{done.same:,} as before; {found}"
        )


if __name__ == "__main__":
    run_command(main, Config)
