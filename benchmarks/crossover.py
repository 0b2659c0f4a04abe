"""From which pool size generation is faster than two-tower search, and a plot of both against the size of the pool."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dvx"


class TwoTower(NamedTuple):
    """One two-tower system at one batch size, in seconds a query."""

    name: str
    batch: int
    encode: float
    search: dict[int, float]
    """By pool size"""
    exact: bool
    """Every picture is compared: the time grows with the pool"""

    def line(self) -> dict[str, Any]:
        """For a table: milliseconds a query, encoder and search together, at each pool size."""
        whole = {f"{pool:,}": round((self.encode + seconds) * 1e3, 1) for pool, seconds in self.search.items()}
        return {"two-tower": self.name, "batch": self.batch, "encoder": round(self.encode * 1e3, 1), **whole}


def crossover(generation: float, system: TwoTower) -> str:
    """The pool size from which generation (seconds a query, the same at any size) is faster.

    Exact search is extended in proportion from the largest pool measured; an approximate index is not extended.
    """
    if generation <= system.encode:
        return "any"
    largest = max(system.search)
    if system.exact:
        return f"{_rounded((generation - system.encode) / (system.search[largest] / largest)):,}"
    beaten = [pool for pool, seconds in sorted(system.search.items()) if generation < system.encode + seconds]
    return f"{beaten[0]:,}" if beaten else f"none up to {largest:,}"


def crossover_table(
    generation: dict[tuple[str, int], float], systems: Sequence[TwoTower], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """One line for each batch size and pair of a generative and a two-tower system.

    Args:
        generation: seconds a query by (system, batch).
        pairs: (start of a generative system's name, start of a two-tower system's name).
    """
    return [
        {
            "protocol": "one query at a time" if batch == 1 else f"batches of {batch}",
            "generation": name,
            "ms/query": round(seconds * 1e3, 1),
            "two-tower": system.name,
            "encode ms": round(system.encode * 1e3, 1),
            "search ms at largest": round(system.search[max(system.search)] * 1e3, 2),
            "faster from pictures": crossover(seconds, system),
        }
        for (name, batch), seconds in sorted(generation.items(), key=lambda item: item[0][1])
        for system in systems
        if system.batch == batch
        and any(name.startswith(first) and system.name.startswith(second) for first, second in pairs)
    ]


def draw(path: Path, generation: dict[tuple[str, int], float], systems: Sequence[TwoTower], *, title: str) -> None:
    """A panel for each batch size: milliseconds a query against the size of the pool, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({system.batch for system in systems})
    pools = sorted(systems[0].search)
    figure, panels = pyplot.subplots(1, len(batches), figsize=(5 * len(batches), 5), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        constant = [(name, seconds) for (name, size), seconds in generation.items() if size == batch]
        for colour, (name, seconds) in zip(COLOURS, constant, strict=False):
            panel.plot(pools, [seconds * 1e3] * len(pools), label=name, linewidth=2.5, color=colour)
        for colour, marker, system in zip(
            COLOURS, MARKERS, [own for own in systems if own.batch == batch], strict=False
        ):
            values = [(system.encode + system.search[pool]) * 1e3 for pool in sorted(system.search)]
            label = f"two-tower: {system.name}"
            panel.plot(sorted(system.search), values, label=label, linestyle="--", marker=marker, color=colour)
        panel.set(xscale="log", yscale="log", xlabel="pictures in the pool", title=f"batch {batch}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("milliseconds a query")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.03 + 0.04 * -(-len(labels) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _rounded(pictures: float) -> int:
    """To two digits: the machines are noisy."""
    digits = len(str(int(pictures))) - 2
    return int(round(pictures, -max(0, digits))) if pictures >= 1 else 1
