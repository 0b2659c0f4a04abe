"""Tables of codes: for each shard of a collection one parquet file with the codes of its pictures.

id        text, `<shard>/<key>`: different for each picture of a collection
key       text, the picture's key in its shard
shard     text, the shard's name (tools/stored_pictures.py)
file      text, the picture's name in the shard
codes     list of `levels` int16, or int32 where the codebooks are larger; null where there is a problem
features  list of `width` float16, the normalised feature; where features are kept
problem   text, why a picture has no codes; null where it has. A row without a key speaks of the shard

A table holds every picture of its shard, also those that cannot be used. It appears in one step: a shard that has a
table is done. Its file's metadata say of which shard it is, and what made it. The folder of the tables may be any
address that fsspec opens.
"""

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pyarrow import compute, parquet

from .errors import BadInput
from .vokens import VokenSpace

ENDING = ".parquet"
HEAD = b"avg"  # the key of a file's metadata under which a table's `Head` lies
ROWS = 65_536  # read at once
SMALL = 1 << 15  # codes below this are stored as int16
DAMAGES = (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError)

HalfFloats = NDArray[np.float16]


class Head(NamedTuple):
    """What a table says of itself."""

    shard: str
    """Name of its shard."""
    address: str
    size: int
    """Bytes of the shard."""
    made_by: str
    """Identifies the models and options that made the codes."""
    pictures: int
    """With codes."""
    problems: int
    """Rows without."""


class Block(NamedTuple):
    """Some pictures that have codes, in the order of a table."""

    codes: NDArray[np.integer]
    """(pictures, levels)"""
    ids: list[str]
    shards: list[str]
    files: list[str]
    """Names in the shard."""
    features: HalfFloats | None
    """(pictures, width), where they are kept and asked for."""


class Problem(NamedTuple):
    """A picture without codes."""

    shard: str
    key: str
    """Empty where the problem is the shard's."""
    reason: str


def schema(space: VokenSpace, width: int | None) -> Any:
    """The columns of a table; `width` is that of the features, None where none are kept."""
    small = pyarrow.int16() if space.codebook_size <= SMALL else pyarrow.int32()
    columns = [(name, pyarrow.string()) for name in ("id", "key", "shard", "file")]
    columns.append(("codes", pyarrow.list_(small, space.levels)))
    if width is not None:
        columns.append(("features", pyarrow.list_(pyarrow.float16(), width)))
    return pyarrow.schema([*columns, ("problem", pyarrow.string())])


def lists(values: NDArray[Any], there: NDArray[np.bool_], kind: Any) -> Any:
    """A column of lists of a fixed length.

    Args:
        values: (of those that are there, length)
        there: (rows,) whether a row has a list; the others are null.
    """
    filled = np.zeros((len(there), kind.list_size), dtype=values.dtype)
    filled[there] = values
    flat = pyarrow.array(filled.reshape(-1), type=kind.value_type)
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=kind, mask=pyarrow.array(~there))


@dataclass(frozen=True)
class Tables:
    """A folder of tables."""

    address: str
    """A path, or whatever else fsspec opens."""

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        system, root = url_to_fs(self.address)
        return system, root

    def path(self, shard: str) -> str:
        """Where the table of a shard lies, in the file system of the address."""
        return f"{self._opened[1]}/{shard}{ENDING}"

    def head(self, shard: str) -> Head | None:
        """What the table of a shard says of itself; None where there is no whole one."""
        system = self._opened[0]
        try:
            with system.open(self.path(shard), "rb") as file:
                return Head(**json.loads(parquet.read_schema(file).metadata[HEAD]))
        except FileNotFoundError:
            return None
        except DAMAGES:
            return None

    def write(self, table: Any, head: Head) -> None:
        """Put the table of a shard in its place in one step, also where a worker that was given up does the same."""
        table = table.replace_schema_metadata({HEAD: json.dumps(head._asdict())})
        system, path = self._opened[0], self.path(head.shard)
        folder, name = posixpath.split(path)
        part = f"{folder}/.{name}.{uuid.uuid4().hex}.part"
        system.makedirs(folder, exist_ok=True)
        if isinstance(system, LocalFileSystem):
            _write_durably(table, Path(part), Path(path))
            return
        with tempfile.TemporaryDirectory() as local:
            parquet.write_table(table, f"{local}/table", compression="zstd")
            system.put_file(f"{local}/table", part)
            system.mv(part, path)

    def problems(self, shard: str) -> list[Problem]:
        """The pictures of a shard that have no codes."""
        with self._reading(shard) as file:
            table = file.read(columns=["shard", "key", "problem"])
        bad = table.filter(compute.is_valid(table["problem"])).to_pylist()
        return [Problem(row["shard"], row["key"], row["problem"]) for row in bad]

    def blocks(self, shard: str, *, features: bool) -> Iterator[Block]:
        """The pictures of a shard that have codes.

        Raises:
            BadInput: the table is gone or damaged.
        """
        columns = ["id", "shard", "file", "codes", *(["features"] if features else []), "problem"]
        with self._reading(shard) as file:
            try:
                for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                    good = batch.filter(compute.is_null(batch["problem"]))
                    if good.num_rows:
                        ids, shards, files = (good[name].to_pylist() for name in ("id", "shard", "file"))
                        kept = _matrix(good["features"]) if features else None
                        yield Block(_matrix(good["codes"]), ids, shards, files, kept)
            except DAMAGES as error:
                raise self._damaged(shard, error) from None

    def _reading(self, shard: str) -> Any:
        try:
            return parquet.ParquetFile(self._opened[0].open(self.path(shard), "rb"))
        except DAMAGES as error:
            raise self._damaged(shard, error) from None

    def _damaged(self, shard: str, error: Exception) -> BadInput:
        said = str(error).partition("\n")[0]
        return BadInput(f"{self.path(shard)} is missing or damaged ({said}): encode the collection again")


def _matrix(column: Any) -> NDArray[Any]:
    """A column of lists of a fixed length without nulls as an array (rows, length)."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(len(column), column.type.list_size)


def _write_durably(table: Any, part: Path, path: Path) -> None:
    """Write a local file, and its place in the folder, so that no loss of power leaves half of it."""
    try:
        with part.open("wb") as file:
            parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def total(heads: Sequence[Head]) -> int:
    """Pictures with codes of several tables."""
    return sum(head.pictures for head in heads)
