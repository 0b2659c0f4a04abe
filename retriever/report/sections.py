"""The sections of a report: figures, tables and words, each made of results that are there.

A section is returned as a `Part` (tools/report_page.py).
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.curves import Point, read_curves
from tools.plots import LIGHT, DotPanel, Dots, Line, Panel, dot_figure, draw, line_figure
from tools.recall import CUTOFFS
from tools.report_page import (
    Cell,
    Html,
    Part,
    Section,
    Thumbnails,
    details,
    escape,
    figure,
    heading,
    joined,
    paragraph,
    table,
)
from tools.results import GUIDED, MRR_NOTE, ordered
from tools.runs import Manifest
from tools.texts import plural

from ..data import RetrieverData
from . import codes as code_pictures
from .measures import TWO_TOWER, Changes, Figure, Speed

Rows = list[dict[str, Any]]

QUANTISED = "two-tower, quantised"
REORDERED = ("features", "reranker", "both")  # ends of the names of systems that reorder another's list
LAST_STYLE = len(LIGHT.colours) - 1
TRAININGS = {
    "RQ-VAE.train_heads": "Projection heads",
    "RQ-VAE.train": "Tokenizer (RQ-VAE)",
    "retriever.train": "Retriever",
    "retriever.train_stage2": "Retriever, stage 2",
    "reranker.train": "Reranker",
}
VALIDATED = re.compile(r"val/(?:quantized_)?(R@\d+)")  # the curve of the model that is trained


class Styles:
    """The look of each system, the same in every figure. Two-tower search comes first. What guides a retriever or
    reorders its list looks like the retriever.

    Args:
        systems: names, each behind those that it is made from.
    """

    def __init__(self, systems: Sequence[str]) -> None:
        self.places = {TWO_TOWER: 0}
        for system in dict.fromkeys(systems):
            if system not in (TWO_TOWER, QUANTISED) and self._retriever(system) is None:
                self.places[system] = len(self.places)
        self.places[QUANTISED] = max(LAST_STYLE, len(self.places))

    def of(self, system: str) -> int:
        retriever = self._retriever(system)
        return self.places.get(system, len(self.places)) if retriever is None else self.places[retriever]

    def _retriever(self, system: str) -> str | None:
        """The retriever that a system guides, or whose list it reorders, where it does."""
        name = system
        while (parts := name.rpartition("+"))[2] in (*REORDERED, GUIDED.removeprefix("+")):
            name = parts[0]
        return name if name != system and name in self.places else None


def recall_part(summary: Rows, folder: Path, styles: Styles, name: str) -> Part:
    """The table of all systems, and the figure of it."""
    rows = ordered([row for row in summary if row["level"] == "image"])
    if not rows:
        return Part(absent=["recall of the systems: no scripts/13_test_retriever.sh has been run"])
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(f"{row['split']} queries, pool {row['pool']}: {row['pool_size']:,} pictures", []).append(row)
    panels = [DotPanel(title, [_dots(row, styles) for row in group]) for title, group in groups.items()]
    measures = [f"R@{cutoff}" for cutoff in CUTOFFS]
    images = draw(folder / "recall", partial(dot_figure, panels=panels, measures=measures))
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    parts = [
        figure(images, "Image-level recall: share of the queries whose own picture is among the first 1, 5 and 10.",
               alt=f"Dot plot of recall at 1, 5 and 10 of every system on {name}; the table below has its numbers."),
        table(
            [_recall_cells(row, group) for group in groups.values() for row in group],
            numbers=("pool", "queries", *measures, "MRR", "median rank", "queries/s"),
            begins=_beginnings(list(groups.values())),
        ),
        paragraph(
            "Inductive: no picture of val or test was trained on. Transductive: they were, through captions that are "
            f"not theirs. The best figure of each pool is bold. {MRR_NOTE} "
            f"Speeds were measured on: {machines}.", "faint",
        ),
    ]  # fmt: skip
    by_code = [row for row in summary if row["level"] == "code"]
    if by_code:
        codes = table([_recall_cells(row, []) for row in ordered(by_code)], numbers=("pool", "queries", *measures))
        parts.append(details("The same by codes, as published: pictures in a collision count as one", codes))
    flat = [{key: row.get(key) for key in ("system", "setting", "split", "pool", "pool_size", "queries")}
            | {f"R@{cutoff}": value for cutoff, value in row["recall"].items()}
            | {key: row.get(key) for key in ("mrr", "median_rank", "queries_per_second")} for row in rows]  # fmt: skip
    return Part(Section("recall", "Recall of all systems", parts), {"recall": flat}, {"recall": images.light})


def _dots(row: dict[str, Any], styles: Styles) -> Dots:
    return Dots(row["system"], [row["recall"][str(cutoff)] for cutoff in CUTOFFS], styles.of(row["system"]))


def _beginnings(groups: Sequence[Rows]) -> list[int]:
    """Places at which each group but the first begins."""
    places, at = [], 0
    for group in groups[:-1]:
        at += len(group)
        places.append(at)
    return places


def _recall_cells(row: dict[str, Any], group: Rows) -> dict[str, Any]:
    def best(value: float, others: Sequence[float]) -> bool:
        return bool(others) and value == max(others)

    cells: dict[str, Any] = {"system": row["system"], "pool": f"{row['pool']} ({row['pool_size']:,})"}
    for cutoff in map(str, CUTOFFS):
        value = row["recall"][cutoff]
        cells[f"R@{cutoff}"] = Cell(f"{value:.1%}", best(value, [each["recall"][cutoff] for each in group]))
    cells["MRR"] = Cell(f"{row['mrr']:.3f}", best(row["mrr"], [each["mrr"] for each in group]))
    cells["median rank"] = "not found" if row["median_rank"] is None else f"{row['median_rank']:g}"
    speed = row["queries_per_second"]
    cells["queries/s"] = None if speed is None else f"{speed:,.0f}"
    return {**cells, "setting": row["setting"], "split": row["split"], "queries": f"{row['queries']:,}"}


def tokenizer_part(data: RetrieverData, codes: Manifest | None, folder: Path) -> Part:
    """Use of the codes, collisions, and what quantising costs."""
    health = code_pictures.health(data.codes, data.space)
    images = draw(folder / "tokenizer", partial(line_figure, panels=code_pictures.panels(health)))
    levels = [
        {
            "level": use.level + 1,
            "codes used": f"{use.used:.1%}",
            "perplexity": f"{use.perplexity:,.1f}",
            "pictures with the same codes so far": f"{prefix.mean:,.1f}",
            "at most": f"{prefix.largest:,}",
            "told apart": f"{prefix.alone:.1%}",
        }
        for use, prefix in zip(health.use, health.prefixes, strict=True)
    ]
    shared = 1.0 - health.prefixes[-1].alone
    words = [f"{len(data.codes):,} pictures, {data.space.levels} levels of {data.space.codebook_size:,} codes. "]
    words.append(f"{shared:.2%} of the pictures share" if shared else "No two pictures share")
    words.append(" all their codes. ")
    metrics = {} if codes is None else codes.metrics
    if "collisions_before" in metrics:
        words.append(f"Before collisions were resolved it was {metrics['collisions_before']:.2%}. ")
    parts = [
        paragraph("".join(words)),
        figure(images, "Left: codes in the order of how often they are used; an even line to the right end is good. "
               "Right: how many pictures have the same first codes; the search tells them apart step by step.",
               alt="Use of the codes of each level, and the number of pictures with the same first codes."),
        table(levels, numbers=tuple(levels[0])),
    ]  # fmt: skip
    recalls = _quantised_recall(metrics)
    if recalls:
        parts += [
            paragraph("What quantising costs: two-tower recall of val, by brute force, from the features themselves "
                      "and from those that are decoded from the codes."),
            table(recalls, numbers=tuple(recalls[0])[1:]),
        ]  # fmt: skip
    section = Section("tokenizer", "Tokenizer", parts)
    tables = {"tokenizer_levels": levels}
    absent = ["what quantising costs: no val recall in a finished scripts/06_generate_codes.sh"] if not recalls else []
    return Part(section, tables, {"tokenizer": images.light}, absent)


def _quantised_recall(metrics: dict[str, Any]) -> Rows:
    names = {"raw": "raw", "quantised": "quantized"}
    if f"val/raw_R@{CUTOFFS[0]}" not in metrics:
        return []
    return [
        {"features": word, **{f"R@{cutoff}": f"{metrics[f'val/{name}_R@{cutoff}']:.1%}" for cutoff in CUTOFFS}}
        for word, name in names.items()
    ]


def codes_part(data: RetrieverData, folder: Path, thumbnails: Thumbnails, *, count: int, seed: int) -> Part:
    """Pictures behind a code, from coarse to fine."""
    paths = code_pictures.paths(data.codes, count=count, seed=seed)
    files = [data.image_folder / file for file in data.files]
    drawn = folder / "codes.png"
    code_pictures.draw_paths(drawn, paths, files, data.space)
    parts = [
        paragraph(
            "Each block follows one picture, drawn at random. A row holds pictures that share its first codes, up to "
            f"{code_pictures.SHOWN} of them at random, the picture itself first: the more codes, the more alike."
        )
    ]
    for levels in paths:
        rows = [
            Html(
                f'<div class="level"><p><code>{escape(code_pictures.names(level.codes, data.space))}</code><br>'
                f'<span class="faint">{plural(level.pictures, "picture")}</span></p><ul class="pictures">'
                + "".join(f"<li>{thumbnails.image(files[row], data.images[row])}</li>" for row in level.rows)
                + "</ul></div>"
            )
            for level in levels
        ]
        parts.append(Html(f'<div class="path">{joined(rows)}</div>'))
    return Part(Section("codes", "Pictures behind a code", parts), images={"codes": drawn})


def curves_part(trainings: Sequence[Manifest], folder: Path) -> Part:
    """A figure for each training that left its curve."""
    part = Part()
    parts = []
    for manifest in trainings:
        points = read_curves(manifest.folder)
        title = training_name(manifest)
        panels = _curve_panels(points, manifest.metrics)
        if not panels:
            part.absent.append(f"curve of {manifest.folder}: it was trained by a version that kept none")
            continue
        name = stage_name(manifest.folder)
        images = draw(folder / f"curves-{name.replace('/', '-')}", partial(line_figure, panels=panels))
        part.images[f"curves/{name}"] = images.light
        caption = f"{manifest.folder}, {_duration(manifest.seconds)} in all."
        parts += [heading(title), figure(images, caption, alt=f"Training curves: {title}.")]
    if not trainings:
        part.absent.append("training curves: nothing has been trained here")
    if parts:
        words = "Losses are means over windows of steps. The dotted line is the epoch whose model was kept, by val."
        part.section = Section("curves", "Training curves", [paragraph(words), *parts])
    return part


def stage_name(folder: Path) -> str:
    """A run folder as its stage and system: "05_train_rqvae", "09_train/retriever"."""
    return folder.name if folder.name[:2].isdigit() else f"{folder.parent.name}/{folder.name}"


def training_name(manifest: Manifest) -> str:
    """What a person calls a training."""
    name = TRAININGS[manifest.command]
    return name if manifest.command.startswith("RQ-VAE") else f"{name}: {manifest.folder.name}"


def _curve_panels(points: Sequence[Point], metrics: dict[str, Any]) -> list[Panel]:
    """The losses, and the recall on val where there is more than one validation."""
    best = metrics.get("val/epoch", metrics.get("best_epoch"))
    losses = [name for name in _names(points) if name.startswith("train/")]
    recalls = {name: match[1] for name in _names(points) if (match := VALIDATED.fullmatch(name))}
    recalls |= {f"val/before {word}": f"{word} before" for word in list(recalls.values())}
    panels = []
    if losses:
        lines = [_curve(points, name, name.removeprefix("train/"), style) for style, name in enumerate(losses)]
        panels.append(Panel("Loss on train", "epoch", "loss", lines, from_zero=False, mark_x=best))
    lines = [
        _curve(points, name, label, style, points_drawn=True)
        for style, (name, label) in enumerate(recalls.items())
        if name in _names(points)
    ]
    if any(len(line.x) > 1 for line in lines):
        panels.append(Panel("Recall on val", "epoch", "recall", lines, percent=True, from_zero=False, mark_x=best))
    return panels


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point if name != "epoch"))


def _curve(points: Sequence[Point], name: str, label: str, style: int, *, points_drawn: bool = False) -> Line:
    known = [(point["epoch"], point[name]) for point in points if point.get(name) is not None]
    x, y = [epoch or 0.0 for epoch, _ in known], [value or 0.0 for _, value in known]
    return Line(label, x, y, style, points=points_drawn or len(x) < 2)


def beams_part(figures: Sequence[Figure], reference: Figure | None, folder: Path, styles: Styles) -> Part:
    """Recall against the number of beams."""
    if not figures:
        return Part()
    beams = sorted({measured.x for measured in figures})
    lines = _by_system(figures)
    panels = [
        Panel(
            f"R@{cutoff}", "beams", "recall", _recall_lines(lines, cutoff, styles)
            + _level(reference, cutoff, beams),
            log_x=True, percent=True, x_ticks=beams, from_zero=False,
        )
        for cutoff in (CUTOFFS[0], CUTOFFS[-1])
    ]  # fmt: skip
    images = draw(folder / "beams", partial(line_figure, panels=panels))
    rows = [measured.row("beams") for measured in figures]
    parts = [
        figure(images, _sampled(figures) + " Searched over val's own pictures. Two-tower is brute-force search of the "
               "same queries.", alt="Recall at 1 and 10 against the number of beams."),
        details("The numbers", table([_measured_cells(row) for row in rows], numbers=tuple(rows[0])[1:])),
    ]  # fmt: skip
    return Part(
        Section("beams", "Recall against beam width", parts), {"recall_by_beams": rows}, {"beams": images.light}
    )


def _level(reference: Figure | None, cutoff: int, beams: Sequence[float]) -> list[Line]:
    """Two-tower search, which has no beams, as a level line."""
    if reference is None:
        return []
    return [Line(reference.system, [beams[0], beams[-1]], [reference.recall[cutoff]] * 2, 0, points=False)]


def guide_part(figures: Sequence[Figure], changes: Sequence[Changes], folder: Path, styles: Styles) -> Part:
    """Recall against the weight of the guide, and what it changes."""
    if not figures:
        return Part()
    lines = _by_system(figures)
    weights = sorted({measured.x for measured in figures})
    places = {weight: float(place) for place, weight in enumerate(weights)}  # even steps: 0 has no logarithm
    panels = [
        Panel(
            f"R@{cutoff}", "weight of the guide", "recall",
            [line._replace(x=[places[weight] for weight in line.x]) for line in _recall_lines(lines, cutoff, styles)],
            percent=True, x_ticks=list(places.values()), x_labels=[f"{weight:g}" for weight in weights],
            from_zero=False,
        )
        for cutoff in (CUTOFFS[0], CUTOFFS[-1])
    ]  # fmt: skip
    images = draw(folder / "guide", partial(line_figure, panels=panels))
    rows = [measured.row("weight") for measured in figures]
    changed = [each.row() for each in changes]
    parts = [
        figure(images, _sampled(figures) + " Searched over val's own pictures. With a weight of 0 the language model "
               "searches alone, as published; with a large one the quantised two-tower model does.",
               alt="Recall at 1 and 10 against the weight of the guide."),
        paragraph("Queries that the chosen weight wins or loses: their picture comes first with the guide alone, or "
                  "without it alone."),
        table([{**row, "weight": f"{row['weight']:g}"} for row in changed], numbers=tuple(changed[0])[1:]),
        details("The numbers", table([{**_measured_cells(row), "weight": f"{row['weight']:g}"} for row in rows],
                                     numbers=tuple(rows[0])[1:])),
    ]  # fmt: skip
    section = Section("guide", "Recall against the guide's weight", parts)
    return Part(section, {"recall_by_weight": rows, "guide_changes": changed}, {"guide": images.light})


def pools_part(figures: Sequence[Figure], beams: int, folder: Path, styles: Styles) -> Part:
    """Recall against the size of the pool."""
    if not figures:
        return Part()
    lines = _by_system(figures)
    sizes = sorted({measured.x for measured in figures})
    ticks = _spaced(sizes)
    panels = [
        Panel(
            f"R@{cutoff}", "pictures in the pool", "recall", _recall_lines(lines, cutoff, styles), log_x=True,
            percent=True, x_ticks=ticks,
        )
        for cutoff in (CUTOFFS[0], CUTOFFS[-1])
    ]  # fmt: skip
    images = draw(folder / "pools", partial(line_figure, panels=panels))
    rows = [measured.row("pool") for measured in figures]
    parts = [
        figure(images, _sampled(figures) + f" The pools hold val's pictures first, then others drawn at random, of "
               f"train too; {beams} beams. Of a pool smaller than val, the queries are those of its pictures.",
               alt="Recall at 1 and 10 against the number of pictures in the pool, beside two-tower search."),
        details("The numbers", table([_measured_cells(row) for row in rows], numbers=tuple(rows[0])[1:])),
    ]  # fmt: skip
    return Part(Section("pools", "Recall against pool size", parts), {"recall_by_pool": rows}, {"pools": images.light})


def speed_part(speeds: Sequence[Speed], queries: int, rounds: int, machine: str, folder: Path, styles: Styles) -> Part:
    """Speed against the size of the pool."""
    if not speeds:
        return Part()
    lines: dict[str, list[Speed]] = {}
    for speed in speeds:
        lines.setdefault(speed.system, []).append(speed)
    drawn = [
        Line(
            name,
            [speed.pool for speed in of_system],
            [speed.queries_per_second for speed in of_system],
            styles.of(name),
        )
        for name, of_system in lines.items()
    ]
    sizes = sorted({speed.pool for speed in speeds})
    panel = Panel(
        "Speed", "pictures in the pool", "queries per second", drawn, log_x=True, log_y=True, x_ticks=_spaced(sizes)
    )
    images = draw(folder / "speed", partial(line_figure, panels=[panel], width=5.2))
    made_up = min((speed.pool for speed in speeds if speed.made_up), default=None)
    filled = f" Pools from {made_up:,} on are filled up with made-up pictures, for speed alone." if made_up else ""
    caption = (
        f"Queries per second, tokenised, encoded and searched in batches of 64; both systems took turns in one run, "
        f"the median of {rounds} rounds of {queries:,} val queries. Machine: {machine}. Two-tower is exact search "
        f"(faiss, flat).{filled}"
    )
    rows = [speed.row() for speed in speeds]
    parts = [
        figure(images, caption, alt="Queries per second of the retriever and of two-tower search by pool size."),
        details("The numbers", table([_measured_cells(row) for row in rows], numbers=tuple(rows[0])[1:])),
    ]
    return Part(Section("speed", "Speed against pool size", parts), {"speed_by_pool": rows}, {"speed": images.light})


def _by_system(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    lines: dict[str, list[Figure]] = {}
    for measured in figures:
        lines.setdefault(measured.system, []).append(measured)
    return lines


def _recall_lines(lines: dict[str, list[Figure]], cutoff: int, styles: Styles) -> list[Line]:
    return [
        Line(
            name,
            [measured.x for measured in of_system],
            [measured.recall[cutoff] for measured in of_system],
            styles.of(name),
        )
        for name, of_system in lines.items()
    ]


def _spaced(sizes: Sequence[float]) -> list[float]:
    """The sizes that an axis has room for, largest first taken."""
    kept: list[float] = []
    for size in sorted(sizes, reverse=True):
        if not kept or kept[-1] >= 1.9 * size:
            kept.append(size)
    return kept[::-1]


def _sampled(figures: Sequence[Figure]) -> str:
    """What the queries of measured figures are."""
    counts = sorted({measured.queries for measured in figures})
    span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    error = 50.0 / counts[0] ** 0.5
    return (
        f"Measured on {span} captions of val, drawn at random: models are chosen on val, and test is used once, for "
        f"the table above. One standard error is {error:.1f} points or less."
    )


def _measured_cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if value is None or isinstance(value, str) else f"{value:.1%}" if key.startswith("R@")
        else f"{value:,.0f}" for key, value in row.items()
    }  # fmt: skip


def runs_part(manifests: Sequence[Manifest]) -> Part:
    """What the report was made of."""
    rows = [
        {
            "run": str(manifest.folder),
            "command": manifest.command,
            "time": _duration(manifest.seconds),
            "commit": manifest.commit[:12],
        }
        for manifest in manifests
    ]
    return Part(Section("runs", "The runs behind it", [table(rows, numbers=("time",))])) if rows else Part()


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
