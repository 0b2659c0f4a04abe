"""Write ranked lists as TREC run and qrels files, which trec_eval, ir-measures and ranx read.

In:  a `retriever.retrieve` folder (--predictions), or a `retriever.rank_splits` or `reranker.test` folder (--lists).
Out: `<output>/<list>/`, a folder for each list file of it:
         run.trec     query Q0 picture rank score system
         qrels.trec   query 0 picture 1: the picture that the query asks for
         queries.tsv  query, tab, text
Command: python -m tools.trec --predictions DIR --output DIR

A query's id is q and its place in the list file, from 1. A picture's is its id here, percent-encoded: `decoded` gives
it back. Evaluators sort by score, and equal scores by id; so the scores written fall strictly, equal ones by the
smallest steps of single precision, in which trec_eval reads them, and every evaluator sees the order as it was ranked.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from . import runs
from .command_line.commands import run_command
from .errors import BadInput
from .features import read_features
from .files import read_json_lines, replacing
from .ranked import read_lists
from .texts import clean

RUN, QRELS, QUERIES = "run.trec", "qrels.trec", "queries.tsv"
LISTS_OF = ("retriever.rank_splits", "reranker.test")


@dataclass(frozen=True)
class Config:
    """Which ranked lists are written."""

    output: Path
    """Folder to write."""
    predictions: Path | None = None
    """Run folder of retriever.retrieve."""
    lists: Path | None = None
    """Run folder of retriever.rank_splits or reranker.test."""
    system: str | None = None
    """Name of the system in the run files; by default that of the run folder."""

    def __post_init__(self) -> None:
        if (self.predictions is None) == (self.lists is None):
            raise BadInput("give either --predictions or --lists")


class Ranking(NamedTuple):
    """One query's answer."""

    text: str
    image: str
    """Id of the picture that it asks for."""
    ranked: list[str]
    """Ids of the pictures found, best first."""
    scores: list[float]


def encoded(image: str) -> str:
    """A picture's id without white space and characters beyond ASCII.

    >>> encoded("café au lait/1.jpg"), decoded(encoded("100% café"))
    ('caf%C3%A9%20au%20lait/1.jpg', '100% café')
    """
    return quote(image, safe="/:,+=@~!$&()*';", errors="surrogatepass")


def decoded(name: str) -> str:
    """What `encoded` was given."""
    return unquote(name, errors="surrogatepass")


def falling(scores: Iterable[float]) -> NDArray[np.float32]:
    """Scores (pictures,) in which each is below the one before: those of a ranked list, lowered where they are not.

    >>> falling([2.0, 2.0, 1.0]).tolist()
    [2.0, 1.9999998807907104, 1.0]
    """
    lowered = np.array(list(scores), dtype=np.float32)
    for place in range(1, len(lowered)):
        below = np.nextafter(lowered[place - 1], np.float32(-np.inf))
        lowered[place] = min(lowered[place], below)
    return lowered


def read_predictions(path: Path) -> Iterator[Ranking]:
    """The answers in a list file of `retriever.retrieve`."""
    for _, line in read_json_lines(path):
        yield Ranking(line["query"], line["image"], line["ranked"], line["scores"])


def read_ranked(path: Path, images: list[str]) -> Iterator[Ranking]:
    """The answers in a list file whose pictures are rows of `images`."""
    lists = read_lists(path)
    for text, picture, rows, scores, present in zip(
        lists.texts, lists.pictures.tolist(), lists.rows, lists.scores, lists.present, strict=True
    ):
        ranked = [images[row] for row in rows[present].tolist()]
        yield Ranking(text, images[picture], ranked, scores[present].tolist())


def write_trec(folder: Path, rankings: Iterable[Ranking], *, system: str) -> int:
    """Write the three files of one list file. Returns the number of queries."""
    folder.mkdir(parents=True, exist_ok=True)
    name, count = encoded(clean(system)), 0
    with (
        replacing(folder / RUN) as run_path,
        replacing(folder / QRELS) as qrels_path,
        replacing(folder / QUERIES) as queries_path,
        run_path.open("w", encoding="utf-8") as run,
        qrels_path.open("w", encoding="utf-8") as qrels,
        queries_path.open("w", encoding="utf-8") as queries,
    ):
        for count, each in enumerate(rankings, start=1):
            qrels.write(f"q{count} 0 {encoded(each.image)} 1\n")
            queries.write(f"q{count}\t{clean(each.text)}\n")
            for rank, (image, score) in enumerate(zip(each.ranked, falling(each.scores), strict=True), start=1):
                run.write(f"q{count} Q0 {encoded(image)} {rank} {score:.9g} {name}\n")
    return count


def list_files(folder: Path) -> list[Path]:
    """The files of ranked lists in a run folder."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BadInput(f"{folder} has no ranked lists: make it again")
    return files


def sources(config: Config) -> Iterator[tuple[str, Iterator[Ranking]]]:
    """Each list file's name and answers."""
    if config.predictions is not None:
        folder = runs.read_manifest(config.predictions, "retriever.retrieve").folder
        yield from ((path.stem, read_predictions(path)) for path in list_files(folder))
        return
    assert config.lists is not None, "the configuration was checked"
    manifest = runs.read_manifest(config.lists, *LISTS_OF)
    if manifest.command == "reranker.test":
        manifest = runs.read_manifest(runs.unchanged_input(manifest, "lists"), "retriever.rank_splits")
    captions = read_features(Path(manifest.facts["features"])).records
    images = [record.image for record in captions]
    yield from ((path.stem, read_ranked(path, images)) for path in list_files(config.lists))


def main(config: Config) -> None:
    system = config.system or (config.predictions or config.lists or config.output).name
    for name, rankings in sources(config):
        count = write_trec(config.output / name, rankings, system=system)
        print(f"{count:,} queries -> {config.output / name}")


if __name__ == "__main__":
    run_command(main, Config)
