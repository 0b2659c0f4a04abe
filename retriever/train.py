"""Stage 1: train a language model to write the vokens of the picture a caption asks for.

In:  a `retriever.prepare` folder; T5 by name or path, or a text encoder that gets a small decoder.
Out: `<output>/model/`, the best checkpoint by recall on val (real constrained search over the val pictures).
Command: python -m retriever.train --dataset DIR --language-model t5-base --output DIR
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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
    seed_everything,
    warmup_share,
)
from models.decoding import make_writer
from models.voken_lm import Kind, VokenLM, build_causal, build_encoder_decoder, build_seq2seq
from tools import runs
from tools.commands import run_command
from tools.errors import BadInput
from tools.logs import Tracker, progress
from tools.recall import CUTOFFS, report

from .data import RetrieverData, read_data
from .losses import Targets, generative_loss, soft_targets
from .queries import LiveQueries, StoredQueries, bucketed_batches
from .retrieve import ranks_of, search_queries

SAVE_EVERY_SECONDS = 30.0
MOST_SAVING = 0.05  # share of the time that may go into saving: a large model is saved less often


@dataclass(frozen=True)
class Config:
    """Model and training. Published values: T5-base on Flickr30k."""

    dataset: Path
    """Run folder of retriever.prepare."""
    language_model: str
    """Hugging Face name or folder: a T5 (seq2seq), a text encoder (encoder-decoder), or a causal model."""
    output: Path
    """Run folder to write."""
    kind: Kind = "seq2seq"
    """seq2seq: a pretrained sequence-to-sequence model, all of it trained; encoder-decoder: a frozen text encoder,
    its states computed once, and a new decoder as wide as the codebooks; causal: LLaMA and the like behind an
    instruction, all of it trained."""
    decoder_layers: int = 2
    """Layers of a new decoder."""
    decoder_heads: int = 8
    """Attention heads of a new decoder."""
    max_source: int = 128
    """Tokens of a caption at most."""
    epochs: int = 100
    """Passes over the train captions."""
    batch_size: int = 128
    """Captions a forward pass."""
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
    dropout: float = 0.2
    """Dropout of the language model."""
    temperature: float = 0.5
    """The loss is the cross-entropy of softmax(logits / temperature)."""
    label_temperature: float = 0.0
    """Above 0: soft labels and stochastic codes by distance to the codebook, in units of the latents' mean squared
    norm (Lee et al. 2022, section 3.2.3); published: 0, one right code a level."""
    train_end: bool = True
    """The end token counts in the loss; published: yes."""
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
        if min(self.epochs, self.batch_size, self.accumulate, self.beams, self.validate_every) < 1:
            raise BadInput("--epochs, --batch-size, --accumulate, --beams and --validate-every must be at least 1")
        if self.temperature <= 0 or self.label_temperature < 0 or not 0 <= self.dropout < 1:
            raise BadInput("--temperature must be above 0, --label-temperature at least 0, --dropout in [0, 1)")


class Split(NamedTuple):
    """Queries of one split, ready to encode, and the pool rows they ask for."""

    queries: LiveQueries | StoredQueries
    pictures: NDArray[np.int64]


def build_model(config: Config, data: RetrieverData) -> VokenLM:
    """The untrained language model with the dataset's vokens."""
    shared = {"space": data.space, "codebooks": np.array(data.codebooks), "max_source": config.max_source}
    if config.kind == "seq2seq":
        return build_seq2seq(config.language_model, dropout=config.dropout, **shared)  # type: ignore[arg-type]
    if config.kind == "causal":
        return build_causal(config.language_model, **shared)  # type: ignore[arg-type]
    return build_encoder_decoder(
        config.language_model,
        layers=config.decoder_layers,
        heads=config.decoder_heads,
        dropout=config.dropout,
        **shared,  # type: ignore[arg-type]
    )


class Training:
    """One training: its parts, and the steps that `main` puts in order."""

    def __init__(self, config: Config, data: RetrieverData, run: runs.Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.lm = build_model(config, data).to(self.device)
        self.train_split = self._split("train", None)
        self.val_split = self._split("val", config.validate_queries)
        self.codes = torch.tensor(data.codes)
        self.latents = torch.from_numpy(np.array(data.latents))
        self.codebooks = torch.from_numpy(np.array(data.codebooks))
        self.label_scale = float((self.latents[data.rows("train")] ** 2).sum(dim=1).mean()) * config.label_temperature
        self.batches = len(
            bucketed_batches(self.train_split.queries.lengths, config.batch_size, np.random.default_rng())
        )
        self.steps = config.epochs * -(-self.batches // config.accumulate)
        self.optimizer = make_optimizer(config.optimizer, self.lm, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_share(step, steps=self.steps, warmup=config.warmup, decay="linear"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.best: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.saved, self.save_pause = time.monotonic(), SAVE_EVERY_SECONDS

    def loss(self, chosen: NDArray[np.int64]) -> Tensor:
        """Loss of one batch of train captions."""
        config = self.config
        pictures = torch.from_numpy(self.train_split.pictures[chosen])
        if config.label_temperature > 0:
            targets = soft_targets(self.latents[pictures], self.codebooks, self.data.space.levels, self.label_scale)
        else:
            targets = Targets(self.codes[pictures], None)
        targets = Targets(*(None if part is None else part.to(self.device) for part in targets))  # type: ignore[arg-type]
        with autocast(self.device, self.dtype):
            logits = self.lm(self.train_split.queries.memory(chosen), targets.codes)
        return generative_loss(logits, targets, self.lm, temperature=config.temperature, end=config.train_end)

    def run_epoch(self, tracker: Tracker) -> None:
        """The batches of the current epoch that are still to come."""
        config = self.config
        generator = np.random.default_rng([config.seed, self.epoch])
        batches = bucketed_batches(self.train_split.queries.lengths, config.batch_size, generator)
        label = f"epoch {self.epoch + 1}/{config.epochs}"
        bar = progress(batches[self.batch :], label, total=len(batches), initial=self.batch)
        self.lm.train()
        for chosen in bar:
            loss = self.loss(chosen)
            self.scaler.scale(loss / config.accumulate).backward()
            self.batch += 1
            if self.batch % config.accumulate and self.batch != len(batches):
                continue
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.lm.parameters(), config.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            tracker.log({"train/loss": loss.item(), "train/lr": self.schedule.get_last_lr()[0], "epoch": self.epoch})
            if time.monotonic() - self.saved > self.save_pause:
                self.save()
        self.epoch, self.batch = self.epoch + 1, 0

    def validate(self) -> dict[str, float]:
        """Image-level recall on val by constrained search over the val pictures; keeps the best model."""
        config = self.config
        self.lm.eval()
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
            self.lm.save_pretrained(self.best_folder)
        return {f"val/R@{cutoff}": value for cutoff, value in recalls.items()}

    def save(self) -> None:
        """Write what a resumed run needs: trained weights, optimiser, and where the epoch stands."""
        began = time.monotonic()
        trained = {name: value.detach() for name, value in self.lm.named_parameters() if value.requires_grad}
        save_state(
            self.run.resume_folder / "state.pt",
            {
                "model": trained,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "best": self.best,
            },
        )
        self.run.note_time()
        self.saved = time.monotonic()
        self.save_pause = max(SAVE_EVERY_SECONDS, (self.saved - began) / MOST_SAVING)
        if self.best:
            runs.keep_only(self.run.resume_folder, "best-*", self.best_folder)

    @property
    def best_folder(self) -> Path:
        """Where the best model so far lies until the training ends."""
        return self.run.resume_folder / f"best-{self.best['epoch']}"

    def resume(self) -> bool:
        """Take up the last saved state; False when there is none."""
        state = load_state(self.run.resume_folder / "state.pt")
        if state is None:
            return False
        self.lm.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        return True

    def _split(self, name: Any, most: int | None) -> Split:
        queries = self.data.queries(name)
        if not queries.texts:
            raise BadInput(f"{self.data.folder} has no {name} captions: a retriever cannot be trained on it")
        kept = np.arange(len(queries.texts))
        if most is not None and most < len(kept):
            kept = np.sort(np.random.default_rng(self.config.seed).permutation(kept)[:most])
        texts = [queries.texts[index] for index in kept]
        if not self.lm.frozen_encoder:
            return Split(LiveQueries(self.lm, texts), queries.pictures[kept])
        stored = StoredQueries(self.lm, texts, folder=self.run.resume_folder, name=name, dtype=self.dtype)
        return Split(stored, queries.pictures[kept])


def main(config: Config) -> None:
    data = read_data(config.dataset)
    inputs = {"dataset": config.dataset}
    if Path(config.language_model).is_dir():
        inputs["language_model"] = Path(config.language_model)
    run = runs.begin("retriever.train", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    training = Training(config, data, run)
    training.resume()
    tracker = Tracker(run.folder, job="train_retriever", config=run.started["config"])
    while training.epoch < config.epochs:
        training.run_epoch(tracker)
        if training.epoch % config.validate_every == 0 or training.epoch == config.epochs:
            figures = training.validate()
            tracker.log({**figures, "epoch": training.epoch})
            print(
                f"epoch {training.epoch}, val: " + ", ".join(f"{k[4:]} {v:.1%}" for k, v in figures.items()), flush=True
            )
        training.save()
    tracker.summary({f"best/{name}": value for name, value in training.best.items()})
    tracker.finish()
    shutil.copytree(training.best_folder, run.folder / "model", dirs_exist_ok=True)
    run.finish(
        facts={"setting": data.manifest.facts["setting"], "kind": config.kind, "codebooks": data.codebooks_hash},
        metrics={f"val/{name}": value for name, value in training.best.items()},
    )
    print(f"best checkpoint: epoch {training.best['epoch']} of {config.epochs} -> {run.folder / 'model'}")


if __name__ == "__main__":
    run_command(main, Config)
