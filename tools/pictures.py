"""Picture files: whether they can be read, and what they show."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import BadInput
from .logs import progress
from .picture_formats import identify, unidentified
from .picture_listing import Listing, list_pictures
from .texts import is_unicode, plural

__all__ = [
    "MOST_OBLONG",
    "Listing",
    "as_seen",
    "check_picture",
    "find_unreadable",
    "is_turned",
    "list_pictures",
    "open_picture",
    "picture_in",
    "read_again",
    "reading_again",
    "small_copy",
    "why_unreadable",
]

CHECK_SIZE = (64, 64)  # JPEGs are decoded at about this size when checked: the whole file is read, a tenth of the work
MOST_OBLONG = 200  # times as long as wide: a picture beyond that would be enlarged to millions of pixels
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # EXIF's values beside 1, upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_MEANING = 258, 262  # TIFF's tags: bits of a value; 0 where the smallest value is white
WHITE = (255, 255, 255, 255)
FIRST_FRAME = "of several frames or pages: the first is taken"
STRETCHED = "of grey values in no usual range: they are stretched, the lowest to black and the highest to white"


def open_picture(path: Path) -> Image.Image:
    """Decode a picture as a person sees it: in RGB with 8 bits a channel, turned as its EXIF says, transparent parts on
    white; of an animation the first frame.

    Raises:
        OSError: it cannot be read. Damaged pictures raise many other kinds.
    """
    with identify(path) as picture:
        return as_seen(picture)


def small_copy(path: Path, side: int) -> Image.Image:
    """What `open_picture` gives, drawn small: the longer side has at most `side` pixels.

    Raises:
        OSError: as `open_picture`.
    """
    with identify(path) as picture:
        picture.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at about that size
        small = as_seen(picture)
    small.thumbnail((side, side))
    return small


def read_again(path: Path, advice: str) -> Image.Image:
    """`open_picture`, of a picture that could be read before; as `reading_again`."""
    with reading_again(path, advice):
        return open_picture(path)


@contextmanager
def reading_again(path: Path, advice: str) -> Iterator[None]:
    """Inside it a picture is read that could be read before.

    Raises:
        BadInput: now it cannot; `advice` says what to do.
    """
    try:
        yield
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BadInput(f"{path} cannot be read any more ({why_unreadable(error)}): {advice}") from None


def as_seen(picture: Image.Image) -> Image.Image:
    """What `open_picture` makes of an open picture."""
    picture.load()  # before its EXIF: of a PNG that decodes it too, and after an error Pillow gives black pixels
    turn = TURNS.get(_orientation(picture))
    if picture.mode.startswith(("I", "F")):  # more than 8 bits, of which Pillow would make white
        picture = _grey_in_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    seen = picture.convert("RGB")
    return seen if turn is None else seen.transpose(turn)


def is_turned(picture: Image.Image) -> bool:
    """Whether its EXIF says that it is to be turned or mirrored."""
    return _orientation(picture) in TURNS


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, which decoding may settle."""
    if picture.format == "TIFF":
        picture.load()  # which turns it
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing; Pillow raises many kinds
        return 1


def _grey_in_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of one channel of 16 or 32 bits, or of floats, in mode L."""
    values = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    black, white = _grey_range(values, bits=tags.get(TIFF_BITS, (16,))[0])
    if tags.get(TIFF_MEANING) == 0:
        black, white = white, black
    numbers = values.astype(np.float32 if values.dtype == np.uint16 else np.float64)
    levels = (np.nan_to_num(numbers, nan=black) - black) * (255 / ((white - black) or 1))
    levels[values == picture.info.get("transparency")] = 255
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def _grey_range(values: NDArray[np.generic], *, bits: int = 16) -> tuple[float, float]:
    """The values that are black and white: 0 and 1, 255, or the highest of 16 bits, whatever all values fit into first;
    else the lowest and the highest.

    Args:
        values: (height, width) integers or floats.
        bits: of a value where it has fewer than 16.
    """
    low, high = _extremes(values)
    if values.dtype == np.uint16:
        return 0.0, float(2**bits - 1)
    usual = (1.0, 255.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    return next(((0.0, white) for white in usual if low >= 0 and high <= white), (low, high))


def _extremes(values: NDArray[np.generic]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


class Checked(NamedTuple):
    """What opening a picture has shown."""

    reason: str
    """Why it cannot be used, or nothing."""
    notes: tuple[str, ...] = ()
    """What is not as in the file, among `FIRST_FRAME` and `STRETCHED`."""


def find_unreadable(files: Sequence[str], *, workers: int, folder: Path = Path()) -> dict[str, str]:
    """Open and decode pictures: for each of `files` why it cannot be used, or nothing. A line is printed about pictures
    that are not used as they are, such as animations.

    Args:
        folder: what the files are relative to, where they are not absolute.
        workers: processes that open them; 0 for this one.
    """
    check = partial(check_picture, folder)
    if not workers:
        checked = [check(file) for file in files]
    else:
        with ProcessPoolExecutor(workers) as pool:
            opened = pool.map(check, files, chunksize=32)
            checked = list(progress(opened, "checking", total=len(files), unit="picture"))
    for note, count in sorted(Counter(note for each in checked for note in each.notes).items()):
        print(f"{plural(count, 'picture')} {note}")
    return {file: each.reason for file, each in zip(files, checked, strict=True)}


def why_unreadable(error: Exception) -> str:
    """What an error on opening or decoding a picture says, without numbers of bytes: equal faults are to be counted."""
    if isinstance(error, PermissionError):
        return "no permission to read the picture"
    if isinstance(error, FileNotFoundError):
        return "picture missing"
    if isinstance(error, Image.DecompressionBombError):
        return f"picture of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):  # which names the whole path
        return "picture damaged, or of a kind that is not read"
    if isinstance(error, MemoryError):
        return "not enough memory to decode the picture"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = re.sub(r"\s*\([^()]*\d[^()]*\)", "", said.partition("\n")[0])
    return f"picture unreadable ({said or type(error).__name__})"


def check_picture(folder: Path, file: str) -> Checked:
    """Open and decode one picture; `file` is relative to the folder, or absolute."""
    path = folder / file
    if not is_unicode(file):
        return Checked("file name not UTF-8")
    try:
        if not path.is_file():
            return Checked(_why_no_file(path))
        if not path.stat().st_size:
            return Checked("picture file is empty")
        with identify(path) as picture:
            if max(picture.size) > MOST_OBLONG * min(picture.size):
                return Checked(f"picture more than {MOST_OBLONG} times as long as wide")
            picture.draft("RGB", CHECK_SIZE)
            as_seen(picture)
            return Checked("", tuple(_notes(picture)))
    except UnidentifiedImageError:
        return Checked(unidentified(path))
    except Exception as error:  # Pillow raises many kinds for damaged files
        return Checked(why_unreadable(error))


class Decoded(NamedTuple):
    """What the bytes of a picture give."""

    picture: Image.Image | None
    """As `open_picture` gives it."""
    reason: str
    """Why there is none, in the words of `check_picture`."""


def picture_in(content: bytes) -> Decoded:
    """Decode a picture from its bytes. What `check_picture` would refuse as a file is refused here."""
    if not content:
        return Decoded(None, "picture file is empty")
    try:
        with identify(io.BytesIO(content)) as picture:
            if max(picture.size) > MOST_OBLONG * min(picture.size):
                return Decoded(None, f"picture more than {MOST_OBLONG} times as long as wide")
            return Decoded(as_seen(picture), "")
    except UnidentifiedImageError:
        return Decoded(None, unidentified(content))
    except Exception as error:  # Pillow raises many kinds for damaged files
        return Decoded(None, why_unreadable(error))


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder, not a picture"
    if path.exists():
        return "special file, not a picture"
    return "link that leads nowhere" if path.is_symlink() else "picture missing"


def _notes(picture: Image.Image) -> list[str]:
    """What of a decoded picture is not as in its file."""
    notes = [FIRST_FRAME] if _has_frames(picture) else []
    if picture.mode in ("I", "F"):
        values = np.asarray(picture)
        if _grey_range(values)[1] not in (1.0, 255.0, 65535.0):
            notes.append(STRETCHED)
    return notes


def _has_frames(picture: Image.Image) -> bool:
    """Whether there are frames or pages behind the first; a JPEG's second picture is its preview."""
    try:
        return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
    except Exception:  # what is damaged lies behind the first frame; Pillow raises many kinds
        return False
