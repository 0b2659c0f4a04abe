"""The training loop that stages share, on one process or many: a stage says what a batch and its loss are.

A batch is `batch_size` captions of all processes together, each of which takes its part; draws depend on seed, epoch
and batch alone. So the number of processes changes the speed, and dropout's masks, but nothing else; and a training
that was killed goes on as if it had not been.

    class Training(TrainingLoop):
        def __init__(self, config: Config, data: Data, run: Run, model: nn.Module) -> None:
            super().__init__(config, run, model)
            ...                             # what `batches` reads; device and dtype are known
            self.prepare(decay="cosine")    # from here on there is an optimiser, and `model` to call in `loss`

    training = Training(config, data, run, build_model(config))
    training.resume()
    training.fit(tracker)
    training.finish(tracker, facts={})
"""

import contextlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn

from tools import processes, runs
from tools.curves import Curves
from tools.errors import BadInput
from tools.logs import Tracker, progress

from .compute import Precision, load_state, make_optimizer, pick_device, pick_dtype, save_state, warmup_share
from .norms import fuse_norms

Decay = Literal["none", "linear", "cosine"]
Compile = Literal["never", "gpu", "always"]

SAVE_EVERY_SECONDS = 30.0
MOST_SAVING = 0.05  # share of the time that may go into saving: a large model is saved less often
COMPILER = "inductor"  # of torch.compile
STEPS_UNREAD = {"cuda": 20}  # at most, between looks at the losses: each waits until the GPU has done what it was given
SECONDS_UNREAD = 5.0  # or about so long: a slow step is looked at, and saved, by itself
SHARDED = "sharded"  # folders of DeepSpeed's own checkpoints
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)


class LoopConfig(Protocol):
    """What the loop reads of a stage's configuration, which declares the fields with defaults and help of its own."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulate(self) -> int: ...

    @property
    def at_once(self) -> int | None: ...

    @property
    def optimizer(self) -> str: ...

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def warmup(self) -> float: ...

    @property
    def max_grad_norm(self) -> float: ...

    @property
    def validate_every(self) -> int: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> str | None: ...

    @property
    def compile(self) -> Compile: ...


def gpu_compiles(device: torch.device) -> bool:
    """Whether a device is a GPU that torch.compile can write kernels for: with Triton, and a C compiler for Triton."""
    if device.type != "cuda":
        return False
    lacking = [
        what
        for what, there in (
            ("Triton", find_spec("triton") is not None),
            ("a C compiler", any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))),
        )
        if not there
    ]
    if lacking and processes.is_main():
        print(f"note: the model is not compiled, which takes {' and '.join(lacking)}: a step takes longer", flush=True)
    return not lacking


def check_launch(kind: DistributedType) -> None:
    """Refuse ways of sharing a model that the loop would take for whole copies, and save in parts.

    Raises:
        BadInput: `accelerate launch` shares it by FSDP, Megatron or another way that is not known here.
    """
    if kind not in PLAIN:
        raise BadInput(
            f"accelerate launch was told to share the model by {kind.value}, which is not supported: write "
            "--multi_gpu for whole copies, or use DeepSpeed's ZeRO-3 for weights in parts (docs/scale.md)"
        )


def check_batch_size(batch_size: int) -> None:
    """Whether every process gets a part of a batch.

    Raises:
        BadInput: the processes are more than the captions.
    """
    if batch_size < processes.count():
        raise BadInput(
            f"`batch_size` {batch_size} counts the captions of all {processes.count()} processes: raise it to "
            f"{processes.count()} or more, and lower `accumulate` as much"
        )


class Step(NamedTuple):
    """A step of the optimiser whose loss nobody has looked at yet."""

    epoch: float
    """Epochs so far, with their fraction."""
    loss: Tensor
    """Mean over the step's batches and this process's part of them; a scalar where the model is."""
    lr: float


class Part(NamedTuple):
    """One process's part of a batch."""

    batch: NDArray[np.int64]
    """(batch,) train queries of all processes"""
    own: NDArray[np.int64]
    """(part,) places in `batch`; never empty"""
    weight: float
    """Of the mean loss over the part, such that the mean over processes is the mean over the batch."""

    @property
    def queries(self) -> NDArray[np.int64]:
        """(part,) train queries of this process."""
        return self.batch[self.own]

    def pieces(self, most: int | None) -> "list[Part]":
        """The part in pieces of nearly equal size, at most `most` queries each, whose losses add up to the part's.

        They are as many in every process, which DeepSpeed needs to keep step: where this process has fewer queries than
        others, a piece of its may carry no weight.
        """
        largest = -(-len(self.batch) // processes.count())
        if most is None or largest <= most:
            return [self]
        cut = np.array_split(self.own, -(-largest // most))
        return [
            Part(self.batch, own if len(own) else self.own[:1], self.weight * len(own) / len(self.own)) for own in cut
        ]


def part_of(batch: NDArray[np.int64]) -> Part:
    """This process's part of a batch; where it is smaller than the processes are many, some carry no weight."""
    places = np.arange(len(batch))[processes.number() :: processes.count()]
    weight = len(places) * processes.count() / len(batch)
    return Part(batch, places if len(places) else np.zeros(1, dtype=np.int64), weight)


def bucketed_batches(
    lengths: NDArray[np.int64], size: int, generator: np.random.Generator, *, bucket: int = 32
) -> list[NDArray[np.int64]]:
    """Shuffled batches of texts of similar length: little padding, and every text once.

    Args:
        lengths: (queries,)
        bucket: batches that are sorted by length together; larger means less padding and less shuffling.
    """
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), size * bucket):
        some = order[start : start + size * bucket]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[begin : begin + size] for begin in range(0, len(some), size)]
    generator.shuffle(batches)
    return batches


class TrainingLoop(ABC):
    """One training: the steps that `fit` puts in order, and what they need. A stage derives from it.

    What is trained, and saved for a resumed run, are the parameters with `requires_grad`; buffers are not saved.

    Attributes:
        run: the run folder; what only a resumed run needs lies in its `resume_folder`.
        device, dtype: where the model lies, and the arithmetic of its forward passes.
        module: the model as the stage built it: to evaluate, to write, to look into.
        model: the same as the processes share it: to call in `loss`, where its gradients are wanted.
        sharded: DeepSpeed trains it, and may keep its weights in parts; see `whole_weights`.
        steps: of the optimiser, in all epochs together.
        epoch, batch: what comes next; finished epochs, and finished batches of the current one.
        curves: losses and validations so far.
        best: the figures of the best model so far, their "mean" and its "epoch"; empty before the first validation.
    """

    config: LoopConfig

    def __init__(self, config: LoopConfig, run: runs.Run, module: nn.Module) -> None:
        self.config, self.run = config, run
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are the same everywhere
        )
        check_launch(self.accelerator.distributed_type)
        self.sharded = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.sharded and self.dtype == torch.float16:  # its clipping takes the scaled gradients for the true ones
            raise BadInput("DeepSpeed does not train with `precision` fp16: write bf16 or fp32")
        self.module = module.to(self.device)
        if self.device.type == "cuda":
            fuse_norms(self.module)
        if config.compile == "always" and self.sharded:
            raise BadInput("`compile` is for whole models, DeepSpeed shares this one: leave one of the two out")
        if config.compile == "always" or (config.compile == "gpu" and not self.sharded and gpu_compiles(self.device)):
            self.module.compile(backend=COMPILER, dynamic=True)
        self.best: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.unread: list[Step] = []
        self.read_every, self.read_at = 1, time.monotonic()

    def prepare(self, *, decay: Decay) -> None:
        """Make optimiser, schedule and `model`: the end of a stage's `__init__`, when `batches` can be asked.

        Args:
            decay: how the learning rate falls after the warmup.
        """
        config = self.config
        self.steps = config.epochs * -(-len(self.batches(0)) // config.accumulate)
        self.curves = Curves(self.steps)
        optimizer = make_optimizer(
            config.optimizer,
            self.module,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" and not self.sharded,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_share(step, steps=self.steps, warmup=config.warmup, decay=decay)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.model, self.optimizer = self._prepare(optimizer)
        self.saved, self.save_pause = time.monotonic(), SAVE_EVERY_SECONDS

    @abstractmethod
    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, numbers of train queries: the same in every process, as many in every epoch."""

    @abstractmethod
    def loss(self, part: Part) -> Tensor:
        """Mean loss over a part of a batch, from one call of `model`; what is drawn is drawn from `_seed`."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures of the current weights as "val/<name>", shares of 1; work `validating`, and `keep_best`."""

    @abstractmethod
    def write_model(self, folder: Path) -> None:
        """Write the whole model, as it is used later, into a folder that need not exist."""

    def begin_epoch(self) -> None:  # noqa: B027
        """What an epoch needs before its batches; a resumed run comes here again."""

    def run_epoch(self, tracker: Tracker) -> None:
        """The batches of the current epoch that are still to come."""
        config = self.config
        self.begin_epoch()
        batches = self.batches(self.epoch)
        label = f"epoch {self.epoch + 1}/{config.epochs}"
        bar = progress(batches[self.batch :], label, total=len(batches), initial=self.batch)
        self.module.train()
        self.read_at = time.monotonic()
        losses: list[Tensor] = []
        for batch in bar:
            torch.manual_seed(self._seed(1 + processes.number()))
            complete = (self.batch + 1) % config.accumulate == 0 or self.batch + 1 == len(batches)
            losses.append(self._backward(part_of(batch), complete))
            self.batch += 1
            if not complete:
                continue
            self._step()
            mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
            rate = float(self.schedule.get_last_lr()[0])
            self.unread.append(Step(self.epoch + self.batch / len(batches), mean, rate))
            losses = []
            if len(self.unread) == self.read_every or self.batch == len(batches):
                bar.set_postfix(loss=f"{self._read_losses(tracker):.3f}", refresh=False)
                if self._save_is_due():
                    self.save()
        self.epoch, self.batch = self.epoch + 1, 0

    def fit(self, tracker: Tracker) -> None:
        """Run every epoch that is still to come."""
        config = self.config
        while self.epoch < config.epochs:
            self.run_epoch(tracker)
            if self.epoch % config.validate_every == 0 or self.epoch == config.epochs:
                self.report(tracker, self.validate())
            self.save()

    def report(self, tracker: Tracker, figures: dict[str, float]) -> None:
        """Show the figures of a validation, and keep them."""
        tracker.log({**figures, "epoch": self.epoch})
        self.curves.mark(self.epoch, figures)
        words = ", ".join(f"{name[4:]} {value:.1%}" for name, value in figures.items())
        print(f"epoch {self.epoch}, val: {words}", flush=True)

    def finish(self, tracker: Tracker, *, facts: dict[str, Any]) -> None:
        """Put the best model in place, as `<run>/model`, and close the run."""
        tracker.summary({f"best/{name}": value for name, value in self.best.items()})
        tracker.finish()
        if processes.is_main():
            shutil.copytree(self.best_folder, self.run.folder / "model", dirs_exist_ok=True)
            self.curves.write(self.run.folder)
        self.run.finish(facts=facts, metrics={f"val/{name}": value for name, value in self.best.items()})

    @contextlib.contextmanager
    def validating(self) -> Iterator[Path | None]:
        """Inside it every process has the whole model, in eval mode.

        Yields:
            A folder for the blocks of work that the processes share, removed afterwards; None with one process.
        """
        self.module.eval()
        blocks = self.run.resume_folder / f"validation-{self.epoch}" if processes.count() > 1 else None
        with self.whole_weights():
            yield blocks
        processes.wait()
        self._drop_validations()

    def keep_best(self, figures: dict[str, float]) -> None:
        """Write the model where the mean of its figures is the best so far; in every process, while `validating`."""
        mean = sum(figures.values()) / len(figures)
        if not self.best or mean > self.best["mean"]:
            self.best = {"mean": mean, "epoch": self.epoch, **figures}
            if processes.is_main():
                self.write_model(self.best_folder)

    @property
    def best_folder(self) -> Path:
        """Where the best model so far lies until the training ends."""
        return self.run.resume_folder / f"best-{self.best['epoch']}"

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def save(self) -> None:
        """Write what a resumed run needs: trained weights, optimiser, and where the epoch stands."""
        began = time.monotonic()
        state: dict[str, Any] = {
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "curves": self.curves.state(),
            "layout": self.layout,
        }
        if self.sharded:
            state["shards"] = f"{SHARDED}-{self.epoch}-{self.batch}"
            self.model.save_checkpoint(self.run.resume_folder / state["shards"], exclude_frozen_parameters=True)
            processes.wait()
        else:
            state["model"] = {name: value.detach() for name, value in self.trained().items()}
            state["optimizer"] = self.optimizer.state_dict()
        if processes.is_main():
            save_state(self.run.resume_folder / "state.pt", state)
            self.run.note_time()
            if self.best:
                runs.keep_only(self.run.resume_folder, "best-*", self.best_folder)
            if self.sharded:
                runs.keep_only(self.run.resume_folder, f"{SHARDED}-*", self.run.resume_folder / state["shards"])
        self.saved = time.monotonic()
        self.save_pause = max(SAVE_EVERY_SECONDS, (self.saved - began) / MOST_SAVING)

    def resume(self) -> bool:
        """Take up the last saved state; False when there is none.

        Raises:
            BadInput: DeepSpeed would have to take up another state than its own, or another one its.
        """
        self._drop_validations()
        state = load_state(self.run.resume_folder / "state.pt")
        if state is None:
            return False
        if (layout := state.get("layout", "without DeepSpeed")) != self.layout:
            raise BadInput(f"{self.run.folder} was begun {layout}, this is {self.layout}: go on as it was begun")
        if self.sharded:
            shards = self.run.resume_folder / state["shards"]
            self.model.load_checkpoint(shards, load_module_strict=False, load_lr_scheduler_states=False)
        else:
            self.module.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        self.curves.restore(state.get("curves"))
        return True

    @property
    def layout(self) -> str:
        """How the saved state lies in files: DeepSpeed's, in parts that fit the same stage and processes alone."""
        if not self.sharded:
            return "without DeepSpeed"
        return f"with DeepSpeed's ZeRO-{self._zero_stage} on {processes.count()} processes"

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside it every process has all weights, which DeepSpeed's ZeRO-3 keeps in parts, and may copy the model."""
        if self._zero_stage == 3:
            import deepspeed

            with deepspeed.zero.unwrap_model_for_generation(self.model):  # its hooks, too, are off for the time
                yield
        else:
            yield

    @property
    def _zero_stage(self) -> int:
        """What DeepSpeed keeps in parts: 0 nothing, 2 optimiser and gradients, 3 weights too."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.sharded else 0

    def _drop_validations(self) -> None:
        """Remove what a validation left: a later one has other weights."""
        if processes.is_main():
            runs.keep_only(self.run.resume_folder, "validation-*", None)
        processes.wait()

    def _seed(self, stream: int) -> int:
        """A seed for the current batch and one purpose: 0 what is drawn alike in every process, 1 + n in process n."""
        words = [self.config.seed, self.epoch, self.batch, stream]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def _prepare(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimiser as `accelerate launch` wants them: alone, in parallel, or sharded by DeepSpeed."""
        if self.sharded:
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = max(1, self.config.batch_size // processes.count())
            settings["gradient_accumulation_steps"] = 1  # losses come divided; `sync_gradients` says when to step
            settings["gradient_clipping"] = self.config.max_grad_norm
            if self.dtype != torch.float32:  # DeepSpeed switches off any autocast but its own
                exact: dict[str, Any] = {"lower_precision_safe_modules": []}  # gradients and weights travel as they are
                settings["torch_autocast"] = {"enabled": True, "dtype": str(self.dtype), **exact}
        model, prepared = self.accelerator.prepare(self.module, optimizer)
        return model, prepared

    def _backward(self, part: Part, complete: bool) -> Tensor:
        """Add a part's gradients; when they are complete, processes share them. Returns its share of the loss."""
        pieces = part.pieces(self.config.at_once)
        losses = []
        for number, piece in enumerate(pieces):
            last = complete and number + 1 == len(pieces)
            self.accelerator.sync_gradients = last
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.loss(piece) * piece.weight
                self.accelerator.backward(self.scaler.scale(loss / self.config.accumulate))
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _read_losses(self, tracker: Tracker) -> float:
        """Wait for the steps that nobody has looked at, and put them on the curves; in every process.

        Returns:
            the last step's loss.
        """
        means: Tensor = self.accelerator.reduce(torch.stack([step.loss for step in self.unread]), "mean")
        for step, loss in zip(self.unread, means.tolist(), strict=True):
            self.curves.step(step.epoch, {"train/loss": loss})
            tracker.log({"train/loss": loss, "train/lr": step.lr, "epoch": self.epoch})
        if (most := STEPS_UNREAD.get(self.device.type, 1)) > 1:
            seconds = (time.monotonic() - self.read_at) / len(self.unread)
            self.read_every = processes.share(min(most, max(1, int(SECONDS_UNREAD / seconds))))
        self.unread, self.read_at = [], time.monotonic()
        return float(means[-1])

    def _step(self) -> None:
        """One step of the optimiser."""
        if not self.sharded:
            raw = self.optimizer.optimizer  # the scaler looks inside it
            self.scaler.unscale_(raw)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
            self.scaler.step(raw)
            self.scaler.update()
            self.optimizer.zero_grad()
        self.schedule.step()

    def _save_is_due(self) -> bool:
        """By the main process's clock; with DeepSpeed, saving takes all processes."""
        due = time.monotonic() - self.saved > self.save_pause
        return processes.share(due) if self.sharded else due and processes.is_main()
