"""webdataset shards: tar files in which the members KEY.jpg, KEY.txt and KEY.json belong together.

A sample's picture is its member with a picture's ending; its captions are the text of KEY.txt and `caption` or
`captions` of KEY.json, which may also have its `split`. Members of other endings are passed over. Pictures are unpacked
into a folder, under their own names: nothing outside it, and nothing but plain files, is ever written.
"""

import errno
import json
import posixpath
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from .captions import leaves_folder
from .errors import BadInput
from .files import replacing
from .pictures import PICTURE_ENDINGS
from .texts import is_unicode

ENDING = ".tar"
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)  # KEY and .ending: the key ends at the first dot
BRACES = re.compile(r"\{(\d+\.\.\d+|[^{},]*(?:,[^{},]*)+)\}")  # others stand for themselves
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_TEXT = 1 << 20  # bytes of a caption member: what is larger is none
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
    problem: str = ""
    """What is wrong with it."""

    def say(self, captions: Iterable[Any]) -> None:
        """Add captions that it does not have yet: shards often hold them in both members."""
        known = {text.strip() for text in self.captions if isinstance(text, str)}
        self.captions += [text for text in captions if not (isinstance(text, str) and text.strip() in known)]


def shards_of(source: Path) -> list[Path]:
    """The shards that a source stands for: itself, those in it where it is a folder, or those that a pattern with *, ?,
    or braces ("train-{000..012}.tar") names; none where it is no such thing.

    Raises:
        BadInput: a pattern names files that do not exist, or none.
    """
    if source.is_dir():
        return sorted(source.glob(f"*{ENDING}"))
    if source.suffix != ENDING:
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


def unpack(shards: Sequence[Path], folder: Path) -> Iterator[tuple[Path, Sample]]:
    """Unpack the pictures of all shards into a folder; give each sample with its shard, in their order.

    What is there already, from a run that was killed, is not written again. Of pictures with the same name the first is
    unpacked.

    Raises:
        BadInput: a shard is damaged, or the disk refuses a file.
    """
    unpacked: set[str] = set()
    for shard in shards:
        samples: dict[str, list[Sample]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    _read_member(archive, member, samples, shard=shard, folder=folder, unpacked=unpacked)
        except tarfile.TarError as error:
            raise BadInput(f"{shard} is damaged ({error}): fetch it again") from None
        yield from ((shard, sample) for same_key in samples.values() for sample in same_key)


def _read_member(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    samples: dict[str, list[Sample]],
    *,
    shard: Path,
    folder: Path,
    unpacked: set[str],
) -> None:
    """Put what one member says into the samples of its key: mostly one, with further ones for what is wrong."""
    name = member.name if leaves_folder(member.name) else posixpath.normpath(member.name)
    match = MEMBER.fullmatch(name)
    if match is None or member.isdir():
        return
    key, ending = match[1], match[2].lower()
    is_picture = ending in PICTURE_ENDINGS
    if not is_picture and ending not in (".txt", ".json"):
        return
    where = f"{shard.name}, member {member.name}"
    same_key = samples.setdefault(key, [Sample(key, where)])
    if is_picture and same_key[0].has_picture:
        same_key.append(Sample(name, where, has_picture=True, problem="second picture of the same key"))
    elif is_picture:
        sample = same_key[0]
        sample.name, sample.where, sample.has_picture = name, where, True
        sample.problem = sample.problem or _unpack_picture(archive, member, name, folder, unpacked)
    elif not member.isreg() or member.size > MOST_TEXT:
        same_key[0].problem = f"{ending} member is no plain file of at most {MOST_TEXT:,} bytes"
    else:
        content = archive.extractfile(member)
        assert content is not None, "a plain file has content"
        same_key[0].problem = same_key[0].problem or _read_text(content.read(), ending, same_key[0])


def _unpack_picture(
    archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, folder: Path, unpacked: set[str]
) -> str:
    """Write a picture, unless it is there; returns what is wrong with it. A later stage looks into it."""
    if not member.isreg():
        return "member is no plain file"
    if leaves_folder(name):
        return "member leads out of the shard"
    if not is_unicode(name):
        return "file name not UTF-8"
    if name in unpacked:  # the check of all pictures says that its id is another's
        return ""
    unpacked.add(name)
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
        value = {"caption": text} if ending == ".txt" else json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return f"{ending} member is not {'UTF-8 text' if ending == '.txt' else 'JSON'}"
    if not isinstance(value, dict):
        return f"{ending} member is no JSON object"
    captions = value.get("caption") if value.get("captions") is None else value["captions"]
    sample.say(captions if isinstance(captions, list) else [] if captions is None else [captions])
    sample.split = sample.split or value.get("split") or None
    return ""
