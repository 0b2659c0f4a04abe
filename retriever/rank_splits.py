"""Rank pictures for the train, val and test queries: what the reranker learns from, chooses by, and reorders.

In:  a `retriever.prepare` folder and a trained retriever.
Out: `<output>/train-train.jsonl`, `val-val.jsonl`, `test-<pool>.jsonl` (tools/ranked.py): each split's captions over
     its own pictures, those of test over further pools too; `guide.safetensors`, the retriever's, where it has one.
     Several processes share the queries, and a killed run goes on where it was.
Command: python -m retriever.rank_splits --dataset DIR --retriever DIR --output DIR
"""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.arithmetic import weights_dtype
from models.compute import pick_device
from models.decoding import Writer, make_writer
from models.guide import GUIDE_NAME, Guide
from models.lengths import tell_overlong
from models.voken_lm import VokenLM
from tools import processes, runs
from tools.captions import Split, first_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.ranked import NO_PICTURE, RankedLists, write_lists

from .beam import RankedPictures
from .data import UNKNOWN, Queries, RetrieverData, read_data, read_retriever
from .queries import LiveQueries
from .retrieve import ListOptions, Pool, chosen_guide, needs_features, queries_per_second, search_each
from .setting import setting_on


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ListOptions):
    """How many queries of each split, and how widely they are searched."""

    pools: tuple[Pool, ...] = ("test",)
    """Pictures that the test captions are searched among, each on its own."""
    train_beams: int = 100
    """Beams, and pictures kept, for the train captions."""
    beams: int = 50
    """The same for those of val and test."""
    train_per_picture: int | None = None
    """Captions of each train picture that are ranked, drawn at random; by default all, 0 for none."""
    seed: int = 0
    """Which train captions are drawn."""

    def __post_init__(self) -> None:
        ListOptions.__post_init__(self)
        if min(self.train_beams, self.beams) < 1 or not self.pools:
            raise BadInput("--train-beams, --beams and the number of --pools must be at least 1")
        if self.seed < 0 or (self.train_per_picture is not None and self.train_per_picture < 0):
            raise BadInput("--seed and --train-per-picture must be at least 0")
        if outside := set(self.pools) - {"test", "all"}:
            raise BadInput(f"--pools {outside.pop()} has no picture of the test captions: choose of test and all")

    def searches(self) -> list[tuple[Split, Pool]]:
        """Which split's captions are ranked over which pool."""
        train: list[tuple[Split, Pool]] = [] if self.train_per_picture == 0 else [("train", "train")]
        return [*train, ("val", "val"), *(("test", pool) for pool in self.pools)]


def queries_of(data: RetrieverData, split: Split, config: Config) -> Queries:
    """A split's captions; of train those that are drawn."""
    queries = data.queries(split)
    if not queries.texts:
        raise BadInput(f"{config.dataset} has no {split} captions: a reranker needs all three splits")
    if (queries.captions == UNKNOWN).any():
        raise BadInput(
            f"{config.dataset} is of an earlier version: run scripts/07_prepare_retriever_dataset.sh --overwrite"
        )
    if split != "train" or config.train_per_picture is None:
        return queries
    shuffled = np.random.default_rng(config.seed).permutation(len(queries.texts))
    chosen = np.sort(shuffled[first_captions(queries.pictures[shuffled], config.train_per_picture)])
    return Queries([queries.texts[place] for place in chosen], queries.pictures[chosen], queries.captions[chosen])


def rank(
    writer: Writer,
    data: RetrieverData,
    split: Split,
    pool: Pool,
    config: Config,
    *,
    guide: Guide | None,
    blocks_folder: Path,
) -> tuple[RankedLists, float]:
    """The lists of one split over one pool, and the queries per second, without the encoder of a guide."""
    queries = queries_of(data, split, config)
    tell_overlong(writer.lm, queries.texts, f"{split} captions")
    beams = config.train_beams if split == "train" else config.beams
    read = needs_features(writer.lm, guide)
    features = data.text_features(queries.texts, writer.lm.device) if read else None
    began = time.monotonic()
    live = LiveQueries(writer.lm, queries.texts)
    tokenising = time.monotonic() - began
    ranking = search_each(
        writer,
        live,
        data.codes,
        data.rows(pool),
        beams=beams,
        keep=beams,
        batch_size=config.batch_size,
        early_beams=None if split == "train" else config.early_beams,
        scoring=config.scoring,
        score_end=config.score_end,
        guide=guide,
        features=features,
        graphs=config.graphs and writer.lm.device.type == "cuda",
        blocks_folder=blocks_folder,
    )
    rows, scores = gathered(ranking, len(queries.texts), beams)
    speed = queries_per_second(blocks_folder, len(queries.texts), tokenising=tokenising)
    return RankedLists(queries.texts, queries.captions, queries.pictures, rows, scores), speed


def gathered(
    ranking: Iterable[tuple[int, RankedPictures]], queries: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pictures and scores, (queries, longest) each, of what was found for each query, by its place; at most `most` of
    each list are kept. Millions of lists never are Python's at once, which would be ten times as large."""
    rows = np.full((queries, most), NO_PICTURE, dtype=np.int64)
    scores = np.full((queries, most), -np.inf, dtype=np.float32)
    for query, found in ranking:
        count = min(len(found.rows), most)
        rows[query, :count], scores[query, :count] = found.rows[:count], found.scores[:count]
    longest = int((rows != NO_PICTURE).sum(axis=1).max(initial=0))
    return rows[:, :longest], scores[:, :longest]


def main(config: Config) -> None:
    data = read_data(config.dataset)
    trained = read_retriever(config.retriever, data)
    inputs = {"dataset": config.dataset, "retriever": config.retriever}
    run = runs.begin("retriever.rank_splits", config, inputs=inputs)
    if run is None:
        return
    device = pick_device(config.device)
    lm = VokenLM.from_pretrained(config.retriever / "model", dtype=weights_dtype(config.precision, device)).to(device)
    writer = make_writer(lm, config.precision)
    guide = chosen_guide(config, device)
    metrics: dict[str, Any] = {}
    for split, pool in config.searches():
        name = f"{split}-{pool}"
        blocks_folder = run.resume_folder / name
        lists, speed = rank(writer, data, split, pool, config, guide=guide, blocks_folder=blocks_folder)
        if processes.is_main():
            write_lists(run.folder / f"{name}.jsonl", lists)
        found = float((lists.rows == lists.pictures[:, None]).any(axis=1).mean())
        metrics[name] = {"queries": len(lists.texts), "found": found, "queries_per_second": round(speed, 2)}
        told = f"{len(lists.texts):,} queries, {speed:.0f} per second; {found:.1%} of the pictures in their list"
        print(f"{name}: {told}")
    if processes.is_main() and (guides := config.retriever / "model" / GUIDE_NAME).is_file():
        shutil.copyfile(guides, run.folder / GUIDE_NAME)
    kept = ("features", "captions_fingerprint")
    facts = {key: data.manifest.facts[key] for key in kept}
    facts |= {"dataset": str(config.dataset), "setting": setting_on(trained, data)}
    run.finish(facts={**facts, "guide": guide.weight if guide else None}, metrics=metrics)


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
