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

    It is faster there and at every larger size measured. Exact search, whose time grows with the pool, is read between
    the sizes measured and extended in proportion beyond the largest; an approximate index is not extended.
    """
    if generation <= system.encode:
        return "any"
    spare = generation - system.encode
    pools = sorted(system.search)
    beaten = [pool for pool in pools if all(spare < system.search[larger] for larger in pools if larger >= pool)]
    if not system.exact:
        return f"{beaten[0]:,}" if beaten else f"none up to {pools[-1]:,}"
    if not beaten:
        return f"{_rounded(spare / system.search[pools[-1]] * pools[-1]):,}"
    if beaten[0] == pools[0]:
        return f"at most {pools[0]:,}"
    low, high = pools[pools.index(beaten[0]) - 1], beaten[0]
    share = (spare - system.search[low]) / (system.search[high] - system.search[low])
    return f"{_rounded(low + share * (high - low)):,}"


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
    colours = dict(zip(dict.fromkeys(name for name, _ in generation), COLOURS, strict=False))
    styles = dict(zip(dict.fromkeys(own.name for own in systems), zip(COLOURS, MARKERS, strict=True), strict=False))
    labelled: dict[str, Any] = {}
    for panel, batch in zip(panels[0], batches, strict=True):
        for (name, size), seconds in generation.items():
            if size == batch:
                flat = [seconds * 1e3] * len(pools)
                labelled[name] = panel.plot(pools, flat, linewidth=2.5, color=colours[name])[0]
        for system in (own for own in systems if own.batch == batch):
            colour, marker = styles[system.name]
            values = [(system.encode + system.search[pool]) * 1e3 for pool in pools]
            (line,) = panel.plot(pools, values, linestyle="--", marker=marker, color=colour)
            labelled[f"two-tower: {system.name}"] = line
        panel.set(xscale="log", yscale="log", xlabel="pictures in the pool", title=f"batch {batch}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("milliseconds a query")
    figure.legend(labelled.values(), labelled.keys(), loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.03 + 0.04 * -(-len(labelled) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _rounded(pictures: float) -> int:
    """To two digits: the machines are noisy."""
    digits = len(str(int(pictures))) - 2
    return int(round(pictures, -max(0, digits))) if pictures >= 1 else 1
