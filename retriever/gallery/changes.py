"""What a sync changes: the pictures below one folder as the gallery has them, held against the files that are there.

Each file that is there takes its code and feature from a row of the gallery that holds the same content: its own row,
or that of a picture which is no longer where it was. All other files are encoded.
"""

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.command_line.place import users_variables
from tools.errors import BadInput
from tools.files import is_file
from tools.pictures import Listing

from .contents import NOT_NOTED, TIMES, Contents, known, read_contents, times_of, unknown
from .gallery import Folder, Gallery, beginning
from .pictures import Picture

UNREADABLE_FOLDER = ("no permission to read the folder", "folder cannot be read")


class Target(NamedTuple):
    """One picture as it will be."""

    picture: Picture
    row: int | None
    """Row of the gallery that holds its content; None where it is to be encoded."""
    own: int | None
    """Row that has this file now."""


@dataclass
class Changes:
    """What becomes of the pictures below a folder."""

    folder: Folder
    targets: list[Target]
    """In the order of their paths."""
    gone: list[Picture]
    """Pictures whose file, and whose content, is no longer there."""
    contents: Contents
    """(targets,) of the files as they are now"""
    left_out: dict[str, str] = field(default_factory=dict)
    """Path -> why it gives no picture."""
    touched: bool = False
    """Whether times or hashes have to be noted, although no picture has changed."""

    def came(self) -> list[Target]:
        return [each for each in self.targets if each.row is None and each.own is None]

    def changed(self) -> list[Target]:
        return [each for each in self.targets if each.own is not None and each.row != each.own]

    def moved(self) -> list[Target]:
        return [each for each in self.targets if each.own is None and each.row is not None]

    def counts(self) -> dict[str, int]:
        """Pictures that came, changed, moved and went, and those that are as they were."""
        numbers = {"came": len(self.came()), "changed": len(self.changed()), "moved": len(self.moved())}
        return {**numbers, "went": len(self.gone), "same": len(self.targets) - sum(numbers.values())}

    def any(self) -> bool:
        return bool(self.gone or self.touched or any(each.row is None or each.row != each.own for each in self.targets))


def rows_below(gallery: Gallery, folder: str) -> dict[str, int]:
    """Row of each picture whose file lies below a folder, by its path below it."""
    start = len(beginning(folder))
    found: dict[str, int] = {}
    for row, picture in gallery.below(folder).items():
        found.setdefault(picture.file[start:], row)
    return found


def folder_of(gallery: Gallery, place: Path) -> Folder:
    """A folder with the prefix that its pictures' ids have.

    Raises:
        BadInput: no picture of the gallery came from there.
    """
    spellings = [*gallery.spellings(place), gallery.recorded(place)]
    path = next((each for each in spellings if gallery.below(each)), spellings[-1])
    for known_folder in gallery.folders:
        if path == known_folder.path:
            return known_folder
    for known_folder in gallery.folders:
        if Path(path).is_relative_to(known_folder.path):
            below = Path(path).relative_to(known_folder.path)
            return Folder(path, f"{known_folder.prefix}{below}/")
    start = len(beginning(path))
    ids = {picture.file[start:]: picture.image for picture in gallery.below(path).values()}
    prefixes = {image.removesuffix(below) for below, image in ids.items() if image.endswith(below)}
    if len(prefixes) == 1 and all(image.endswith(below) for below, image in ids.items()):
        return Folder(path, prefixes.pop())
    if ids:
        added = ", ".join(each.path for each in gallery.folders) or "folders below it"
        raise BadInput(f"the pictures below {place} came from {added}: sync each of these; nothing was changed")
    if not place.is_dir():
        raise BadInput(f"{place} is not a folder, and no picture of {gallery.folder} came from there: name another one")
    typed = str(place.resolve())
    raise BadInput(
        f"no picture of {gallery.folder} lies below {place}: add those that are there with scripts/add_pictures.sh "
        f"{shlex.quote(typed)}, or search them alone, in the place of those that the index has, with "
        f"{of_pictures(typed)}scripts/quickstart.sh --overwrite"
    )


def of_pictures(folder: str) -> str:
    """The variables with which scripts/quickstart.sh searches a folder of pictures."""
    return users_variables(**({} if "PICTURES=" in users_variables() else {"DATASET": "folder"}), PICTURES=folder)


def compare(gallery: Gallery, folder: Folder, listing: Listing, *, before: int) -> Changes:
    """Hold the pictures below a folder against its files.

    Args:
        listing: of the folder.
        before: nanoseconds since 1970, for pictures of which nothing is noted: files that have not changed since then
            are what the gallery has.
    """
    root, start, pictures = gallery.files_below / folder.path, len(beginning(folder.path)), gallery.below(folder.path)
    old = {picture.file[start:]: row for row, picture in reversed(pictures.items())}
    noted = dict(zip(pictures, gallery.read_contents(np.array(list(pictures), dtype=np.int64)), strict=True))
    listed = set(listing.pictures)
    closed = {path for path in old.keys() - listed if _is_closed(path, listing)}
    kept = closed | {path for path in old.keys() - listed - closed if is_file(root / path)}
    paths = sorted(listed | kept, key=lambda path: path.split("/"))
    contents, unchanged = _contents_now(root, paths, old, noted, before, closed=closed)
    free = _free_contents(old, noted, unchanged)
    targets, left_out = [], {path: why for path, why in listing.problems.items() if path not in kept}
    for place, path in enumerate(paths):
        own = old.get(path)
        row = own if path in unchanged else _take(free, contents[place]["hash"]) if known(contents[place]) else None
        image = folder.prefix + path if own is None else pictures[own].image
        targets.append(Target(Picture(image, str(Path(folder.path) / path)), row, own))
    used = {each.row for each in targets} | {each.own for each in targets}
    gone = [pictures[row] for row in old.values() if row not in used]
    touched = any(
        each.row is not None and noted[each.row] != record for each, record in zip(targets, contents, strict=True)
    )
    changes = Changes(folder, targets, gone, contents, left_out, touched)
    return leave_out(changes, _same_ids(gallery, changes, pictures))


def leave_out(changes: Changes, reasons: dict[str, str]) -> Changes:
    """The changes without files that cannot be used.

    Args:
        reasons: file of a picture -> why; empty for one that can be used.
    """
    reasons = {file: why for file, why in reasons.items() if why}
    if not reasons:
        return changes
    stay = [place for place, each in enumerate(changes.targets) if each.picture.file not in reasons]
    left_out = {**changes.left_out, **reasons}
    lost = [each.picture for each in changes.targets if each.picture.file in reasons and each.own is not None]
    targets = [changes.targets[place] for place in stay]
    return Changes(changes.folder, targets, changes.gone + lost, changes.contents[stay], left_out, changes.touched)


def _contents_now(
    root: Path, paths: Sequence[str], old: dict[str, int], noted: dict[int, Any], before: int, *, closed: set[str]
) -> tuple[Contents, set[str]]:
    """What files hold now, and those which hold what the gallery has of them. Only others than these are hashed.

    Args:
        noted: what they held when they were encoded, by row.
        closed: paths in folders that cannot be read, which are taken for unchanged.
    """
    same: dict[str, Contents] = {}
    to_hash = []
    for path in paths:
        row = old.get(path)
        if row is not None and (path in closed or _has_times(root / path, noted[row])):
            same[path] = noted[row]
        else:
            to_hash.append(path)
    hashed = dict(zip(to_hash, read_contents(root / path for path in to_hash), strict=True))
    unchanged = set(same)
    for path in to_hash:
        row, record = old.get(path), hashed[path]
        if row is not None and known(record):
            trusted = noted[row]["size"] == NOT_NOTED and max(record["mtime"], record["ctime"]) < before
            if trusted or (known(noted[row]) and record["hash"] == noted[row]["hash"]):
                unchanged.add(path)
    now = unknown(len(paths))
    for place, path in enumerate(paths):
        now[place] = same[path] if path in same else hashed[path]
    return now, unchanged


def _has_times(file: Path, record: Any) -> bool:
    return known(record) and times_of(file) == record[TIMES].item()


def _is_closed(path: str, listing: Listing) -> bool:
    """Whether a picture may be in a folder that cannot be read."""
    closed = [place for place, why in listing.problems.items() if why.startswith(UNREADABLE_FOLDER)]
    return any(place == "." or path.startswith(f"{place}/") for place in closed)


def _free_contents(old: dict[str, int], noted: dict[int, Any], unchanged: set[str]) -> dict[bytes, list[int]]:
    """Rows below the folder whose content is no longer in their file, by its hash; the first is taken last."""
    free: dict[bytes, list[int]] = defaultdict(list)
    for path in sorted(old, key=lambda path: path.split("/"), reverse=True):
        if path not in unchanged and known(noted[old[path]]):
            free[bytes(noted[old[path]]["hash"])].append(old[path])
    return free


def _take(free: dict[bytes, list[int]], content: bytes) -> int | None:
    rows = free.get(bytes(content))
    return rows.pop() if rows else None


def _same_ids(gallery: Gallery, changes: Changes, below: dict[int, Picture]) -> dict[str, str]:
    """New files whose id another picture has -> why they are left out.

    Args:
        below: the folder's pictures as the gallery has them, by row.
    """
    new = [each.picture for each in changes.targets if each.own is None]
    others = gallery.with_images([picture.image for picture in new])
    taken = {picture.image: picture.file for row, picture in others.items() if row not in below}
    taken |= {each.picture.image: each.picture.file for each in changes.targets if each.own is not None}
    return {
        picture.file: f"its id would be that of {taken[picture.image]}: rename it"
        for picture in new
        if picture.image in taken
    }
