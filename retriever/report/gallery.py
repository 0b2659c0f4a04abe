"""The gallery of a report: single queries with what they found, and the vokens behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.contact_sheet import SheetRow, draw_sheet
from tools.recall import NOT_FOUND
from tools.report_page import Html, Part, Section, Thumbnails, details, escape, heading, joined, paragraph, table
from tools.vokens import VokenSpace

from ..data import RetrieverData
from .examples import Example, Explained, Step, Voken

FEWEST_SHOWN, MOST_SHOWN = 6, 12  # pictures of a query's list; all that lie above the right one, if they are no more


def gallery_part(
    explained: Sequence[Explained],
    data: RetrieverData,
    thumbnails: Thumbnails,
    folder: Path,
    *,
    system: str,
    split: str,
    pool: str,
    keep: int,
    reordered: dict[str, list[int]],
) -> Part:
    """Queries with what they found and the vokens behind it.

    Args:
        reordered: name of a reordering -> the right picture's rank in it, for each example.
    """
    if not explained:
        return Part()
    files = [data.image_folder / file for file in data.files]
    words = (
        f"Captions of {split}, searched by {system} in the pool {pool}. Best: the right picture is first, with the "
        "widest lead. Typical: it has the median rank. Worst: it is not in the list, though the first picture's score "
        "is high. The right picture stands first, in a frame; then what the search found, in its order. Below: the "
        "vokens of the right picture, step by step, given the query and the vokens before. Probability and place are "
        "among the codes that pictures of the pool have at that step; log-probabilities are what the search adds up to "
        "a score, with the end token's where that counts."
    )
    parts: list[Html] = [paragraph(words)]
    kinds = list(dict.fromkeys(each.example.kind for each in explained))
    for kind in kinds:
        parts.append(heading(kind.capitalize()))
        for number, each in enumerate(explained):
            if each.example.kind == kind:
                after = {name: ranks[number] for name, ranks in reordered.items()}
                parts.append(_example(each, data, files, thumbnails, keep, after))
    sheet = folder / "gallery.png"
    rows = [SheetRow(e.query, [files[row] for row in e.rows], files[e.picture]) for e in (x.example for x in explained)]
    draw_sheet(sheet, rows, title=f"{system}, pool {pool}: best, typical, worst")
    tables = {"gallery": [_gallery_row(each, data, keep) for each in explained]}
    return Part(Section("gallery", "Queries: best, typical, worst", parts), tables, {"gallery": sheet})


def _gallery_row(each: Explained, data: RetrieverData, keep: int) -> dict[str, Any]:
    example = each.example
    return {
        "kind": example.kind,
        "query": example.query,
        "picture": data.images[example.picture],
        "rank": _rank(example.rank, keep),
        "ranked above": ", ".join(data.images[row] for row in _above(example)),
        "vokens": " ".join(
            f"{_token(s.written, n, data.space)}:{s.written.probability:.3f}" for n, s in enumerate(each.right)
        ),
    }


def _above(example: Example) -> list[int]:
    return example.rows[: len(example.rows) if example.rank == NOT_FOUND else example.rank - 1]


def _example(
    each: Explained, data: RetrieverData, files: list[Path], thumbnails: Thumbnails, keep: int, after: dict[str, int]
) -> Html:
    example = each.example
    told = [f"Right picture: {_rank(example.rank, keep)}"]
    told += [f"{_rank(rank, keep)} after {name}" for name, rank in after.items()]
    right = (
        f'<li class="right apart">{thumbnails.image(files[example.picture], data.images[example.picture])}right</li>'
    )
    shown = example.rows[: min(MOST_SHOWN, max(FEWEST_SHOWN, len(_above(example)) + 1))]
    found = "".join(
        f'<li class="{"right" if row == example.picture else "found"}">'
        f"{thumbnails.image(files[row], data.images[row])}{place}</li>"
        for place, row in enumerate(shown, start=1)
    )
    tables = [_steps_table(each.right, data.space)]
    if each.first is not None:
        tables.append(details("The same for the picture ranked first", _steps_table(each.first, data.space)))
    return Html(
        f'<div class="query"><h4>{escape(example.query)}</h4><p class="faint">{escape("; ".join(told))}.</p>'
        f'<ul class="pictures">{right}{found}</ul>{joined(tables)}</div>'
    )


def _steps_table(found: Sequence[Step], space: VokenSpace) -> Html:
    return table(
        [
            {
                "step": number + 1,
                "voken": Html(f"<code>{escape(_token(step.written, number, space))}</code>"),
                "probability": _share(step.written.probability),
                "place": f"{step.place:,} of {step.choices:,}",
                "log-probability": f"{round(step.log_probability, 2) + 0.0:.2f}",  # never -0.00
                "most probable others": joined(
                    [
                        Html(
                            f"<code>{escape(_token(other, number, space))}</code> {escape(_percent(other.probability))}"
                        )
                        for other in step.others
                    ]
                    or ["none: no other picture begins so"],
                    ", ",
                ),
            }
            for number, step in enumerate(found)
        ],
        numbers=("step", "log-probability"),
    )


def _share(probability: float) -> Html:
    width = f"{100 * min(1.0, probability):.1f}%"
    return Html(f'<span class="share"><i style="width:{width}"></i></span>{escape(_percent(probability))}')


def _percent(probability: float) -> str:
    return "<0.1%" if 0 < probability < 0.001 else f"{probability:.1%}"


def _token(voken: Voken, level: int, space: VokenSpace) -> str:
    return space.tokens[space.level_rows(level)][voken.code]


def _rank(rank: int, keep: int) -> str:
    return f"not among the first {keep}" if rank == NOT_FOUND else f"rank {rank}"
