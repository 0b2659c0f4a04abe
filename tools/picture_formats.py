"""The formats that pictures may have, with the endings of their files: one list for folders, shards and uploads.

HEIC and JPEG XL are read where `pillow-heif` and `pillow-jxl-plugin` are installed.
"""

import importlib
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import Image

BUILT_IN = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),  # Pillow calls one with a second picture behind it MPO
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
OPTIONAL = {"HEIF": (".heic", ".heif", ".hif", ".heics", ".heifs"), "JXL": (".jxl",)}
PACKAGES = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}  # as pip calls them
NAMES = {"HEIF": "HEIC", "JXL": "JPEG XL", "JPEG2000": "JPEG 2000", "WEBP": "WebP"}  # as people call formats
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")
SHORT_STARTS = {"PPM", "DIB"}  # which texts may have, too
START_BYTES = 16  # of a file, which tell these two formats


def _register() -> dict[str, str]:
    """Let Pillow read the optional formats; for each of the others what to do about it."""
    missing = {}
    for name, module in (("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")):
        if find_spec(module) is None:
            missing[name] = install_command(PACKAGES[name])
            continue
        try:
            plugin = importlib.import_module(module)  # pillow_jxl registers itself
            if name == "HEIF":
                plugin.register_heif_opener()
        except (ImportError, OSError) as error:  # for example a library that the system lacks
            missing[name] = f"{PACKAGES[name]} does not load: {error}"
    return missing


def install_command(package: str) -> str:
    """The command that installs a package, or `-r` with a file of them, into the Python that runs."""
    python = shlex.quote(sys.executable)
    try:
        metadata.distribution("pip")  # find_spec("pip") would make setuptools leave distutils to the standard library
    except metadata.PackageNotFoundError:
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"


MISSING = _register()
FORMATS = {name: endings for name, endings in (BUILT_IN | OPTIONAL).items() if name not in MISSING}
"""Pillow's names of the formats that are read, with their endings, the usual one first. Pillow knows more, and runs
Ghostscript on one of them."""
PICTURE_ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
UNREAD_ENDINGS = {ending: name for name in MISSING for ending in OPTIONAL[name]}
"""Endings of pictures that need a package, with their format."""


def format_of(picture: Image.Image) -> str:
    """The format of an open picture, a key of `FORMATS`."""
    return "JPEG" if picture.format == "MPO" else str(picture.format)


def called(name: str) -> str:
    """What people call a format, a key of `FORMATS`."""
    return NAMES.get(name, name)


def identify(file: Path | IO[bytes]) -> Image.Image:
    """Open a picture of a format that is read, without decoding it.

    Raises:
        UnidentifiedImageError: it is none; see `unidentified`.
        OSError: the file cannot be read. Damaged pictures raise many other kinds.
    """
    return Image.open(file, formats=list(FORMATS))


def unidentified(file: Path | bytes) -> str:
    """Why a file, or its content, is no picture that `identify` knows.

    >>> unidentified(b"a text"), unidentified(b"GIF89a and no more")
    ('file is no picture', 'GIF file that is damaged or of a kind that is not read')
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            start = opened.read(START_BYTES)
    else:
        start = file[:START_BYTES]
    if name := _optional_format(start):
        return f"{NAMES[name]} picture: {MISSING[name]}"
    Image.init()
    for name in FORMATS.keys() - SHORT_STARTS if len(start) == START_BYTES else ():
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(start) is True:
            return f"{called(name)} file that is damaged or of a kind that is not read"
    return "file is no picture"


def _optional_format(start: bytes) -> str:
    """The missing format of a file that starts with these bytes, if any."""
    is_heif = start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS
    name = "HEIF" if is_heif else "JXL" if start.startswith(JXL_STARTS) else ""
    return name if name in MISSING else ""
