"""What lies below a folder: its pictures, what is wrong, and a count of everything else.

A file is a picture by its ending; one without an ending, or with that of a format that is not read here, is one by its
content. Hidden files and folders and the folders that systems make (thumbnails, waste bins) are left out and counted.
Two names of one file are one picture.
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import UnidentifiedImageError

from .files import SYSTEM_FOLDERS
from .picture_formats import MISSING, PICTURE_ENDINGS, UNREAD_ENDINGS, identify
from .texts import is_unicode, printable

ENDING = re.compile(r"\.[a-z0-9]*[a-z][a-z0-9]*", re.ASCII)  # ".30" of a time and "._large" are none
LONGEST_ENDING = 10
SHOWN_KINDS = 12  # of other files, in one line

FOLDER_LINK = "link to a folder, not followed"
FILE_LINK = "link that leads out of the folder, not followed"
NOT_FOLLOWED = frozenset({FOLDER_LINK, FILE_LINK})
"""Problems that `follow_links` solves."""
PICTURE_ALIAS, SHARD_ALIAS = (f"link to a {kind} listed under another name" for kind in ("picture", "shard"))
KNOWN_FOLDER = "link to a folder listed under another name"
DEAD_LINKS = {
    errno.ENOENT: "link that leads nowhere",
    errno.ENOTDIR: "link that leads nowhere",
    errno.ELOOP: "links that lead round in circles",
    errno.EACCES: "no permission to follow the link",
}
DEAD_ENDS = frozenset(DEAD_LINKS[each] for each in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
HIDDEN_FILE, HIDDEN_FOLDER, SYSTEM_FOLDER = "hidden file", "hidden folder", "system folder"
SPECIAL = "special file"
NO_ENDING = "file without an ending"
PLURALS = {
    PICTURE_ALIAS: "links to pictures listed under another name",
    SHARD_ALIAS: "links to shards listed under another name",
    KNOWN_FOLDER: "links to folders listed under another name",
    HIDDEN_FILE: "hidden files",
    HIDDEN_FOLDER: "hidden folders",
    SYSTEM_FOLDER: "system folders",
    SPECIAL: "special files",
    NO_ENDING: "files without an ending",
}

KindOfOther = Callable[[str, str], str]


@dataclass
class Listing:
    """Every entry below a folder, the folders that were read aside, stands in one of these."""

    pictures: list[str] = field(default_factory=list)
    """Paths relative to the folder, in their order."""
    problems: dict[str, str] = field(default_factory=dict)
    """Relative path of a link, folder or file that should be a picture -> why it is none."""
    others: Counter[str] = field(default_factory=Counter)
    """Endings and kinds of the rest."""
    linked: dict[str, Path] = field(default_factory=dict)
    """Relative path of a link to a folder that was followed -> that folder."""

    def summary(self) -> str:
        """The other files in one line, empty where there are none.

        >>> Listing(others=Counter({".txt": 3, "hidden file": 2})).summary()
        '5 other files: 3 .txt, 2 hidden files'
        """
        return summary_of(self.others)

    @property
    def lost(self) -> dict[str, str]:
        """The problems that may keep pictures out: a link behind which nothing is does not."""
        return {path: reason for path, reason in self.problems.items() if reason not in DEAD_ENDS}

    def notes(self) -> list[str]:
        """What a person is told about the rest, a line each: links that lead nowhere, and the other files."""
        lines = []
        for reason in sorted(DEAD_ENDS & {*self.problems.values()}):
            first, *more = (path for path, each in self.problems.items() if each == reason)
            lines.append(printable(f"{len(more) + 1:,} × {reason}{', the first' if more else ''}: {first}"))
        return [*lines, *filter(None, [self.summary()])]

    def why_empty(self, folder: Path) -> str:
        """The error of a folder without a picture."""
        beside = self.summary() or ("the folder is empty" if not self.problems else "")
        wrong = [f"{len(self.problems):,} problems, the first: {path}: {why}" for path, why in self.problems.items()]
        there = "; ".join(part for part in (beside, *wrong[:1]) if part)
        endings = ", ".join(sorted(PICTURE_ENDINGS))
        return printable(f"there is no picture below {folder} ({there}); pictures end in {endings}")


def summary_of(others: Counter[str]) -> str:
    """Counts of kinds of files (endings, or keys of `PLURALS`) in one line, the most frequent first."""
    if not others:
        return ""
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {PLURALS.get(kind, kind) if count > 1 else kind}" for kind, count in ordered[:SHOWN_KINDS]]
    if rest := ordered[SHOWN_KINDS:]:
        parts.append(f"{sum(count for _, count in rest):,} of {len(rest):,} further kinds")
    total = sum(others.values())
    advice = {MISSING[UNREAD_ENDINGS[kind]]: kind for kind in sorted(others, reverse=True) if kind in UNREAD_ENDINGS}
    hints = "".join(f" (to read {kind}: {what})" for what, kind in sorted(advice.items()))
    return printable(f"{total:,} other file{'s' if total > 1 else ''}: {', '.join(parts)}{hints}")


def list_pictures(folder: Path, *, follow_links: bool = False) -> Listing:
    """List the pictures below a folder, and account for everything else there.

    Args:
        follow_links: take what lies behind links that lead out of the folder, to files and to folders.
    """
    return list_files(folder, _kind_of_other, alias=PICTURE_ALIAS, follow_links=follow_links)


def list_files(folder: Path, kind_of_other: KindOfOther, *, alias: str, follow_links: bool) -> Listing:
    """`list_pictures` for files of another kind, which then stand in the listing's `pictures`.

    Args:
        kind_of_other: see `_kind_of_other`.
        alias: what further links to them are called.
    """
    walk = _Walk(str(folder), kind_of_other, alias)
    walk.read("", walk.root)
    walk.settle_folder_links(follow=follow_links)
    walk.settle_file_links(follow=follow_links)
    walk.listing.pictures.sort(key=lambda path: path.split("/"))
    return walk.listing


def ending_of(name: str) -> str:
    """A file's ending in small letters; empty where what stands behind the last dot is none.

    >>> ending_of("a.JPG"), ending_of("Dr. Who, at 10.30"), ending_of("photo.jpg~")
    ('.jpg', '', '')
    """
    _, dot, last = name.rpartition(".")
    ending = dot + last.lower()
    return ending if len(ending) <= LONGEST_ENDING and ENDING.fullmatch(ending) else ""


def holds_picture(path: str) -> bool:
    """Whether a file begins as a picture of a format that is read."""
    try:
        with identify(Path(path)):
            return True
    except (UnidentifiedImageError, PermissionError):
        return False
    except Exception:  # it begins as a picture and is damaged: whoever opens it will say how
        return True


class _Walk:
    """The reading of one folder: first the folders in it, then links to folders, then links to files."""

    def __init__(self, folder: str, kind_of_other: KindOfOther, alias: str) -> None:
        self.root, self.kind_of_other, self.alias = os.path.realpath(folder), kind_of_other, alias
        self.listing = Listing()
        self.below: dict[str, str] = {}  # folders that were read: where they really are -> relative path
        self.folder_links: list[tuple[str, str]] = []  # relative path, where it leads
        self.file_links: list[tuple[str, str]] = []

    def read(self, below: str, real: str) -> None:
        """Read the folder at the relative path `below`, which really is at `real`, and the folders in it."""
        waiting = [(below, real)]
        while waiting:
            below, real = waiting.pop()
            self.below[real] = below
            try:
                os.stat(f"{real}/.")  # noqa: PTH116  (a folder may be listed and yet not be entered)
                with os.scandir(real) as entries:
                    for entry in entries:
                        path = f"{below}/{entry.name}" if below else entry.name
                        if self._is_new_folder(entry, path):
                            waiting.append((path, entry.path))
            except PermissionError:
                self.listing.problems[below or "."] = "no permission to read the folder"
            except OSError as error:
                self.listing.problems[below or "."] = f"folder cannot be read ({error.strerror})"

    def _is_new_folder(self, entry: os.DirEntry[str], path: str) -> bool:
        """Whether an entry is a folder to be read; any other is put where it belongs."""
        if entry.is_symlink():
            self._take_link(path, entry)
            return False
        is_folder = entry.is_dir(follow_symlinks=False)
        if reason := _left_out(entry.name, is_folder=is_folder):
            self.listing.others[reason] += 1
        elif is_folder and entry.path in self.below:  # by a link to a folder around it
            self.listing.others[KNOWN_FOLDER] += 1
        elif is_folder:
            return True
        elif not entry.is_file(follow_symlinks=False):
            self.listing.others[SPECIAL] += 1
        elif kind := self.kind_of_other(path, entry.path):
            self.listing.others[kind] += 1
        else:
            self._take_picture(path)
        return False

    def _take_link(self, path: str, entry: os.DirEntry[str]) -> None:
        """Keep a link to a folder or picture for later; any other is put where it belongs."""
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if reason := _left_out(entry.name, is_folder=False) or self.kind_of_other(path, ""):
                self.listing.others[reason] += 1
            else:
                self.listing.problems[path] = DEAD_LINKS.get(
                    error.errno or 0, f"link leads to an error ({error.strerror})"
                )
            return
        real = os.path.realpath(entry.path)
        if reason := _left_out(entry.name, is_folder=stat.S_ISDIR(mode)):
            self.listing.others[reason] += 1
        elif stat.S_ISDIR(mode):
            self.folder_links.append((path, real))
        elif not stat.S_ISREG(mode):
            self.listing.others[SPECIAL] += 1
        elif kind := self.kind_of_other(path, real):
            self.listing.others[kind] += 1
        else:
            self.file_links.append((path, real))

    def _take_picture(self, path: str) -> None:
        if is_unicode(path):
            self.listing.pictures.append(path)
        else:
            self.listing.problems[path] = "file name not UTF-8"

    def settle_folder_links(self, *, follow: bool) -> None:
        """Read the folders that links lead to, and further links there; or say that they are not followed."""
        while self.folder_links:
            self.folder_links.sort(reverse=True)
            path, real = self.folder_links.pop()
            if real in self.below:
                self.listing.others[KNOWN_FOLDER] += 1
            elif follow:
                self.listing.linked[path] = Path(real)
                self.read(path, real)
            else:
                self.listing.problems[path] = FOLDER_LINK

    def settle_file_links(self, *, follow: bool) -> None:
        """Take the pictures that links lead to, unless they are listed by another name already."""
        if not self.file_links:
            return
        reals = {below: real for real, below in self.below.items()}
        folders = ((*path.rpartition("/"),) for path in self.listing.pictures)
        known = {os.path.join(reals[folder], name) for folder, _, name in folders}  # noqa: PTH118  (a million)
        inside = self.root.rstrip("/") + "/"
        for path, real in sorted(self.file_links):
            if real in known:
                self.listing.others[self.alias] += 1
            elif not follow and not real.startswith(inside):
                self.listing.problems[path] = FILE_LINK
            else:
                known.add(real)
                self._take_picture(path)


def _left_out(name: str, *, is_folder: bool) -> str:
    """Why an entry is passed over for its name; empty where it is not."""
    if name.startswith("."):
        return HIDDEN_FOLDER if is_folder else HIDDEN_FILE
    return SYSTEM_FOLDER if is_folder and name.lower() in SYSTEM_FOLDERS else ""


def _kind_of_other(path: str, real: str) -> str:
    """What a file is that is no picture: an ending or one of the kinds above; empty for a picture.

    Args:
        real: where it can be opened; empty where it cannot, and only its name tells.
    """
    ending = ending_of(path.rpartition("/")[2])
    if ending in PICTURE_ENDINGS:
        return ""
    if ending and ending not in UNREAD_ENDINGS:
        return ending
    return "" if not real or holds_picture(real) else ending or NO_ENDING
