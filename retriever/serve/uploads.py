"""Pictures that people hand to the search page: checked, stored in a folder of their own, drawn small."""

import io
import re
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from tools.command_line.failures import why_not_written
from tools.errors import BadInput
from tools.files import replacing
from tools.picture_formats import FORMATS, called, format_of, identify, unidentified
from tools.pictures import MOST_OBLONG, small_copy, why_unreadable

MOST_BYTES = 20 << 20  # of one picture
MOST_PIXELS = 64_000_000  # of one picture: some 200 MB while it is decoded
LONGEST_NAME = 120  # bytes, where file systems take 255 and a number is put behind
THUMBNAIL = 320  # pixels of the longer side
CACHED = 1000  # thumbnails, some 10 kB each


class Upload(NamedTuple):
    """A picture as it came."""

    name: str
    content: bytes


def check(upload: Upload) -> str:
    """Decode a picture; the ending that its format has.

    Raises:
        BadInput: it is too large, or no picture of a known format, or damaged.
    """
    name, content = upload
    if not content:
        raise BadInput(f"{name}: picture file is empty: send the whole file")
    if len(content) > MOST_BYTES:
        raise BadInput(f"{name}: {len(content):,} bytes, {MOST_BYTES:,} are allowed: make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is below it
            picture = identify(io.BytesIO(content))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BadInput(_refusal(name, content, error)) from None
    if picture.width * picture.height > MOST_PIXELS:
        raise BadInput(
            f"{name}: {picture.width:,} × {picture.height:,} pixels, {MOST_PIXELS:,} in all are allowed: "
            "make it smaller"
        )
    if max(picture.size) > MOST_OBLONG * min(picture.size):
        raise BadInput(f"{name}: picture more than {MOST_OBLONG} times as long as wide: send another one")
    try:
        picture.load()
    except Exception as error:  # as above
        raise BadInput(_refusal(name, content, error)) from None
    endings = FORMATS[format_of(picture)]
    suffix = Path(name).suffix.lower()
    return suffix if suffix in endings else endings[0]


def _refusal(name: str, content: bytes, error: Exception) -> str:
    """Why an upload cannot be opened or decoded, and what to do about it."""
    reason = unidentified(content) if isinstance(error, UnidentifiedImageError) else why_unreadable(error)
    *most, last = (called(each) for each in FORMATS)
    return f"{name} is not a picture that can be read ({reason}): send a whole {', '.join(most)} or {last}"


def safe_name(name: str, ending: str) -> str:
    """A file name for a picture that calls itself `name`: no folder, nothing hidden, nothing that cannot be printed."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    printable = "".join(letter if letter.isprintable() else " " for letter in last)
    stem = Path(printable.strip(" .")).stem.strip(" .").encode(errors="ignore")[:LONGEST_NAME].decode(errors="ignore")
    return (stem.strip(" .") or "picture") + ending


def store(folder: Path, upload: Upload, ending: str) -> Path:
    """Write a picture to a new file of the folder, named after what it was called. No reader sees half of it, and a
    kill leaves no part of it under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / safe_name(upload.name, ending)
    path, number = wanted, 1
    while (claim := take(path)) is None:
        number += 1
        path = wanted.with_stem(f"{wanted.stem} ({number})")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(upload.content)
    finally:
        claim.unlink(missing_ok=True)
    return path


def take(path: Path) -> Path | None:
    """Make a hidden file beside a name, which keeps other server processes from it; None where the name is in use.

    Raises:
        BadInput: the disk is full, read-only, or otherwise refuses the file.
    """
    claim = path.with_name(f".{path.name}.part")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return None
    except OSError as error:
        if reason := why_not_written(error):
            raise BadInput(f"{path} cannot be written: {reason}") from error
        raise
    if path.exists():
        claim.unlink()
        return None
    return claim


@lru_cache(maxsize=CACHED)
def thumbnail(file: Path, changed: int) -> bytes:
    """A picture drawn small, as WebP.

    Args:
        changed: time of the file's last change: another time, another picture.

    Raises:
        OSError: the file is gone, or no picture any more. Damaged pictures raise many other kinds.
    """
    with io.BytesIO() as buffer:
        small_copy(file, THUMBNAIL).save(buffer, "WEBP", quality=85)
        return buffer.getvalue()
