"""Picture files: which files of a folder are pictures, whether they can be read, and what they show."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .logs import progress
from .texts import is_unicode

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# What a file may hold, whatever it is called. Pillow knows more, and runs Ghostscript on one of them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM")
CHECK_SIZE = (64, 64)  # JPEGs are decoded at about this size when checked: the whole file is read, a tenth of the work
MOST_OBLONG = 200  # times as long as wide: a picture beyond that would be enlarged to millions of pixels
ORIENTATION = 0x0112  # EXIF's tag
WHITE = (255, 255, 255, 255)


def open_picture(path: Path) -> Image.Image:
    """Decode a picture as a person sees it: in RGB with 8 bits a channel, turned as its EXIF says, transparent parts on
    white; of an animation the first frame.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path, formats=FORMATS) as picture:
        return as_seen(picture)


def as_seen(picture: Image.Image) -> Image.Image:
    """What `open_picture` makes of an open picture."""
    if is_turned(picture):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, of which Pillow would make white
        levels = np.asarray(picture)
        shift = 8 if picture.mode != "I" or levels.max(initial=0) > 255 else 0
        picture = Image.fromarray((levels >> shift).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB")


def is_turned(picture: Image.Image) -> bool:
    """Whether its EXIF says that it is to be turned or mirrored."""
    try:
        return picture.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF says nothing; Pillow raises many kinds
        return False


def pictures_below(folder: Path) -> list[str]:
    """Paths, relative to the folder and in their order, of all pictures below it; links to folders are not followed."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_ENDINGS)
    return [str(path.relative_to(folder)) for path in paths if path.is_file()]


def find_unreadable(files: Sequence[str], *, workers: int, folder: Path = Path()) -> dict[str, str]:
    """Open and decode pictures: for each of `files` why it cannot be used, or nothing.

    Args:
        folder: what the files are relative to, where they are not absolute.
        workers: processes that open them; 0 for this one.
    """
    check = partial(_why_unreadable, folder)
    if not workers:
        return {file: check(file) for file in files}
    with ProcessPoolExecutor(workers) as pool:
        reasons = progress(pool.map(check, files, chunksize=32), "checking", total=len(files), unit="picture")
        return dict(zip(files, reasons, strict=True))


def _why_unreadable(folder: Path, file: str) -> str:
    path = folder / file
    if not is_unicode(file):
        return "file name not UTF-8"
    try:
        if not path.is_file():
            return "link that leads nowhere" if path.is_symlink() else "picture missing"
        if not path.stat().st_size:
            return "picture file is empty"
        with Image.open(path, formats=FORMATS) as picture:
            if max(picture.size) > MOST_OBLONG * min(picture.size):
                return f"picture more than {MOST_OBLONG} times as long as wide"
            picture.draft("RGB", CHECK_SIZE)
            picture.load()
    except PermissionError:
        return "no permission to read the picture"
    except UnidentifiedImageError:
        return "file is no picture"
    except Image.DecompressionBombError:
        return f"picture of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    except Exception as error:  # Pillow raises many kinds for damaged files
        return f"picture unreadable ({type(error).__name__})"
    return ""
