"""The rows of all systems on one dataset (`summary.json`), and the tables made of them.

Command: python -m tools.results --summary retriever/output/emoji/summary.json [--markdown]
"""

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .command_line.command_names import script_of
from .command_line.commands import run_command
from .command_line.sweeps import own_place
from .errors import BadInput
from .files import read_json, write_json
from .logs import table
from .recall import CUTOFFS, Report
from .texts import as_markdown_cell

KEY = ("system", "dataset", "split", "pool", "level")
GUIDED = "+guide"  # behind the name of a system, a pool or a list: searched with the guide
HUBS_CORRECTED = "two-tower, hubs corrected"  # by the captions of the train split (models/hubness.py)
FIRST = "two-tower"  # systems whose names begin so stand at the head of each pool

MRR_NOTE = "MRR and median rank: brute-force search counts the whole pool, a retriever what is in its list."


@dataclass(frozen=True)
class Config:
    """Which rows, and for whom."""

    summary: Path
    """JSON file that retriever.test adds its rows to."""
    levels: tuple[Literal["image", "code"], ...] = ("image", "code")
    """Rows to show: recall of pictures, of codes, or both."""
    markdown: bool = False
    """A table for a Markdown file."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of summary.json: one system's figures on one split's queries over one pool."""

    system: str
    dataset: str
    split: str
    pool: str
    pool_size: int
    level: Literal["image", "code"] = "image"
    setting: str
    """inductive, or transductive where something was trained on texts for pictures of val or test."""
    figures: Report
    captions_per_picture: int | None
    """Of each picture so many captions are queries; None: all."""
    speed: float | None = None
    """Queries per second, where it was measured."""
    machine: str
    run: Path
    """Folder of the run that gave the figures."""

    def line(self, **more: Any) -> dict[str, Any]:
        """The row as it lies in the file.

        Args:
            more: what rows of this kind have besides.
        """
        return {
            "system": self.system,
            "dataset": self.dataset,
            "split": self.split,
            "pool": self.pool,
            "pool_size": self.pool_size,
            "level": self.level,
            "setting": self.setting,
            **self.figures.rounded(),
            "captions_per_picture": self.captions_per_picture,
            "queries_per_second": None if self.speed is None else round(self.speed, 1),
            "machine": self.machine,
            "run": str(self.run),
            **more,
        }


def merge_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the summary: in place of rows of the same system, split, pool and level, else at its end.

    A trial of a sweep has a summary of its own.
    """
    path = own_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:  # until it is closed: other systems' tests may run
        fcntl.flock(lock, fcntl.LOCK_EX)
        _merge(path, rows)


def _merge(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    merged = {_key(row): row for row in (read_rows(path) if path.is_file() else [])}
    merged.update({_key(row): row for row in rows})
    write_json(path, list(merged.values()))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a summary.

    Raises:
        BadInput: the file is none.
    """
    rows = read_json(path)
    wanted = {*KEY, "recall"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise BadInput(f"{path} holds no rows of results: give a summary.json of {script_of('retriever.test')}")
    return rows


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by split and pool in the order of their first appearance, two-tower search first."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        places.setdefault((row["split"], row["pool"]), len(places))
    return sorted(rows, key=lambda row: (places[row["split"], row["pool"]], not row["system"].startswith(FIRST)))


def scalars(rows: Sequence[dict[str, Any]], *, main: str) -> dict[str, float]:
    """The rows as flat figures that runs can be sorted by: `<system>/<queries and pool>/<figure>`.

    The rows of the system `main` come without a name, too: `test/R@1` is its recall of test queries over the test
    pool, `test-all/R@1` over all pictures, `test/code/R@1` that of codes.

    >>> row = {"system": "x", "split": "test", "pool": "test", "level": "image", "recall": {"1": 0.5}, "mrr": 0.6}
    >>> scalars([row], main="x")
    {'x/test/R@1': 0.5, 'x/test/MRR': 0.6, 'test/R@1': 0.5, 'test/MRR': 0.6}
    """
    found = {f"{row['system']}/{_place(row)}/{name}": value for row in rows for name, value in _figures(row).items()}
    own = f"{main}/"
    return found | {name.removeprefix(own): value for name, value in found.items() if name.startswith(own)}


def _place(row: dict[str, Any]) -> str:
    split, pool = re.sub(r"\W+", "-", row["split"]), row["pool"]
    place = split if row["split"].partition(",")[0] == pool else f"{split}-{pool}"
    return place if row["level"] == "image" else f"{place}/{row['level']}"


def _figures(row: dict[str, Any]) -> dict[str, float]:
    names = {
        "mrr": "MRR",
        "median_rank": "median_rank",
        "queries_per_second": "queries_per_second",
        "ceiling": "ceiling",
    }
    recalls = {f"R@{cutoff}": value for cutoff, value in row["recall"].items()}
    return recalls | {name: row[key] for key, name in names.items() if row.get(key) is not None}


def printable(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    return table([_cells(row) for row in ordered(rows)])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [_cells(row) for row in ordered(rows)]
    lines = [list(cells[0]), ["---"] * len(cells[0])]
    lines += [
        ["–" if v is None else f"{v:.3g}" if isinstance(v, float) else as_markdown_cell(v) for v in row.values()]
        for row in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "system": row["system"],
        "level": row["level"],
        "split": row["split"],
        "pool": f"{row['pool']} ({row['pool_size']:,})",
        "setting": row["setting"],
        **{f"R@{cutoff}": f"{row['recall'][str(cutoff)]:.1%}" for cutoff in CUTOFFS},
        "MRR": row["mrr"],
        "median rank": row["median_rank"],
        "queries/s": row["queries_per_second"],
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def main(config: Config) -> None:
    rows = [row for row in read_rows(config.summary) if row["level"] in config.levels]
    if not rows:
        raise BadInput(f"{config.summary} has no rows of --levels {' '.join(config.levels)}")
    print(markdown(rows) if config.markdown else printable(rows))


if __name__ == "__main__":
    run_command(main, Config)
