"""Search pictures with words: load the trained retriever once, answer each query, draw the answers.

In:  a `retriever.train` folder, a `retriever.gallery.build` folder, and queries on the command line, or one per line on
     standard input.
Out: ranked pictures on standard output, and a contact sheet of the last answer.
Command: python -m retriever.gallery.search --retriever DIR --index DIR "outlined drawing of a turtle"

Where the index keeps the pictures' features, a wider search finds the pictures and an interpolation orders them: of the
retriever's scores and the cosines between the pictures' features and the query's (tools/interpolation.py).
"""

import io
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from tools.command_line.commands import run_command
from tools.contact_sheet import SheetRow, draw_sheet
from tools.errors import BadInput
from tools.texts import clean, printable, shortened

from ..retrieve import SearchOptions
from .api import Found, Retriever, check_queries
from .options import RetrieverOptions


@dataclass(frozen=True, kw_only=True)
class Config(SearchOptions, RetrieverOptions):
    """What is searched, and with what words."""

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts to search for; none: read from standard input, one per line."""
    sheet: Path
    """PNG to draw the answers to."""
    beams: int | None = None
    """Codes kept at each level, whose pictures are re-ranked; by default 50, and 10 without re-ranking, but at
    least --keep."""
    keep: int = 10
    """Pictures shown for each query."""
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


def find(retriever: Retriever, query: str, config: Config) -> list[Found]:
    """Pictures of the index as it is now, best first."""
    retriever.refresh()
    [found] = retriever.search(
        [query],
        k=config.keep,
        beams=config.beams,
        guided=config.guided,
        rerank=config.rerank,
        share=config.rerank_weight,
    )
    return found


def how(retriever: Retriever, config: Config) -> str:
    """What is said of the order behind an answer's time."""
    share = retriever.share_of_features(rerank=config.rerank, share=config.rerank_weight)
    guide = f", guided (weight {retriever.guide.weight:g})" if retriever.guide and config.guided else ""
    return guide + (f", re-ranked by features (share {share:.2f})" if share else "")


def typed_queries() -> Iterable[str]:
    """Lines of standard input until it ends, with a prompt on a terminal; bytes that are no text do not stop it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("search for: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if query := clean(line):
            yield query


def main(config: Config) -> None:
    check_queries(config.queries)
    retriever = Retriever.from_runs(
        index=config.index,
        retriever=config.retriever,
        weights=config.weights,
        device=config.device,
        precision=config.precision,
        scoring=config.scoring,
    )
    sheet: list[SheetRow] = []
    for query in config.queries or typed_queries():
        began = time.monotonic()
        try:
            found = find(retriever, query, config)
        except BadInput as error:
            if config.queries:
                raise
            print(f"error: {printable(str(error))}", file=sys.stderr)  # the next query may do better
            continue
        seconds = time.monotonic() - began
        print(f'"{shortened(query)}", {len(retriever):,} pictures, {seconds:.2f} s{how(retriever, config)}')
        for rank, one in enumerate(found, start=1):
            print(f"{rank:4d}  {one.score:8.3f}  {printable(str(one.file))}")
        answer = SheetRow(query, [one.file for one in found], None)
        sheet = [*sheet, answer] if config.queries else [answer]
    if sheet:
        config.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(config.sheet, sheet, title=f"{len(retriever):,} pictures", columns=config.keep)
        print(f"drawn: {config.sheet}")


if __name__ == "__main__":
    run_command(main, Config)
