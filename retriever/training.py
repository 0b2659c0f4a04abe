"""One training of a retriever: the loop that both stages share, on one process or many.

A batch is `--batch-size` captions of all processes together, each of which takes its part; draws depend on seed, epoch
and batch alone. So the number of processes changes the speed, and dropout's masks, but nothing else; and a training
that was killed goes on as if it had not been.
"""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn

from models.compute import (
    Precision,
    autocast,
    load_state,
    make_optimizer,
    pick_device,
    pick_dtype,
    save_state,
    warmup_share,
)
from models.decoding import make_writer
from models.voken_lm import VokenLM
from tools import captions, processes, runs
from tools.errors import BadInput
from tools.logs import Tracker, progress
from tools.recall import CUTOFFS, report

from .data import Pairs, RetrieverData
from .losses import Targets, generative_loss, soft_targets
from .pseudo_queries import read_pseudo_queries
from .queries import LiveQueries, StoredQueries, bucketed_batches
from .retrieve import ranks_of, search_queries

SAVE_EVERY_SECONDS = 30.0
MOST_SAVING = 0.05  # share of the time that may go into saving: a large model is saved less often
SHARDED = "sharded"  # folders of DeepSpeed's own checkpoints


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What both stages have in common. Published values: T5-base on Flickr30k, stage 1."""

    dataset: Path
    """Run folder of retriever.prepare."""
    output: Path
    """Run folder to write."""
    pseudo_queries: Path | None = None
    """Run folder of retriever.generate_pseudo_query: train on these captions of pool pictures too (transductive)."""
    epochs: int = 100
    """Passes over the train captions."""
    queries_per_epoch: int | None = None
    """Train captions of an epoch, drawn anew each time; by default all."""
    batch_size: int = 128
    """Captions a forward pass, of all processes together."""
    accumulate: int = 1
    """Forward passes a step of the optimiser."""
    optimizer: str = "adamw"
    """Name of an optimiser of torch.optim."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of the matrices."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    temperature: float = 0.5
    """The generative loss is the cross-entropy of softmax(logits / temperature)."""
    label_temperature: float = 0.0
    """Above 0: soft labels and stochastic codes by distance to the codebook, in units of the latents' mean squared
    norm (Lee et al. 2022, section 3.2.3); published: 0, one right code a level."""
    train_end: bool = True
    """The end token counts in the losses; published: yes."""
    score_end: bool = False
    """The end token counts in the score of a search; published: yes."""
    beams: int = 10
    """Beams of the search on val."""
    validate_every: int = 1
    """Epochs between validations."""
    validate_queries: int = 5000
    """Captions of val that are searched, at most."""
    precision: Precision = "auto"
    """Arithmetic of the forward passes; weights are kept in fp32."""
    seed: int = 0
    """Seed of weights, batches and drawn codes."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch_size, self.accumulate, self.beams, self.validate_every, self.validate_queries)
        if min(counts) < 1 or (self.queries_per_epoch is not None and self.queries_per_epoch < 1):
            raise BadInput(
                "--epochs, --queries-per-epoch, --batch-size, --accumulate, --beams, --validate-every and "
                "--validate-queries must be at least 1"
            )
        if self.temperature <= 0 or self.label_temperature < 0 or self.seed < 0:
            raise BadInput("--temperature must be above 0, --label-temperature and --seed at least 0")
        if self.batch_size < processes.count():
            raise BadInput(
                f"--batch-size {self.batch_size} counts the captions of all {processes.count()} processes: raise it to "
                f"{processes.count()} or more, and lower --accumulate as much"
            )

    def inputs(self) -> dict[str, Path]:
        """Run folders that the training reads."""
        return {
            name: path for name, path in (("dataset", self.dataset), ("pseudo_queries", self.pseudo_queries)) if path
        }


class Split(NamedTuple):
    """Captions of one split that a training reads, ready to encode, and the pool rows they ask for."""

    queries: LiveQueries | StoredQueries
    pictures: NDArray[np.int64]
    texts: list[str]


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


def part_of(batch: NDArray[np.int64]) -> Part:
    """This process's part of a batch; where it is smaller than the processes are many, some carry no weight."""
    places = np.arange(len(batch))[processes.number() :: processes.count()]
    weight = len(places) * processes.count() / len(batch)
    return Part(batch, places if len(places) else np.zeros(1, dtype=np.int64), weight)


class Training:
    """One training: its parts, and the steps that `fit` puts in order. Stage 1 as it is; stage 2 derives from it."""

    def __init__(self, config: TrainingConfig, data: RetrieverData, run: runs.Run, lm: VokenLM) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        self.sharded = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.sharded and self.dtype == torch.float16:  # its clipping takes the scaled gradients for the true ones
            raise BadInput("DeepSpeed does not train with --precision fp16: write bf16 or fp32")
        self.lm = lm.to(self.device)
        self.pairs = self._train_pairs()
        self.read = self._read()
        self.train_split = self._encodable(self.pairs.some(self.read), "train")
        self.val_split = self._encodable(self._val_pairs(), "val")
        self.codes = torch.tensor(data.codes)
        self.latents = torch.from_numpy(np.array(data.latents))
        self.codebooks = torch.from_numpy(np.array(data.codebooks))
        self.label_scale = float((self.latents[data.rows("train")] ** 2).sum(dim=1).mean()) * config.label_temperature
        self.steps = config.epochs * -(-len(self.batches(0)) // config.accumulate)
        optimizer = make_optimizer(config.optimizer, self.lm, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_share(step, steps=self.steps, warmup=config.warmup, decay="linear")
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.model, self.optimizer = self._prepare(optimizer)
        self.best: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.saved, self.save_pause = time.monotonic(), SAVE_EVERY_SECONDS

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, places in `train_split`; the same in every process."""
        drawn = np.searchsorted(self.read, self._drawn(epoch))
        generator = np.random.default_rng([self.config.seed, epoch])
        lengths = self.train_split.queries.lengths[drawn]
        return [drawn[batch] for batch in bucketed_batches(lengths, self.config.batch_size, generator)]

    def targets(self, part: Part) -> Targets:
        """What the model should write for a part of a batch, drawn for the whole batch in every process."""
        pictures = torch.from_numpy(self.train_split.pictures[part.batch])
        if self.config.label_temperature == 0:
            targets = Targets(self.codes[pictures], None)
        else:
            generator = torch.Generator().manual_seed(self._seed(0))
            levels = self.data.space.levels
            targets = soft_targets(self.latents[pictures], self.codebooks, levels, self.label_scale, generator)
        own = torch.from_numpy(part.own)
        return Targets(*(None if each is None else each[own].to(self.device) for each in targets))  # type: ignore[arg-type]

    def loss(self, part: Part) -> Tensor:
        """Mean loss over a part of a batch of train captions."""
        config, targets = self.config, self.targets(part)
        with autocast(self.device, self.dtype):
            logits = self.model(self.train_split.queries.batch(part.queries), targets.codes)
        return generative_loss(logits, targets, self.lm, temperature=config.temperature, end=config.train_end)

    def begin_epoch(self) -> None:
        """What an epoch needs before its batches."""

    def run_epoch(self, tracker: Tracker) -> None:
        """The batches of the current epoch that are still to come."""
        config = self.config
        self.begin_epoch()
        batches = self.batches(self.epoch)
        label = f"epoch {self.epoch + 1}/{config.epochs}"
        bar = progress(batches[self.batch :], label, total=len(batches), initial=self.batch)
        self.lm.train()
        for batch in bar:
            torch.manual_seed(self._seed(1 + processes.number()))
            complete = (self.batch + 1) % config.accumulate == 0 or self.batch + 1 == len(batches)
            loss = self._backward(part_of(batch), complete)
            self.batch += 1
            if not complete:
                continue
            self._step()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            tracker.log({"train/loss": loss, "train/lr": self.schedule.get_last_lr()[0], "epoch": self.epoch})
            if self._save_is_due():
                self.save()
        self.epoch, self.batch = self.epoch + 1, 0

    def validate(self) -> dict[str, float]:
        """Image-level recall on val by constrained search over the val pictures; keeps the best model."""
        config = self.config
        self.lm.eval()
        blocks = self.run.resume_folder / f"validation-{self.epoch}" if processes.count() > 1 else None
        with self.whole_weights():
            ranking = search_queries(
                make_writer(self.lm, config.precision),
                self.val_split.queries,
                self.data.codes,
                self.data.rows("val"),
                beams=config.beams,
                keep=max(CUTOFFS),
                batch_size=64,
                score_end=config.score_end,
                quiet=True,
                blocks_folder=blocks,
            )
            images, _ = ranks_of(ranking, self.val_split.pictures, self.data.codes)
            recalls = report(images).recalls
            mean = sum(recalls.values()) / len(recalls)
            if not self.best or mean > self.best["mean"]:
                self.best = {
                    "mean": mean,
                    "epoch": self.epoch,
                    **{f"R@{cutoff}": value for cutoff, value in recalls.items()},
                }
                if processes.is_main():
                    self.lm.save_pretrained(self.best_folder)
        processes.wait()
        self._drop_validations()
        return {f"val/R@{cutoff}": value for cutoff, value in recalls.items()}

    def fit(self, tracker: Tracker) -> None:
        """Run every epoch that is still to come."""
        config = self.config
        while self.epoch < config.epochs:
            self.run_epoch(tracker)
            if self.epoch % config.validate_every == 0 or self.epoch == config.epochs:
                self.report(tracker, self.validate())
            self.save()

    def report(self, tracker: Tracker, figures: dict[str, float]) -> None:
        """Show the figures of a validation."""
        tracker.log({**figures, "epoch": self.epoch})
        words = ", ".join(f"{name[4:]} {value:.1%}" for name, value in figures.items())
        print(f"epoch {self.epoch}, val: {words}", flush=True)

    def save(self) -> None:
        """Write what a resumed run needs: trained weights, optimiser, and where the epoch stands."""
        began = time.monotonic()
        state: dict[str, Any] = {
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "layout": self.layout,
        }
        if self.sharded:
            state["shards"] = f"{SHARDED}-{self.epoch}-{self.batch}"
            self.model.save_checkpoint(self.run.resume_folder / state["shards"], exclude_frozen_parameters=True)
            processes.wait()
        else:
            state["model"] = {name: p.detach() for name, p in self.lm.named_parameters() if p.requires_grad}
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

    @property
    def best_folder(self) -> Path:
        """Where the best model so far lies until the training ends."""
        return self.run.resume_folder / f"best-{self.best['epoch']}"

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
            self.lm.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        return True

    @property
    def layout(self) -> str:
        """How the saved state lies in files: DeepSpeed's, in parts that fit the same stage and processes alone."""
        if not self.sharded:
            return "without DeepSpeed"
        return f"with DeepSpeed's ZeRO-{self._zero_stage} on {processes.count()} processes"

    @contextlib.contextmanager
    def whole_weights(self) -> Any:
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
        """Remove what a search on val left: a later one has other weights."""
        if processes.is_main():
            runs.keep_only(self.run.resume_folder, "validation-*", None)
        processes.wait()

    def _seed(self, stream: int) -> int:
        """A seed for one batch and one purpose."""
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
        model, prepared = self.accelerator.prepare(self.lm, optimizer)
        return model, prepared

    def _backward(self, part: Part, complete: bool) -> float:
        """Add a part's gradients; when they are complete, processes share them. Returns the batch's mean loss."""
        self.accelerator.sync_gradients = complete
        with contextlib.nullcontext() if complete else self.accelerator.no_sync(self.model):
            loss = self.loss(part) * part.weight
            self.accelerator.backward(self.scaler.scale(loss / self.config.accumulate))
        mean: Tensor = self.accelerator.reduce(loss.detach(), "mean")
        return float(mean)

    def _step(self) -> None:
        """One step of the optimiser."""
        if not self.sharded:
            raw = self.optimizer.optimizer  # the scaler looks inside it
            self.scaler.unscale_(raw)
            nn.utils.clip_grad_norm_(self.lm.parameters(), self.config.max_grad_norm)
            self.scaler.step(raw)
            self.scaler.update()
            self.optimizer.zero_grad()
        self.schedule.step()

    def _save_is_due(self) -> bool:
        """By the main process's clock; with DeepSpeed, saving takes all processes."""
        due = time.monotonic() - self.saved > self.save_pause
        return processes.share(due) if self.sharded else due and processes.is_main()

    def _train_pairs(self) -> Pairs:
        pairs = self._pairs("train")
        if self.config.pseudo_queries is None:
            return pairs
        pseudo = read_pseudo_queries(self.config.pseudo_queries, self.data)
        return Pairs(pairs.texts + pseudo.texts, np.concatenate([pairs.pictures, pseudo.pictures]))

    def _val_pairs(self) -> Pairs:
        pairs, most = self._pairs("val"), self.config.validate_queries
        return pairs.some(np.sort(np.random.default_rng(self.config.seed).permutation(len(pairs.texts))[:most]))

    def _pairs(self, name: captions.Split) -> Pairs:
        queries = self.data.queries(name)
        if not queries.texts:
            raise BadInput(f"{self.data.folder} has no {name} captions: a retriever cannot be trained on it")
        return Pairs(queries.texts, queries.pictures)

    def _read(self) -> NDArray[np.int64]:
        """Places in `pairs` of the captions that some epoch draws, sorted."""
        if self.config.queries_per_epoch is None:
            return np.arange(len(self.pairs.texts))
        return np.unique(np.concatenate([self._drawn(epoch) for epoch in range(self.config.epochs)]))

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        """Places in `pairs` of an epoch's captions, sorted."""
        every = np.arange(len(self.pairs.texts))
        if (most := self.config.queries_per_epoch) is None:
            return every
        return np.sort(np.random.default_rng([self.config.seed, epoch, 1]).permutation(every)[:most])

    def _encodable(self, pairs: Pairs, name: str) -> Split:
        if not self.lm.frozen_encoder:
            return Split(LiveQueries(self.lm, pairs.texts), pairs.pictures, pairs.texts)
        stored = StoredQueries(self.lm, pairs.texts, folder=self.run.resume_folder, name=name, dtype=self.dtype)
        return Split(stored, pairs.pictures, pairs.texts)


def finish(training: Training, tracker: Tracker, *, facts: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Put the best model in place and close the run."""
    best, config, data = training.best, training.config, training.data
    tracker.summary({f"best/{name}": value for name, value in best.items()})
    tracker.finish()
    if processes.is_main():
        shutil.copytree(training.best_folder, training.run.folder / "model", dirs_exist_ok=True)
    setting = data.manifest.facts["setting"] if config.pseudo_queries is None else "transductive"
    training.run.finish(
        facts={"setting": setting, "kind": training.lm.kind, "codebooks": data.codebooks_hash, **facts},
        metrics={**{f"val/{name}": value for name, value in best.items()}, **metrics},
    )
