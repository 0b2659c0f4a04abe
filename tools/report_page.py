"""A report as one HTML file: everything is in it, nothing is fetched, no script runs; light, dark, narrow and printed.

    page = Page("emoji", lead="…")
    page.add(Section("recall", "Recall", [figure(images, "…"), table(rows)]))
    page.write(folder / "report.html")

Functions return HTML. Every text that goes in is escaped, but for what `Html` says is HTML already.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .files import replacing
from .pictures import small_copy, why_unreadable
from .plots import DPI, Images
from .texts import as_html

THUMBNAIL = 112  # pixels, shown at up to two thirds of it: sharp on fine screens
GONE = "#888888"  # in place of a picture that cannot be read

# Nothing may be loaded but what stands in the file itself; pictures do.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1b1f24; --faint: #59636e; --line: #d8dde3; --soft: #f4f6f8;
  --right: #0b7a5b; --mark: #0072b2; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14171b; --ink: #e8eaed; --faint: #a3abb5;
  --line: #343a42; --soft: #1c2026; --right: #2fc49a; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--mark); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .75rem 0; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.scroll img { min-width: 38rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); }
th.number, td.number { text-align: right; padding: .25rem .7rem .25rem .3rem; }
tr.begins td { border-top: 2px solid var(--faint); }
td.free { white-space: normal; min-width: 12rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; font-size: .86em; }
.query { border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1rem; margin: 1rem 0;
  background: var(--soft); }
.query h4 { margin: 0 0 .2rem; font-size: 1rem; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; padding: 0; list-style: none; }
.pictures li { width: 76px; font-size: .75rem; line-height: 1.3; color: var(--faint); text-align: center; }
.pictures img { display: block; width: 76px; height: 76px; object-fit: contain; background: #fff; border-radius: 3px;
  border: 1px solid var(--line); }
.pictures .right { color: var(--right); font-weight: 600; }
.pictures .right img { outline: 3px solid var(--right); outline-offset: 0; }
.pictures .apart { margin-right: .9rem; }
.share { display: inline-block; width: 5rem; height: .6rem; background: var(--line); margin-right: .45rem; }
.share i { display: block; height: 100%; background: var(--mark); print-color-adjust: exact; }
.level { display: grid; grid-template-columns: 10.5rem 1fr; gap: 0 1rem; align-items: center; }
.level .pictures { margin: .25rem 0; gap: .4rem; }
.level .pictures li, .level .pictures img { width: 60px; }
.level .pictures img { height: 60px; }
.level p { margin: 0; font-size: .85rem; line-height: 1.4; }
.path { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1rem 0 1.5rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--faint); }
@media (max-width: 40rem) { main { padding: 1rem .8rem 3rem; } .level { grid-template-columns: 1fr; }
  .level p { margin-top: .5rem; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 10.5pt; } nav { display: none; }
  figure, .query, .path, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } .scroll img { min-width: 0; }
  table { font-size: 8pt; } th, td { padding-right: .35rem; } }
"""


class Html(str):
    """Text that is HTML already."""


class Cell(NamedTuple):
    """One place of a table."""

    value: Any
    """Escaped, unless it is `Html`; None is a dash."""
    strong: bool = False


class Section(NamedTuple):
    """One part of the report."""

    name: str
    """Its anchor."""
    title: str
    parts: Sequence[Html]


@dataclass
class Part:
    """One section: what goes on the page, what else goes to Weights & Biases by name, and what was not there."""

    section: Section | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


class Page:
    """The report, section by section.

    Args:
        title: of the page.
        lead: HTML below it.
    """

    def __init__(self, title: str, *, lead: Html) -> None:
        self.title, self.lead = title, lead
        self.sections: list[Section] = []

    def add(self, section: Section) -> None:
        self.sections.append(section)

    def text(self) -> str:
        """The whole file."""
        links = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in self.sections)
        body = "".join(
            f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{"".join(section.parts)}</section>\n'
            for section in self.sections
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main><h1>{escape(self.title)}</h1>{self.lead}<nav><ul>{links}</ul></nav>\n{body}</main></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        with replacing(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")


def escape(value: Any) -> Html:
    """A value as text in HTML, also inside an attribute."""
    return value if isinstance(value, Html) else Html(as_html(value))


def paragraph(text: Any, kind: str = "") -> Html:
    return Html(f"<p{_kind(kind)}>{escape(text)}</p>")


def heading(text: Any) -> Html:
    return Html(f"<h3>{escape(text)}</h3>")


def joined(parts: Iterable[Any], between: str = "") -> Html:
    """Parts, escaped, one behind the other."""
    return Html(between.join(escape(part) for part in parts))


def details(summary: Any, content: Html) -> Html:
    """What is shown when it is asked for."""
    return Html(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def table(rows: Sequence[dict[str, Any]], *, numbers: Sequence[str] = (), begins: Sequence[int] = ()) -> Html:
    """Rows of equal keys.

    Args:
        rows: column -> a value, or a `Cell`.
        numbers: columns that are aligned to the right.
        begins: places of rows with a line above them.
    """
    columns = list(rows[0])
    kinds = {column: ' class="number"' if column in numbers else "" for column in columns}
    head = "".join(f'<th scope="col"{kinds[column]}>{escape(column)}</th>' for column in columns)
    body = ""
    for place, row in enumerate(rows):
        cells = "".join(f"<td{kinds[column]}>{_cell(row[column])}</td>" for column in columns)
        body += f"<tr{_kind('begins' if place in begins else '')}>{cells}</tr>"
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return Html(f'<div class="scroll" tabindex="0">{whole}</div>')


def figure(images: Images, caption: str, *, alt: str) -> Html:
    """A drawn figure with what is to be seen in it; the page takes the one that suits its colours.

    Args:
        alt: what the figure shows, for those who do not see it.
    """
    with Image.open(images.light) as picture:
        width, height = (round(side * 96 / DPI) for side in picture.size)
    return Html(
        '<figure><div class="scroll" tabindex="0"><picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{_embedded(images.dark.read_bytes(), "png")}">'
        f'<img src="{_embedded(images.light.read_bytes(), "png")}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}"></picture></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


class Thumbnails:
    """Small copies of pictures, each read once."""

    def __init__(self) -> None:
        self.made: dict[Path, tuple[str, str]] = {}  # what is shown, and why it is not the picture

    def image(self, file: Path, alt: str) -> Html:
        """An image element; a grey square, whose text says why, where the file has gone or is damaged."""
        if file not in self.made:
            thumbnail, wrong = _thumbnail(file)
            self.made[file] = _embedded(thumbnail, "jpeg"), f" ({wrong})" if wrong else ""
        source, wrong = self.made[file]
        return Html(f'<img src="{source}" alt="{escape(alt + wrong)}">')


def _thumbnail(file: Path) -> tuple[bytes, str]:
    """A picture drawn small; with the reason where it is a grey square."""
    try:
        small, wrong = small_copy(file, THUMBNAIL), ""
    except Exception as error:  # Pillow raises many kinds for damaged files
        small, wrong = Image.new("RGB", (THUMBNAIL, THUMBNAIL), GONE), why_unreadable(error)
    written = io.BytesIO()
    small.save(written, format="JPEG", quality=80)
    return written.getvalue(), wrong


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _cell(value: Any) -> Html:
    if not isinstance(value, Cell):
        value = Cell(value)
    text = escape("–" if value.value is None else value.value)
    return Html(f"<strong>{text}</strong>") if value.strong else text


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
