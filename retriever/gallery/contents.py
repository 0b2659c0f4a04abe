"""What the files of a gallery's pictures held when they were encoded: by this a sync knows which have changed.

A file whose size and times are as they were is taken for unchanged. Else its hash decides, so that a file that was only
touched, moved or renamed is not encoded again.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.files import hash_file, is_file

Contents = NDArray[np.void]
"""(pictures,) records of `CONTENT`"""

CONTENT = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("ctime", "<i8"), ("hash", "S32")])
TIMES = ["size", "mtime", "ctime"]
"""Bytes, and nanoseconds since 1970: of the last change of the content, and of the content or the file's record."""


NOT_NOTED, CHANGED = -1, -2  # in the place of a size: nothing is known, or the file changed before it was read


def unknown(count: int) -> Contents:
    """Records of pictures of whose files nothing is known."""
    records = np.zeros(count, dtype=CONTENT)
    records["size"] = NOT_NOTED
    return records


def known(record: Any) -> bool:
    return bool(record["size"] >= 0)


def read_contents(files: Iterable[Path], *, before: int | None = None) -> Contents:
    """Hash files, each of which is read once. One that is not there, or that cannot be read, is unknown.

    Args:
        before: nanoseconds since 1970; files that have changed since then are unknown too, and never taken for
            unchanged.
    """
    records = [_record(file, before) for file in files]
    return np.array(records, dtype=CONTENT) if records else unknown(0)


def times_of(file: Path) -> tuple[int, int, int] | None:
    """Size and times of a file as its record has them; None where it is not there."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _record(file: Path, before: int | None) -> tuple[Any, ...]:
    times = times_of(file)
    nothing = (NOT_NOTED, 0, 0, b"")
    if times is None or not is_file(file):
        return nothing
    if before is not None and max(times[1:]) >= before:
        return (CHANGED, 0, 0, b"")
    try:
        return (*times, hash_file(file).encode())
    except OSError:
        return nothing
