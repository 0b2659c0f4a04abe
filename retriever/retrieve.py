"""Rank the pictures of one or more pools for every query of a split, by constrained beam search.

In:  a `retriever.prepare` folder and a `retriever.train` or `retriever.train_stage2` folder.
Out: `<output>/<pool>.jsonl`: {"query", "image", "ranked": [image, ...], "scores": [...]} a line per query; the same
     by the guided search in `<pool>+guide.jsonl`, where the retriever has a guide. Several processes share the queries,
     and a killed run goes on where it was.
Command: python -m retriever.retrieve --dataset DIR --retriever DIR --split test --pools test all --output DIR
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.arithmetic import Arithmetic, weights_dtype
from models.compute import pick_device
from models.decoding import Scoring, Writer, make_writer
from models.guide import GUIDE_NAME, Guide, read_guide
from models.lengths import tell_overlong
from models.options import DeviceOptions
from models.voken_lm import Memory, VokenLM
from tools import processes, runs
from tools.blocks import Blocks
from tools.captions import Split
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import Floats
from tools.files import read_json_lines, write_json_lines
from tools.logs import progress
from tools.recall import Ranks, code_rank, image_rank
from tools.results import GUIDED

from .beam import RankedPictures, beam_search, expand
from .data import Queries, RetrieverData, read_data, read_retriever
from .graphed_search import GraphedSearch
from .index import build_index, to_device
from .queries import LiveQueries, Searchable
from .setting import setting_on
from .two_tower import encoding_seconds

Pool = Literal["train", "val", "test", "all"]

BLOCK_BATCHES = 16  # batches a block: what a killed search loses at most, in each process


@dataclass(frozen=True, kw_only=True)
class ArithmeticOptions(DeviceOptions):
    """Where a retriever computes, and how."""

    precision: Arithmetic = "auto"
    """Arithmetic of the language model; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32; int8: on a
    CPU, weights and inputs quantised row by row."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ArithmeticOptions):
    """How a retriever scores what it writes."""

    scoring: Scoring = "full"
    """Softmax over the whole vocabulary (published), or over the vokens of each level, which is faster."""


@dataclass(frozen=True, kw_only=True)
class ListOptions(SearchOptions):
    """Which retriever answers the captions of which dataset."""

    dataset: Path
    """Run folder of retriever.prepare."""
    retriever: Path
    """Run folder of retriever.train or retriever.train_stage2."""
    score_end: bool = False
    """Add the end token's log-probability to a score; published: yes."""
    guided: bool = True
    """Search with the guide that the retriever's training chose on val, where it chose one."""
    early_beams: int | None = None
    """Codes kept at the first half of the levels while a guide steers, where they are more than --beams: a guide knows
    little of a picture before its last codes are written."""
    batch_size: int = 64
    """Queries per batch."""
    graphs: bool = True
    """On a GPU, record the search as CUDA graphs, which start all its kernels at once."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput("--batch-size must be at least 1")
        if self.early_beams is not None and self.early_beams < 1:
            raise BadInput("--early-beams must be at least 1")
        check_scoring(self.scoring, self.score_end)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ListOptions):
    """What is searched for, where, and how widely."""

    split: Split = "test"
    """Whose captions are the queries."""
    pools: tuple[Pool, ...] = ("test",)
    """Pictures that may be found: one split's, or all; each is searched on its own."""
    beams: int = 10
    """Codes kept at each level."""
    keep: int = 10
    """Codes written for each query, each with all its pictures."""
    unguided: bool = True
    """Search without the guide too, as published."""

    def __post_init__(self) -> None:
        ListOptions.__post_init__(self)
        if min(self.beams, self.keep) < 1 or not self.pools:
            raise BadInput("--beams, --keep and the number of --pools must be at least 1")
        if not (self.guided or self.unguided):
            raise BadInput("--no-guided and --no-unguided together leave nothing to search: give one")


def check_scoring(scoring: Scoring, score_end: bool) -> None:
    """Refuse a score that does not exist."""
    if score_end and scoring == "voken":
        raise BadInput("--score-end needs --scoring full: the softmax over vokens has no end token")


def search_queries(
    writer: Writer, queries: Searchable, *pictures: NDArray[np.int64], **options: Any
) -> list[RankedPictures]:
    """What `search_each` finds, as a list in the order of the queries."""
    results: list[RankedPictures] = [RankedPictures([], [])] * len(queries.lengths)
    for query, result in search_each(writer, queries, *pictures, **options):
        results[query] = result
    return results


def search_each(
    writer: Writer,
    queries: Searchable,
    codes: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    beams: int,
    keep: int,
    batch_size: int,
    early_beams: int | None = None,
    scoring: Scoring = "full",
    score_end: bool = False,
    guide: Guide | None = None,
    features: Floats | None = None,
    graphs: bool = False,
    blocks_folder: Path | None = None,
    quiet: bool = False,
) -> Iterator[tuple[int, RankedPictures]]:
    """Search the pictures `rows` of `codes` (all pictures, levels) for every query, in batches of similar length.

    Yields:
        the place of a query, and what was found for it; the rows in it are rows of all pictures.

    Args:
        early_beams: as in `beam_search`, where a guide steers; a search without one narrows at once.
        guide: where one steers the search; on the writer's device.
        features: (queries, features) two-tower features of the texts, which a guide, or a slot of the model, reads.
        graphs: search as `GraphedSearch` does.
        blocks_folder: share the batches with the other processes, in blocks below this folder that a killed run keeps:
            a folder of its own for each search. Without it each process searches everything.
    """
    if not len(rows):
        raise BadInput("the pool has no pictures: choose another --pool")
    index = build_index(codes[rows])
    levels = to_device(index, writer.lm.device)
    order = np.argsort(queries.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    early = None if guide is None else early_beams
    options: dict[str, Any] = {"beams": beams, "early_beams": early, "scoring": scoring, "score_end": score_end}
    graphed = None
    if graphs:
        graphed = GraphedSearch(writer, levels, guide=guide, **options)

    def search(batch: NDArray[np.int64]) -> list[RankedPictures]:
        with torch.inference_mode():
            memory = queries.memory(batch, writer.encode if graphed is None else graphed.encode)
            texts = None if features is None else torch.from_numpy(features[batch]).to(writer.lm.device)
            memory, seen = with_features(writer.lm, memory, texts, guide)
            steering = None if guide is None or seen is None else guide.steer(seen)
        try:
            if graphed is None:
                found = beam_search(writer, memory, levels, steering=steering, **options)
            else:
                found = graphed(memory, seen)
        except FloatingPointError as error:
            raise BadInput(str(error)) from None
        return [RankedPictures(rows[own].tolist(), scores) for own, scores in expand(found, index, keep=keep)]

    ranked: Iterator[RankedPictures]
    if blocks_folder is None:
        ranked = (one for batch in (batches if quiet else progress(batches, "searching")) for one in search(batch))
    else:
        ranked = _search_blocks(search, batches, blocks_folder, quiet=quiet)
    yield from zip(order.tolist(), ranked, strict=True)


def with_features(
    lm: VokenLM, memory: Memory, texts: Tensor | None, guide: Guide | None
) -> tuple[Memory, Tensor | None]:
    """A batch's memory with the model's slot filled, and the text features that the guide steers by.

    Args:
        texts: (queries, features) of the two-tower model, where `needs_features` asks for them.
    """
    seen = guide.read(memory) if guide is not None and guide.head is not None else texts
    return lm.with_slot(memory, texts), seen


def _search_blocks(
    search: Callable[[NDArray[np.int64]], list[RankedPictures]],
    batches: list[NDArray[np.int64]],
    folder: Path,
    *,
    quiet: bool,
) -> Iterator[RankedPictures]:
    """What `search` finds for all batches, this process searching its share of the blocks that are missing.

    A block is a line {"seconds"} that it took, and a line {"rows", "scores"} a query.
    """
    blocks = [batches[start : start + BLOCK_BATCHES] for start in range(0, len(batches), BLOCK_BATCHES)]
    work = Blocks(folder, len(blocks), suffix=".jsonl")
    left = [batch for number in work.left for batch in blocks[number]]
    found = map(search, left if quiet else progress(left, "searching"))
    for number in work.left:
        began = time.monotonic()
        ranked = [one for some in islice(found, len(blocks[number])) for one in some]
        seconds = time.monotonic() - began
        write_json_lines(work.path(number), [{"seconds": seconds}, *(one._asdict() for one in ranked)])
    next(found, None)  # the bar ends
    for path in work.gather():
        for number, line in read_json_lines(path):
            if number > 1:
                yield RankedPictures(line["rows"], line["scores"])


def queries_per_second(blocks_folder: Path, queries: int, *, tokenising: float) -> float:
    """Speed of a finished search in blocks: all its queries, over the seconds of tokenising (in every process all of
    them) and those that the slowest process takes for its share of the blocks.

    Each block counts with the seconds it took when it was searched. So a run that was killed reports its search, not
    how fast it found results there; one that goes on with more processes, what that many would have taken.
    """
    seconds = [next(read_json_lines(path))[1]["seconds"] for path in sorted(blocks_folder.glob("[0-9]*.jsonl"))]
    slowest = max(sum(seconds[first :: processes.count()]) for first in range(processes.count()))
    return queries / (tokenising + slowest)


def ranks_of(
    ranking: list[RankedPictures], targets: NDArray[np.int64], codes: NDArray[np.int64]
) -> tuple[Ranks, Ranks]:
    """Image-level and code-level rank of each query's target picture."""
    images, by_code = [], []
    for result, target in zip(ranking, targets, strict=True):
        images.append(image_rank(result.rows, int(target)))
        by_code.append(code_rank([codes[row].tobytes() for row in result.rows], codes[target].tobytes()))
    return np.array(images, dtype=np.int64), np.array(by_code, dtype=np.int64)


def predictions(data: RetrieverData, queries: Queries, ranking: list[RankedPictures]) -> Iterator[dict[str, Any]]:
    """The lines of `<pool>.jsonl`."""
    for text, picture, result in zip(queries.texts, queries.pictures, ranking, strict=True):
        yield {
            "query": text,
            "image": data.images[picture],
            "ranked": [data.images[row] for row in result.rows],
            "scores": [round(score, 4) for score in result.scores],
        }


def chosen_guide(config: ListOptions, device: torch.device) -> Guide | None:
    """What steers the searches of a retriever; None where it is not wanted, or where val gave it no weight."""
    guide = read_guide(config.retriever / "model" / GUIDE_NAME) if config.guided else None
    if guide is None:
        return None
    if not guide.weight:
        print(f"note: on val the guide did not help: {config.retriever} searches without it")
        return None
    return guide.to(device)


def needs_features(lm: VokenLM, guide: Guide | None) -> bool:
    """Whether a search reads the text features of its queries, so that they pass through a second text encoder."""
    return lm.slot is not None or (guide is not None and guide.head is None)


def main(config: Config) -> None:
    data = read_data(config.dataset)
    trained = read_retriever(config.retriever, data)
    inputs = {"dataset": config.dataset, "retriever": config.retriever}
    run = runs.begin("retriever.retrieve", config, inputs=inputs)
    if run is None:
        return
    device = pick_device(config.device)
    lm = VokenLM.from_pretrained(config.retriever / "model", dtype=weights_dtype(config.precision, device)).to(device)
    writer = make_writer(lm, config.precision)
    queries = data.queries(config.split)
    if not queries.texts:
        raise BadInput(f"{config.dataset} has no {config.split} captions: choose another --split")
    tell_overlong(lm, queries.texts, f"{config.split} captions")
    metrics: dict[str, Any] = {}
    began = time.monotonic()
    live = LiveQueries(lm, queries.texts)
    tokenising = time.monotonic() - began
    chosen = chosen_guide(config, device)
    features, encoding = None, 0.0
    if needs_features(lm, chosen):
        features = data.text_features(queries.texts, device)
        encoding = encoding_seconds(data.features, queries.texts, device=config.device)
    guides = ([None] if config.unguided or chosen is None else []) + ([] if chosen is None else [chosen])
    for pool, guide in product(config.pools, guides):
        name = pool if guide is None else pool + GUIDED
        blocks_folder = run.resume_folder / name
        ranking = search_queries(
            writer,
            live,
            data.codes,
            data.rows(pool),
            beams=config.beams,
            keep=config.keep,
            batch_size=config.batch_size,
            early_beams=config.early_beams,
            scoring=config.scoring,
            score_end=config.score_end,
            guide=guide,
            features=features,
            graphs=config.graphs and device.type == "cuda",
            blocks_folder=blocks_folder,
        )
        before = tokenising + encoding if needs_features(lm, guide) else tokenising
        speed = queries_per_second(blocks_folder, len(queries.texts), tokenising=before)
        if processes.is_main():
            write_json_lines(run.folder / f"{name}.jsonl", predictions(data, queries, ranking))
        metrics[name] = {"queries": len(queries.texts), "queries_per_second": round(speed, 2)}
        print(f"{len(queries.texts):,} queries over pool {name}: {speed:.0f} per second")
    facts = {"dataset": str(config.dataset), "setting": setting_on(trained, data)}
    run.finish(facts={**facts, "guide": None if chosen is None else chosen.weight}, metrics=metrics)


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
