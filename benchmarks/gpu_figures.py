"""What the GPU check reports: figures with their goals, and failures that stop nothing but themselves."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

GIB = 1 << 30


class Goal(NamedTuple):
    """A bound for a figure."""

    bound: float
    least: bool
    """The figure is to be at least the bound, else at most."""

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g}"


class Figure(NamedTuple):
    """One line of the report."""

    section: str
    what: str
    value: float | None
    """None where nothing was measured; `note` says why."""
    unit: str
    goal: str = ""
    met: bool | None = None
    """None without a goal, and on a CPU, for which the goals are not made."""
    note: str = ""
    trace: str = ""
    """Where a failure came from."""


class Skipped(Exception):
    """Something cannot be measured here; the message says why."""


class Report:
    """Where a section puts its figures.

    Attributes:
        deadline: on `time.monotonic`'s clock, for `need_time`.
    """

    def __init__(self, section: str, device: torch.device, send: Callable[[Figure], None], deadline: float) -> None:
        self.section, self.device, self.send, self.deadline = section, device, send, deadline

    def add(self, what: str, value: float, unit: str, *, goal: Goal | None = None, note: str = "") -> None:
        """Report a figure."""
        judged = goal is not None and self.device.type == "cuda"
        met = goal.met(value) if goal is not None and judged else None
        self.send(Figure(self.section, what, value, unit, "" if goal is None else str(goal), met, note))

    def say(self, what: str, note: str, *, trace: str = "") -> None:
        """Report that there is no figure."""
        self.send(Figure(self.section, what, None, "", note=note, trace=trace))

    def need_time(self) -> None:
        """Begin nothing more after the deadline.

        Raises:
            Skipped: it is over.
        """
        if time.monotonic() > self.deadline:
            raise Skipped("the time is over")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Inside it a failure becomes a line of the report, and what was allocated is freed."""
        try:
            yield
        except Skipped as reason:
            self.say(what, f"skipped: {reason}")
        except Exception as error:
            line = next((line for line in str(error).splitlines() if line.strip()), "")
            self.say(what, f"failed: {type(error).__name__}: {line}"[:300], trace=traceback.format_exc())
        free()


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cells(figure: Figure) -> dict[str, Any]:
    """A figure as a table for people has it."""
    return {
        "section": figure.section,
        "figure": figure.what,
        "value": "-"
        if figure.value is None
        else f"{figure.value:,.4g}"
        if figure.value < 1000
        else f"{figure.value:,.0f}",
        "unit": figure.unit,
        "goal": figure.goal,
        "met": {None: "", True: "yes", False: "NO"}[figure.met],
        "note": figure.note,
    }
