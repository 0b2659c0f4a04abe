"""Writing files so that a reader never sees half of one."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from .command_line.failures import why_not_written
from .errors import BadInput

HASH_CHUNK_BYTES = 1 << 20
SETTLED_SECONDS = 2.0  # a file changed later than this before it was hashed may change again unseen by its times
SYSTEM_FOLDERS = frozenset(  # of network drives, macOS and Windows; those of Linux are hidden
    {
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "__macosx",
        "lost+found",
        "system volume information",
    }
)
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})  # of Windows

_hashes: dict[Path, tuple[tuple[int, ...], str]] = {}


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """Relative path and bytes of every file below a folder, sorted; hidden ones and those of systems are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS]
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):  # it has gone in the meantime, or is a link that leads nowhere
                if not name.startswith(".") and name.lower() not in SYSTEM_FILES and path.is_file():
                    found.append((str(path.relative_to(folder)), path.stat().st_size))
    return sorted(found, key=lambda item: item[0].split("/"))


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path` in one step, on failure it goes.

    Args:
        durable: when this returns, the new file outlives a power cut; before, the old one does.

    Raises:
        BadInput: the disk is full, read-only, or otherwise refuses the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        if durable:
            force_to_disk(temporary)
        temporary.replace(path)
        if durable:
            force_to_disk(path.parent)
    except Exception as error:
        if reason := why_not_written(error):
            raise BadInput(f"{path} cannot be written: {reason}") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of files, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_file(path: Path) -> bool:
    """Whether there is a file. In folders that cannot be entered, and for names that are too long, there is none, where
    `Path.is_file` raises an error."""
    return os.path.isfile(path)  # noqa: PTH113


def remove_torn(folder: Path) -> None:
    """Remove, below a folder that nobody writes to, the temporary files that a killed `replacing` left."""
    for part in folder.rglob(".*.part"):
        part.unlink()


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write `value` as indented JSON, atomically; `durable` as in `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse a JSON file.

    Args:
        object_pairs_hook: makes an object of its pairs, as in `json.loads`.

    Raises:
        BadInput: the file is missing or is not JSON; the message has the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise BadInput(f"{path}: not readable JSON ({error})") from None


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line, atomically. Returns the number of rows."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line.

    Raises:
        BadInput: the file is missing, or a line is not a JSON object; the message has file and line.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_decoded(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not readable JSON ({error})") from None
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


def _decoded(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start} of a block): save it as UTF-8") from None


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one `.npy` file, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(cast(Any, _Written(file)), array)


class _Written:
    """A file that numpy does not take for one: into a real one it writes through C, whose last error it does not see,
    and on a full disk the end of an array would be lost without a word."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def new_array(path: Path, *, dtype: Any, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    """A memory-mapped `.npy` file to fill, its space on the disk reserved: a full disk would else kill the process."""
    array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def read_array(path: Path) -> NDArray[Any]:
    """Memory-map one `.npy` file, read-only; never unpickles."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path} is not a readable .npy file ({error}): make it again") from None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None


def hash_file(path: Path) -> str:
    """BLAKE2b-128 of a file's content, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verified_hash(path: Path) -> str:
    """`hash_file`, of a file that has not changed since this process hashed it without reading it again."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    known = _hashes.get(path)
    if known is not None and known[0] == key:
        return known[1]
    began = time.time()
    content = hash_file(path)
    if began - max(state.st_mtime, state.st_ctime) > SETTLED_SECONDS:
        _hashes[path] = (key, content)
    return content
