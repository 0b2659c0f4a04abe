"""Reorder the beam's pictures by their features, by the reranker and by both; choose the shares on val, report on test.

In:  a `retriever.rank_splits` folder; the features that its vokens were made of; a `reranker.train` folder.
Out: `<output>/table.txt`; rows in the dataset's `summary.json`; `<split>-<pool>.<score>.npy` (queries, pictures), the
     scores, and `<split>-<pool>.<system>.jsonl`, the final order of each query's list (tools/ranked.py).
Command: python -m reranker.test --lists DIR --reranker DIR --tokens DIR --output DIR --summary FILE --name emoji

Without `--reranker` the features alone reorder. A query's picture that is not in its list cannot be found by any
reordering: the retriever's recall at the list's length is the ceiling, and stands in the table.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.compute import machine, pick_device, pick_dtype
from models.hubness import Hubness
from models.lengths import tell_overlong
from models.options import PrecisionOptions
from models.scorer import Scorer
from tools import processes, runs
from tools.captions import first_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions, TableOptions
from tools.errors import BadInput
from tools.features import Features, normalized, read_features
from tools.files import replacing, write_array
from tools.interpolation import COSINE_SCALE, Choice, choose_weights, interpolated
from tools.logs import Tracker, table
from tools.ranked import RankedLists, reordered_ranks, write_lists
from tools.recall import Report, report
from tools.results import GUIDED, MRR_NOTE, Row, merge_summary, printable, scalars
from tools.two_tower import two_tower_recall

from .data import Lists, PictureTokens, read_ranked, read_tokens
from .rerank import score_lists

Scores = NDArray[np.float32]
FEATURES, RERANKER, BOTH = "features", "reranker", "both"


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TableOptions, PrecisionOptions):
    """What reorders which lists, and where the figures go."""

    lists: Path
    """Run folder of retriever.rank_splits."""
    system: str = "retriever"
    """Name of the retriever; the rows are this +features, +reranker and +both."""
    reranker: Path | None = None
    """Run folder of reranker.train; without it the features alone reorder."""
    tokens: Path | None = None
    """Run folder of reranker.convert that it was trained with."""
    features: bool = True
    """Reorder by the stored features too."""
    top_k: int = 50
    """Pictures of each list that are reordered; the others go."""
    pairs: int | None = None
    """Of a query and a picture that are scored in a batch, at most; by default 100 on a CPU, 2048 on a GPU."""
    memory: float = 4.0
    """GiB for all that scoring needs beside the weights: what the reranker keeps of pictures that it has read, and its
    forward passes, which are divided until they fit."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or (self.pairs is not None and self.pairs < 1) or self.memory <= 0:
            raise BadInput("--top-k and --pairs must be at least 1, --memory above 0")
        TableOptions.__post_init__(self)
        if (self.reranker is None) != (self.tokens is None):
            raise BadInput("--reranker and --tokens belong together: give both or none")
        if self.reranker is None and not self.features:
            raise BadInput("--no-features without a --reranker leaves nothing to reorder by")


class Case(NamedTuple):
    """The lists of one split over one pool, with every score of their pictures."""

    split: str
    pool: str
    lists: RankedLists
    scores: dict[str, Scores]
    """Name -> (queries, longest)"""
    speed: float | None
    """Queries per second of the reranker, where it was measured."""
    captions_per_picture: int | None = None
    """Of each picture so many captions are queries; None: all."""

    @property
    def name(self) -> str:
        return f"{self.split}-{self.pool}"

    def first(self, count: int) -> "Case":
        """The same for the first captions of each picture alone."""
        chosen = first_captions(self.lists.pictures, count)
        scores = {name: each[chosen] for name, each in self.scores.items()}
        label = f"{self.split}, first {count} captions"
        return Case(label, self.pool, self.lists.some(chosen), scores, None, count)


def cosines(lists: RankedLists, features: Features, hubness: Hubness | None) -> Scores:
    """Scaled cosine of each query's text with the pictures of its list, (queries, longest), less its hubness."""
    texts, images = normalized(features.texts[lists.captions]), normalized(features.images[:])
    found = np.empty(lists.rows.shape, dtype=np.float32)
    for place, row in enumerate(lists.rows):
        found[place] = images[row] @ texts[place]
    if hubness is not None:
        found -= hubness.taken_off(images)[lists.rows]
    return np.where(lists.present, COSINE_SCALE * found, -np.inf)


class Reranking:
    """The reranker, ready to score."""

    def __init__(self, config: Config, lists: Lists) -> None:
        assert config.reranker is not None
        assert config.tokens is not None
        self.config = config
        self.pictures: PictureTokens = read_tokens(config.tokens)
        if self.pictures.manifest.facts["captions_fingerprint"] != lists.facts["captions_fingerprint"]:
            raise BadInput(f"{config.tokens} and {config.lists} speak of different pictures: make both from one set")
        self.manifest = runs.read_manifest(config.reranker, "reranker.train")
        if self.manifest.facts["tokens"] != self.pictures.manifest.fingerprint:
            raise BadInput(f"{config.reranker} was trained with other image tokens than those of {config.tokens}")
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.scorer = Scorer.from_pretrained(config.reranker / "model", self.dtype).to(self.device)

    def score(self, lists: RankedLists, blocks_folder: Path) -> tuple[Scores, float | None]:
        """Scores (queries, longest), and queries per second; None where a killed run has left scores."""
        tell_overlong(self.scorer, lists.texts, "listed captions")
        resumed = processes.share(processes.is_main() and any(blocks_folder.rglob("*.npy")))
        began = time.monotonic()
        scores = score_lists(
            self.scorer,
            self.pictures.tokens,
            lists,
            dtype=self.dtype,
            pairs=self.config.pairs,
            memory=self.config.memory,
            blocks_folder=blocks_folder,
        )
        return scores, None if resumed else len(lists.texts) / (time.monotonic() - began)


def read_case(
    split: str, pool: str, ranked: Lists, config: Config, features: Features, reranking: Reranking | None, run: runs.Run
) -> Case:
    """Every score of one split's lists."""
    scores, speed, lists = {}, None, ranked.read(split, pool).first(config.top_k)
    if config.features:
        scores[FEATURES] = cosines(lists, features, ranked.hubness)
    if reranking is not None:
        scores[RERANKER], speed = reranking.score(lists, run.resume_folder / f"{split}-{pool}")
    return Case(split, pool, lists, scores, speed)


def choices(val: Case) -> dict[str, Choice]:
    """The shares that do best on val: of each score alone beside the retriever's, and of both."""
    found = {name: choose_weights(val.lists, {name: scores}) for name, scores in val.scores.items()}
    if len(val.scores) > 1:
        found[BOTH] = choose_weights(val.lists, val.scores)
    return found


def system_of(config: Config, lists: Lists) -> str:
    """Name of the retriever that found the lists, by the guided search or without a guide."""
    return config.system + (GUIDED if lists.facts.get("guide") else "")


class Table:
    """Rows of the summary, two-tower search first."""

    def __init__(self, config: Config, lists: Lists, features: Features, setting: str) -> None:
        self.config, self.lists, self.features, self.setting = config, lists, features, setting
        self.system = system_of(config, lists)

    def two_tower(self, case: Case) -> dict[str, Any]:
        """Brute-force search of a case's queries over its whole pool."""
        figures = two_tower_recall(self.features, case.lists.captions, self.pool_rows(case.pool))
        return self.row("two-tower", case, figures, setting="inductive").line()

    def reordered(self, name: str, case: Case, choice: Choice) -> dict[str, Any]:
        """A case's queries in the order of the interpolated scores."""
        order = interpolated(case.lists.scores, case.scores, choice.weights)
        figures = report(reordered_ranks(case.lists, order))
        return self.row(f"{self.system}+{name}", case, figures, setting=self.setting).line(
            weights=choice.weights,
            top_k=case.lists.rows.shape[1],
            before=report(reordered_ranks(case.lists, case.lists.scores)).rounded()["recall"],
            ceiling=ceiling(case.lists),
            reranker_queries_per_second=None if case.speed is None else round(case.speed, 1),
        )

    def row(self, system: str, case: Case, figures: Report, *, setting: str) -> Row:
        """What every row of summary.json has."""
        return Row(
            system=system,
            dataset=self.config.name,
            split=case.split,
            pool=case.pool,
            pool_size=len(self.pool_rows(case.pool)),
            setting=setting,
            figures=figures,
            captions_per_picture=case.captions_per_picture,
            machine=machine(),
            run=self.config.output,
        )

    def pool_rows(self, pool: str) -> NDArray[np.int64]:
        """Rows of the pictures that could be found."""
        if pool == "all":
            return np.arange(len(self.features.records))
        return np.array([row for row, each in enumerate(self.features.records) if each.split == pool], dtype=np.int64)


def ceiling(lists: RankedLists) -> float:
    """Share of the queries whose picture is in their list at all."""
    return round(float((lists.rows == lists.pictures[:, None]).any(axis=1).mean()), 5)


def explanation(rows: list[dict[str, Any]]) -> str:
    """Before, after, ceiling and shares, a line per row that was reordered."""
    return table(
        [
            {
                "system": row["system"],
                "pool": row["pool"],
                "first": row["top_k"],
                "R@1 before": f"{row['before']['1']:.1%}",
                "R@1 after": f"{row['recall']['1']:.1%}",
                "ceiling": f"{row['ceiling']:.1%}",
                "shares": ", ".join(f"{name} {weight:.2f}" for name, weight in row["weights"].items()),
            }
            for row in rows
            if "weights" in row
        ]
    )


def save(run: runs.Run, cases: list[Case], chosen: dict[str, Choice]) -> None:
    """Write every score, and the final order of every list."""
    for case in cases:
        for name, scores in case.scores.items():
            write_array(run.folder / f"{case.name}.{name}.npy", scores)
        for name, choice in chosen.items():
            total = interpolated(case.lists.scores, case.scores, choice.weights)
            order = np.argsort(-total, axis=1, kind="stable")
            rows = np.take_along_axis(case.lists.rows, order, axis=1)
            scores = np.take_along_axis(total, order, axis=1).astype(np.float32)
            write_lists(run.folder / f"{case.name}.{name}.jsonl", case.lists._replace(rows=rows, scores=scores))


def main(config: Config) -> None:
    lists = read_ranked(config.lists)
    features = read_features(Path(lists.facts["features"]))
    reranking = None if config.reranker is None else Reranking(config, lists)
    inputs = {"lists": config.lists, "features": features.manifest.folder}
    if reranking is not None:
        inputs |= {"reranker": reranking.manifest.folder, "tokens": reranking.pictures.manifest.folder}
    run = runs.begin("reranker.test", config, inputs=inputs)
    if run is None:
        print((config.output / "table.txt").read_text(encoding="utf-8", errors="backslashreplace"), end="")
        return
    settings = {lists.facts["setting"]} | ({reranking.manifest.facts["setting"]} if reranking else set())
    pools = [("val", "val"), *(("test", pool) for pool in lists.test_pools())]
    cases = [read_case(*each, lists, config, features, reranking, run) for each in pools]
    if processes.is_main():
        chosen = choices(cases[0])
        summary = Table(config, lists, features, "transductive" if "transductive" in settings else "inductive")
        some = config.captions_per_picture
        measured = cases if some is None else [*cases, *(case.first(some) for case in cases)]
        rows = [
            row
            for case in measured
            for row in (
                summary.two_tower(case),
                *(summary.reordered(*each[:1], case, each[1]) for each in chosen.items()),
            )
        ]
        conclude(run, config, system_of(config, lists), cases, chosen, rows)
        facts = {"weights": {name: choice.weights for name, choice in chosen.items()}}
        metrics = {f"{row['system']}/{row['split']}-{row['pool']}/R@1": row["recall"]["1"] for row in rows}
        run.finish(facts=facts, metrics=metrics)
    else:
        run.finish()


def conclude(
    run: runs.Run,
    config: Config,
    system: str,
    cases: list[Case],
    chosen: dict[str, Choice],
    rows: list[dict[str, Any]],
) -> None:
    """Save everything, and show it."""
    save(run, cases, chosen)
    text = f"{printable(rows)}\n\n{MRR_NOTE}\n\n{explanation(rows)}"
    with replacing(run.folder / "table.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    tested = [row for row in rows if row["split"].startswith("test") and "weights" in row]
    merge_summary(config.summary, tested)
    tracker = Tracker(run.folder, job="test_reranker", config=run.started["config"])
    tracker.table("reranked", [{**{k: v for k, v in row.items() if k != "recall"}, **row["recall"]} for row in tested])
    tracker.summary(scalars(rows, main=f"{system}+{list(chosen)[-1]}"))  # by all that there is to reorder by
    tracker.finish()
    print(f"{text}\n\nrows: {config.summary}")
    for name, choice in chosen.items():
        if not sum(choice.weights.values()):
            print(f"note: on val {name} did not help: it has no share, and {system}+{name} is {system}")


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
