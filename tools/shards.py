"""webdataset shards: tar files in which the members KEY.jpg, KEY.txt and KEY.json belong together.

A sample's picture is its member with a picture's ending; its captions are the text of KEY.txt, KEY.text, KEY.caption or
KEY.cap, and `captions` and `caption`, or else `text`, of KEY.json, which may also have its `split`. Other members are
counted. Pictures are unpacked into a folder, under their own names: nothing outside it, and nothing but plain files, is
ever written. A picture whose name another shard has had gets its shard's name before its own.
"""

import errno
import gzip
import json
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from .captions import leaves_folder
from .data.json_sources import Doubled, once, stated_captions
from .errors import BadInput
from .files import replacing
from .picture_formats import PICTURE_ENDINGS
from .picture_listing import HIDDEN_FILE, NO_ENDING, SHARD_ALIAS, Listing, ending_of, list_files
from .texts import is_unicode

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_ENDINGS = (".txt", ".text", ".caption", ".cap")
CAPTION_KEYS = frozenset({"captions", "caption", "text"})  # of a JSON member; the last where it has no other
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)  # KEY and .ending: the key ends at the first dot
BRACES = re.compile(r"\{(\d+\.\.\d+|[^{},]*(?:,[^{},]*)+)\}")  # others stand for themselves
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_TEXT = 1 << 20  # bytes of a caption member: what is larger is none
DAMAGES = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
NOT_CLOSED = "shard without the mark of its end: it may be cut off"
UNUSABLE_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


@dataclass
class Sample:
    """What the members of one key say."""

    name: str
    """Of its picture's member; its key where it has none."""
    where: str
    captions: list[Any] = field(default_factory=list)
    """Texts, unless the shard is wrong."""
    split: str | None = None
    has_picture: bool = False
    has_null: bool = False
    """Whether a caption is null, as where there was none to fetch."""
    has_unread_text: bool = False
    """Whether its JSON has a `text` beside captions, which is not read."""
    problem: str = ""
    """What is wrong with it."""

    def say(self, captions: Iterable[Any]) -> None:
        """Add captions that it does not have yet: shards often hold them in both members."""
        known = {text.strip() for text in self.captions if isinstance(text, str)}
        self.captions += [text for text in captions if not (isinstance(text, str) and text.strip() in known)]


def shards_of(source: Path, *, follow_links: bool = False) -> list[Path]:
    """The shards that a source stands for: itself, those below it where it is a folder, or those that a pattern with *,
    ?, or braces ("train-{000..012}.tar") names; none where it is no such thing.

    Raises:
        BadInput: a pattern names files that do not exist, or none.
    """
    if source.is_dir():
        return [source / file for file in list_shards(source, follow_links=follow_links).pictures]
    if not source.name.lower().endswith(ENDINGS):
        return []
    if source.is_file():
        return [source]
    found = []
    for name in braces_expanded(str(source)):
        matching = sorted(glob(name)) if re.search(r"[*?\[]", name) else [name]  # noqa: PTH207  (Path.glob takes no folder)
        if not matching or not Path(matching[0]).is_file():
            raise BadInput(f"--source {source}: there is no shard {name}")
        found += [Path(each) for each in matching]
    return found


def list_shards(folder: Path, *, follow_links: bool) -> Listing:
    """The shards below a folder, in the place of a listing's pictures, and an account of everything else."""

    def kind_of_other(path: str, _: str) -> str:
        name = path.rpartition("/")[2]
        return "" if name.lower().endswith(ENDINGS) else ending_of(name) or NO_ENDING

    return list_files(folder, kind_of_other, alias=SHARD_ALIAS, follow_links=follow_links)


def braces_expanded(pattern: str) -> Iterator[str]:
    """Names that a pattern with braces stands for, as in bash.

    >>> list(braces_expanded("{train,val}-{08..10}.tar"))[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    braces = BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    inside = RANGE.fullmatch(braces[1])
    if inside:
        first, last, width = int(inside[1]), int(inside[2]), len(inside[1])
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        words = braces[1].split(",")
    for word in words:
        yield from braces_expanded(pattern[: braces.start()] + word + pattern[braces.end() :])


class Unpacking:
    """The reading of shards, one after the other, with their pictures unpacked into a folder.

    What is there already, from a run that was killed, is not written again.
    """

    def __init__(self, shards: Sequence[Path], folder: Path) -> None:
        """
        Args:
            folder: of the unpacked pictures.
        """
        self.shards, self.folder = shards, folder
        self.others: Counter[str] = Counter()
        """Endings and kinds of members that are neither pictures nor captions."""
        self._names: set[str] = set()  # of the pictures

    def samples(self) -> Iterator[tuple[Path, Sample]]:
        """Each sample with its shard, in their order.

        Raises:
            BadInput: a shard is damaged, or the disk refuses a file.
        """
        for shard in self.shards:
            samples: dict[str, list[Sample]] = {}
            try:
                with tarfile.open(shard, "r:*") as archive:
                    for member in archive:
                        self._read(archive, member, samples, shard)
                    if not is_closed(archive):
                        samples["/"] = [Sample(shard.name, shard.name, problem=NOT_CLOSED)]  # no member's key
            except DAMAGES as error:
                reason = str(error).partition("\n")[0].rstrip(":")
                raise BadInput(f"{shard} is damaged ({reason}): fetch it again") from None
            for sample in (sample for same_key in samples.values() for sample in same_key):
                if sample.has_null and not sample.captions:
                    sample.captions = [None]
                yield shard, sample

    def _read(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, list[Sample]], shard: Path
    ) -> None:
        """Put what one member says into the samples of its key: mostly one, with further ones for what is wrong."""
        name = member.name if leaves_folder(member.name) else posixpath.normpath(member.name)
        match = MEMBER.fullmatch(name)
        ending = match[2].lower() if match else ""
        if member.isdir():
            return
        if match is None or ending not in PICTURE_ENDINGS | {*TEXT_ENDINGS, ".json"}:
            hidden = posixpath.basename(name).startswith(".")
            self.others[HIDDEN_FILE if hidden else ending or NO_ENDING] += 1
            return
        where = f"{shard.name}, member {member.name}"
        same_key = samples.setdefault(match[1], [Sample(match[1], where)])
        sample = same_key[0]
        if ending in PICTURE_ENDINGS and sample.has_picture:
            same_key.append(Sample(name, where, has_picture=True, problem="second picture of the same key"))
        elif ending in PICTURE_ENDINGS:
            sample.name, sample.where, sample.has_picture = self._new_name(name, shard), where, True
            sample.problem = sample.problem or _unpack_picture(archive, member, sample.name, self.folder)
        elif not member.isreg() or member.size > MOST_TEXT:
            sample.problem = f"{ending} member is no plain file of at most {MOST_TEXT:,} bytes"
        else:
            content = archive.extractfile(member)
            assert content is not None, "a plain file has content"
            sample.problem = sample.problem or _read_text(content.read(), ending, sample)

    def _new_name(self, name: str, shard: Path) -> str:
        """A picture's name, with its shard's before it where another shard has had the same."""
        while name in self._names:
            name = f"{self._folder_of(shard)}/{name}"
        self._names.add(name)
        return name

    def _folder_of(self, shard: Path) -> str:
        """A shard's name without its ending, and with the folders that tell it from others of that name."""
        base = os.path.commonpath([other.absolute().parent for other in self.shards])
        path = str(shard.absolute().relative_to(base))
        ending = max((ending for ending in ENDINGS if path.lower().endswith(ending)), key=len, default="")
        return path.removesuffix(path[len(path) - len(ending) :])


def is_closed(archive: tarfile.TarFile) -> bool:
    """Whether an archive that was read to its end has tar's mark there; without it, something may be cut off.

    Raises:
        tarfile.ReadError: something lies behind the end: tarfile takes a damaged member for one.
    """
    stream = archive.fileobj
    assert stream is not None, "the archive is open"
    read = stream.tell() - archive.offset  # of what should be the mark
    if 0 < read < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    while rest := stream.read(MOST_TEXT):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"unreadable from byte {archive.offset:,} on")
    return read > 0


def _unpack_picture(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, folder: Path) -> str:
    """Write a picture, unless it is there; returns what is wrong with it. A later stage looks into it."""
    if not member.isreg():
        return "member is no plain file"
    if leaves_folder(name):
        return "member leads out of the shard"
    if not is_unicode(name):
        return "file name not UTF-8"
    path = folder / name
    try:
        if path.is_file() and path.stat().st_size == member.size:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = archive.extractfile(member)
        assert content is not None, "a plain file has content"
        with replacing(path) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(content, file)
    except OSError as error:
        if error.errno not in UNUSABLE_NAME:
            raise
        return f"member's name cannot be a file's ({errno.errorcode[error.errno]})"
    return ""


def _read_text(content: bytes, ending: str, sample: Sample) -> str:
    """Take captions and split from a text or JSON member; returns what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=once) if ending == ".json" else {"caption": text}
    except (UnicodeDecodeError, ValueError, RecursionError):
        return f"{ending} member is not {'JSON' if ending == '.json' else 'UTF-8 text'}"
    if not isinstance(value, dict):
        return f"{ending} member is no JSON object"
    if isinstance(value, Doubled):
        return f"{ending} member has a key that stands twice ({value.key})"
    captions = stated_captions(value)
    sample.has_unread_text = bool(captions and value.get("text") and value["text"] not in captions)
    captions = captions or stated_captions({"caption": value.get("text")})
    sample.has_null = sample.has_null or (not captions and not CAPTION_KEYS.isdisjoint(value))
    sample.say(captions or [])
    sample.split = sample.split or value.get("split") or None
    return ""
