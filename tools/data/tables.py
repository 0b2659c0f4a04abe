"""Tables of pictures and captions: CSV, TSV, JSON lines, and the `.token` files of Flickr8k and Flickr30k.

Every row is read exactly or is a problem with its line: a table's reading goes on behind a row that cannot be read.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..picture_formats import PICTURE_ENDINGS
from ..texts import is_unicode
from .columns import Columns, Wanted, choose, found_in_row, plain, tell_unread
from .foreign import UTF16
from .found import Found, bad, note, picture_of
from .json_sources import Doubled, once

ENDINGS = frozenset({".csv", ".tsv", ".tab", ".txt", ".psv", ".token", ".jsonl", ".ndjson"})
JSON_LINES = frozenset({".jsonl", ".ndjson"})
SEPARATORS = (",", ";", "|", "\t")
TOKEN = re.compile(r"([^\t]+)#\d+\t([^\t]*)")  # a.jpg#0<TAB>caption
KAGGLE = ["imagename", "commentnumber", "comment"]
LATE_NUMBER = re.compile(r"\s*\d+\s+(\S.*)", re.DOTALL)  # of a line in Kaggle's results.csv that lacks its second |
NUL = "NUL character (save the file as UTF-8)"
OWN_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line


@dataclass(frozen=True)
class Layout:
    """How a table is written, and what its columns hold."""

    file: str
    names: list[str]
    columns: Columns
    separator: str
    quotes: bool
    """Whether quotation marks enclose a cell; else they are text."""
    blanks: bool
    """Whether there are blanks behind separators, which are no text."""
    kaggle: bool
    """Whether this is Kaggle's results.csv of Flickr30k: a picture's name, the caption's number, the caption."""

    def where(self, number: int) -> str:
        """A line, counted from 0, as a message names it."""
        return f"{self.file}, line {number + 1}"


def read_table(path: Path, wanted: Wanted) -> Iterator[Found]:
    """A table in which one row is a caption, or all captions of a picture.

    Raises:
        BadInput: nothing of it can be read; the message says what its columns are taken for.
    """
    if path.suffix.lower() in JSON_LINES:
        yield from read_json_lines(path, wanted)
        return
    lines = _lines(path)
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise BadInput(f"{path} is empty: it needs a header, such as image,caption")
    header = lines[first]
    if path.suffix.lower() == ".token" or TOKEN.fullmatch(header.rstrip("\r\n")):
        yield from _read_token(path.name, lines)
        return
    own = OWN_SEPARATOR.fullmatch(header)
    first += 1 if own else 0
    layout = _layout(path, lines[first] if first < len(lines) else "", own[1] if own else "", wanted)
    tell_unread(layout.names, layout.columns, path.name)
    yield from (_read_quoted if layout.quotes else _read_unquoted)(lines, first + 1, layout)


def read_json_lines(path: Path, wanted: Wanted) -> Iterator[Found]:
    """One JSON object a line, whose keys are the columns."""
    rows = [(f"{path.name}, line {number}", line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    yield from found_in_objects([(where, _parsed(line)) for where, line in rows], wanted, path.name)


def found_in_objects(rows: Sequence[tuple[str, Any]], wanted: Wanted, name: str) -> Iterator[Found]:
    """Objects as the rows of a table; a text in an object's place says what is wrong with the row.

    Raises:
        BadInput: no object has a picture's name or a caption.
    """
    names = list(dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row))
    columns = choose(names, wanted, name) if names else None
    if columns is not None:
        tell_unread(names, columns, name)
    for where, row in rows:
        if isinstance(row, str):
            yield bad(where, row)
        elif isinstance(row, Doubled):
            yield bad(f"{where}: {row.key}", "key that stands twice")
        elif not isinstance(row, dict) or columns is None:
            yield bad(where, "no JSON object with a picture and a caption")
        else:
            yield found_in_row([row.get(key) for key in names], columns, where, cells=False)


def _parsed(line: str) -> Any:
    """A line's JSON value; for what is none, a text that says why."""
    if not is_unicode(line):
        return "line that is not UTF-8 (save the file as UTF-8)"
    try:
        value = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError:
        return "line that is not JSON"
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of brackets
        return "line that is not readable JSON"
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        return "line that is a list of JSON objects (name the file *.json)"
    return value if isinstance(value, dict) else "line that is no JSON object"


def _lines(path: Path) -> list[str]:
    """The lines of a text file with their ends; bytes that are not UTF-8 become lone surrogates."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in UTF16 else "utf-8-sig"
    newline = "\n" if path.suffix.lower() in JSON_LINES else ""
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline=newline) as file:
            return list(file)
    except UnicodeDecodeError:
        raise BadInput(f"{path} begins as UTF-16 and is not: save it as UTF-8") from None


def _layout(path: Path, header: str, own: str, wanted: Wanted) -> Layout:
    """How a table is written, told by its header: the separator is the one that shows the columns."""
    if path.suffix.lower() in (".tsv", ".tab"):
        separators: tuple[str, ...] = ("\t",)
    else:
        separators = (own,) if own else SEPARATORS
    refusals: list[tuple[int, BadInput]] = []
    for separator in separators:
        kaggle = separator == "|" and [plain(name) for name in header.split("|")] == KAGGLE
        quotes = not kaggle and (separator != "\t" or path.suffix.lower() == ".csv")
        blanks = f"{separator} " in header and separator != "\t"
        names = _header_cells(header, path, separator, quotes=quotes, blanks=blanks)
        if pictures := [name for name in names if Path(name.strip()).suffix.lower() in PICTURE_ENDINGS]:
            first = f"{path}, line 1: {pictures[0].strip()} is a picture and no column's name"
            raise BadInput(f"{first}: put a header above it, such as image{separator}caption")
        try:
            columns = choose(names, wanted, f"{path}, line 1")
        except BadInput as error:
            refusals.append((len(names), error))
        else:
            return Layout(path.name, names, columns, separator, quotes, blanks, kaggle)
    raise max(refusals, key=lambda refusal: refusal[0])[1]


def _header_cells(header: str, path: Path, separator: str, *, quotes: bool, blanks: bool) -> list[str]:
    if not quotes:
        return header.rstrip("\r\n").split(separator)
    try:
        return next(csv.reader([header], delimiter=separator, strict=True, skipinitialspace=blanks), [])
    except csv.Error as error:
        raise BadInput(f"{path}, line 1: the header cannot be read ({error}): mend it") from None


def _read_quoted(lines: list[str], first: int, layout: Layout) -> Iterator[Found]:
    """Rows of a CSV file. Behind a row that cannot be read, reading goes on at the line after the row's first."""
    doubtful = first  # up to this line, a quotation mark may belong to one that was opened before
    while first < len(lines):
        where = layout.where(first)
        ahead = (lines[number] for number in range(first, len(lines)))
        reader = csv.reader(ahead, delimiter=layout.separator, strict=True, skipinitialspace=layout.blanks)
        try:
            cells = next(reader)
            row = lines[first : first + reader.line_num]
            problem = _swallowed_rows(row, layout)
        except csv.Error as error:
            problem = _explained(error, reader.line_num)
        if problem:
            yield bad(where, problem)
            doubtful = max(doubtful, first + reader.line_num)
            first += 1
            continue
        first += reader.line_num
        if problem := _wrong_text("".join(row)) or _wrong_blank(row, layout, cells):
            yield bad(where, problem)
        elif row[-1].endswith("\r") and lines[0].endswith("\n"):
            yield bad(where, "line break within a cell that is not quoted")
            first = next(
                (number for number in range(first, len(lines)) if lines[number - 1].endswith("\n")), len(lines)
            )
        elif first <= doubtful and any('"' in cell and _as_quoted(cell) not in "".join(row) for cell in cells):
            yield bad(where, "quotation mark that may close one of a row before")
        elif any(cells):  # what spreadsheets write of rows with nothing in any cell is a blank line
            yield _found(cells, layout, where)


def _as_quoted(cell: str) -> str:
    doubled = cell.replace('"', '""')
    return f'"{doubled}"'


def _swallowed_rows(row: list[str], layout: Layout) -> str:
    """Whether a quoted cell runs over lines that name a picture where a row does."""
    for line in row[1:]:
        cells = line.split(layout.separator)
        if layout.columns.image < len(cells) > 1:
            name = cells[layout.columns.image].strip(' "\r\n')
            if Path(name).suffix.lower() in PICTURE_ENDINGS:
                return "quotation mark that is opened and not closed before the next rows"
    return ""


def _explained(error: csv.Error, read: int) -> str:
    """A csv.Error in words; `read` lines had been read when it came."""
    if "NUL" in str(error):
        return NUL
    if read > 1 or "unexpected end" in str(error):
        return "quotation mark that is opened and not closed"
    if "field limit" in str(error):
        return f"cell of more than {csv.field_size_limit():,} characters"
    return 'quotation mark within a quoted cell (write it twice: "")'


def _wrong_text(text: str) -> str:
    if not is_unicode(text):
        return "line that is not UTF-8 (save the file as UTF-8)"
    return NUL if "\0" in text else ""


def _wrong_blank(row: list[str], layout: Layout, cells: list[str]) -> str:
    """Whether a blank keeps a quotation mark from opening a cell, which most programs that write it do not mean."""
    if layout.blanks or not re.search(re.escape(layout.separator) + ' +"', "".join(row)):
        return ""
    as_meant = next(csv.reader(iter(row), delimiter=layout.separator, skipinitialspace=True))
    if [cell.lstrip(" ") for cell in cells] == [cell.lstrip(" ") for cell in as_meant]:
        return ""
    return "blank before the quotation mark that opens a cell (leave the blank out)"


def _read_unquoted(lines: list[str], first: int, layout: Layout) -> Iterator[Found]:
    """Rows of a file in which quotation marks are text, as in TSV."""
    quoted = 0
    for number, line in enumerate(_whole_lines(lines[first:]), first):
        text = line.rstrip("\r\n")
        cells = text.split(layout.separator)
        if not any(cells):
            continue
        if problem := _wrong_text(text):
            yield bad(layout.where(number), problem)
            continue
        captions = [cells[place] for place in layout.columns.captions if place < len(cells)]
        quoted += any(re.fullmatch(r'".*"', caption) is not None for caption in captions)
        yield _found(cells, layout, layout.where(number))
    if quoted:
        note(f"{layout.file}: captions in quotation marks, which are read as part of the text: {quoted:,}")


def _whole_lines(lines: list[str]) -> Iterator[str]:
    """Lines that end with a line feed: a carriage return alone, in a file that has line feeds, is text."""
    if not any(line.endswith("\n") for line in lines):
        yield from lines
        return
    begun = ""
    for line in lines:
        begun += line
        if not line.endswith("\r"):
            yield begun
            begun = ""
    if begun:
        yield begun


def _found(cells: list[str], layout: Layout, where: str) -> Found:
    if len(cells) > len(layout.names):
        advice = "put texts with separators in quotation marks" if layout.quotes else "leave separators out of texts"
        return bad(where, f"row with more cells than the header ({advice})")
    cells = [cell.strip() for cell in cells] if layout.blanks else cells
    if layout.kaggle and len(cells) == 2 and (late := LATE_NUMBER.fullmatch(cells[1])):
        note(f"{where}: a separator is missing, read as the caption: {late[1]}")
        cells = [cells[0], "", late[1]]
    found = found_in_row(cells, layout.columns, where, cells=True)
    if len(cells) < len(layout.names) and not found.problem:
        return bad(where, "row with fewer cells than the header")
    return found


def _read_token(name: str, lines: list[str]) -> Iterator[Found]:
    for number, line in enumerate(_whole_lines(lines), 1):
        where, text = f"{name}, line {number}", line.rstrip("\r\n")
        if problem := _wrong_text(text):
            yield bad(where, problem)
        elif match := TOKEN.fullmatch(text):
            yield picture_of(match[1], [match[2]], where, joins=True)
        elif text.strip():
            yield bad(where, "line that is not PICTURE#NUMBER, a tab, and a caption")
