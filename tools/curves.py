"""The curve of a training, kept with its saved state and written into its run folder at the end.

curves.jsonl  {"epoch": 0.5, "train/loss": 3.2} or {"epoch": 2.0, "val/R@1": 0.31} a line per point, in order

Equal trainings leave equal files: no times stand in them, and a training that was killed and resumed has the curve of
one that was not. Losses are means over windows of steps: a long training leaves no more points than a short one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json_lines, write_json_lines

FILE_NAME = "curves.jsonl"
MOST_WINDOWS = 500
DIGITS = 5  # significant ones, of every figure

Point = dict[str, float | None]


class Curves:
    """The points of one training so far.

    Args:
        steps: of the whole training, which are cut into windows.
    """

    def __init__(self, steps: int) -> None:
        self.window = max(1, -(-steps // MOST_WINDOWS))
        self.points: list[Point] = []
        self.sums: dict[str, float] = {}
        self.count = 0
        self.epoch = 0.0

    def step(self, epoch: float, values: Mapping[str, float]) -> None:
        """Add one step's figures to the window, and the window to the points when it is full.

        Args:
            epoch: epochs so far, with their fraction.
        """
        self.epoch = epoch
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.count += 1
        if self.count == self.window:
            self._close()

    def mark(self, epoch: float, values: Mapping[str, float]) -> None:
        """Add the figures of a validation as they are."""
        self.points.append({"epoch": _rounded(epoch), **{name: _rounded(value) for name, value in values.items()}})

    def state(self) -> dict[str, Any]:
        """What goes into the training's saved state."""
        return {"points": list(self.points), "sums": self.sums, "count": self.count, "epoch": self.epoch}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` gave; None, of a state that an earlier version saved, leaves the curve empty."""
        if state is not None:
            self.points, self.sums = list(state["points"]), dict(state["sums"])
            self.count, self.epoch = state["count"], state["epoch"]

    def write(self, folder: Path) -> None:
        """Write the file, the last window included though it may not be full."""
        if self.count:
            self._close()
        write_json_lines(folder / FILE_NAME, self.points)

    def _close(self) -> None:
        self.mark(self.epoch, {name: value / self.count for name, value in self.sums.items()})
        self.sums, self.count = {}, 0


def read_curves(folder: Path) -> list[Point]:
    """The points that a training left; none where it was made before there were any."""
    path = folder / FILE_NAME
    return [point for _, point in read_json_lines(path)] if path.is_file() else []


def _rounded(value: float) -> float | None:
    """To a few digits; None, which is JSON, for what is no number."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
