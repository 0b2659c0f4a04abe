"""One training of a retriever: batches, loss and validation, which both stages share.

The loops are in train.py and train_stage2.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batches import Part, bucketed_batches, check_batch_size, drawn
from models.compute import autocast, pick_dtype
from models.decoding import Writer, make_writer
from models.graphed_step import Inputs, Loss
from models.guide import GUIDE_NAME, fit_text_head, pooled
from models.lengths import tell_overlong
from models.options import LargeModelOptions, TrainingOptions, ValidationOptions, examples_of_epoch
from models.stepper import Stepper
from models.training import Checkpoint
from models.voken_lm import Memory, Tokens, VokenLM
from tools import captions, processes, runs
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import Floats
from tools.recall import CUTOFFS, Ranks, clearly_better, report

from .data import Pairs, RetrieverData, read_pseudo_queries
from .losses import Targets, generative_loss, soft_targets
from .queries import LiveQueries, SomeQueries, StoredQueries
from .retrieve import ranks_of, search_queries


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunOptions, TrainingOptions, ValidationOptions, LargeModelOptions):
    """What both stages have in common. Published values: T5-base on Flickr30k, stage 1."""

    dataset: Path
    """Run folder of retriever.prepare."""
    pseudo_queries: Path | None = None
    """Run folder of retriever.pseudo_queries.generate: train on these captions of pool pictures too (transductive)."""
    epochs: int = 100
    """Passes over the train captions."""
    queries_per_epoch: int | None = None
    """Train captions of an epoch, drawn anew each time, several times where there are fewer; by default each once."""
    batch_size: int = 128
    """Captions per batch, of all processes together."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = 1.0
    temperature: float = 0.5
    """The generative loss is the cross-entropy of softmax(logits / temperature)."""
    label_temperature: float = 0.0
    """Above 0: soft labels and stochastic codes by distance to the codebook, in units of the latents' mean squared
    norm (Lee et al. 2022, section 3.2.3); published: 0, one right code per level."""
    train_end: bool = True
    """The end token counts in the losses; published: yes."""
    score_end: bool = False
    """The end token counts in the score of a search; published: yes."""
    guide_head: bool = False
    """With --guide: at the end fit a head that sees the text feature in the language model's own encoder states, and
    let it guide, so that a query passes through one text encoder."""
    guide: bool = False
    """Let the tokenizer's guide steer the search on val too (models/guide.py): its best weight is kept with the model,
    and the best checkpoint is the one that searches best with it; published: no."""
    graphs: bool = False
    """On a GPU, record forward and backward as CUDA graphs, one for each shape of a batch, and start each at once; for
    one process."""
    beams: int = 10
    """Beams of the search on val."""
    validate_queries: int = 5000
    """Captions of val that are searched, at most."""

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        ValidationOptions.__post_init__(self)
        LargeModelOptions.__post_init__(self)
        least = min(self.epochs, self.beams, self.validate_queries)
        if least < 1 or (self.queries_per_epoch is not None and self.queries_per_epoch < 1):
            raise BadInput("--epochs, --queries-per-epoch, --beams and --validate-queries must be at least 1")
        if self.guide_head and not self.guide:
            raise BadInput("--guide-head is for --guide: give both")
        if self.temperature <= 0 or self.label_temperature < 0:
            raise BadInput("--temperature must be above 0, --label-temperature at least 0")
        check_batch_size(self.batch_size)

    def check(self, data: RetrieverData) -> None:
        """Look at what is trained on before a model is loaded.

        Raises:
            BadInput: there are no captions to train on or to validate with, or the pseudo queries are of other data.
        """
        for split in ("train", "val"):
            if not (data.folder / f"{split}.jsonl").stat().st_size:
                raise BadInput(f"{data.folder} has no {split} captions: a retriever cannot be trained on it")
        if self.pseudo_queries is not None:
            read_pseudo_queries(self.pseudo_queries, data)
        if self.guide and data.guide is None:
            raise BadInput(
                f"{data.folder} has no guide, which a tokenizer without --no-skip gives: run "
                "scripts/06_generate_codes.sh --overwrite and scripts/07_prepare_retriever_dataset.sh --overwrite, or "
                "leave --guide out"
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
    features: Floats | None
    """(queries, features) two-tower features of the texts, where a slot or a guide reads them."""


WEIGHTS = (0.0, 10.0, 20.0, 40.0, 80.0, 160.0)  # of the guide that are tried
MOST_FITTED = 100_000  # captions that a guide's head is fitted on
USUAL_WEIGHT = 80.0  # good for most data: another one has to be clearly better


def recalls_of(ranks: Ranks) -> dict[str, float]:
    """Recall by name."""
    return {f"R@{cutoff}": value for cutoff, value in report(ranks).recalls.items()}


def guided_recalls(ranks: Ranks) -> dict[str, float]:
    """Recall of the guided search, by name."""
    return {f"{name} guided": value for name, value in recalls_of(ranks).items()}


def best_weight(ranks_with: Callable[[float], Ranks]) -> tuple[float, Ranks]:
    """The guide's weight of the highest mean recall, and the ranks with it.

    It is searched for up and down from the usual one, which stays unless the other is clearly better.

    Args:
        ranks_with: rank of each query's picture with a weight.
    """
    known: dict[float, Ranks] = {}

    def mean_recall(place: int) -> float:
        weight = WEIGHTS[place]
        if weight not in known:
            known[weight] = ranks_with(weight)
        return float(np.mean(list(report(known[weight]).recalls.values())))

    usual = place = WEIGHTS.index(USUAL_WEIGHT)
    for step in (1, -1):
        while 0 <= place + step < len(WEIGHTS) and mean_recall(place + step) > mean_recall(place):
            place += step
        if place != usual:
            break
    chosen = WEIGHTS[place] if clearly_better(known[WEIGHTS[place]], known[USUAL_WEIGHT]) else USUAL_WEIGHT
    return chosen, known[chosen]


@torch.inference_mode()
def pooled_states(queries: LiveQueries | SomeQueries) -> Tensor:
    """Pooled encoder states (queries, width) of all queries."""
    order = np.argsort(queries.lengths, kind="stable")
    batches = np.array_split(order, -(-len(order) // 256))
    found = torch.cat([pooled(queries.memory(batch)) for batch in batches])
    return found[torch.from_numpy(np.argsort(order)).to(found.device)].clone()


class Training:
    """One training of a retriever. Stage 1 as it is; stage 2 derives from it.

    Args:
        lm: on the device where it is trained.

    Attributes:
        stepper, checkpoint: the optimiser's step, and the saved progress.
    """

    config: TrainingConfig

    def __init__(self, config: TrainingConfig, data: RetrieverData, run: runs.Run, lm: VokenLM) -> None:
        self.config, self.data, self.run, self.lm = config, data, run, lm
        self.device = next(lm.parameters()).device
        self.dtype = pick_dtype(config.precision, self.device)
        self.pairs = self._train_pairs()
        count, accumulate = len(self.pairs.texts), config.accumulate
        self.of_epoch = examples_of_epoch(config, count=count, accumulate=accumulate, examples=config.queries_per_epoch)
        self.used = self._used_rows()
        self.train_split = self._split(self.pairs.some(self.used), "train")
        self.val_split = self._split(self._val_pairs(), "val")
        guide = data.guide if config.guide else None
        self.guide = None if guide is None else guide.to(self.device)
        self.codes = torch.tensor(data.codes)
        if config.label_temperature > 0:
            self.latents = torch.from_numpy(np.array(data.latents)).to(self.device)
            self.codebooks = torch.from_numpy(np.array(data.codebooks)).to(self.device)
            squares = (self.latents[data.rows("train")] ** 2).sum(dim=1)
            self.label_scale = float(squares.mean()) * config.label_temperature
        steps = config.epochs * -(-len(self.batches(0)) // config.accumulate)
        self.stepper = Stepper(lm, config, steps=steps, decay="linear", large=config, graphs=config.graphs)
        self.checkpoint = Checkpoint(run, self.stepper, epochs=config.epochs, points=steps, patience=config.patience)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, places in `train_split`; the same in every process."""
        places = np.searchsorted(self.used, self._rows_of_epoch(epoch))
        generator = np.random.default_rng([self.config.seed, epoch])
        lengths = self.train_split.queries.lengths[places]
        return [places[batch] for batch in bucketed_batches(lengths, self.config.batch_size, generator)]

    def targets(self, part: Part) -> Targets:
        """What the model should write for a part of a batch, drawn for the whole batch in every process."""
        pictures = torch.from_numpy(self.train_split.pictures[part.batch.rows])
        own = torch.from_numpy(part.own)
        if self.config.label_temperature == 0:
            return Targets(self.codes[pictures[own]].to(self.device, non_blocking=True), None)
        generator = torch.Generator(self.device).manual_seed(part.batch.stream(0))
        latents = self.latents[pictures.to(self.device, non_blocking=True)]
        levels = self.data.space.levels
        codes, shares = soft_targets(latents, self.codebooks, levels, self.label_scale, generator)
        own = own.to(self.device, non_blocking=True)
        return Targets(codes[own], None if shares is None else shares[own])

    def features(self, part: Part) -> Tensor | None:
        """Text features (part, features) for the model's slot, where it has one."""
        if self.lm.slot is None or self.train_split.features is None:
            return None
        return torch.from_numpy(self.train_split.features[part.rows]).to(self.device, non_blocking=True)

    @property
    def loss(self) -> Loss:
        """Mean loss over a part of a batch of train captions."""
        return Loss(self.read, self.loss_of)

    def read(self, part: Part) -> Inputs:
        """What `loss_of` takes of a part of a batch."""
        return self.train_split.queries.batch(part.rows), self.targets(part), self.features(part)

    def loss_of(self, texts: Tokens | Memory, targets: Targets, features: Tensor | None) -> Tensor:
        """The generative loss of the texts."""
        config = self.config
        with autocast(self.device, self.dtype):
            logits = self.stepper.model(texts, targets.codes, features)
        return generative_loss(logits, targets, self.lm, temperature=config.temperature, end=config.train_end)

    def validate(self) -> dict[str, float]:
        """Image-level recall on val by constrained search over the val pictures; keeps the best model.

        With a guide the best model is the one that searches best without it and with its usual weight, on average. It
        is kept with its own best weight.
        """
        checkpoint = self.checkpoint
        with checkpoint.validating() as blocks:
            writer = make_writer(self.lm, self.config.precision)

            @cache
            def ranks(weight: float) -> Ranks:
                return self._ranks(writer, weight, None if blocks is None else blocks / f"{weight:g}")

            figures, weight, guided = recalls_of(ranks(0.0)), 0.0, None
            if self.guide is not None:
                figures |= guided_recalls(ranks(USUAL_WEIGHT))
                if checkpoint.is_best(figures):
                    weight, guided = best_weight(ranks)
            checkpoint.keep_best(figures, lambda folder: self._save(folder, weight))
            if guided is not None:
                checkpoint.best |= {**guided_recalls(guided), "guide": weight}
        return {f"val/{name}": value for name, value in figures.items()}

    def _ranks(self, writer: Writer, weight: float, blocks: Path | None) -> Ranks:
        """Rank on val of each query's picture, with this weight of the guide."""
        config = self.config
        guide = None if self.guide is None or not weight else self.guide._replace(weight=weight)
        ranking = search_queries(
            writer,
            self.val_split.queries,
            self.data.codes,
            self.data.rows("val"),
            beams=config.beams,
            keep=max(CUTOFFS),
            batch_size=64,
            score_end=config.score_end,
            guide=guide,
            features=self.val_split.features,
            quiet=True,
            blocks_folder=blocks,
        )
        images, _ = ranks_of(ranking, self.val_split.pictures, self.data.codes)
        return images

    def _save(self, folder: Path, weight: float) -> None:
        """Write the model, and the guide with its weight beside it."""
        self.lm.save_pretrained(folder)
        if self.guide is not None:
            self.guide._replace(weight=weight).save(folder / GUIDE_NAME)

    def fit_guide_head(self) -> None:
        """Put a head into the guide of the best model, which is fitted on train captions, and choose its weight anew;
        work of the main process."""
        if self.guide is not None and processes.is_main():
            folder = self.checkpoint.best_folder
            lm = VokenLM.from_pretrained(folder).to(self.device)
            generator = np.random.default_rng(self.config.seed)
            places = np.sort(generator.permutation(len(self.train_split.texts))[:MOST_FITTED])
            texts = [self.train_split.texts[place] for place in places]
            features = torch.from_numpy(self.data.text_features(texts, self.device)).to(self.device)
            queries = SomeQueries(self.train_split.queries, places) if lm.frozen_encoder else LiveQueries(lm, texts)
            head = fit_text_head(pooled_states(queries), features, seed=self.config.seed)
            self.guide = self.guide._replace(head=head)
            writer = make_writer(lm.eval(), self.config.precision)
            weight, ranks = best_weight(lambda weight: self._ranks(writer, weight, None))
            self.guide._replace(weight=weight).save(folder / GUIDE_NAME)
            self.checkpoint.best |= {**guided_recalls(ranks), "guide": weight}
            words = ", ".join(f"{name} {value:.1%}" for name, value in recalls_of(ranks).items())
            print(f"guided by a head on the language model's states, val: {words} (weight {weight:g})", flush=True)
        processes.wait()

    @property
    def chance(self) -> float:
        """Mean recall of a guess on val."""
        pictures = len(self.data.rows("val"))
        return sum(min(1.0, cutoff / pictures) for cutoff in CUTOFFS) / len(CUTOFFS)

    def facts(self) -> dict[str, Any]:
        """What the run's manifest says of the model."""
        data = self.data
        setting = data.manifest.facts["setting"] if self.config.pseudo_queries is None else "transductive"
        return {"setting": setting, "kind": self.lm.kind, "codebooks": data.codebooks_hash}

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

    def _used_rows(self) -> NDArray[np.int64]:
        """Places in `pairs` of the captions that some epoch draws, sorted."""
        if self.of_epoch is None or self.of_epoch >= len(self.pairs.texts):
            return np.arange(len(self.pairs.texts))
        return np.unique(np.concatenate([self._rows_of_epoch(epoch) for epoch in range(self.config.epochs)]))

    def _rows_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Places in `pairs` of an epoch's captions, sorted."""
        count, most = len(self.pairs.texts), self.of_epoch
        if most is None:
            return np.arange(count)
        return np.sort(drawn(count, most, np.random.default_rng([self.config.seed, epoch, 1])))

    def _split(self, pairs: Pairs, name: captions.Split) -> Split:
        read = self.lm.slot is not None or (self.config.guide and name == "val")
        features = self.data.text_features(pairs.texts, self.device) if read else None
        tell_overlong(self.lm, pairs.texts, f"{name} queries")
        queries: LiveQueries | StoredQueries
        if self.lm.frozen_encoder:
            queries = StoredQueries(self.lm, pairs.texts, folder=self.run.resume_folder, name=name, dtype=self.dtype)
        else:
            queries = LiveQueries(self.lm, pairs.texts)
        return Split(queries, pairs.pictures, pairs.texts, features)
