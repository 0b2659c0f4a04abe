"""Pictures in shards, read in place: tar files as webdataset has them, and parquet files that hold pictures' bytes.

A source is the address of a shard, of a folder of shards, or a pattern with *, ? or braces: a path on this machine, or
whatever else fsspec opens (s3://, gs://, hf://, https:// ...). Nothing is unpacked, and captions are not read.
"""

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow
from fsspec.core import url_to_fs
from pyarrow import parquet

from .captions import leaves_folder
from .data.parquet import holds_pictures
from .errors import BadInput
from .picture_formats import PICTURE_ENDINGS, UNREAD_ENDINGS, called
from .picture_listing import ending_of
from .shards import DAMAGES, ENDINGS, MEMBER, NOT_CLOSED, braces_expanded, is_closed
from .texts import did_you_mean, is_unicode, printable

PARQUET = ".parquet"
SPECIAL = re.compile(r"[*?\[{]")  # where the part of an address begins that stands for several
KEY_COLUMNS = ("key", "__key__")
ROWS = 64  # of a parquet file, read at once
SECOND = "second picture of the same key"


class Shard(NamedTuple):
    """One shard of a source."""

    name: str
    """Its path below the source's folder, without its ending; different for each shard of a source."""
    address: str
    """As fsspec opens it."""
    size: int
    """Bytes."""


class Columns(NamedTuple):
    """Which columns of parquet shards are read; None: those that are recognised."""

    image: str | None = None
    key: str | None = None


class TornShardError(Exception):
    """A shard cannot be read to its end; the message says why, without its name."""


@dataclass
class StoredPicture:
    """One picture of a shard."""

    key: str
    """Of its sample; different for each picture of a shard that has no problem."""
    file: str
    """Its member's name, or the name that a parquet file has for it."""
    content: bytes
    problem: str = ""
    """Why its content is not there."""


@dataclass
class Reading:
    """The reading of one shard.

    Attributes:
        others: members that are not pictures, by ending.
    """

    shard: Shard
    columns: Columns
    others: Counter[str] = field(default_factory=Counter)

    def pictures(self) -> Iterator[StoredPicture]:
        """Every picture, in the shard's order.

        Raises:
            TornShardError: the shard is damaged, or what it holds is not what it should; pictures before the damage
                have been given.
        """
        try:
            with fsspec.open(self.shard.address, "rb") as file:
                read = self._of_parquet if self.shard.address.lower().endswith(PARQUET) else self._of_tar
                yield from _told_apart(read(file))
        except (*DAMAGES, pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(":.") or type(error).__name__
            raise TornShardError(f"shard cannot be read to its end ({reason})") from None

    def _of_tar(self, file: IO[bytes]) -> Iterator[StoredPicture]:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            for member in archive:
                if not member.isdir() and (picture := self._member(archive, member)) is not None:
                    yield picture
            if not is_closed(archive):
                raise TornShardError(NOT_CLOSED)

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> StoredPicture | None:
        """The picture that a member is, or None for another one."""
        name = posixpath.normpath(member.name)
        match = MEMBER.fullmatch(name)
        ending = match[2].lower() if match else ""
        if match is None or ending not in PICTURE_ENDINGS | UNREAD_ENDINGS.keys():
            self.others[ending or ending_of(name) or "no ending"] += 1
            return None
        if not is_unicode(name):
            return StoredPicture(printable(match[1]), printable(name), b"", "file name not UTF-8")
        picture = StoredPicture(match[1], name, b"")
        if ending in UNREAD_ENDINGS:
            picture.problem = f"{called(UNREAD_ENDINGS[ending])} picture, for which a package is missing"
        elif not member.isreg():
            picture.problem = "member is no plain file"
        elif leaves_folder(member.name):
            picture.problem = "member leads out of the shard"
        else:
            content = archive.extractfile(member)
            assert content is not None, "a plain file has content"
            picture.content = content.read()
        return picture

    def _of_parquet(self, file: IO[bytes]) -> Iterator[StoredPicture]:
        table = parquet.ParquetFile(file)
        image, key = _columns(table.schema_arrow, self.columns)
        row, digits = 0, len(str(table.metadata.num_rows))
        for batch in table.iter_batches(batch_size=ROWS, columns=[image] + [key] * (key is not None)):
            for values in batch.to_pylist():
                number = f"{row:0{digits}d}"
                yield _row(values[image], number if key is None else values[key], number)
                row += 1


def find_shards(source: str) -> list[Shard]:
    """The shards that a source stands for, in the order of their names.

    Raises:
        BadInput: it cannot be opened, there is no shard, or two would have the same name.
    """
    below = _folder_of(source)
    found = [(path, size, url) for pattern in braces_expanded(source) for path, size, url in _files(pattern, source)]
    shards: dict[str, Shard] = {}
    for path, size, address in found:
        ending = max((each for each in (*ENDINGS, PARQUET) if path.lower().endswith(each)), key=len)
        name = posixpath.relpath(path, below)[: -len(ending)]
        if not is_unicode(name):
            raise BadInput(f"--source {source}: the name of the shard {printable(path)} is not UTF-8: rename it")
        known = shards.setdefault(name, Shard(name, address, size))
        if known.address != address:
            raise BadInput(f"--source {source}: {known.address} and {address} differ in their ending alone: rename one")
    return [shards[name] for name in sorted(shards)]


def _folder_of(source: str) -> str:
    """The path of the folder that the names of a source's shards are relative to."""
    special = SPECIAL.search(source)
    if special is None:
        system, path = _opened(source)
        return str(path) if system.isdir(path) else posixpath.dirname(path)
    return posixpath.dirname(_opened(source[: special.start()] + "x")[1])


def _files(pattern: str, source: str) -> list[tuple[str, int, str]]:
    """Path, size and address of each shard that an address or pattern without braces stands for."""
    system, path = _opened(pattern)
    try:
        if system.isdir(path):
            found = [each for each in system.find(path, detail=True).values() if _is_shard(each["name"])]
        elif SPECIAL.search(path) and not system.exists(path):
            found = [each for each in system.glob(path, detail=True).values() if _is_shard(each["name"])]
        else:
            found = [system.info(path)] if system.isfile(path) else []
    except OSError as error:
        raise BadInput(f"--source {source} cannot be listed: {error}") from None
    if not found or not all(_is_shard(each["name"]) for each in found):
        endings = ", ".join((*ENDINGS, PARQUET))
        raise BadInput(f"--source {source}: there is no shard {pattern} (a shard ends in {endings})")
    return [(each["name"], int(each["size"] or 0), system.unstrip_protocol(each["name"])) for each in found]


def _opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        BadInput: fsspec knows no such file system, or lacks a package for it.
    """
    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise BadInput(f"{address} cannot be opened: {str(error).partition(chr(10))[0]}") from None
    return system, path


def _is_shard(path: str) -> bool:
    return not posixpath.basename(path).startswith(".") and path.lower().endswith((*ENDINGS, PARQUET))


def _told_apart(pictures: Iterator[StoredPicture]) -> Iterator[StoredPicture]:
    """The same pictures, those with a problem whose key another one has had."""
    keys: set[str] = set()
    for picture in pictures:
        if picture.key in keys:
            picture.content, picture.problem = b"", picture.problem or SECOND
        keys.add(picture.key)
        yield picture


def _columns(schema: Any, wanted: Columns) -> tuple[str, str | None]:
    """The columns of a parquet file that hold pictures and keys; no column for keys that are the rows' numbers."""
    for name in (name for name in wanted if name is not None and name not in schema.names):
        raise TornShardError(f"parquet shard without a column {name}{did_you_mean(name, schema.names)}")
    holding = [field.name for field in schema if holds_pictures(field.type)]
    if wanted.image is None and len(holding) != 1:
        found = ", ".join(holding) or "none"
        raise TornShardError(f"parquet shard: name its column of pictures with --image-column (of bytes: {found})")
    key = wanted.key or next((name for name in KEY_COLUMNS if name in schema.names), None)
    return wanted.image or holding[0], key


def _row(value: Any, key: Any, number: str) -> StoredPicture:
    stated = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(key, str | int) or isinstance(key, bool) or key == "":
        return StoredPicture(number, f"row {number}", b"", "row without a key")
    picture = StoredPicture(str(key), str(stated or key), b"")
    if isinstance(content, bytes):
        picture.content = content
    else:
        picture.problem = "row without a picture"
    return picture
