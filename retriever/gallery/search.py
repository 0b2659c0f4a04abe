"""Search pictures with words, or with a picture: load the trained retriever once, answer each query, draw the answers.

In:  a `retriever.train` folder, a `retriever.gallery.build` folder, and queries on the command line, or one per line on
     standard input, or a picture (--picture).
Out: ranked pictures on standard output, and a contact sheet of the last answer; with --json a line of JSON per query.
Command: python -m retriever.gallery.search --retriever DIR --index DIR "outlined drawing of a turtle"

Where the index keeps the pictures' features, a wider search finds the pictures and an interpolation orders them: of the
retriever's scores and the cosines between the pictures' features and the query's (tools/interpolation.py).
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import tyro

from tools.command_line.commands import run_command
from tools.command_line.place import for_user
from tools.contact_sheet import SheetRow, draw_sheet
from tools.errors import BadInput
from tools.texts import clean, plural, printable, shortened

from ..retrieve import SearchOptions
from .answers import FOLD, Found
from .api import Retriever
from .by_picture import read_picture
from .options import RetrieverOptions
from .query_texts import check_queries


@dataclass(frozen=True, kw_only=True)
class QueryOptions(SearchOptions):
    """What is searched for, and how the answers are shown."""

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts to search for; none: read from standard input, one per line."""
    picture: Path | None = None
    """A picture to search by, in the place of words: of the index, or any other."""
    sheet: Path | None = None
    """PNG to draw the answers to; by default, and with --json, none is drawn."""
    json: bool = False
    """Print one JSON object per query on standard output, and nothing else (docs/search.md)."""
    beams: int | None = None
    """Codes kept at each level, whose pictures are re-ranked; by default 50, and 10 without re-ranking, but at
    least --keep."""
    keep: int = 10
    """Pictures shown for each query."""
    min_similarity: float | None = None
    """Leave out pictures whose cosine with the query is below this, -1 to 1; by default none."""
    fold: bool = False
    """Show near-duplicates under the best of them, as one result."""
    fold_at: float = FOLD
    """Cosine of two pictures from which they are near-duplicates."""
    guided: bool = True
    """Let the guide steer the beams, where training gave the retriever one (models/guide.py)."""
    rerank: bool = True
    """Reorder the pictures found by their features and the retriever's scores, where the index keeps features."""
    rerank_weight: float | None = None
    """Share of the features in the final order, 0 (none of it, as --no-rerank) to 1; by default what was chosen on val
    (--weights), else 0.3."""

    def __post_init__(self) -> None:
        if (self.beams is not None and self.beams < 1) or self.keep < 1:
            raise BadInput("--beams and --keep must be at least 1")
        if self.rerank_weight is not None and not 0 <= self.rerank_weight <= 1:
            raise BadInput(f"--rerank-weight is a share, 0 to 1, not {self.rerank_weight}")
        if self.rerank_weight and not self.rerank:
            raise BadInput("--no-rerank and --rerank-weight contradict each other: give one")
        if self.picture is not None and (self.queries or self.beams or self.rerank_weight):
            raise BadInput("--picture is a search of its own: leave the words, --beams and --rerank-weight out")
        for name, cosine in (("--min-similarity", self.min_similarity), ("--fold-at", self.fold_at)):
            if cosine is not None and not -1 <= cosine <= 1:
                raise BadInput(f"{name} is a cosine, -1 to 1, not {cosine}")


@dataclass(frozen=True, kw_only=True)
class Config(QueryOptions, RetrieverOptions):
    """What is searched, and for what."""


class Answer(NamedTuple):
    """What one query found."""

    query: str | None
    picture: Path | None
    """What was searched by, where that was not words."""
    found: list[Found]
    unread: list[str]
    """What of the query is longer than a model reads."""
    pictures: int
    """That could be found."""
    seconds: float

    @property
    def asked(self) -> str:
        """The query in a line for people."""
        return f'"{shortened(self.query)}"' if self.query is not None else printable(str(self.picture))


def find(retriever: Retriever, query: str | None, config: QueryOptions) -> Answer:
    """Pictures of the index as it is now, best first.

    Args:
        query: None: search by the picture.
    """
    began = time.monotonic()
    retriever.refresh()
    options: dict[str, Any] = {
        "k": config.keep,
        "min_similarity": config.min_similarity,
        "fold": config.fold and config.fold_at,
    }
    unread: list[list[str]] = []
    if query is None:
        assert config.picture is not None, "there is a query otherwise"
        found = retriever.search_image(config.picture, **options)
    else:
        [found] = retriever.search(
            [query],
            beams=config.beams,
            guided=config.guided,
            rerank=config.rerank,
            share=config.rerank_weight,
            unread=unread,
            **options,
        )
    notes = unread[0] if unread else []
    return Answer(query, config.picture, found, notes, len(retriever), time.monotonic() - began)


def lines(answer: Answer, how: str, config: QueryOptions) -> Iterator[str]:
    """An answer for people."""
    similar = any(one.similarity is not None for one in answer.found)
    columns = "; the third column is the similarity" if similar else ""
    yield f"{answer.asked}, {answer.pictures:,} pictures, {answer.seconds:.2f} s{how}{columns}"
    for rank, one in enumerate(answer.found, start=1):
        count = f"  (+{plural(len(one.folded), 'near-duplicate')})" if one.folded else ""
        yield f"{rank:4d}  {line(one)}{count}"
        for other in one.folded:
            yield f"   +  {line(other)}"
    if not answer.found and config.min_similarity is not None:
        yield (
            f"no picture is close to {answer.asked}: none that was found has a similarity of at least "
            f"{config.min_similarity:g} (--min-similarity)"
        )


def line(one: Found) -> str:
    """Score, similarity where it is known, and file of a picture."""
    similarity = "" if one.similarity is None else f"  {one.similarity:6.3f}"
    return f"{one.score:8.3f}{similarity}  {printable(str(for_user(one.file)))}{'  (file is gone)' if one.gone else ''}"


def as_json(answer: Answer) -> str:
    """An answer for programs, on one line."""
    results = [{"rank": rank, **fields(one)} for rank, one in enumerate(answer.found, start=1)]
    for result, one in zip(results, answer.found, strict=True):
        result["folded"] = [fields(other) for other in one.folded]
    picture = None if answer.picture is None else str(answer.picture)
    about = {"query": answer.query, "picture": picture, "pictures": answer.pictures}
    return dumps({**about, "seconds": round(answer.seconds, 4), "unread": answer.unread, "results": results})


def fields(one: Found) -> dict[str, Any]:
    """A picture as JSON has it."""
    return {
        "image": one.image,
        "file": str(for_user(one.file)),
        "score": round(one.score, 4),
        "similarity": None if one.similarity is None else round(one.similarity, 4),
        "vokens": list(one.codes),
        "gone": one.gone,
    }


def how(retriever: Retriever, config: QueryOptions) -> str:
    """What is said of the order behind an answer's time."""
    if config.picture is not None:
        return f", by {'features' if retriever.gallery.keeps_features else 'vokens'}"
    share = retriever.share_of_features(rerank=config.rerank, share=config.rerank_weight)
    guide = f", guided (weight {retriever.guide.weight:g})" if retriever.guide and config.guided else ""
    return guide + (f", re-ranked by features (share {share:.2f})" if share else "")


def typed_queries() -> Iterable[str]:
    """Lines of standard input until it ends, with a prompt on a terminal; bytes that are no text do not stop it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("search for: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if query := clean(line):
            yield query


def main(config: Config) -> None:
    def load() -> Retriever:
        return Retriever.from_runs(
            index=config.index,
            retriever=config.retriever,
            weights=config.weights,
            device=config.device,
            precision=config.precision,
            scoring=config.scoring,
        )

    answer_all(config, load)


def answer_all(config: QueryOptions, load: Callable[[], Retriever]) -> None:
    """Load a retriever and answer every query on standard output, where JSON stands alone."""
    if not config.json:
        search(config, load, sys.stdout)
        return
    printed = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever is told on the way
        search(config, load, printed)


def search(config: QueryOptions, load: Callable[[], Retriever], printed: TextIO) -> None:
    """Answer every query on a stream."""
    check_queries(config.queries)
    if config.picture is not None:
        read_picture(config.picture)  # before anything is loaded
    retriever = load()
    sheet: list[SheetRow] = []
    given: Iterable[str | None] = [None] if config.picture is not None else config.queries or typed_queries()
    for query in given:
        try:
            answer = find(retriever, query, config)
        except BadInput as error:
            if config.queries or query is None:
                raise
            print(f"error: {printable(str(error))}", file=sys.stderr)  # the next query may do better
            if config.json:
                print(dumps({"query": query, "error": str(error)}), file=printed, flush=True)
            continue
        for note in answer.unread:
            print(f"note: {note}", file=sys.stderr)
        if config.json:
            print(as_json(answer), file=printed, flush=True)
            continue
        for each in lines(answer, how(retriever, config), config):
            print(each)
        row = SheetRow(query or f"like {config.picture}", [one.file for one in answer.found], None)
        sheet = [*sheet, row] if config.queries else [row]
    if sheet and config.sheet is not None:
        config.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(config.sheet, sheet, title=f"{len(retriever):,} pictures", columns=config.keep)
        print(f"drawn: {config.sheet}")


if __name__ == "__main__":
    run_command(main, Config)
