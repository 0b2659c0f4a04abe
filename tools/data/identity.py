"""Which picture a name means: the file's identity counts, and not the spelling of its name.

`./a.jpg`, `sub//b.jpg`, absolute paths below the folder, names in another Unicode form or with backslashes, and links
are other names of the same picture.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..captions import Record
from ..files import hash_file
from ..picture_listing import list_pictures
from ..texts import is_unicode
from .found import Found, bad, note, some

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
IS_ADDRESS = "web address in place of a file's name (fetch the pictures first, for example with img2dataset)"


class Names:
    """Pictures below a folder by path, by name and by stem, for names that are not a file's path."""

    def __init__(self, files: Iterable[str]) -> None:
        self.by_path: defaultdict[str, list[str]] = defaultdict(list)
        self.by_name: defaultdict[str, list[str]] = defaultdict(list)
        for file in files:
            name = PurePosixPath(file)
            self.by_path[_composed(file)].append(file)
            self.by_name[_composed(name.name)].append(file)
            self.by_name[_composed(name.stem)].append(file)

    def other_spellings(self, file: str) -> list[str]:
        """Files that a name means in another Unicode form, with slashes for backslashes, or without outer blanks."""
        for spelling in (file, file.replace("\\", "/"), file.strip()):
            if files := self.by_path.get(_composed(str(PurePosixPath(spelling)))):
                return files
        return []

    def of_name(self, name: str) -> list[str]:
        """Files in any folder that have a name, with its ending or without."""
        return [] if "/" in name else self.by_name.get(_composed(name), [])

    @cached_property
    def by_letters(self) -> defaultdict[str, list[str]]:
        """Files by their names without regard to capitals."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for files in self.by_path.values():
            for file in files:
                found[_composed(PurePosixPath(file).name).casefold()].append(file)
        return found

    def like(self, file: str) -> tuple[str, list[str]]:
        """What is wrong with a name that no file has, and files that it may mean."""
        name = _composed(file.replace("\\", "/").rpartition("/")[2].strip())
        files = self.by_letters.get(name.casefold(), [])
        if not files:
            return "", []
        if any(_composed(PurePosixPath(each).name) == name for each in files):
            return "picture missing there, another folder has its name (write its path below --images)", files
        return "picture missing, one has its name in other capitals (write it as the file is called)", files


def resolve(found: Iterable[Found], folder: Path, *, follow_links: bool = False) -> list[Found]:
    """Give every picture's file the one path below the folder that it has.

    A name without a folder is looked for in all folders below; where several have it, it is a problem. The ids of
    pictures that are named by their files follow the path; the ids of those found by their name stay.
    """
    names: Names | None = None
    known: dict[str, tuple[str, str]] = {}  # name -> (file, how it was found or what is wrong)
    rows = []
    for row in found:
        if row.problem:
            rows.append(row)
            continue
        if row.file not in known and "\0" in row.file:
            known[row.file] = (row.file, "name with a NUL character, which no file can have")
        elif row.file not in known and ADDRESS.match(row.file):
            known[row.file] = (row.file, IS_ADDRESS)
        elif row.file not in known:
            file = canonical(row.file, folder)
            known[row.file] = (file, "")
            if _usable(file) and not os.path.lexists(folder / file):
                names = names or Names(list_pictures(folder, follow_links=follow_links).pictures)
                known[row.file] = _looked_up(file, names)
        file, how = known[row.file]
        if how not in ("", "below"):
            kind, _, files = how.partition(": ")
            rows.append(bad(f"{row.where}: {row.file}{files and f' ({files})'}", kind))
            continue
        image = file if row.image == row.file and how != "below" else row.image
        spelled = how != "below" and file != row.file
        rows.append(row._replace(image=image, file=file, joins=row.joins or spelled))
    below = sorted({str(PurePosixPath(file).parent) for file, how in known.values() if how == "below"})
    if below:
        count = sum(how == "below" for _, how in known.values())
        note(f"pictures found by their name in a folder below {folder}: {count:,} ({some(below)})")
    return rows


def canonical(file: str, folder: Path) -> str:
    """A file's path below the folder in its shortest form; a name that leads out of the folder stays as it is."""
    if not _usable(file):
        return file
    path = PurePosixPath(file)
    real = os.path.realpath(folder)
    if path.is_absolute():
        bases = [base for base in (os.path.abspath(folder), real) if path.is_relative_to(base)]  # noqa: PTH100
        if not bases:
            return file
        path = path.relative_to(bases[0])
    if ".." in path.parts:
        target = PurePosixPath(os.path.realpath(folder / path))
        return str(target.relative_to(real)) if target.is_relative_to(real) else file
    return str(path)


def join(rows: Sequence[Found]) -> list[Found]:
    """Make one of the rows that name one picture in one split, and give pictures of different files different ids.

    Rows stay apart that are in two splits, or that a source should not have twice: the check names them.
    """
    joined: dict[Hashable, Found] = {}
    for number, row in enumerate(rows):
        key: Hashable = (row.file, str(row.split), None if _id_is_name(row) else row.image)
        known = joined.get(key)
        if known is None:
            joined[key] = row._replace(captions=list(row.captions))
        elif row.joins or known.joins:
            known.captions.extend(row.captions)
        else:
            joined[number] = row
    files: dict[str, set[str]] = defaultdict(set)
    for row in joined.values():
        files[row.image].add(row.file)
    return [
        row._replace(image=row.file) if len(files[row.image]) > 1 and _id_is_name(row) else row
        for row in joined.values()
    ]


def file_key(file: str, folder: Path) -> Hashable:
    """The same for all names of a file, links too; hard links are files of equal content, as copies are."""
    return os.path.realpath(folder / file)


def tell_copies(records: Sequence[Record], folder: Path) -> None:
    """Say how many val and test pictures have the same bytes as a train picture, and how many are one file.

    A file that has gone since the pictures were checked is left to whoever opens it next.
    """
    by_size: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        with suppress(OSError):
            by_size[(folder / record.file).stat().st_size].append(record)
    copies, tested = [], 0
    for same_size in by_size.values():
        others = [record for record in same_size if record.split != "train"]
        tested += len(others)
        if not others or len(others) == len(same_size):
            continue
        train = {_hash(folder / record.file): record for record in same_size if record.split == "train"}
        for record in others:
            if (content := _hash(folder / record.file)) and content in train:
                copies.append(f"{record.file} = {train[content].file}")
    if copies:
        note(f"val and test pictures with the bytes of a train picture: {len(copies):,} of {tested:,} ({some(copies)})")
    files = Counter(file_key(record.file, folder) for record in records)
    if twice := len(records) - len(files):
        note(f"further names of a picture (links), each counted as a picture of its own: {twice:,}")


def _hash(path: Path) -> str:
    """A file's hash, empty where it cannot be read."""
    try:
        return hash_file(path)
    except OSError:
        return ""


def _looked_up(file: str, names: Names) -> tuple[str, str]:
    """The file that a name means which is no file's path, and how it was found or what is wrong."""
    if files := names.other_spellings(file):
        return (
            (files[0], "")
            if len(files) == 1
            else (file, f"name of several pictures (in other Unicode forms): {some(files)}")
        )
    files = names.of_name(file)
    if len(files) > 1:
        return file, f"name of pictures in several folders (write the path with its folder): {some(files)}"
    if files:
        return files[0], "below"
    problem, files = names.like(file)
    return file, f"{problem}: {some(files)}" if files else ""


def _id_is_name(row: Found) -> bool:
    """Whether a picture's id is its file's name, and not one that the source gives it."""
    return row.image == row.file or row.image == row.file.rpartition("/")[2]


def _usable(file: str) -> bool:
    return "\0" not in file and is_unicode(file)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
