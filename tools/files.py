"""Writing files so that a reader never sees half of one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput

HASH_CHUNK_BYTES = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path` in one step, on failure it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_torn(folder: Path) -> None:
    """Remove, below a folder that nobody writes to, the temporary files that a killed `replacing` left."""
    for part in folder.rglob(".*.part"):
        part.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        BadInput: the file is missing or is not JSON; the message has the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically. Returns the number of rows."""
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
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_decoded(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not valid JSON ({error.msg})") from None
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
        np.save(file, array)


def read_array(path: Path) -> NDArray[Any]:
    """Memory-map one `.npy` file, read-only; never unpickles."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path} is not a readable .npy file ({error})") from None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None


def hash_file(path: Path) -> str:
    """BLAKE2b-128 of a file's content, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
