"""Train the image tokenizer: RQ-VAE with semantic alignment on features of the train split.

In:  a feature folder (RQ-VAE.prepare_emb, or RQ-VAE.train_heads).
Out: `<output>/config.json`, `<output>/model.safetensors` (the best checkpoint by validation), `<output>/report.json`,
     `<output>/curves.jsonl` (tools/curves.py).
Command: python -m RQ-VAE.train --features DIR --output DIR
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.compute import (
    check_optimization,
    load_state,
    make_optimizer,
    pick_device,
    save_state,
    seed_everything,
    warmup_share,
)
from models.rqvae import BLOCK, AlignAt, Alignment, RqVae, RqVaeConfig
from tools import runs
from tools.commands import run_command
from tools.curves import Curves
from tools.errors import BadInput
from tools.features import Features, Rows, encoder_of, read_features
from tools.files import read_json_lines, write_json
from tools.logs import Tracker, progress
from tools.recall import CUTOFFS
from tools.tokenizer_report import TokenizerReport, make_report

SAVE_EVERY_SECONDS = 10.0
STATE = "state.pt"  # what a resumed run goes on from


@dataclass(frozen=True)
class Config:
    """Shape, losses and training of the tokenizer. Published values: the paper's recipe for Flickr30k."""

    features: Path
    """Feature folder."""
    output: Path
    """Run folder to write."""
    width: int = 768
    """Width of latents and codebooks (e_dim): the width of the language model."""
    hidden: tuple[int, ...] = (1024, 512)
    """Hidden widths of the encoder, mirrored in the decoder."""
    levels: int = 4
    """Vokens a picture."""
    codebook_size: int = 1024
    """Codes a codebook."""
    shared_codebook: bool = False
    """One codebook for all levels (published), or one a level."""
    dropout: float = 0.25
    """Dropout of the MLPs."""
    normalize: bool = True
    """Quantise directions; published: no."""
    skip: bool = True
    """A linear path started from principal components, so that training starts from residual k-means; published: no."""
    alignment: Alignment = "mse"
    """Semantic alignment with the caption's feature."""
    align_at: AlignAt = "after"
    """Align the decoder's output or the encoder's."""
    alignment_weight: float = 1.0
    """Weight of the alignment in the objective."""
    sinkhorn_temperature: float = 0.0
    """Above 0: balanced assignment (Sinkhorn) during training; published: yes, with a value that is not known."""
    kmeans_start: bool = True
    """Start the codebooks from residual k-means over the train split."""
    kmeans_sample: int = 200_000
    """Pictures that k-means sees at most, drawn at random."""
    kmeans_first_batch: bool = False
    """K-means sees the first batch alone, as the network in training sees it (dropout, statistics of the batch);
    published: yes."""
    kmeans_iterations: int = 100
    """Iterations of k-means."""
    kmeans_balance: float = 0.05
    """Above 0: clusters of equal size, softer for larger values; published: 0."""
    revive_every: int = 10
    """Epochs between moves of unused codes onto data; 0: never."""
    pairs: Literal["picture", "caption"] = "picture"
    """What an epoch passes over: each picture once, with one of its captions, drawn anew; or each caption once, with
    its picture. Published: caption, which is as many times more steps as a picture has captions."""
    pseudo_queries: Path | None = None
    """Run folder of retriever.pseudo_queries.generate: with --pairs caption, train on these captions of pool pictures
    too (transductive)."""
    epochs: int = 3000
    """Passes over the train pictures, or over their captions."""
    batch_size: int = 16384
    """Pairs of a picture and a caption a batch."""
    shuffle: bool = True
    """Other batches in each epoch; published: no."""
    optimizer: str = "adamw"
    """Name of an optimiser of torch.optim."""
    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of the matrices."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises."""
    validate_every: int = 20
    """Epochs between validations."""
    seed: int = 0
    """Seed of start, batches and captions."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""

    def __post_init__(self) -> None:
        if min(self.levels, self.codebook_size, self.width, self.batch_size, self.validate_every) < 1:
            raise BadInput("--levels, --codebook-size, --width, --batch-size, --validate-every must be at least 1")
        if self.batch_size < 2:
            raise BadInput("--batch-size must be at least 2")
        if self.epochs < 0 or not 0 <= self.dropout < 1:
            raise BadInput("--epochs must not be negative, --dropout must be in [0, 1)")
        if self.sinkhorn_temperature < 0 or self.kmeans_balance < 0:
            raise BadInput("--sinkhorn-temperature and --kmeans-balance must not be negative")
        if min(self.kmeans_iterations, self.revive_every, self.alignment_weight) < 0 or self.kmeans_sample < 1:
            raise BadInput(
                "--kmeans-iterations, --revive-every and --alignment-weight must not be negative, --kmeans-sample must "
                "be at least 1"
            )
        if min(self.hidden, default=1) < 1:
            raise BadInput("--hidden takes widths of at least 1")
        if self.pseudo_queries is not None and self.pairs != "caption":
            raise BadInput("--pseudo-queries are pairs of their own: add --pairs caption")
        check_optimization(self)

    def model(self, features: int) -> RqVaeConfig:
        """The model's part of this configuration."""
        return RqVaeConfig(
            features=features,
            width=self.width,
            hidden=self.hidden,
            levels=self.levels,
            codebook_size=self.codebook_size,
            shared=self.shared_codebook,
            dropout=self.dropout,
            normalize=self.normalize,
            skip=self.skip,
            alignment=self.alignment,
            align_at=self.align_at,
            alignment_weight=self.alignment_weight,
            sinkhorn_temperature=self.sinkhorn_temperature,
        )


class PseudoPairs(NamedTuple):
    """Pictures of the pool and what was written for them."""

    pictures: Rows
    """(pairs,) rows of the features' pictures"""
    texts: Tensor
    """(pairs, features) on the device"""


def read_pseudo_pairs(folder: Path, features: Features, device: torch.device) -> PseudoPairs:
    """Read pseudo queries and encode them as the captions were.

    Raises:
        BadInput: the folder is not finished, or speaks of other pictures.
    """
    from models.clip import encode_texts, load_recorded  # slow to load, and needed for nothing else here

    manifest = runs.read_manifest(folder, "retriever.pseudo_queries.generate")
    if manifest.facts["captions_fingerprint"] != features.manifest.facts["captions_fingerprint"]:
        raise BadInput(f"{folder} was made from other captions than {features.manifest.folder}: make it again")
    row_of = {record.image: row for row, record in enumerate(features.records)}
    lines = [line for _, line in read_json_lines(folder / "pseudo.jsonl")]
    clip = load_recorded(features.manifest.facts)
    clip.model.text.to(device)
    texts = encode_texts(clip, [line["query"] for line in lines], device)
    return PseudoPairs(np.array([row_of[line["image"]] for line in lines], np.int64), texts)


class TrainData:
    """The train split on the device, and the batches of its pairs of a picture and a caption."""

    def __init__(self, features: Features, config: Config, device: torch.device) -> None:
        self.features, self.config, self.rows = features, config, features.captioned_rows("train")
        if len(self.rows) < 2:
            found = f"{len(self.rows)} train pictures with captions"
            raise BadInput(f"{features.manifest.folder} has {found}, needs at least 2")
        self.images = torch.from_numpy(features.images[self.rows].copy()).to(device)
        self.texts = torch.tensor(features.texts).to(device)
        if config.pairs == "caption":
            self.captions = features.text_rows("train")
            self.pictures = np.searchsorted(self.rows, features.owners[self.captions])
        if config.pseudo_queries is not None:
            self._add_pseudo_queries(read_pseudo_pairs(config.pseudo_queries, features, device))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (features, caption features), each (batch, features), for one epoch."""
        for pictures, captions in self._chosen(epoch):
            yield self.images[torch.from_numpy(pictures)], self.texts[torch.from_numpy(captions)]

    def batch_count(self) -> int:
        """Batches an epoch."""
        return len(self._chosen(0))

    def _chosen(self, epoch: int) -> list[tuple[Rows, Rows]]:
        """Rows of `images` and of `texts` of each batch."""
        generator, size = np.random.default_rng([self.config.seed, epoch]), self.config.batch_size
        pairs = len(self.rows) if self.config.pairs == "picture" else len(self.captions)
        order = generator.permutation(pairs) if self.config.shuffle else np.arange(pairs)
        if self.config.pairs == "picture":
            captions = self.features.draw_captions(self.rows, generator)
            count = max(1, pairs // size)  # none smaller than `size`: batch norm needs company
            return [(chosen, captions[chosen]) for chosen in np.array_split(order, count)]
        cuts = list(range(size, pairs, size))  # as published: the last one is what is left
        if cuts and pairs - cuts[-1] == 1:
            cuts.pop()
        return [(self.pictures[chosen], self.captions[chosen]) for chosen in np.split(order, cuts)]

    def _add_pseudo_queries(self, pseudo: PseudoPairs) -> None:
        """Put further pairs behind those of the train split, and each picture once that is not of it."""
        rows = np.union1d(self.rows, pseudo.pictures)
        more = np.setdiff1d(rows, self.rows)
        place = np.empty(rows.max() + 1, np.int64)
        place[np.concatenate([self.rows, more])] = np.arange(len(rows))
        device = self.images.device
        self.images = torch.cat([self.images, torch.from_numpy(self.features.images[more]).to(device)])
        self.captions = np.concatenate([self.captions, len(self.texts) + np.arange(len(pseudo.pictures))])
        self.pictures = np.concatenate([self.pictures, place[pseudo.pictures]])
        self.texts = torch.cat([self.texts, pseudo.texts])


def score(report: TokenizerReport) -> float:
    """What the best checkpoint has most of: recall of quantised features, averaged over the cutoffs; without val
    captions, the reconstruction."""
    if report.quantized_recall:
        return sum(report.quantized_recall[str(cutoff)] for cutoff in CUTOFFS) / len(CUTOFFS)
    return -report.reconstruction_error


def revive(model: RqVae, data: TrainData, config: Config, epoch: int) -> int:
    """Move unused codes onto train latents."""
    model.eval()
    with torch.no_grad():
        latents = torch.cat([model.encode(model.prepare(block)) for block in torch.split(data.images, BLOCK)])
        revived = model.quantizer.revive(
            latents, least=1, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        )
    model.train()
    return revived


def start_from_kmeans(model: RqVae, data: TrainData, config: Config) -> None:
    """Start the codebooks from the train split, from a large sample of it, or as published from the first batch.

    Raises:
        BadInput: it has fewer vectors than a codebook has codes.
    """
    if config.kmeans_first_batch:
        what, (sample, _) = "pairs in the first batch", next(data.batches(0))
    else:
        what, sample = "train pictures", data.images[torch.randperm(len(data.images))[: config.kmeans_sample]]
    if len(sample) < config.codebook_size:
        raise BadInput(f"--codebook-size {config.codebook_size} needs as many {what}, there are {len(sample)}")
    print(f"residual k-means over the {'first batch' if config.kmeans_first_batch else 'train split'} ...", flush=True)
    model.start_from(
        sample,
        iterations=config.kmeans_iterations,
        seed=config.seed,
        balance=config.kmeans_balance,
        as_in_training=config.kmeans_first_batch,
    )


def best_folder(run: runs.Run, best: dict[str, Any]) -> Path:
    """Where the best checkpoint so far lies until the training ends."""
    return run.resume_folder / f"best-{best['epoch']}"


def save(run: runs.Run, best: dict[str, Any], state: dict[str, Any]) -> None:
    """Write what a resumed run needs."""
    save_state(run.resume_folder / STATE, {**state, "best": best})
    run.note_time()
    runs.keep_only(run.resume_folder, "best-*", best_folder(run, best))


def train(model: RqVae, features: Features, run: runs.Run, config: Config) -> dict[str, Any]:
    """Train, validate, keep the best; returns the best validation with its epoch. Resumes from its last state."""
    device = next(model.parameters()).device
    data = TrainData(features, config, device)
    optimizer = make_optimizer(
        config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    steps = config.epochs * data.batch_count()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_share(step, steps=steps, warmup=config.warmup, decay="none")
    )
    tracker = Tracker(run.folder, job="train_rqvae", config=run.started["config"])
    best: dict[str, Any] = {}
    curves = Curves(config.epochs)
    raw: dict[str, float] | None = None  # the features stay as they are: measured once

    def validate(epoch: int) -> None:
        nonlocal raw
        report = make_report(model, features, split="val", raw=raw)
        raw = report.raw_recall
        figures = {f"val/{name.removeprefix('val/')}": value for name, value in report.figures().items()}
        tracker.log(figures, step=epoch)
        curves.mark(epoch, figures)
        if not best or score(report) > best["score"]:
            best.update(score=score(report), epoch=epoch)
            model.save_pretrained(best_folder(run, best))

    state = load_state(run.resume_folder / STATE)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, best = state["epoch"], state["best"]
        curves.restore(state.get("curves"))
    else:
        if config.kmeans_start:
            start_from_kmeans(model, data, config)
        validate(0)
    saved = time.monotonic()
    bar = progress(range(start, config.epochs), "training RQ-VAE", total=config.epochs, unit="epoch", initial=start)
    for epoch in bar:
        model.train()
        for images, captions in data.batches(epoch):
            losses = model.losses(images, captions)
            optimizer.zero_grad()
            losses.total(config.alignment_weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if config.revive_every and (epoch + 1) % config.revive_every == 0 and epoch + 1 < config.epochs:
            revive(model, data, config, epoch)
        figures = {name: value.item() for name, value in losses._asdict().items()}
        tracker.log({f"train/{name}": value for name, value in figures.items()}, step=epoch + 1)
        curves.step(epoch + 1, {f"train/{name}": value for name, value in figures.items()})
        bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            validate(epoch + 1)
        if time.monotonic() - saved > SAVE_EVERY_SECONDS or epoch + 1 == config.epochs:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curves": curves.state()}
            save(run, best, {**states, "schedule": schedule.state_dict(), "epoch": epoch + 1})
            saved = time.monotonic()
    tracker.finish()
    curves.write(run.folder)
    return best


def main(config: Config) -> None:
    features = read_features(config.features)
    inputs = {"features": config.features}
    if config.pseudo_queries is not None:
        inputs["pseudo_queries"] = config.pseudo_queries
    run = runs.begin("RQ-VAE.train", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    model = RqVae(config.model(features.images.shape[1])).to(pick_device(config.device))
    best = train(model, features, run, config)
    model = RqVae.from_pretrained(best_folder(run, best))
    model.save_pretrained(run.folder)
    report = make_report(model, features, split="val")
    write_json(run.folder / "report.json", report._asdict())
    print(f"best checkpoint: epoch {best['epoch']}\n{report.text()}")
    run.finish(
        facts={
            "encoder": encoder_of(features.manifest),
            "levels": config.levels,
            "codebook_size": config.codebook_size,
            "shared": config.shared_codebook,
            "setting": "inductive" if config.pseudo_queries is None else "transductive",
        },
        metrics={"best_epoch": best["epoch"], **report.figures()},
    )


if __name__ == "__main__":
    run_command(main, Config)
