"""Pictures that people hand to the search page: checked, stored in a folder of their own, drawn small."""

import io
import os
import re
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tools.errors import BadInput
from tools.files import replacing
from tools.pictures import MOST_OBLONG, as_seen

MOST_BYTES = 20 << 20  # of one picture
MOST_PIXELS = 64_000_000  # of one picture: some 200 MB while it is decoded
ENDINGS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
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
    if len(content) > MOST_BYTES:
        raise BadInput(f"{name}: {len(content):,} bytes, {MOST_BYTES:,} are allowed: make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=list(ENDINGS)) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise BadInput(
                        f"{name}: {picture.width:,} × {picture.height:,} pixels, {MOST_PIXELS:,} in all are allowed: "
                        "make it smaller"
                    )
                if max(picture.size) > MOST_OBLONG * min(picture.size):
                    raise BadInput(f"{name} is more than {MOST_OBLONG} times as long as wide")
                picture.load()
                endings = ENDINGS[str(picture.format)]
    except BadInput:
        raise
    except Exception:  # Pillow raises many kinds for damaged files
        *most, last = ENDINGS
        raise BadInput(f"{name} is not a picture that can be read: send a whole {', '.join(most)} or {last}") from None
    suffix = Path(name).suffix.lower()
    return suffix if suffix in endings else endings[0]


def safe_name(name: str, ending: str) -> str:
    """A file name for a picture that calls itself `name`: no folder, nothing hidden, nothing that cannot be printed."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    printable = "".join(letter if letter.isprintable() else " " for letter in last)
    stem = Path(printable.strip(" .")).stem.strip(" .").encode(errors="ignore")[:LONGEST_NAME].decode(errors="ignore")
    return (stem.strip(" .") or "picture") + ending


def store(folder: Path, upload: Upload, ending: str) -> Path:
    """Write a picture to a new file of the folder, named after what it was called."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / safe_name(upload.name, ending)
    path, number = wanted, 1
    while os.path.lexists(path):
        number += 1
        path = wanted.with_stem(f"{wanted.stem} ({number})")
    with replacing(path) as temporary:
        temporary.write_bytes(upload.content)
    return path


@lru_cache(maxsize=CACHED)
def thumbnail(file: Path, changed: int) -> bytes:
    """A picture drawn small, as WebP.

    Args:
        changed: time of the file's last change: another time, another picture.

    Raises:
        OSError: the file is gone, or no picture any more.
    """
    with Image.open(file) as picture:
        picture.draft("RGB", (THUMBNAIL, THUMBNAIL))
        seen = as_seen(picture)
    seen.thumbnail((THUMBNAIL, THUMBNAIL))
    with io.BytesIO() as buffer:
        seen.save(buffer, "WEBP", quality=85)
        return buffer.getvalue()
