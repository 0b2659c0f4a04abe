"""Picture files: which files of a folder are pictures, and whether they can be read."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from .logs import progress

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
CHECK_SIZE = (64, 64)  # JPEGs are decoded at about this size when checked: the whole file is read, a tenth of the work


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


def printable(name: str) -> str:
    """A file name as every terminal takes it: bytes that are not UTF-8 stand as \\udcXX."""
    return name.encode(errors="backslashreplace").decode()


def _why_unreadable(folder: Path, file: str) -> str:
    path = folder / file
    if printable(file) != file:
        return "file name not UTF-8"
    if not path.is_file():
        return "picture missing"
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", CHECK_SIZE)
            picture.load()
    except Exception as error:  # Pillow raises many kinds for damaged files
        return f"picture unreadable ({type(error).__name__})"
    return ""
