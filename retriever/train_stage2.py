"""Stage 2: train on to tell the right picture from those the search confuses it with.

In:  a `retriever.prepare` folder and the `retriever.train` folder to start from.
Out: `<output>/model/`, the best checkpoint by recall on val; the start itself where nothing beats it;
     `<output>/curves.jsonl`, losses and validations (tools/curves.py).
Command: python -m retriever.train_stage2 --dataset DIR --stage1 DIR --output DIR

Before each epoch its captions are searched, in eval mode, over the pictures that are trained on (those of val and test
too where there are pseudo queries); what is found beside the right codes are that epoch's negatives. Right and wrong
codes are scored in one batch:
L = L_gen + weight * L_disc, each score the sum of the full-vocabulary log-probabilities.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batches import Part
from models.compute import autocast, pick_device, seed_everything
from models.decoding import make_writer
from models.graphed_step import Inputs
from models.options import NegativeOptions
from models.voken_lm import Memory, Tokens, VokenLM
from tools import processes, runs
from tools.blocks import wait_for
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import read_array, write_array
from tools.logs import Tracker

from .beam import RankedPictures
from .data import RetrieverData, read_data, read_retriever
from .losses import Discriminative, Rivals, Targets, discriminative_loss, generative_loss, written_log_probabilities
from .queries import SomeQueries
from .retrieve import search_queries
from .training import Training, TrainingConfig

NO_PICTURE = -1


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, NegativeOptions):
    """Losses and training. Published values: T5-base on Flickr30k."""

    stage1: Path
    """Run folder of retriever.train, to start from."""
    epochs: int = 5
    lr: float = 1e-4
    discriminative: Discriminative = "list-wise"
    """list-wise: softmax of the scores; double-softmax: softmax of that softmax (published); margin, prefix-margin:
    against one negative."""
    discriminative_weight: float = 0.5
    """L = L_gen + weight * L_disc."""
    discriminative_temperature: float = 1.0
    """Scores are divided by this."""
    margin: float = 1.0
    """Of the margin forms."""
    negatives: int = 9
    """Wrong sequences per caption, at most; they are searched with one beam more."""
    search_batch: int = 64
    """Captions per batch of the search for negatives."""
    mix: tuple[float, ...] = (0.5, 0.75)
    """After each epoch also validate weights of which this share is new and the rest the start's (Wortsman et al. 2022,
    WiSE-FT): they keep more of what the start knew; published: none."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        NegativeOptions.__post_init__(self)
        if self.search_batch < 1:
            raise BadInput("--search-batch must be at least 1")
        if any(not 0 < share < 1 for share in self.mix):
            raise BadInput("--mix takes shares between 0 and 1; without values there is none")
        if self.discriminative_weight < 0 or self.discriminative_temperature <= 0:
            raise BadInput("--discriminative-weight must be at least 0, --discriminative-temperature above 0")


class Stage2(Training):
    """The training of stage 1 with the discriminative loss beside the generative one."""

    config: Config

    def __init__(self, config: Config, data: RetrieverData, run: runs.Run, lm: VokenLM) -> None:
        super().__init__(config, data, run, lm)
        self.pool = np.unique(self.pairs.pictures)
        self.negatives: NDArray[np.int64] = np.zeros((0, config.negatives), dtype=np.int64)
        self.start = {name: value.detach().clone() for name, value in self.stepper.trained().items()}
        if self.stepper.deepspeed and config.mix:
            raise BadInput("--mix writes to the weights, of which DeepSpeed keeps copies: give --mix no values")
        self.spared: dict[str, set[bytes]] = defaultdict(set)
        if config.spare_same_words:
            for text, picture in zip(*self.pairs, strict=True):
                self.spared[text].add(data.codes[picture].tobytes())

    def find_negatives(self) -> None:
        """Find this epoch's negatives, or load those that an interrupted run saved."""
        path = self.run.resume_folder / f"negatives-{self.checkpoint.epoch}.npy"
        if processes.share(path.exists()):
            wait_for([path])
            self.negatives = np.array(read_array(path))
            return
        self.negatives = self._search()
        processes.wait()  # every process has read the blocks
        if processes.is_main():
            for old in self.run.resume_folder.glob("negatives-*.npy"):
                old.unlink()
            write_array(path, self.negatives)
            runs.keep_only(self.run.resume_folder, "search-*", None)

    def validate_mixtures(self) -> dict[str, float]:
        """Recall of the new weights, and of each mixture with the start's: the best of all is kept."""
        figures = self.validate()
        named = self.stepper.trained().items()
        trained = [(value, value.detach().clone(), self.start[name]) for name, value in named]
        for share in self.config.mix:
            for value, new, start in trained:
                value.data.copy_(torch.lerp(start, new, share))
            best = self.checkpoint.best
            mixed = self.validate()
            if self.checkpoint.best is not best:
                self.checkpoint.best["new_share"] = share
            figures |= {f"{name} at {share:g}": recall for name, recall in mixed.items()}
        for value, new, _ in trained:
            value.data.copy_(new)
        return figures

    def read(self, part: Part) -> Inputs:
        """What `loss_of` takes of a part of a batch: what stage 1 reads, and the rival sequences."""
        texts, targets, features = super().read(part)
        right = self.codes[torch.from_numpy(self.train_split.pictures[part.rows])]
        rows = torch.from_numpy(np.array(self.negatives[part.rows]))
        present = rows >= 0
        rivals = torch.cat([right.unsqueeze(1), self.codes[rows.clamp_min(0)]], dim=1)
        drawn = torch.from_numpy(part.rows + part.batch.epoch) % present.sum(dim=1).clamp_min(1)
        placed = (each.to(self.device, non_blocking=True) for each in (rivals, present, drawn))
        return texts, targets, features, *placed

    def loss_of(  # type: ignore[override]
        self,
        texts: Tokens | Memory,
        targets: Targets,
        features: Tensor | None,
        rivals: Tensor,
        present: Tensor,
        drawn: Tensor,
    ) -> Tensor:
        """L_gen of the right codes and L_disc against the negatives, from one forward pass.

        The sequences of a caption are: what the generative loss writes, the right codes, the negatives.

        Args:
            rivals: (batch, 1 + negatives, levels) the right codes and the negatives'.
            present: (batch, negatives) bool; which negatives there are.
            drawn: (batch,) the negative that the margin forms compare.
        """
        config = self.config
        sequences = torch.cat([targets.codes.unsqueeze(1), rivals], dim=1)
        with autocast(self.device, self.dtype):
            logits = self.stepper.model(texts, sequences.flatten(0, 1), features)
        logits = logits.view(*sequences.shape[:2], *logits.shape[1:])
        generative = generative_loss(
            logits[:, 0], targets, self.lm, temperature=config.temperature, end=config.train_end
        )
        discriminative = discriminative_loss(
            self._rivals(logits[:, 1:], rivals, present, drawn),
            config.discriminative,
            temperature=config.discriminative_temperature,
            margin=config.margin,
        )
        return generative + config.discriminative_weight * discriminative

    def _rivals(self, logits: Tensor, codes: Tensor, present: Tensor, drawn: Tensor) -> Rivals:
        """From logits (batch, 1 + negatives, levels + 1, vocabulary) of codes (batch, 1 + negatives, levels)."""
        end = self.config.train_end
        flat = written_log_probabilities(logits.flatten(0, 1), codes.flatten(0, 1), self.lm, end=end)
        written = flat.view(*codes.shape[:2], -1)
        parted = (codes[:, 1:] != codes[:, :1]).cumsum(dim=2) > 0
        if end:
            parted = torch.cat([parted, parted[:, :, -1:]], dim=2)
        return Rivals(written[:, 0], written[:, 1:], present, parted, drawn)

    def _search(self) -> NDArray[np.int64]:
        """Pool rows of the negatives of this epoch's captions, hardest first: (train captions, negatives)."""
        config = self.config
        chosen = np.unique(np.concatenate(self.batches(self.checkpoint.epoch)))
        self.lm.eval()
        with self.stepper.whole_weights():
            found = search_queries(
                make_writer(self.lm, config.precision),
                SomeQueries(self.train_split.queries, chosen),
                self.data.codes,
                self.pool,
                beams=config.negatives + 1,
                keep=config.negatives + 1,
                batch_size=config.search_batch,
                score_end=config.score_end,
                features=None if self.train_split.features is None else self.train_split.features[chosen],
                blocks_folder=self.run.resume_folder / f"search-{self.checkpoint.epoch}",
            )
        negatives = np.full((len(self.train_split.texts), config.negatives), NO_PICTURE, dtype=np.int64)
        for query, ranked in zip(chosen, found, strict=True):
            wrong = self._wrong(ranked, int(query))
            negatives[query, : len(wrong)] = wrong
        return negatives

    def _wrong(self, ranked: RankedPictures, query: int) -> list[int]:
        """One picture for each wrong code sequence, in ranked order."""
        codes, right = self.data.codes, self.train_split.pictures[query]
        seen = {codes[right].tobytes()} | self.spared.get(self.train_split.texts[query], set())
        wrong = []
        for row in ranked.rows:
            if (key := codes[row].tobytes()) not in seen:
                seen.add(key)
                wrong.append(row)
        return wrong[: self.config.negatives]


def read_start(config: Config, data: RetrieverData) -> tuple[VokenLM, runs.Manifest]:
    """The model that stage 1 left.

    Raises:
        BadInput: it is not finished, writes other codebooks' vokens, or is a causal model.
    """
    manifest = read_retriever(config.stage1, data, "retriever.train")
    lm = VokenLM.from_pretrained(config.stage1 / "model")
    if lm.kind == "causal":
        raise BadInput(f"--stage1 {config.stage1} is a causal model: stage 2 trains seq2seq and encoder-decoder models")
    return lm, manifest


def train(training: Stage2, tracker: Tracker) -> None:
    """Run every epoch that is still to come, each against the negatives that the search finds before it."""
    config, checkpoint = training.config, training.checkpoint
    while not checkpoint.over:
        training.find_negatives()
        training.lm.train()
        for batches in checkpoint.steps(training.batches(checkpoint.epoch), seed=config.seed):
            checkpoint.record(training.stepper.step(training.loss, batches), tracker)
        checkpoint.epoch_ends()
        if checkpoint.validation_is_due(config.validate_every):
            checkpoint.report(tracker, training.validate_mixtures())
        checkpoint.save()


def main(config: Config) -> None:
    data = read_data(config.dataset)
    config.check(data)
    lm, start = read_start(config, data)
    if start.facts["setting"] == "transductive" and config.pseudo_queries is None:
        print("note: --stage1 was trained on pseudo queries, this stage is not: the result counts as transductive")
    run = runs.begin("retriever.train_stage2", config, inputs={**config.inputs(), "stage1": config.stage1})
    if run is None:
        return
    seed_everything(config.seed)
    training = Stage2(config, data, run, lm.to(pick_device(config.device)))
    checkpoint = training.checkpoint
    tracker = Tracker(run.folder, job="train_retriever_stage2", config=run.started["config"])
    if not checkpoint.resume():
        checkpoint.report(tracker, training.validate())  # the start is the first to beat
        checkpoint.save()
    train(training, tracker)
    if config.guide_head:
        training.fit_guide_head()
    setting = "transductive" if config.pseudo_queries else start.facts["setting"]
    checkpoint.finish(tracker, facts={**training.facts(), "setting": setting, "stage1": str(config.stage1)})
    best = checkpoint.best
    if best["epoch"] == 0:
        print(f"no epoch beat the start on val: {run.folder / 'model'} is the model of {config.stage1}")
    else:
        share = best.get("new_share", 1)
        print(f"{checkpoint.told(chance=training.chance)}\n{share:.0%} of its weights -> {run.folder / 'model'}")


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
