"""Where a training stands: its epoch and batch, its curve, and its best model; saved, and taken up again.

A training that was killed goes on as if it had not been. A stage owns its loop:

    checkpoint = Checkpoint(run, stepper, epochs=config.epochs, points=steps)
    checkpoint.resume()
    while not checkpoint.over:
        model.train()
        for batches in checkpoint.steps(batches_of(checkpoint.epoch), seed=config.seed):
            checkpoint.record(stepper.step(loss_of, batches), tracker)
        checkpoint.epoch_ends()
        with checkpoint.validating():
            checkpoint.keep_best(figures, model.save_pretrained)
        checkpoint.report(tracker, figures)
        checkpoint.save()
    checkpoint.finish(tracker, facts={})
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tools import processes, runs
from tools.curves import Curves
from tools.errors import BadInput
from tools.logs import Tracker, progress

from .batches import Batch
from .compute import load_state, save_state
from .stepper import Stepper

SAVE_EVERY_SECONDS = 30.0
MOST_SAVING = 0.05  # share of the time that may go into saving: a large model is saved less often
STEPS_UNREAD = {"cuda": 20}  # most steps between reads of the loss: each read waits for the GPU
SECONDS_UNREAD = 5.0  # most time between them: after a slow step the loss is read, and the state saved, at once
NEAR_CHANCE = 3.0  # times what a guess scores: below it a model has learned next to nothing
SHARDED = "sharded"  # folders of DeepSpeed's own checkpoints
STATE = "state.pt"


class Unread(NamedTuple):
    """A step of the optimiser whose loss nobody has looked at yet."""

    epoch: float
    """Epochs so far, with their fraction."""
    loss: Tensor
    """Mean over the step's batches and this process's part of them; a scalar where the model is."""
    rate: float


class Checkpoint:
    """The state of one training in its run folder. What only a resumed run needs lies in the `resume_folder`.

    Args:
        points: losses that the curve gets in the whole training, such as one per step.
        patience: validated epochs in a row that may be worse than the best before the training is over; None: all.

    Attributes:
        epoch, batch: what comes next; finished epochs, and finished batches of the current one.
        curves: losses and validations so far.
        best: the figures of the best model so far, their "mean" and its "epoch"; empty before the first validation.
        worse: epochs with a validation since the best one.
    """

    def __init__(
        self, run: runs.Run, stepper: Stepper, *, epochs: int, points: int, patience: int | None = None
    ) -> None:
        self.run, self.stepper, self.epochs, self.patience = run, stepper, epochs, patience
        self.curves = Curves(points)
        self.best: dict[str, Any] = {}
        self.worse = 0
        self._judged = -1  # the epoch of the last validation: one epoch may have several, of mixtures of weights
        self.epoch, self.batch, self.of_epoch = 0, 0, 0
        self._unread: list[Unread] = []
        self._bar: tqdm[int] | None = None
        self._read_every, self._read_at = 1, time.monotonic()
        self._saved, self._pause = time.monotonic(), SAVE_EVERY_SECONDS

    def steps(self, batches: Sequence[NDArray[np.int64]], *, seed: int, shown: bool = True) -> Iterator[list[Batch]]:
        """The batches of each step of the current epoch that is still to come.

        Args:
            batches: of the whole epoch, the same in every process.
            seed: the training's.
            shown: under a progress bar.
        """
        self.of_epoch = len(batches)
        label = f"epoch {self.epoch + 1}/{self.epochs}"
        accumulate = self.stepper.large.accumulate
        starts = range(self.batch, len(batches), accumulate)
        total = -(-len(batches) // accumulate)
        self._bar = progress(starts, label, total=total, unit="step", initial=total - len(starts)) if shown else None
        self._read_at = time.monotonic()
        for start in starts if self._bar is None else self._bar:
            some = batches[start : start + accumulate]
            self.batch = start + len(some)
            yield [Batch(rows, seed, self.epoch, start + place) for place, rows in enumerate(some)]

    def record(self, loss: Tensor, tracker: Tracker) -> None:
        """Put a step's loss on the curves, which may wait for later steps, and save where it is time."""
        self._unread.append(Unread(self.epoch + self.batch / self.of_epoch, loss, self.stepper.rate))
        if len(self._unread) == self._read_every or self.batch == self.of_epoch:
            last = self._read_losses(tracker)
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{last:.3f}", refresh=False)
            self.save_if_due()

    def epoch_ends(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    @property
    def over(self) -> bool:
        """Whether all epochs have run, or validations have not been the best for too long."""
        return self.epoch >= self.epochs or (self.patience is not None and self.worse >= self.patience)

    def validation_is_due(self, every: int) -> bool:
        """Whether a validation follows the epochs so far: every `every` epochs, and after the last."""
        return self.epoch % every == 0 or self.epoch == self.epochs

    @contextlib.contextmanager
    def validating(self) -> Iterator[Path | None]:
        """Inside it every process has the whole model, in eval mode.

        Yields:
            A folder for the blocks of work that the processes share, removed afterwards; None with one process.
        """
        self.stepper.module.eval()
        blocks = self.run.resume_folder / f"validation-{self.epoch}" if processes.count() > 1 else None
        with self.stepper.whole_weights():
            yield blocks
        processes.wait()
        self._drop_validations()

    def keep_best(
        self, figures: dict[str, float], write: Callable[[Path], None], *, score: float | None = None
    ) -> None:
        """Write the model where it is the best so far; in every process, while `validating`.

        Args:
            write: writes the whole model, as it is used later, into a folder that need not exist.
            score: what the best model has most of; by default the mean of the figures.
        """
        if self.is_best(figures, score=score):
            self.best, self.worse = {"mean": score_of(figures, score), "epoch": self.epoch, **figures}, 0
            if processes.is_main():
                write(self.best_folder)
        elif self._judged != self.epoch:
            self.worse += 1
        self._judged = self.epoch

    def is_best(self, figures: dict[str, float], *, score: float | None = None) -> bool:
        """Whether a model with these figures is the best so far; arguments as in `keep_best`."""
        return not self.best or score_of(figures, score) > self.best["mean"]

    @property
    def best_folder(self) -> Path:
        """Where the best model so far lies until the training ends."""
        return self.run.resume_folder / f"best-{self.best['epoch']}"

    def report(self, tracker: Tracker, figures: dict[str, float]) -> None:
        """Print and store the figures of a validation, given as fractions named "val/<name>"."""
        tracker.log({**figures, "epoch": self.epoch})
        self.curves.mark(self.epoch, figures)
        words = ", ".join(f"{name.removeprefix('val/')} {value:.1%}" for name, value in figures.items())
        print(f"epoch {self.epoch}, val: {words}", flush=True)

    def save(self) -> None:
        """Write what a resumed run needs: where the training stands, its curve, and the stepper's state."""
        began = time.monotonic()
        shards = self.run.resume_folder / f"{SHARDED}-{self.epoch}-{self.batch}"
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "worse": self.worse,
            "curves": self.curves.state(),
            **self.stepper.state(shards),
        }
        if processes.is_main():
            save_state(self.run.resume_folder / STATE, state)
            self.run.note_time()
            if self.best:
                runs.keep_only(self.run.resume_folder, "best-*", self.best_folder)
            if self.stepper.deepspeed:
                runs.keep_only(self.run.resume_folder, f"{SHARDED}-*", shards)
        self._saved = time.monotonic()
        self._pause = max(SAVE_EVERY_SECONDS, (self._saved - began) / MOST_SAVING)

    def save_if_due(self) -> None:
        """Save where it is time by the main process's clock; a state in parts takes all processes."""
        due = time.monotonic() - self._saved > self._pause
        if processes.share(due) if self.stepper.in_parts else due and processes.is_main():
            self.save()

    def resume(self) -> bool:
        """Take up the last saved state; False when there is none.

        Raises:
            BadInput: an earlier version saved it, or a run with another DeepSpeed setting did.
        """
        self._drop_validations()
        state = load_state(self.run.resume_folder / STATE)
        if state is None:
            return False
        if "layout" not in state:
            raise BadInput(f"{self.run.folder} was begun by an earlier version: start it again with `overwrite`")
        if (layout := state["layout"]) != self.stepper.layout:
            raise BadInput(
                f"{self.run.folder} was begun {layout}, this is {self.stepper.layout}: go on as it was begun"
            )
        self.stepper.restore(state, self.run.resume_folder)
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        self.worse = state.get("worse", 0)
        self.curves.restore(state["curves"])
        return True

    def told(self, *, chance: float | None = None) -> str:
        """Which checkpoint is the best; and what to do where its figures look as if it should not be.

        Args:
            chance: what a guess would score on val.
        """
        best, last = self.best["epoch"], self.epoch
        words = f"best checkpoint: epoch {best} of {last}"
        if last < self.epochs:
            words += f" (of {self.epochs}: it stopped, for val had not been better since)"
        if chance is not None and self.best["mean"] < NEAR_CHANCE * chance:
            words += (
                f"\nnote: val is near chance ({self.best['mean']:.1%}, a guess has {chance:.1%}): the training is too "
                "short or too fast, or captions and pictures do not belong together: give more `steps` or another `lr`"
            )
        elif best == self.epochs > 0:
            words += "\nnote: the best checkpoint is the last one: more `steps`, or `epochs`, may give a better one"
        return words

    def finish(self, tracker: Tracker, *, facts: dict[str, Any]) -> None:
        """Put the best model in place, as `<run>/model`, and close the run."""
        tracker.summary({f"best/{name}": value for name, value in self.best.items()})
        tracker.finish()
        if processes.is_main():
            shutil.copytree(self.best_folder, self.run.folder / "model", dirs_exist_ok=True)
            self.curves.write(self.run.folder)
        self.run.finish(facts=facts, metrics={f"val/{name}": value for name, value in self.best.items()})

    def _drop_validations(self) -> None:
        """Remove what a validation left: a later one has other weights."""
        if processes.is_main():
            runs.keep_only(self.run.resume_folder, "validation-*", None)
        processes.wait()

    def _read_losses(self, tracker: Tracker) -> float:
        """Wait for the steps that nobody has looked at, and put them on the curves; in every process.

        Returns:
            the last step's loss.
        """
        losses = torch.stack([step.loss for step in self._unread])
        means = self.stepper.mean_over_processes(losses).tolist()
        for step, loss in zip(self._unread, means, strict=True):
            self.curves.step(step.epoch, {"train/loss": loss})
            tracker.log({"train/loss": loss, "train/lr": step.rate, "epoch": self.epoch})
        if (most := STEPS_UNREAD.get(self.stepper.device.type, 1)) > 1:
            seconds = (time.monotonic() - self._read_at) / len(self._unread)
            self._read_every = processes.share(min(most, max(1, int(SECONDS_UNREAD / seconds))))
        self._unread, self._read_at = [], time.monotonic()
        return float(means[-1])


def score_of(figures: dict[str, float], score: float | None) -> float:
    """What models are compared by: the score, or the mean of the figures where there is none."""
    return sum(figures.values()) / len(figures) if score is None else score
