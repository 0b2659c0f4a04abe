"""Which pictures a segment of the gallery has: their ids and files, and what the files held, in one SQLite file.

It is written once and then only read. A look-up by row, id, file or folder reads a few of its pages, however many
pictures there are, so no process holds all lines in memory. It also names the rows of earlier segments that a change
removed, by the segment's number and the row within it.
"""

import itertools
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tools.command_line.failures import AGAIN, NOT_WRITTEN
from tools.errors import BadInput
from tools.features import Rows
from tools.texts import is_unicode

from .contents import Contents, unknown

STORE = "pictures.sqlite"
TOGETHER = 500  # names that one query asks for: SQLite takes at least 999
NOT_WRITABLE = ("disk is full", "I/O error", "unable to open", "readonly")  # of SQLite's messages, those of the disk
BLOCK = 4096  # pictures that are read at once
BEGIN = """
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
    BEGIN;
    CREATE TABLE pictures (
        row INTEGER PRIMARY KEY, image TEXT NOT NULL, file TEXT NOT NULL,
        size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL, hash BLOB NOT NULL
    );
    CREATE TABLE removed (segment INTEGER NOT NULL, row INTEGER NOT NULL, PRIMARY KEY (segment, row)) WITHOUT ROWID;
"""
END = "CREATE INDEX by_image ON pictures (image); CREATE INDEX by_file ON pictures (file); COMMIT"


class Picture(NamedTuple):
    """One picture that can be found."""

    image: str
    """Its id."""
    file: str
    """Its path, as seen from the gallery's `files_below`: the repository's root."""


class Gone(NamedTuple):
    """Pictures of one segment that were removed."""

    segment: int
    """Its number."""
    rows: Rows
    """Within it, ascending."""


class Store(Protocol):
    """The pictures of one segment. Rows are counted within it."""

    def __len__(self) -> int: ...

    def picture(self, row: int) -> Picture:
        """The picture of a row."""

    def pictures(self) -> Iterator[Picture]:
        """All of them, in the order of rows."""

    def with_images(self, images: Sequence[str]) -> list[tuple[int, Picture]]:
        """Those that have one of some ids, each with its row."""

    def with_files(self, files: Sequence[str]) -> list[tuple[int, Picture]]:
        """Those that have one of some files, each with its row."""

    def below(self, folder: str) -> list[tuple[int, Picture]]:
        """Those whose file's path begins with a folder ("photos/"; "": those of relative paths), in no order."""

    def contents(self, rows: Rows) -> Contents:
        """What the files of rows held."""

    def gone(self) -> list[Gone]:
        """Pictures of earlier segments that were removed with this one."""


def write_store(path: Path, pictures: Iterable[tuple[Picture, Contents]], *, gone: Sequence[Gone] = ()) -> None:
    """Write the file.

    Args:
        pictures: in the order of rows, each with what its file held.

    Raises:
        BadInput: the disk is full.
    """
    lines = ((row, *picture, *content.item()) for row, (picture, content) in enumerate(pictures))
    removed = ((each.segment, row) for each in gone for row in each.rows.tolist())
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as store:
            for statement in BEGIN.strip(" \n;").split(";"):
                store.execute(statement)
            store.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?)", lines)
            store.executemany("INSERT INTO removed VALUES (?, ?)", removed)
            for statement in END.split(";"):
                store.execute(statement)
    except sqlite3.OperationalError as error:
        if any(word in str(error) for word in NOT_WRITABLE):
            sorted_in = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
            reason = f"{NOT_WRITTEN} ({error}; SQLite sorts in {sorted_in}, which needs space, too)"
            raise BadInput(f"{path} cannot be written: {reason}, {AGAIN}") from error
        raise


class SqliteStore:
    """What `write_store` wrote. Any number of threads may read it."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadInput: the file is missing or damaged.
        """
        self.path, self._turn = path, threading.Lock()
        place = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            path.open("rb").close()  # SQLite does not tell what keeps it from opening a file
            self._file = sqlite3.connect(place, uri=True, check_same_thread=False)
        except (FileNotFoundError, sqlite3.OperationalError) as error:
            raise BadInput(f"{path} does not open ({error}): build the index again") from None
        weakref.finalize(self, self._file.close)  # at once: it is in a circle with its statements
        [(last,)] = self._ask("SELECT max(row) FROM pictures")
        self._length = 0 if last is None else last + 1
        removed = itertools.groupby(self._ask("SELECT segment, row FROM removed"), key=lambda each: each[0])
        self._gone = [Gone(segment, np.array([row for _, row in rows], dtype=np.int64)) for segment, rows in removed]

    def __len__(self) -> int:
        return self._length

    def picture(self, row: int) -> Picture:
        [found] = self._whole(1, "SELECT image, file FROM pictures WHERE row = ?", row)
        return Picture(*found)

    def pictures(self) -> Iterator[Picture]:
        for start in range(0, len(self), BLOCK):
            query = "SELECT image, file FROM pictures WHERE row >= ? AND row < ? ORDER BY row"
            count = min(BLOCK, len(self) - start)
            yield from itertools.starmap(Picture, self._whole(count, query, start, start + BLOCK))

    def with_images(self, images: Sequence[str]) -> list[tuple[int, Picture]]:
        return self._with("image", images)

    def with_files(self, files: Sequence[str]) -> list[tuple[int, Picture]]:
        return self._with("file", files)

    def below(self, folder: str) -> list[tuple[int, Picture]]:
        if not is_unicode(folder):
            return []
        if folder:
            bounds = (folder, folder[:-1] + chr(ord(folder[-1]) + 1))
            found = self._ask("SELECT row, image, file FROM pictures WHERE file >= ? AND file < ?", *bounds)
        else:
            found = self._ask("SELECT row, image, file FROM pictures WHERE file < '/' OR file >= '0'")
        return [(row, Picture(image, file)) for row, image, file in found]

    def contents(self, rows: Rows) -> Contents:
        found: dict[int, tuple[Any, ...]] = {}
        for some in chunks(rows.tolist()):
            query = f"SELECT row, size, mtime, ctime, hash FROM pictures WHERE row IN ({places(some)})"
            found |= {row: tuple(content) for row, *content in self._whole(len(set(some)), query, *some)}
        records = unknown(len(rows))
        for place, row in enumerate(rows.tolist()):
            records[place] = found[row]
        return records

    def gone(self) -> list[Gone]:
        return self._gone

    def _with(self, column: str, names: Sequence[str]) -> list[tuple[int, Picture]]:
        found = []
        for some in chunks([name for name in names if is_unicode(name)]):
            query = f"SELECT row, image, file FROM pictures WHERE {column} IN ({places(some)})"
            found += [(row, Picture(image, file)) for row, image, file in self._ask(query, *some)]
        return found

    def _whole(self, count: int, query: str, *values: Any) -> list[Any]:
        """The answer to a question for so many rows of this segment."""
        found = self._ask(query, *values)
        if len(found) != count:
            raise BadInput(f"{self.path} is damaged, it lacks {count - len(found)} pictures: build the index again")
        return found

    def _ask(self, query: str, *values: Any) -> list[Any]:
        try:
            with self._turn:
                return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise BadInput(f"{self.path} is not readable ({error}): build the index again") from None


def chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """As many values as one query takes."""
    return (values[start : start + TOGETHER] for start in range(0, len(values), TOGETHER))


def places(values: Sequence[Any]) -> str:
    """A question mark for each value.

    >>> places("abc")
    '?,?,?'
    """
    return ",".join("?" * len(values))


class LineStore:
    """The pictures of a version that an earlier program wrote: a JSON line each, which every look-up reads through."""

    LINES, TEXT, CONTENTS = "lines.npy", "pictures.jsonl", "contents.npy"

    def __init__(self, text: NDArray[np.uint8], lines: NDArray[np.int64], contents: Contents | None) -> None:
        self.text, self.lines, self.noted = text, lines, contents

    def __len__(self) -> int:
        return len(self.lines) - 1

    def picture(self, row: int) -> Picture:
        return Picture(**json.loads(self.text[self.lines[row] : self.lines[row + 1]].tobytes()))

    def pictures(self) -> Iterator[Picture]:
        return map(self.picture, range(len(self)))

    def with_images(self, images: Sequence[str]) -> list[tuple[int, Picture]]:
        wanted = set(images)
        return [each for each in enumerate(self.pictures()) if each[1].image in wanted]

    def with_files(self, files: Sequence[str]) -> list[tuple[int, Picture]]:
        wanted = set(files)
        return [each for each in enumerate(self.pictures()) if each[1].file in wanted]

    def below(self, folder: str) -> list[tuple[int, Picture]]:
        return [
            each
            for each in enumerate(self.pictures())
            if each[1].file.startswith(folder) and (folder or not os.path.isabs(each[1].file))  # noqa: PTH117
        ]

    def contents(self, rows: Rows) -> Contents:
        return unknown(len(rows)) if self.noted is None else self.noted[rows]

    def gone(self) -> list[Gone]:
        return []
