"""A picture of searches: a row per query, its best pictures from left to right, the right one framed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tools.files import is_file, replacing
from tools.pictures import small_copy
from tools.texts import printable

THUMBNAIL = 96
GAP = 8
TEXT_HEIGHT = 22
FRAME = 4
DRAWN_CHARACTERS = 200  # of a query: more than the sheet is wide
RIGHT, BACKGROUND, INK, FAINT = "#1a9850", "#ffffff", "#222222", "#888888"


class SheetRow(NamedTuple):
    """One query: its text, the files found, best first, and the file asked for (None in a free search)."""

    query: str
    found: list[Path]
    wanted: Path | None


def draw_sheet(path: Path, rows: Sequence[SheetRow], *, title: str, columns: int = 10) -> None:
    """Draw the rows to a PNG; where the right picture was not found, it stands at the end, apart."""
    extra = 1 if any(row.wanted is not None for row in rows) else 0
    width = GAP + (columns + extra) * (THUMBNAIL + GAP) + extra * 2 * GAP
    row_height = TEXT_HEIGHT + THUMBNAIL + 2 * GAP
    sheet = Image.new("RGB", (width, TEXT_HEIGHT + GAP + len(rows) * row_height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), printable(title), fill=INK, font=ImageFont.load_default(15))
    for number, row in enumerate(rows):
        top = TEXT_HEIGHT + GAP + number * row_height
        rank = row.found.index(row.wanted) + 1 if row.wanted in row.found else None
        note = (
            ""
            if row.wanted is None
            else f"   (right picture at rank {rank})"
            if rank
            else "   (not found; shown right)"
        )
        query = printable(row.query[:DRAWN_CHARACTERS])
        pen.text((GAP, top), query, fill=INK, font=ImageFont.load_default(14))
        offset = pen.textlength(query, font=ImageFont.load_default(14))
        pen.text((GAP + offset, top), note, fill=FAINT, font=ImageFont.load_default(14))
        for column, file in enumerate(row.found[:columns]):
            left = GAP + column * (THUMBNAIL + GAP)
            paste(sheet, file, left, top + TEXT_HEIGHT, frame=RIGHT if file == row.wanted else None)
        if row.wanted is not None and rank is None:
            paste(sheet, row.wanted, width - GAP - THUMBNAIL, top + TEXT_HEIGHT, frame=FAINT)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def paste(sheet: Image.Image, file: Path, left: int, top: int, *, frame: str | None) -> None:
    """Put a thumbnail of a picture file onto a sheet, with a frame of that colour; where the file has gone or cannot be
    read any more, words that say so."""
    try:
        thumbnail = small_copy(file, THUMBNAIL)
    except Exception:  # Pillow raises many kinds for damaged files
        thumbnail = Image.new("RGB", (THUMBNAIL, THUMBNAIL), FAINT)
        words = "file cannot\nbe read" if is_file(file) else "file is gone"
        centre = (THUMBNAIL // 2, THUMBNAIL // 2)
        ImageDraw.Draw(thumbnail).text(centre, words, fill=BACKGROUND, anchor="mm", font=ImageFont.load_default(13))
    box = (left - FRAME, top - FRAME, left + THUMBNAIL + FRAME - 1, top + THUMBNAIL + FRAME - 1)
    if frame is not None:
        ImageDraw.Draw(sheet).rectangle(box, outline=frame, width=FRAME)
    sheet.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + (THUMBNAIL - thumbnail.height) // 2))
