"""Train the image tokenizer: RQ-VAE with semantic alignment on features of the train split.

In:  a feature folder (RQ-VAE.prepare_emb, or RQ-VAE.train_heads).
Out: `<output>/config.json`, `<output>/model.safetensors` (the best checkpoint by validation), `<output>/report.json`,
     `<output>/curves.jsonl` (tools/curves.py).
Command: python -m RQ-VAE.train --features DIR --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.batches import Part, check_batch_size, drawn
from models.compute import pick_device, seed_everything
from models.lengths import tell_overlong
from models.options import TrainingOptions, ValidationOptions, examples_of_epoch
from models.rqvae import BLOCK, AlignAt, Alignment, RqVae, RqVaeConfig
from models.stepper import Stepper
from models.training import Checkpoint
from tools import processes, runs
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import TAKEN, Features, Rows, encoder_of, read_features
from tools.files import read_json_lines, write_json
from tools.logs import Tracker, progress
from tools.recall import CUTOFFS
from tools.tokenizer_report import TokenizerReport, make_report

LEAST = 2  # pairs per process in a batch, which batch norm needs


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TrainingOptions, ValidationOptions):
    """Shape, losses and training of the tokenizer. Published values: the paper's recipe for Flickr30k."""

    features: Path
    """Feature folder."""
    width: int = 768
    """Width of latents and codebooks (e_dim): the width of the language model."""
    hidden: tuple[int, ...] = (1024, 512)
    """Hidden widths of the encoder, mirrored in the decoder."""
    levels: int = 4
    """Vokens per picture."""
    codebook_size: int = 1024
    """Codes per codebook, at most."""
    pictures_per_code: float = 1.5
    """Halve the codebooks until there are so many train pictures for each code, so that small collections fill them;
    0: keep --codebook-size."""
    shared_codebook: bool = False
    """One codebook for all levels (published), or one per level."""
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
    its picture. Published: caption; with n captions per picture that takes n times the steps."""
    pseudo_queries: Path | None = None
    """Run folder of retriever.pseudo_queries.generate: with --pairs caption, train on these captions of pool pictures
    too (transductive)."""
    epochs: int = 3000
    """Passes over the train pictures, or over their captions."""
    batch_size: int = 16384
    """Pairs of a picture and a caption per batch, of all processes together."""
    shuffle: bool = True
    """Shuffle the pairs in each epoch; published: no."""
    lr: float = 1e-4
    validate_every: int = 20

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        ValidationOptions.__post_init__(self)
        if min(self.levels, self.codebook_size, self.width) < 1:
            raise BadInput("--levels, --codebook-size and --width must be at least 1")
        check_batch_size(self.batch_size, least=LEAST, accumulates=False)
        if self.pictures_per_code < 0:
            raise BadInput("--pictures-per-code must not be negative")
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

    def codes_for(self, pictures: int) -> int:
        """Codes per codebook that so many train pictures fill."""
        codes = self.codebook_size
        while codes > 1 and pictures < codes * self.pictures_per_code:
            codes //= 2
        return codes

    def rqvae(self, features: int, codebook_size: int | None = None) -> RqVaeConfig:
        """The model's configuration.

        Args:
            features: width of the features.
            codebook_size: by default what was asked for.
        """
        return RqVaeConfig(
            features=features,
            width=self.width,
            hidden=self.hidden,
            levels=self.levels,
            codebook_size=codebook_size or self.codebook_size,
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
    from models.clip import TextEncoder  # slow to load, and needed for nothing else here

    manifest = runs.read_manifest(folder, "retriever.pseudo_queries.generate")
    if manifest.facts["captions_fingerprint"] != features.manifest.facts["captions_fingerprint"]:
        raise BadInput(f"{folder} was made from other captions than {features.manifest.folder}: make it again")
    row_of = {record.image: row for row, record in enumerate(features.records)}
    lines = [line for _, line in read_json_lines(folder / "pseudo.jsonl")]
    encoder, queries = TextEncoder.recorded(features.manifest.facts, device), [line["query"] for line in lines]
    tell_overlong(encoder, queries, "pseudo queries")
    texts = encoder.encode(queries)
    return PseudoPairs(np.array([row_of[line["image"]] for line in lines], np.int64), texts)


class TrainData:
    """The train split on the device, and the batches of its pairs of a picture and a caption."""

    def __init__(self, features: Features, config: Config, device: torch.device) -> None:
        self.features, self.config, self.rows = features, config, features.captioned_rows("train")
        if len(self.rows) < (needed := LEAST * processes.count()):
            found = f"{len(self.rows)} train pictures with captions"
            raise BadInput(f"{features.manifest.folder} has {found}, needs at least {needed} ({LEAST} per process)")
        self.images = torch.from_numpy(features.images[self.rows].copy()).to(device)
        self.texts = torch.tensor(features.texts).to(device)
        if config.pairs == "caption":
            self.captions = features.text_rows("train")
            self.pictures = np.searchsorted(self.rows, features.owners[self.captions])
        if config.pseudo_queries is not None:
            self._add_pseudo_queries(read_pseudo_pairs(config.pseudo_queries, features, device))

    @property
    def count(self) -> int:
        """Pairs that there are; of each picture one, or all."""
        return len(self.rows) if self.config.pairs == "picture" else len(self.captions)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, each (batch, 2) rows of `images` and of `texts`; the same in every process."""
        generator, size = np.random.default_rng([self.config.seed, epoch]), self.config.batch_size
        pairs = self.count
        most = examples_of_epoch(self.config, count=pairs) or pairs
        order = drawn(pairs, most, generator) if self.config.shuffle else np.resize(np.arange(pairs), most)
        pairs = len(order)
        if self.config.pairs == "picture":
            captions = self.features.draw_captions(self.rows, generator)
            count = max(1, pairs // size)  # none smaller than `size`
            return [np.stack([chosen, captions[chosen]], axis=1) for chosen in np.array_split(order, count)]
        cuts = list(range(size, pairs, size))  # as published: the last one is what is left
        if cuts and pairs - cuts[-1] < LEAST * processes.count():
            cuts.pop()
        return [np.stack([self.pictures[chosen], self.captions[chosen]], axis=1) for chosen in np.split(order, cuts)]

    def pairs(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features of pictures and of captions, each (batch, features), of rows (batch, 2)."""
        pictures, captions = torch.from_numpy(rows).unbind(dim=1)
        return self.images[pictures], self.texts[captions]

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
    """What the best checkpoint is chosen by: recall of quantised features, averaged over the cutoffs; without val
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
        what, (sample, _) = "pairs in the first batch", data.pairs(data.batches(0)[0])
    else:
        what, sample = "train pictures", data.images[torch.randperm(len(data.images))[: config.kmeans_sample]]
    if len(sample) < (codes := model.config.codebook_size):
        raise BadInput(f"--codebook-size {codes} needs as many {what}, there are {len(sample)}")
    print(f"residual k-means over the {'first batch' if config.kmeans_first_batch else 'train split'} ...", flush=True)
    model.start_from(
        sample,
        iterations=config.kmeans_iterations,
        seed=config.seed,
        balance=config.kmeans_balance,
        as_in_training=config.kmeans_first_batch,
    )


class Validation:
    """Reports on val. The features stay as they are, so that their own recall is measured once."""

    def __init__(self, model: RqVae, features: Features) -> None:
        self.model, self.features = model, features
        self.raw: dict[str, float] | None = None

    def report(self) -> TokenizerReport:
        """The report of the weights as they are, made by the main process, in every process."""
        report = None
        if processes.is_main():
            report = make_report(self.model, self.features, split="val", raw=self.raw)
            self.raw = report.raw_recall
        shared = processes.share(report)
        assert shared is not None, "the main process has no report"
        return shared


def make_stepper(model: RqVae, config: Config, *, steps: int) -> Stepper:
    """The optimiser of the tokenizer, in whole copies of the model."""
    several = processes.count() > 1  # alone, dropout goes on with the draws of the batch before
    if several and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return Stepper(model, config, steps=steps, decay="none", seeded=several)


def train(model: RqVae, features: Features, run: runs.Run, config: Config) -> Checkpoint:
    """Train, validate, keep the best. Resumes from the last state.

    The curves have the losses of each epoch's last batch.

    Args:
        model: on the device where it is trained.
    """
    data = TrainData(features, config, next(model.parameters()).device)
    stepper = make_stepper(model, config, steps=config.epochs * len(data.batches(0)))
    checkpoint = Checkpoint(run, stepper, epochs=config.epochs, points=config.epochs, patience=config.patience)
    tracker = Tracker(run.folder, job="train_rqvae", config=run.started["config"])
    validation = Validation(model, features)
    parts: dict[str, Tensor] = {}

    def loss(part: Part) -> Tensor:
        losses = stepper.model(*data.pairs(part.rows))
        parts.update({f"train/{name}": value.detach() for name, value in losses._asdict().items()})
        total: Tensor = losses.total(config.alignment_weight)
        return total

    def validate() -> None:
        report = validation.report()
        figures = {f"val/{name.removeprefix('val/')}": value for name, value in report.figures().items()}
        tracker.log(figures, step=checkpoint.epoch)
        checkpoint.curves.mark(checkpoint.epoch, figures)
        checkpoint.keep_best({}, model.save_pretrained, score=score(report))

    if not checkpoint.resume():
        if config.kmeans_start:
            start_from_kmeans(model, data, config)
            stepper.align()
        validate()
    epochs = range(checkpoint.epoch, config.epochs)
    bar = progress(epochs, "training RQ-VAE", total=config.epochs, unit="epoch", initial=checkpoint.epoch)
    for epoch in bar:
        if checkpoint.over:
            break
        model.train()
        for batches in checkpoint.steps(data.batches(epoch), seed=config.seed, shown=False):
            stepper.step(loss, batches)
        checkpoint.epoch_ends()
        if config.revive_every and checkpoint.epoch % config.revive_every == 0 and checkpoint.epoch < config.epochs:
            revive(model, data, config, epoch)
            stepper.align()
        means = stepper.mean_over_processes(torch.stack(list(parts.values()))).tolist()
        figures = dict(zip(parts, means, strict=True))
        tracker.log(figures, step=checkpoint.epoch)
        checkpoint.curves.step(checkpoint.epoch, figures)
        bar.set_postfix({name.removeprefix("train/"): f"{value:.3f}" for name, value in figures.items()}, refresh=False)
        if checkpoint.validation_is_due(config.validate_every):
            validate()
        checkpoint.save_if_due()
    checkpoint.save()
    tracker.finish()
    return checkpoint


def write_best(checkpoint: Checkpoint, features: Features, folder: Path) -> dict[str, float]:
    """Put the best checkpoint, its report and the curves in place. Returns the report's figures."""
    model = RqVae.from_pretrained(checkpoint.best_folder)
    model.save_pretrained(folder)
    checkpoint.curves.write(folder)
    report = make_report(model, features, split="val")
    write_json(folder / "report.json", report._asdict())
    print(f"{checkpoint.told()}\n{report.text()}")
    return report.figures()


def main(config: Config) -> None:
    processes.share_whole_models()  # DeepSpeed keeps copies of weights, and k-means and `revive` write to the weights
    features = read_features(config.features)
    if TAKEN in features.manifest.facts and not config.normalize:
        raise BadInput(
            f"--no-normalize reads the lengths of features, and those of {config.features} were taken from embeddings "
            "of length 1: leave it out, or encode the pictures (scripts/03_prepare_emb.sh --overwrite)"
        )
    inputs = {"features": config.features}
    if config.pseudo_queries is not None:
        inputs["pseudo_queries"] = config.pseudo_queries
    run = runs.begin("RQ-VAE.train", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    pictures = len(features.captioned_rows("train"))
    if (codes := config.codes_for(pictures)) < config.codebook_size:
        print(f"note: {pictures} train pictures fill {codes} codes a level, not the {config.codebook_size} asked for")
    model = RqVae(config.rqvae(features.images.shape[1], codes)).to(pick_device(config.device))
    checkpoint = train(model, features, run, config)
    figures = write_best(checkpoint, features, run.folder) if processes.is_main() else {}
    run.finish(
        facts={
            "encoder": encoder_of(features.manifest),
            "levels": config.levels,
            "codebook_size": codes,
            "shared": config.shared_codebook,
            "setting": "inductive" if config.pseudo_queries is None else "transductive",
        },
        metrics={"best_epoch": checkpoint.best["epoch"], **figures},
    )


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
