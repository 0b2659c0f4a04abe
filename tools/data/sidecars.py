"""Sidecar files: a folder in which a.jpg has its captions in a.txt, a.caption or a.json beside it."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import is_file
from ..texts import plural
from .foreign import refuse_foreign, tables_in
from .found import Found, bad, note, picture_of, some
from .json_sources import Doubled, once, stated_captions

TEXT_ENDINGS = (".txt", ".caption")
SIDECARS = (*TEXT_ENDINGS, ".json")


def read_sidecars(files: list[str], images: Path, source: Path) -> Iterator[Found]:
    """Pictures with the captions of the files beside them: each line of a text file is a caption.

    Args:
        files: pictures, relative to `images`.
        source: folder, `images` or below it, whose pictures are read.

    Raises:
        BadInput: `source` does not lie in `images`, or no picture has such a file.
    """
    if not source.resolve().is_relative_to(images.resolve()):
        refuse_foreign(source, nothing_else=True)
        raise BadInput(f"--source {source} is a folder outside --images {images}: name a folder of pictures and texts")
    below = images / source.resolve().relative_to(images.resolve())
    found = [(file, _beside(images / file)) for file in files if (images / file).is_relative_to(below)]
    if not any(texts for _, texts in found):
        refuse_foreign(source, nothing_else=True)
        tables = " ".join(shlex.quote(str(path)) for path in tables_in(source))
        advice = (
            f"name the tables, --source {tables}" if tables else "for pictures without captions, leave --source out"
        )
        raise BadInput(
            f"--source {source} has no shard, no parquet file, and no picture with a text file beside it: {advice}"
        )
    long = []
    for file, texts in found:
        row = _read(file, texts)
        long += [texts[0].name] if texts and len(row.captions) > 1 and texts[0].suffix.lower() in TEXT_ENDINGS else []
        yield row
    if long:
        note(f"{source}: {plural(len(long), 'text file')} of several lines, each line is a caption: {some(long)}")
    used = {path for _, texts in found for path in texts}
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.suffix.lower() in SIDECARS)
    other = [name for name in names if below / name not in used]
    if other:
        note(f"{source}: text files that belong to no picture and are not read: {len(other):,} ({some(other)})")


def count_sidecars(files: list[str], images: Path) -> int:
    """Number of pictures that have a text file beside them."""
    return sum(any(path.suffix.lower() in TEXT_ENDINGS for path in _beside(images / file)) for file in files)


def _beside(picture: Path) -> list[Path]:
    """The text files of a picture, their endings in small letters or else in capitals."""
    spellings = ((picture.with_suffix(ending), picture.with_suffix(ending.upper())) for ending in SIDECARS)
    found = (next((path for path in each if is_file(path)), None) for each in spellings)
    return [path for path in found if path is not None]


def _read(file: str, texts: list[Path]) -> Found:
    captions: list[Any] = []
    split = None
    if not texts:
        return bad(file, "picture without a text file beside it")
    for path in texts:
        where = str(Path(file).with_name(path.name))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            return bad(where, "file that is not UTF-8 (save it as UTF-8)")
        if path.suffix.lower() in TEXT_ENDINGS:
            captions += [line for line in text.splitlines() if line.strip()]
            continue
        try:
            value = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError):
            return bad(where, "file that is not JSON")
        if not isinstance(value, dict) or isinstance(value, Doubled):
            return bad(where, "file without one JSON object, or with a key that stands twice")
        split = value.get("split") or None
        captions += [caption for caption in stated_captions(value) or [] if caption not in captions]
    if not captions:
        return bad(str(Path(file).with_name(texts[0].name)), "picture whose text file is empty")
    return picture_of(file, captions, file, split)
