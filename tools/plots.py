"""Drawing: lines, dots and bars that read in print, in grey and for colour-blind readers, on light and on dark pages.

    images = draw(folder / "recall", partial(line_figure, panels=panels))   # recall.png and recall-dark.png

Colours are those of Okabe and Ito (2008); each comes with a marker and a line style of its own, so that none of them
has to be told by its hue. Lines are named at their ends, or under the plot where the ends would not say which.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .files import replacing

DPI = 180
TEXT, SMALL = 9.0, 8.0  # points
LABEL_GAP = 1.25  # lines of text between two names at the ends of lines, at least
LETTER_INCHES = 0.068  # width of a letter of small text, about

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))


class Theme(NamedTuple):
    """The colours of a page."""

    name: str
    background: str
    ink: str
    faint: str
    grid: str
    colours: tuple[str, ...]
    """Of systems, in their order; each is told from the background at 3:1 or better."""


LIGHT = Theme(
    "light", "#ffffff", "#1b1f24", "#59636e", "#d8dde3",
    (BLACK, BLUE, VERMILLION, "#007a5a", "#a8558a", "#a06f00", "#2f7fae", "#59636e"),
)  # fmt: skip
DARK = Theme(
    "dark", "#14171b", "#e8eaed", "#a3abb5", "#343a42",
    ("#ffffff", SKY, "#f08a4b", "#2fc49a", "#e3a0c6", ORANGE, YELLOW, "#a3abb5"),
)  # fmt: skip


class Images(NamedTuple):
    """One figure's files."""

    light: Path
    dark: Path


class Line(NamedTuple):
    """One named line; `style` is the place of its system among all, so that it looks the same in every figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int
    points: bool = True
    """Mark the points; a line of hundreds has none."""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    """Heights are shares of 1, and written in percent."""
    x_ticks: Sequence[float] | None = None
    """Where the axis is numbered; by default where it suits."""
    x_labels: Sequence[str] | None = None
    """What stands at the ticks; by default their numbers."""
    from_zero: bool = True
    """The height begins at 0; never where it is logarithmic."""
    legend: bool = False
    """Name the lines in a corner, where their ends do not lie apart."""
    mark_x: float | None = None
    """Where a thin upright line stands, such as the epoch that was kept."""


class Dots(NamedTuple):
    """One row of a dot plot: a system, and its figures in the order of the measures."""

    name: str
    values: Sequence[float]
    style: int


class DotPanel(NamedTuple):
    """A dot plot: a row per system, a marker per measure."""

    title: str
    rows: Sequence[Dots]


def draw(stem: Path, figure: Callable[[Theme], Figure]) -> Images:
    """Draw a figure for both kinds of page: `<stem>.png` and `<stem>-dark.png`."""
    images = Images(stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}-dark.png"))
    for theme, path in zip((LIGHT, DARK), images, strict=True):
        with matplotlib.rc_context(_settings(theme)):
            made = figure(theme)
            with replacing(path) as temporary:
                options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.12, "metadata": {"Software": None}}
                made.savefig(temporary, format="png", dpi=DPI, **options)
    return images


def line_figure(theme: Theme, *, panels: Sequence[Panel], width: float = 3.5, height: float = 2.6) -> Figure:
    """Panels side by side; every line is named at its right end.

    Args:
        width, height: of one panel, in inches, without the names.
    """
    figure = _figure()
    room = [_room(panel) for panel in panels]
    left = 0.75
    whole = sum(left + width + each for each in room)
    figure.set_size_inches(whole, height)
    start = 0.0
    for panel, each in zip(panels, room, strict=True):
        axes = figure.add_axes(((start + left) / whole, 0.18, width / whole, 0.68))
        start += left + width + each
        _draw_panel(axes, panel, theme)
    return figure


def _room(panel: Panel) -> float:
    """Inches right of a panel that its lines' names take."""
    letters = max((len(line.name) for line in panel.lines if not panel.legend), default=0)
    return LETTER_INCHES * letters + 0.25


def _draw_panel(axes: Any, panel: Panel, theme: Theme) -> None:
    ends = []
    for line in panel.lines:
        colour = theme.colours[line.style % len(theme.colours)]
        axes.plot(
            line.x, line.y, color=colour, linestyle=DASHES[line.style % len(DASHES)], linewidth=1.7,
            marker=MARKERS[line.style % len(MARKERS)] if line.points else "", markersize=4.5,
            markeredgecolor=theme.background, markeredgewidth=0.5, label=line.name,
        )  # fmt: skip
        if len(line.x):
            ends.append((line.name, line.x[-1], line.y[-1], colour))
    _scale(axes, panel)
    axes.set_title(panel.title, loc="left", fontsize=TEXT, fontweight="bold", color=theme.ink)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.mark_x is not None:
        axes.axvline(panel.mark_x, color=theme.faint, linewidth=0.9, linestyle=":", zorder=0)
    if panel.legend:
        axes.legend(loc="best", frameon=False, fontsize=SMALL, handlelength=3.2)
    else:
        _name_ends(axes, ends)


def _scale(axes: Any, panel: Panel) -> None:
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
        values = [value for line in panel.lines for value in line.y if value > 0]
        if values:
            axes.set_ylim(round_number(min(values) * 0.9, up=False), round_number(max(values) * 1.1, up=True))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(panel.x_ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        words = dict(zip(panel.x_ticks, panel.x_labels or map(short_number, panel.x_ticks), strict=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.get(value, "")))
    elif not panel.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 4):g}%"))
    elif panel.log_y:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.yaxis.set_minor_locator(NullLocator())


def _name_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write the lines' names right of the axes, at the heights of their ends, moved apart where they would touch."""
    axes.get_xlim(), axes.get_ylim()  # which settles them: the transforms below do not
    figure = axes.figure
    to_axes = axes.transAxes.inverted()
    axes_height = axes.get_position().height * figure.get_figheight() * 72  # points
    gap = LABEL_GAP * SMALL / axes_height
    heights = [to_axes.transform(axes.transData.transform((x, y)))[1] for _, x, y, _ in ends]
    for (name, _, _, colour), own, place in zip(ends, heights, apart(heights, gap), strict=True):
        axes.annotate(
            name, xy=(1.0, min(max(own, 0.0), 1.0)), xytext=(1.045, place), xycoords="axes fraction",
            textcoords="axes fraction", va="center", ha="left", fontsize=SMALL, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved as little as need be to lie at least a gap apart, in the same order; around their middles.

    >>> [round(height, 2) for height in apart([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    groups: list[tuple[float, int]] = []  # (middle, names)
    for place in order:
        middle, count = heights[place], 1
        while groups and middle - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            before, others = groups.pop()
            middle, count = (before * others + middle * count) / (others + count), others + count
        groups.append((middle, count))
    spread = [middle + gap * (number - (count - 1) / 2) for middle, count in groups for number in range(count)]
    result = [0.0] * len(heights)
    for place, height in zip(order, spread, strict=True):
        result[place] = height
    return result


def dot_figure(theme: Theme, *, panels: Sequence[DotPanel], measures: Sequence[str]) -> Figure:
    """Dot plots one above the other: a row per system, its measures joined, each with its number."""
    counts = [len(panel.rows) for panel in panels]
    head, row, foot = 0.45, 0.3, 0.55
    tall = sum(head + row * count for count in counts) + foot
    letters = max(len(dots.name) for panel in panels for dots in panel.rows)
    name_inches = LETTER_INCHES * letters + 0.35
    wide = name_inches + 5.6
    figure = _figure()
    figure.set_size_inches(wide, tall)
    top = tall
    for number, (panel, count) in enumerate(zip(panels, counts, strict=True)):
        top -= head
        box = (name_inches / wide, (top - row * count) / tall, 5.3 / wide, row * count / tall)
        top -= row * count
        axes = figure.add_axes(box)
        _draw_dots(axes, panel, theme, measures, last=number + 1 == len(panels), legend=number == 0)
    return figure


def _draw_dots(axes: Any, panel: DotPanel, theme: Theme, measures: Sequence[str], *, last: bool, legend: bool) -> None:
    for height, dots in enumerate(panel.rows):
        colour = theme.colours[dots.style % len(theme.colours)]
        axes.plot(dots.values, [height] * len(dots.values), color=colour, linewidth=1.2, zorder=1)
        for marker, value in zip(MARKERS, dots.values, strict=False):
            axes.plot([value], [height], marker=marker, color=colour, markersize=6, linestyle="", zorder=2)
            axes.annotate(
                f"{100 * value:.1f}", (value, height), xytext=(0, 5), textcoords="offset points", ha="center",
                va="bottom", fontsize=6.5, color=theme.faint,
            )  # fmt: skip
    axes.set_yticks(range(len(panel.rows)), [dots.name for dots in panel.rows])
    axes.set_ylim(len(panel.rows) - 0.45, -0.75)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_title(panel.title, loc="left", fontsize=TEXT, fontweight="bold", color=theme.ink)
    if last:
        axes.set_xlabel("share of queries whose picture is among the first 1, 5, 10")
    else:
        axes.set_xticklabels([])
    if legend:
        handles = [
            axes.plot([], [], marker=marker, color=theme.ink, linestyle="", markersize=5, label=measure)[0]
            for marker, measure in zip(MARKERS, measures, strict=False)
        ]
        axes.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=len(handles), frameon=False,
            borderaxespad=0.2, handletextpad=0.1, columnspacing=1.0, fontsize=SMALL,
        )  # fmt: skip


def short_number(value: float) -> str:
    """A count as an axis has room for it.

    >>> [short_number(value) for value in (0.5, 8, 500, 3000, 8156, 1_500_000)]
    ['0.5', '8', '500', '3k', '8.16k', '1.5M']
    """
    for size, name in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:g}"


def round_number(value: float, *, up: bool) -> float:
    """The next 1, 2 or 5 times a power of ten above or below a positive number.

    >>> round_number(37, up=False), round_number(37, up=True), round_number(0.9, up=False)
    (20.0, 50.0, 0.5)
    """
    power = 10.0 ** math.floor(math.log10(value))
    steps = [step * power for step in (1, 2, 5, 10)]
    return next(step for step in steps if step >= value) if up else [step for step in steps if step <= value][-1]


def _figure() -> Figure:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure


def _settings(theme: Theme) -> dict[str, Any]:
    """matplotlib's own settings; names of systems are no formulas."""
    return {
        "figure.facecolor": theme.background, "axes.facecolor": theme.background, "savefig.facecolor": theme.background,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
        "xtick.color": theme.faint, "ytick.color": theme.faint, "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink, "grid.color": theme.grid, "axes.grid": True, "grid.linewidth": 0.7,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
        "font.size": SMALL, "axes.labelsize": SMALL, "font.family": "DejaVu Sans", "axes.unicode_minus": True,
    }  # fmt: skip
