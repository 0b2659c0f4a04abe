"""Trials of a W&B sweep: an agent runs the same command again and again with other flags, each time as another run.

Two configurations cannot share a run folder. So a trial writes beside the folder that its command line names, into
`sweeps/<sweep>/<run>/<name>`, and reads from there what an earlier command of the same trial left. The agent says
which trial it is in WANDB_SWEEP_ID and WANDB_RUN_ID.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")

SWEEP_VARIABLE, RUN_VARIABLE = "WANDB_SWEEP_ID", "WANDB_RUN_ID"
FOLDER = "sweeps"


def trial() -> tuple[str, str] | None:
    """Ids of the sweep and of the run that this process is a trial of; None outside a sweep."""
    sweep, run = os.environ.get(SWEEP_VARIABLE), os.environ.get(RUN_VARIABLE)
    return (Path(sweep).name, run) if sweep and run else None


def own_place(path: Path) -> Path:
    """Where the trial keeps what lies at `path` outside a sweep: `path` itself outside one, or where it is that place.

    With sweep s1 and run r2, `output/09_train/retriever` is `output/09_train/sweeps/s1/r2/retriever`.
    """
    ids = trial()
    if ids is None or path.parts[-4:-1] == (FOLDER, *ids):
        return path
    return path.parent.joinpath(FOLDER, *ids, path.name)


def common_place(path: Path) -> Path:
    """The path outside a sweep: what `own_place` was made of.

    >>> common_place(Path("output/09_train/sweeps/s1/r2/retriever")).as_posix()
    'output/09_train/retriever'
    """
    return path.parents[3] / path.name if path.parts[-4:-3] == (FOLDER,) else path


def of_trial(config: ConfigT) -> ConfigT:
    """A command's configuration with the trial's own output folder, and with those inputs that the trial has made."""
    if trial() is None:
        return config
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Path) and (field.name == "output" or own_place(value).exists()):
            changed[field.name] = own_place(value)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]
