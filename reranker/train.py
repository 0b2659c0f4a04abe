"""Train the reranker: a language model scores one right picture and several wrong ones from the retriever's lists.

In:  a `retriever.rank_splits` folder, a `reranker.convert` folder, and SEED-LLaMA, another causal model, or nothing
     but a tokenizer (`--new-layers`).
Out: `<output>/model/`, the best checkpoint by recall on val when its scores and the retriever's are interpolated;
     `<output>/curves.jsonl`, losses and validations (tools/curves.py).
Command: python -m reranker.train --lists DIR --tokens DIR --language-model AILab-CVC/seed-llama-8b-sft --output DIR

The loss of a query is -log softmax of the right picture's score among its group's. Wrong pictures are drawn anew in
each epoch.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batches import Part, bucketed_batches, check_batch_size, drawn
from models.compute import autocast, pick_device, pick_dtype, seed_everything
from models.four_bits import check_four_bits
from models.lengths import tell_overlong
from models.options import (
    LargeModelOptions,
    LoraOptions,
    NegativeOptions,
    TrainingOptions,
    ValidationOptions,
    examples_of_epoch,
)
from models.scorer import LORA_TARGETS, TRAINED_WHOLE, Lora, Scorer, build_new_scorer, build_scorer
from models.stepper import Stepper
from models.training import Checkpoint
from tools import runs
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.command_line.place import NameOrPath
from tools.errors import BadInput
from tools.interpolation import choose_weights, interpolated
from tools.logs import Tracker
from tools.ranked import NO_PICTURE, reordered_ranks
from tools.recall import report

from .data import Lists, PictureTokens, read_ranked, read_tokens
from .rerank import score_lists


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TrainingOptions, ValidationOptions, LargeModelOptions, LoraOptions, NegativeOptions):
    """Model, negatives and training. Published values, with SEED-LLaMA 8B."""

    lists: Path
    """Run folder of retriever.rank_splits."""
    tokens: Path
    """Run folder of reranker.convert."""
    language_model: NameOrPath
    """Hugging Face name or folder of a causal model; for --new-layers, of any model that lends tokenizer and words."""
    tokenizer: NameOrPath | None = None
    """Name or folder of the tokenizer, where it is not the model's; published: AILab-CVC/seed-tokenizer-2."""
    layers: int | None = None
    """Use only the first layers of the model, so many of them."""
    new_layers: int = 0
    """Above 0: a new small LLaMA of so many layers, trained from nothing; its embeddings start with which words and
    image tokens occur together."""
    new_width: int = 128
    """Width of a new model."""
    new_heads: int = 4
    """Attention heads of a new model."""
    max_query: int = 64
    """Tokens of a query at most; the prompt around it is never cut."""
    compat: bool = False
    """Read as published: the whole prompt cut and padded to --max-length on the right, no attention mask, scored at
    the last position, which is padding for most queries."""
    max_length: int = 64
    """Tokens of a prompt with --compat."""
    negatives: int = 7
    """Wrong pictures of a group."""
    random_negatives: int = 0
    """Number of them that are drawn from all train pictures, the others from the list; published: 0."""
    easing: float = 0.0
    """Share of the training over which the negatives go from all random to --random-negatives; published: 0."""
    by_picture: bool = False
    """A batch holds all captions of a picture, including those without a list. They share one set of negatives from the
    picture's lists, so that pictures are read once for several queries. Published: no."""
    lora_rank: int = 16
    """Rank of low-rank adapters; 0: all weights are trained, as those of a new model are."""
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_whole: tuple[str, ...] = TRAINED_WHOLE
    """Modules that are trained whole beside them; published: lm_head too, which gets no gradient."""
    epochs: int = 3
    """Passes over the train queries."""
    queries_per_epoch: int | None = None
    """Train queries of an epoch, drawn anew each time, several times where there are fewer; by default each once."""
    batch_size: int = 16
    """Groups per batch, of all processes together."""
    lr: float = 3e-5
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls as a cosine to 0."""
    max_grad_norm: float = 1.0
    validate_queries: int = 1000
    """Captions of val that are reranked, at most."""
    top_k: int = 50
    """Pictures of each of their lists."""

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        ValidationOptions.__post_init__(self)
        LargeModelOptions.__post_init__(self)
        LoraOptions.__post_init__(self)
        NegativeOptions.__post_init__(self)
        counts = (self.epochs, self.validate_queries, self.top_k, self.max_query, self.max_length)
        if min(*counts, 1 if self.queries_per_epoch is None else self.queries_per_epoch) < 1:
            raise BadInput(
                "--epochs, --queries-per-epoch, --validate-queries, --top-k, --max-query and --max-length must be at "
                "least 1"
            )
        if not 0 <= self.random_negatives <= self.negatives:
            raise BadInput(f"--random-negatives must be between 0 and the {self.negatives} --negatives")
        if not 0 <= self.easing <= 1:
            raise BadInput("--easing must be in [0, 1]")
        if self.new_layers < 0:
            raise BadInput("--new-layers must be at least 0")
        if min(self.new_width, self.new_heads) < 1 or (self.layers is not None and self.layers < 1):
            raise BadInput("--layers, --new-width and --new-heads must be at least 1")
        if self.new_layers and self.tokenizer:
            raise BadInput("--new-layers takes the tokenizer of --language-model: leave --tokenizer out")
        if self.new_layers and self.load_in_4bit:
            raise BadInput("--load-in-4bit is for a trained model: leave it out with --new-layers")
        if self.new_layers and self.layers:
            raise BadInput("--new-layers makes a model from nothing, --layers cuts a trained one: give one of the two")
        check_batch_size(self.batch_size)

    @property
    def lora(self) -> Lora | None:
        if not self.lora_rank or self.new_layers:
            return None
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets, self.lora_whole)


class TrainQueries(NamedTuple):
    """What is trained on."""

    texts: list[str]
    pictures: NDArray[np.int64]
    """(queries,) row of the right picture"""
    listed: list[NDArray[np.int64]]
    """For each query the pictures that negatives are drawn from."""


class Training:
    """The training of a reranker.

    Args:
        scorer: on the device where it is trained.

    Attributes:
        stepper, checkpoint: the optimiser's step, and the saved progress.
    """

    def __init__(self, config: Config, lists: Lists, pictures: PictureTokens, run: runs.Run, scorer: Scorer) -> None:
        self.config, self.scorer, self.tokens = config, scorer, pictures.tokens
        self.device = next(scorer.parameters()).device
        self.train = train_queries(lists, pictures, by_picture=config.by_picture)
        val = lists.read("val", "val").first(config.top_k)
        order = np.random.default_rng(config.seed).permutation(len(val.texts))
        self.val = val.some(np.sort(order[: config.validate_queries]))
        tell_overlong(scorer, self.train.texts, "train queries")
        self.queries = scorer.query_ids(self.train.texts)
        self.lengths = np.array([len(ids) for ids in self.queries])
        self.pool = np.array([row for row, record in enumerate(pictures.records) if record.split == "train"])
        self.spared = spared_pictures(pictures) if config.spare_same_words else {}
        count, accumulate = len(self.lengths), config.accumulate
        self.of_epoch = examples_of_epoch(config, count=count, accumulate=accumulate, examples=config.queries_per_epoch)
        self.epoch_batches = len(self.batches(0))
        epochs = config.epochs
        steps = epochs * -(-self.epoch_batches // config.accumulate)
        self.stepper = Stepper(scorer, config, steps=steps, decay="cosine", large=config)
        self.share_pictures = not (config.gradient_checkpointing or self.stepper.fsdp)  # or layers run twice in a pass
        self.checkpoint = Checkpoint(run, self.stepper, epochs=epochs, points=steps, patience=config.patience)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, places in the train lists."""
        generator = np.random.default_rng([self.config.seed, epoch])
        size, most = self.config.batch_size, self.of_epoch
        if not self.config.by_picture:
            places = np.sort(drawn(len(self.lengths), most, generator))
            return [places[batch] for batch in bucketed_batches(self.lengths[places], size, generator)]
        every = len(self.lengths)
        passes: list[NDArray[np.int64]] = []
        for _ in range(-(-(most or every) // every)):
            place = generator.permutation(self.train.pictures.max() + 1)[self.train.pictures]
            passes.append(np.argsort(place, kind="stable"))
        order = np.concatenate(passes)[: most or every]
        return [order[start : start + size] for start in range(0, len(order), size)]

    def loss(self, part: Part) -> Tensor:
        """Mean loss of a part of a batch of train queries."""
        groups = self.groups(part)[part.own]
        distinct, places = np.unique(groups, return_inverse=True)
        of_query = torch.arange(len(groups)).repeat_interleave(groups.shape[1])
        queries = [self.queries[query] for query in part.rows]
        pairs = self.scorer.pairs(self.tokens[distinct], queries, torch.from_numpy(places.reshape(-1)), of_query)
        with autocast(self.device, self.stepper.dtype):
            scores: Tensor = self.stepper.model(pairs, share_pictures=self.share_pictures)
        return listwise_loss(scores.view(groups.shape))

    def groups(self, part: Part) -> NDArray[np.int64]:
        """Pictures (batch, 1 + negatives) for a whole batch, the right one first; alike in every process."""
        config, batch = self.config, part.batch
        generator = np.random.default_rng(batch.stream(0))
        done = (batch.epoch * self.epoch_batches + batch.number) / (config.epochs * self.epoch_batches)
        still = max(0.0, 1.0 - done / config.easing) if config.easing else 0.0
        random = config.random_negatives + round((config.negatives - config.random_negatives) * still)
        keys = self.train.pictures[batch.rows] if config.by_picture else np.arange(len(batch.rows))
        groups = np.empty((len(batch.rows), 1 + config.negatives), dtype=np.int64)
        for key in np.unique(keys):
            own = np.flatnonzero(keys == key)
            groups[own, 0] = self.train.pictures[batch.rows[own]]
            groups[own, 1:] = self.draw(batch.rows[own], random, generator)
        return groups

    def draw(self, queries: NDArray[np.int64], random: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Wrong pictures (negatives,) for queries of one picture: from their lists, then at random.

        A list that is too short is filled up at random.

        Raises:
            BadInput: no train picture is wrong.
        """
        right = set(self.train.pictures[queries].tolist())
        for query in queries:
            right |= self.spared.get(self.train.texts[query], set())
        listed = np.unique(np.concatenate([self.train.listed[query] for query in queries]))
        hard = listed[~np.isin(listed, list(right))]
        hard = generator.permutation(hard)[: self.config.negatives - random]
        left = self.config.negatives - len(hard)
        if not left:
            return hard
        others = self.pool[~np.isin(self.pool, [*right, *hard.tolist()])]
        if not len(others):
            raise BadInput(f"{self.config.lists}: no train picture is wrong for {self.train.texts[queries[0]]!r}")
        return np.concatenate([hard, generator.choice(others, left, replace=left > len(others))])

    def validate(self) -> dict[str, float]:
        """Recall on val of the retriever's order and the reranker's interpolated; each alone is logged too."""
        with self.checkpoint.validating() as blocks:
            dtype = self.stepper.dtype
            scores = score_lists(self.scorer, self.tokens, self.val, dtype=dtype, blocks_folder=blocks, quiet=True)
            choice = choose_weights(self.val, {"reranker": scores})
            together = interpolated(self.val.scores, {"reranker": scores}, choice.weights)
            figures = {
                name: report(reordered_ranks(self.val, order)).recalls
                for name, order in (("", together), ("alone ", scores), ("before ", self.val.scores))
            }
            best = {f"R@{cutoff}": value for cutoff, value in figures[""].items()}
            self.checkpoint.keep_best(best, self.scorer.save_pretrained)
        return {f"val/{name}R@{cutoff}": value for name, each in figures.items() for cutoff, value in each.items()}


def listwise_loss(scores: Tensor) -> Tensor:
    """Mean of -log softmax(scores)_0 over groups (groups, pictures), the right picture first; stable at any size."""
    return -scores.log_softmax(dim=1)[:, 0].mean()


def train_queries(lists: Lists, pictures: PictureTokens, *, by_picture: bool) -> TrainQueries:
    """The captions that have a list; or, by picture, all captions of their pictures, each with the picture's lists."""
    ranked = lists.read("train", "train")
    own = [row[row != NO_PICTURE] for row in ranked.rows]
    if not by_picture:
        return TrainQueries(ranked.texts, ranked.pictures, own)
    of_picture = defaultdict(list)
    for picture, row in zip(ranked.pictures.tolist(), own, strict=True):
        of_picture[picture].append(row)
    merged = {picture: np.unique(np.concatenate(rows)) for picture, rows in of_picture.items()}
    each = [(text, picture) for picture in merged for text in pictures.records[picture].captions]
    owners = np.array([picture for _, picture in each], dtype=np.int64)
    return TrainQueries([text for text, _ in each], owners, [merged[picture] for picture in owners.tolist()])


def spared_pictures(pictures: PictureTokens) -> dict[str, set[int]]:
    """For the text of each train caption, the pictures that have it."""
    under: dict[str, set[int]] = defaultdict(set)
    for row, record in enumerate(pictures.records):
        if record.split == "train":
            for text in record.captions:
                under[text].add(row)
    return dict(under)


def build_model(config: Config, pictures: PictureTokens) -> Scorer:
    """The untrained reranker."""
    scorer = build_untrained(config, pictures)
    if config.gradient_checkpointing:
        scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return scorer


def build_untrained(config: Config, pictures: PictureTokens) -> Scorer:
    """A new model, or a trained one with a new head."""
    compat = config.max_length if config.compat else None
    if config.new_layers:
        train = [row for row, record in enumerate(pictures.records) if record.split == "train"]
        return build_new_scorer(
            config.language_model,
            images=pictures.images,
            pictures=pictures.tokens[train],
            captions=[pictures.records[row].captions for row in train],
            layers=config.new_layers,
            width=config.new_width,
            heads=config.new_heads,
            max_query=config.max_query,
            compat=compat,
        )
    device = pick_device(config.device)
    return build_scorer(
        config.language_model,
        images=pictures.images,
        starts=np.array(pictures.codebook),
        tokenizer_name=config.tokenizer,
        layers=config.layers,
        max_query=config.max_query,
        compat=compat,
        dtype=pick_dtype(config.precision, device) if config.lora else torch.float32,
        lora=config.lora,
        four_bits=device if config.load_in_4bit else None,
    )


def train(training: Training, tracker: Tracker) -> None:
    """Run every epoch that is still to come, validate, and keep the best model."""
    config, checkpoint = training.config, training.checkpoint
    while not checkpoint.over:
        training.scorer.train()
        for batches in checkpoint.steps(training.batches(checkpoint.epoch), seed=config.seed):
            checkpoint.record(training.stepper.step(training.loss, batches), tracker)
        checkpoint.epoch_ends()
        if checkpoint.validation_is_due(config.validate_every):
            checkpoint.report(tracker, training.validate())
        checkpoint.save()


def main(config: Config) -> None:
    pictures = read_tokens(config.tokens)
    lists = read_ranked(config.lists, pictures.manifest.facts["captions_fingerprint"])
    check_four_bits(config, config.device)
    inputs = {"lists": config.lists, "tokens": config.tokens}
    places = {"language_model": config.language_model, "tokenizer": config.tokenizer}
    inputs |= {name: Path(place) for name, place in places.items() if place and Path(place).is_dir()}
    run = runs.begin("reranker.train", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    scorer = build_model(config, pictures).to(pick_device(config.device))
    training = Training(config, lists, pictures, run, scorer)
    checkpoint = training.checkpoint
    checkpoint.resume()
    tracker = Tracker(run.folder, job="train_reranker", config=run.started["config"])
    train(training, tracker)
    checkpoint.finish(tracker, facts={"setting": lists.facts["setting"], "tokens": pictures.manifest.fingerprint})
    print(f"{checkpoint.told()}\n-> {run.folder / 'model'}")


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
