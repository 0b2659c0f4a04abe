"""Which columns of a table hold what, and what a cell holds."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .found import Found, bad, note

IMAGE_NAME = re.compile(r"(image|img)(name|path|file|filename)?|picture|photo|file|filename|filepath|path")
CAPTION_NAME = re.compile(r"(caption|text|title|comment|sentence|description|raw|sentencesraw)s?(\d*)")
OPTIONS = "name the columns with --image-column and --caption-column"


@dataclass(frozen=True)
class Columns:
    """Places of the columns that are read."""

    image: int
    captions: tuple[int, ...]
    split: int | None = None
    file: int | None = None
    """Of the path, where the image column holds ids."""


@dataclass(frozen=True)
class Wanted:
    """Columns that the user names; without them they are recognised by their names."""

    image: str | None = None
    captions: tuple[str, ...] = ()


def plain(name: Any) -> str:
    """A column's name without capitals, blanks and punctuation.

    >>> plain(" Image_Name"), plain("caption.1")
    ('imagename', 'caption1')
    """
    return re.sub(r"[\W_]+", "", str(name)).casefold()


def choose(names: Sequence[str], wanted: Wanted, where: str) -> Columns:
    """Find the columns of picture, captions and split by their names.

    Raises:
        BadInput: there are none, or several that could be meant; the message names all columns.
    """
    image, file = _image_columns(names, wanted, where)
    if wanted.captions:
        captions = tuple(place for name in wanted.captions for place in _named(names, name, "--caption-column", where))
    else:
        captions = _caption_columns(names, where)
    split = [place for place, name in enumerate(names) if plain(name) == "split"]
    if len(split) > 1:
        raise BadInput(f"{where}: the column {names[split[0]]} stands {len(split)} times: leave one of them")
    return Columns(image, captions, split[0] if split else None, file)


def tell_unread(names: Sequence[str], columns: Columns, where: str, *, also: int | None = None) -> None:
    """Name the columns that are not read, in one line; `also` is read for another purpose."""
    read = {columns.image, columns.file, columns.split, *columns.captions, also}
    unread = [name.strip() or f"number {place + 1}" for place, name in enumerate(names) if place not in read]
    if unread:
        note(f"{where}: columns that are not read: {', '.join(unread)}")


def found_in_row(values: Sequence[Any], columns: Columns, where: str, *, cells: bool) -> Found:
    """One row as a picture with its captions, or with what is wrong.

    Args:
        values: by column; None for what is not there.
        cells: the values are the texts of a table's cells, which may hold lists.
    """

    def value(place: int | None) -> Any:
        return None if place is None or place >= len(values) else values[place]

    image, file, split = value(columns.image), value(columns.file), value(columns.split)
    image, file = (str(each) if type(each) is int else each for each in (image, file))
    if image is None or (isinstance(image, str) and not image.strip()):
        return bad(where, "row without a picture")
    if not isinstance(image, str) or not isinstance(file, str | None):
        return bad(where, "a picture's name that is no text")
    found: list[Any] = []
    stated = [value(place) for place in columns.captions if value(place) is not None]
    if not stated:
        return bad(where, "row without a caption")
    for cell in stated:
        texts = texts_in_cell(cell) if cells else cell if isinstance(cell, list) else [cell]
        if texts is None:
            return bad(where, "a list in a cell that is neither a JSON nor a Python list of texts")
        known = found if isinstance(cell, list) else []  # `captions` often repeats `caption`
        found = found + [text for text in texts if text not in known]
    if not found:
        return bad(where, "row without a caption")
    return Found(image, file or image, split, found, where, joins=True)


def texts_in_cell(cell: str) -> list[str] | None:
    """The captions in one cell: its text, or those of the JSON or Python list that it holds; None for a broken list.

    A text in brackets that is no list stays a text. An array as numpy prints it, without commas, is a broken list.

    >>> texts_in_cell('["one", "two"]'), texts_in_cell("['one' 'two']"), texts_in_cell("[a man]")
    (['one', 'two'], None, ['[a man]'])
    """
    text = cell.strip()
    if re.match(r"array\(\[", text):  # as numpy writes it
        return None
    if re.match(r"\[\s*[\"'][^\]]*$", text):  # whose end is cut off
        return None
    if not (text.startswith("[") and text.endswith("]")):
        return [cell]
    value: Any = None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_list(text)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    return None if re.match(r"\[\s*[\"']", text) or isinstance(value, list) else [cell]


def _python_list(text: str) -> list[Any] | None:
    """A list that Python wrote; None where two texts stand beside each other, which Python would make into one."""
    try:
        value = ast.literal_eval(text)
        tokens = [each.type for each in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, list) and tokens.count(tokenize.STRING) == len(value) else None


def _named(names: Sequence[str], wanted: str, option: str, where: str) -> list[int]:
    exact = [place for place, name in enumerate(names) if name.strip() == wanted.strip()]
    places = exact or [place for place, name in enumerate(names) if plain(name) == plain(wanted)]
    if not places:
        raise BadInput(f"{where}: {option} {wanted}: the columns are {_shown(names)}")
    return places


def _image_columns(names: Sequence[str], wanted: Wanted, where: str) -> tuple[int, int | None]:
    """Places of the picture's id and, where it is in a column of its own, of its file."""
    if wanted.image is not None:
        places = _named(names, wanted.image, "--image-column", where)
    else:
        places = [place for place, name in enumerate(names) if IMAGE_NAME.fullmatch(plain(name))]
        known = {plain(names[place]): place for place in places}
        if len(places) == 2 and known.keys() == {"image", "file"}:
            return known["image"], known["file"]
    if not places:
        raise BadInput(f"{where}: no column names the pictures; the columns are {_shown(names)}: {OPTIONS}")
    if len(places) > 1 and len({plain(names[place]) for place in places}) == 1:
        raise BadInput(f"{where}: the column {names[places[0]].strip()} stands {len(places)} times: rename the others")
    if len(places) > 1:
        found = ", ".join(names[place].strip() for place in places)
        raise BadInput(f"{where}: several columns could name the picture ({found}): name one with --image-column")
    return places[0], None


def _caption_columns(names: Sequence[str], where: str) -> tuple[int, ...]:
    kinds: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if match := CAPTION_NAME.fullmatch(plain(name)):
            kinds.setdefault(match[1], []).append(place)
    if not kinds:
        raise BadInput(f"{where}: no column holds captions; the columns are {_shown(names)}: {OPTIONS}")
    if len(kinds) > 1:
        found = ", ".join(names[place].strip() for places in kinds.values() for place in places)
        raise BadInput(f"{where}: several columns could hold captions ({found}): name them with --caption-column")
    (places,) = kinds.values()
    return tuple(places)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(name.strip() or '""' for name in names)
