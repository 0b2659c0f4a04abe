"""Write a split's captions and pictures, and ranked lists, in the layout of BEIR.

In:  a `tools.prepare_captions` folder; a `retriever.retrieve` folder (--predictions), or a `retriever.rank_splits` or
     `reranker.test` folder (--lists), for the runs.
Out: `<output>/`
         corpus.jsonl         {"_id", "title", "text", "image", "file"} a line per picture; title and text are empty
         queries.jsonl        {"_id", "text"} a line per caption
         qrels/<split>.tsv    query-id, corpus-id and score 1: the picture that the caption belongs to
         runs/<list>.json     {query: {picture: score}} of each list file of these captions over these pictures
Command: python -m tools.beir --captions DIR --split test --output DIR

A query's id is q and its place among the split's captions, from 1, as in the files of tools.trec. A picture's is its id
here, percent-encoded as there; `image` is the id itself and `file` the picture's file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .captions import CaptionSet, Record, Split, read_captions
from .command_line.commands import run_command
from .errors import BadInput
from .files import read_json_lines, replacing, write_json, write_json_lines
from .texts import clean
from .trec import Config as TrecConfig
from .trec import Ranking, encoded, falling, sources

CORPUS, QUERIES, QRELS, RUNS = "corpus.jsonl", "queries.jsonl", "qrels", "runs"
HEADER = "query-id\tcorpus-id\tscore\n"


@dataclass(frozen=True)
class Config:
    """Which captions and pictures are written, and which ranked lists beside them."""

    captions: Path
    """Run folder of tools.prepare_captions."""
    output: Path
    """Folder to write."""
    split: Split = "test"
    """Whose captions are the queries, and whose pictures are searched."""
    all_pictures: bool = False
    """Let the pictures of all splits be searched."""
    predictions: Path | None = None
    """Run folder of retriever.retrieve."""
    lists: Path | None = None
    """Run folder of retriever.rank_splits or reranker.test."""

    def __post_init__(self) -> None:
        if self.predictions is not None and self.lists is not None:
            raise BadInput("give either --predictions or --lists, or none of them")


class Task(NamedTuple):
    """A folder in the layout of BEIR."""

    images: list[str]
    """Ids of the pictures, as they stand in the files."""
    files: list[Path]
    """(pictures)"""
    queries: dict[str, str]
    """Text of each query's id."""
    relevant: dict[str, dict[str, int]]
    """For each query the pictures that it asks for, and how much."""


def owners(records: Iterable[Record]) -> Iterator[tuple[str, Record, str]]:
    """Id, picture and text of each caption."""
    pairs = ((record, text) for record in records for text in record.captions)
    yield from ((f"q{number}", record, text) for number, (record, text) in enumerate(pairs, start=1))


def write_dataset(folder: Path, captions: CaptionSet, split: Split, *, all_pictures: bool) -> int:
    """Write all but the runs. Returns the number of queries."""
    (folder / QRELS).mkdir(parents=True, exist_ok=True)
    asked = [record for record in captions.records if record.split == split]
    below = captions.images.resolve()
    searched = captions.records if all_pictures else asked
    write_json_lines(folder / CORPUS, (picture_line(record, below) for record in searched))
    lines = ({"_id": query, "text": clean(text)} for query, _, text in owners(asked))
    count = write_json_lines(folder / QUERIES, lines)
    with replacing(folder / QRELS / f"{split}.tsv") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(HEADER)
        file.writelines(f"{query}\t{encoded(record.image)}\t1\n" for query, record, _ in owners(asked))
    return count


def picture_line(record: Record, below: Path) -> dict[str, str]:
    """A picture's line of the corpus."""
    name = encoded(record.image)
    return {"_id": name, "title": "", "text": "", "image": record.image, "file": str(below / record.file)}


def write_runs(folder: Path, records: list[Record], pool: set[str], config: Config) -> Iterator[str]:
    """Write the list files of these captions over these pictures, and yield a line about each list file."""
    texts = [text for _, _, text in owners(records)]
    (folder / RUNS).mkdir(exist_ok=True)
    for name, rankings in sources(TrecConfig(config.output, config.predictions, config.lists)):
        lists = list(rankings)
        reason = why_not(lists, texts, records, pool)
        if reason:
            yield f"{name}: left out, {reason}"
            continue
        write_json(folder / RUNS / f"{name}.json", {f"q{place}": scores(each) for place, each in enumerate(lists, 1)})
        yield f"{name}: {len(lists):,} lists -> {folder / RUNS / name}.json"


def why_not(lists: list[Ranking], texts: list[str], records: list[Record], pool: set[str]) -> str:
    """Why ranked lists are not those of a split's captions over a pool of pictures; empty where they are."""
    wanted = [record.image for _, record, _ in owners(records)]
    if [each.text for each in lists] != texts or [each.image for each in lists] != wanted:
        return "its queries are not these captions"
    outside = next((image for each in lists for image in each.ranked if image not in pool), None)
    return "" if outside is None else f"it ranks pictures of other splits, {outside!r} among them (--all-pictures)"


def scores(ranking: Ranking) -> dict[str, float]:
    """The pictures of one list with scores that fall strictly, so that every evaluator sees the order as it was."""
    return dict(zip(map(encoded, ranking.ranked), falling(ranking.scores).tolist(), strict=True))


def read_task(folder: Path, split: str) -> Task:
    """Read what `write_dataset` wrote.

    Raises:
        BadInput: a file is missing or a line is not one; the message has file and line.
    """
    corpus = [_fields(folder / CORPUS, number, row, "_id", "file") for number, row in read_json_lines(folder / CORPUS)]
    queries = [
        _fields(folder / QUERIES, number, row, "_id", "text") for number, row in read_json_lines(folder / QUERIES)
    ]
    task = Task([image for image, _ in corpus], [Path(file) for _, file in corpus], dict(queries), {})
    known = set(task.images)
    for number, query, image, score in _judgements(folder / QRELS / f"{split}.tsv"):
        if query not in task.queries or image not in known:
            unknown = query if query not in task.queries else image
            raise BadInput(f"{folder / QRELS / split}.tsv, line {number}: there is no {unknown!r}: export it again")
        task.relevant.setdefault(query, {})[image] = score
    return task


def _fields(path: Path, number: int, row: dict[str, Any], *names: str) -> tuple[str, str]:
    first, second = (row.get(name) for name in names)
    if not (isinstance(first, str) and isinstance(second, str)):
        raise BadInput(f"{path}, line {number}: it must have {' and '.join(names)}, which are texts: export it again")
    return first, second


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    if not path.is_file():
        raise BadInput(f"{path} does not exist: name a split that was exported")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        parts = line.split("\t")
        if len(parts) != 3 or not parts[2].isdecimal():
            raise BadInput(f"{path}, line {number}: expected query, picture and score with tabs between them")
        yield number, parts[0], parts[1], int(parts[2])


def main(config: Config) -> None:
    if config.output.is_dir() and any(config.output.iterdir()):
        raise BadInput(f"{config.output} holds something already: name another --output")
    captions = read_captions(config.captions)
    asked = [record for record in captions.records if record.split == config.split]
    if not any(record.captions for record in asked):
        raise BadInput(f"{config.captions} has no {config.split} captions: choose another --split")
    pool = {record.image for record in (captions.records if config.all_pictures else asked)}
    count = write_dataset(config.output, captions, config.split, all_pictures=config.all_pictures)
    print(f"{count:,} queries, {len(pool):,} pictures -> {config.output}")
    if config.predictions is not None or config.lists is not None:
        for line in write_runs(config.output, asked, pool, config):
            print(line)


if __name__ == "__main__":
    run_command(main, Config)
