"""What a person sees of a run: progress bars, tables, and Weights & Biases.

W&B never stands in the way: without a login it logs offline (`wandb sync` sends it later), `WANDB_MODE=disabled`
switches it off, and any failure of it becomes one line on standard error.
"""

import os
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from . import environment, processes, runs, verbosity
from .command_line import sweeps

ItemT = TypeVar("ItemT")

PROJECT = "avg"
INIT_TIMEOUT_SECONDS = 20
LONG_NUMBER = 100.0  # from here on a table shows one decimal instead of three
QUIET_INTERVAL_SECONDS = 20.0  # between two lines of a progress bar that goes to a file


def progress(
    items: Iterable[ItemT], label: str, *, total: int | None = None, unit: str = "batch", initial: int = 0
) -> "tqdm[ItemT]":
    """A progress bar over `items`: live on a terminal, a line now and then in a log file; none with --quiet."""
    environment.say_choices()  # a command without a choice of precision has not said its device
    interval = 0.1 if sys.stderr.isatty() else QUIET_INTERVAL_SECONDS
    return tqdm(
        items,
        desc=label,
        total=total,
        unit=f" {unit}",
        initial=initial,
        mininterval=interval,
        dynamic_ncols=True,
        disable=not processes.is_main() or verbosity.is_quiet(),
    )


def end_progress() -> None:
    """End every bar that is still shown, so that what is printed next has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned text: words to the left, numbers to the right, None as a dash.

    >>> print(table([{"system": "two-tower", "R@1": 0.5}, {"system": "x", "R@1": None}]))
    system       R@1
    two-tower  0.500
    x              -
    """
    header = list(rows[0])
    cells = [[_cell(row[key]) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    left = [isinstance(rows[0][key], str) for key in header]

    def line(values: list[str]) -> str:
        padded = (
            value.ljust(width) if is_left else value.rjust(width)
            for value, width, is_left in zip(values, widths, left, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(line(values) for values in [header, *cells])


class Tracker:
    """One W&B run that belongs to a run folder; a resumed run continues its curves.

    The runs of one chain are a group. In a sweep all commands of a trial log into the trial's one run.

    Args:
        folder: the run folder; its path names the run and its group, and `resume/wandb_id` in it keeps the id.
        job: the kind of run, W&B's job type.
        config: shown beside the curves.
    """

    def __init__(self, folder: Path, *, job: str, config: dict[str, Any]) -> None:
        self._run: Any = None
        self._folder = folder
        if os.environ.get("WANDB_MODE") == "disabled" or not processes.is_main():
            return
        try:
            self._run = self._start(folder, job, config)
        except Exception as error:
            print(f"wandb is off for this run: {error}", file=sys.stderr)

    def _start(self, folder: Path, job: str, config: dict[str, Any]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # here, and not above: slow to import, and not needed by the core

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        id_file = folder / "resume" / "wandb_id"
        trial = sweeps.trial()
        own = id_file.read_text(encoding="utf-8") if id_file.is_file() else secrets.token_hex(4)
        run_id = trial[1] if trial else own
        options: dict[str, Any] = {
            "group": os.environ.get("WANDB_RUN_GROUP") or chain_of(folder),
            "job_type": job,
            "config": config,
            "resume": "allow",
        }
        if trial is None:  # the agent has chosen name, project and id of a trial
            options |= {"name": str(folder), "project": os.environ.get("WANDB_PROJECT", PROJECT), "id": run_id}
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS)
        try:
            run = wandb.init(mode=mode, settings=settings, **options)
        except Exception:
            if mode != "online":
                raise
            print("wandb: no answer from the server, logging offline", file=sys.stderr)
            run = wandb.init(mode="offline", settings=settings, **options)
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(run_id, encoding="utf-8")
        return run

    def log(self, values: dict[str, Any], *, step: int | None = None) -> None:
        """Add one point to the curves."""
        self._call("log", values, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        """Set the figures shown in the list of runs."""
        if self._run is not None:
            self._call_on(self._run.summary, "update", values)

    def table(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Log rows of equal keys as a W&B table; columns of numbers stay numbers, all others are text."""
        if rows:
            columns = list(rows[0])
            plain = {key for key in columns if all(isinstance(row[key], int | float | None) for row in rows)}
            cells = [[row[key] if key in plain else str(row[key]) for key in columns] for row in rows]
            self._show(name, "Table", columns=columns, data=cells)

    def image(self, name: str, path: Path) -> None:
        """Log a picture file."""
        self._show(name, "Image", str(path))

    def page(self, name: str, path: Path) -> None:
        """Log an HTML file, as it is."""
        self._show(name, "Html", str(path), inject=False)

    def finish(self) -> None:
        """Say where the run was computed and how long it took, flush and close."""
        if self._run is not None:
            self.summary({f"run/{name}": value for name, value in ran(self._folder).items()})
        self._call("finish")
        self._run = None

    def _show(self, name: str, kind: str, *args: Any, **options: Any) -> None:
        """Log one of W&B's own objects; making it may fail, too."""
        if self._run is None:
            return
        try:
            import wandb

            self._run.log({name: getattr(wandb, kind)(*args, **options)})
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        print(f"wandb is off for the rest of this run: {error}", file=sys.stderr)
        self._run = None

    def _call(self, method: str, *args: Any, **options: Any) -> None:
        if self._run is not None:
            self._call_on(self._run, method, *args, **options)

    def _call_on(self, target: Any, method: str, *args: Any, **options: Any) -> None:
        try:
            getattr(target, method)(*args, **options)
        except Exception as error:
            self._stop(error)


def chain_of(folder: Path) -> str:
    """The chain that a run folder belongs to: what lies between `output/` and the folder of its stage.

    >>> chain_of(Path("retriever/output/flickr30k-better/09_train/retriever"))
    'flickr30k-better'
    >>> chain_of(Path("retriever/output/emoji/ablations/beam size 1/13_test/retriever"))
    'emoji-ablations-beam size 1'
    """
    folder = sweeps.common_place(folder.absolute())
    stages = [place for place in (folder, *folder.parents) if re.match(r"\d\d_", place.name)]
    parts = (stages[-1] if stages else folder).parent.parts
    after = [place for place, part in enumerate(parts) if part == "output"]
    return "-".join(parts[after[-1] + 1 :] if after else parts[-1:])


def ran(folder: Path) -> dict[str, str | float]:
    """Device, arithmetic and hours of the run in a folder, whose process this is."""
    found = environment.describe()
    device, machine = str(found.get("device", "cpu")), found["machine"]
    facts: dict[str, str | float] = {
        "device": machine["gpu"] if device.startswith("cuda") else f"{device}, {machine['processor']}",
        "processes": found["processes"],
        "precision": found.get("precision", "float32"),
    }
    seconds = runs.seconds_so_far(folder)
    return facts if seconds is None else {**facts, "hours": round(seconds / 3600, 4)}


def _logged_in(wandb: Any) -> bool:
    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < LONG_NUMBER else f"{value:,.1f}"
    return str(value)
