"""Evaluate a retriever on text-to-image tasks of MTEB, or on a folder of tools.beir, by MTEB's measures and by ours.

In:  an exported retriever (--folder), or a `retriever.gallery.build` folder and a trained retriever; names of tasks, or
     a folder of `tools.beir`.
Out: `<output>/<task>.json`, as MTEB writes results; `<output>/<task>_predictions.json`, the lists; a table on standard
     output.
Command: python -m retriever.gallery.benchmark --folder avg-emoji --tasks Flickr30kT2IRetrieval --output DIR

It needs the packages of requirements-benchmarks.txt. MTEB fetches its tasks from the Hugging Face Hub.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.beir import read_task
from tools.captions import Split
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.logs import table
from tools.recall import NOT_FOUND, Ranks, report
from tools.texts import did_you_mean

from ..retrieve import ArithmeticOptions
from .api import Retriever
from .mteb_model import CATEGORY, Lists, MtebRetriever

THEIRS = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "recall_at_10", "ndcg_at_10")
"""MTEB's measures that the table shows, beside R@1, R@5 and R@10 of tools/recall.py."""


@dataclass(frozen=True, kw_only=True)
class Config(ArithmeticOptions):
    """Which retriever is evaluated, on what, and how it searches."""

    output: Path
    """Folder to write."""
    tasks: tuple[str, ...] = ()
    """Names of MTEB's tasks."""
    beir: Path | None = None
    """Folder of tools.beir, as a task of its own."""
    split: Split = "test"
    """Split of --beir."""
    folder: Path | None = None
    """Folder of an exported retriever; else give --index and --retriever."""
    index: Path | None = None
    """Run folder of retriever.gallery.build."""
    retriever: Path | None = None
    """Run folder of retriever.train or retriever.train_stage2."""
    weights: Path | None = None
    """Run folder of reranker.test, for the features' share."""
    name: str = "avg/retriever"
    """Name of the model in the results, owner/name."""
    beams: int | None = None
    """Codes kept at each level; by default 50, and 10 without re-ranking."""
    keep: int | None = None
    """Pictures in a list at most; by default as many as beams."""
    guided: bool = True
    """Let the guide steer the beams, where the retriever has one."""
    rerank: bool = True
    """Reorder what the beams find by its features."""
    rerank_weight: float | None = None
    """Share of the features in the final order, 0 to 1; by default what was chosen on val."""

    def __post_init__(self) -> None:
        if bool(self.tasks) == (self.beir is not None):
            raise BadInput("give either --tasks or --beir")
        if (self.folder is None) == (self.index is None) or (self.index is None) != (self.retriever is None):
            raise BadInput("give either --folder, or --index and --retriever")
        if self.rerank_weight and not self.rerank:
            raise BadInput("--no-rerank and --rerank-weight contradict each other: give one")


def need_mteb() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import mteb
    except ImportError as error:
        raise BadInput(
            f"this needs MTEB, which cannot be loaded ({error}): pip install -r requirements-benchmarks.txt"
        ) from None
    return mteb


def folder_task(folder: Path, split: str, *, name: str | None = None) -> Any:
    """A folder of `tools.beir` as a task of MTEB, which any model that MTEB knows can be evaluated on.

    Args:
        name: of the task; by default the folder's.

    Raises:
        BadInput: a file is missing or damaged.
    """
    need_mteb()
    from datasets import Dataset, Image
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    found = read_task(folder, split)
    if missing := next((file for file in found.files if not file.is_file()), None):
        raise BadInput(f"{folder}: the picture {missing} is not there: put it back, or export again")
    corpus = Dataset.from_dict({"id": found.images, "image": list(map(str, found.files))})
    asked = {query: text for query, text in found.queries.items() if query in found.relevant}

    class FolderTask(AbsTaskRetrieval):
        data_loaded = False
        metadata = TaskMetadata(
            name=name or folder.resolve().name,
            description=f"Captions and pictures of {folder.resolve().name}.",
            dataset={"path": str(folder.resolve()), "revision": "local"},
            type="Any2AnyRetrieval",
            category=CATEGORY,
            modalities=["text", "image"],
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            if self.data_loaded:
                return
            self.dataset = {
                "default": {
                    split: {
                        "corpus": corpus.cast_column("image", Image()),
                        "queries": Dataset.from_dict({"id": list(asked), "text": list(asked.values())}),
                        "relevant_docs": found.relevant,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return FolderTask()


def first_ranks(lists: Lists, relevant: dict[str, dict[str, int]]) -> Ranks:
    """For each query the rank of the first picture that it asks for; several may be as good."""
    ranks = []
    for query, asked in relevant.items():
        if query not in lists:  # nor does MTEB count it
            continue
        right = {image for image, score in asked.items() if score > 0}
        found = (rank for rank, image in enumerate(lists[query], start=1) if image in right)
        ranks.append(next(found, NOT_FOUND))
    return np.array(ranks, dtype=np.int64)


def named_tasks(names: tuple[str, ...]) -> list[Any]:
    """Tasks of MTEB with their data, which is fetched once.

    Raises:
        BadInput: there is none of that name, or its data cannot be fetched.
    """
    mteb = need_mteb()
    known = {each.metadata.name for each in mteb.get_tasks(categories=[CATEGORY])}
    if unknown := [name for name in names if name not in known]:
        raise BadInput(
            f"MTEB has no text-to-image task {unknown[0]!r}{did_you_mean(unknown[0], known)}: "
            f"mteb.get_tasks(categories=['{CATEGORY}']) lists them"
        )
    return [mteb.get_task(name) for name in names]


def load_data(task: Any) -> None:
    """Fetch a task's data, where it is not there yet."""
    try:
        task.load_data()
    except Exception as error:  # the hub's client and what it stands on raise many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"the data of {task.metadata.name} cannot be loaded: {line}") from None


def rows_of(task: Any, model: MtebRetriever, scores: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, str]]:
    """A line of the table for each split and subset that was evaluated: our figures, and MTEB's."""
    for split, subsets in scores.items():
        for theirs in subsets:
            subset = theirs["hf_subset"]
            searched = model.searched[subset, split]
            own = report(first_ranks(searched.lists, task.dataset[subset][split]["relevant_docs"])).rounded()
            yield {
                **{"task": task.metadata.name, "split": split, "subset": subset, "setting": searched.setting},
                **{f"R@{cutoff}": f"{value:.5f}" for cutoff, value in own["recall"].items()},
                **{name: f"{theirs[name]:.5f}" for name in THEIRS},
            }


def load(config: Config) -> Retriever:
    """The retriever that is evaluated."""
    options: dict[str, Any] = {"device": config.device, "precision": config.precision}
    if config.folder is not None:
        return Retriever.load(config.folder, **options)
    assert config.index is not None and config.retriever is not None, "the configuration was checked"  # noqa: PT018
    return Retriever.from_runs(index=config.index, retriever=config.retriever, weights=config.weights, **options)


def main(config: Config) -> None:
    mteb = need_mteb()
    tasks = named_tasks(config.tasks) if config.beir is None else [folder_task(config.beir, config.split)]
    model = MtebRetriever(
        load(config), name=config.name, beams=config.beams, keep=config.keep, guided=config.guided,
        rerank=config.rerank, share=config.rerank_weight,
    )  # fmt: skip
    config.output.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        load_data(task)
        done = mteb.evaluate(model, task, cache=None, prediction_folder=config.output, show_progress_bar=False)
        [result] = done.task_results
        result.to_disk(config.output / f"{task.metadata.name}.json")
        print(table(list(rows_of(task, model, result.scores))))
        task.unload_data()


if __name__ == "__main__":
    run_command(main, Config)
