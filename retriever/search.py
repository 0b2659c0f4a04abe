"""Search pictures with words: load the trained retriever once, answer each query, draw the answers.

In:  a `retriever.train` folder, a `retriever.build_index` folder, and queries on the command line, or one a line on
     standard input.
Out: ranked pictures on standard output, and a contact sheet of the last answer.
Command: python -m retriever.search --retriever DIR --index DIR "outlined drawing of a turtle"
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from models.arithmetic import Arithmetic
from models.compute import pick_device
from models.decoding import Scoring, make_writer
from models.voken_lm import VokenLM
from tools.commands import run_command
from tools.errors import BadInput

from .beam import beam_search, expand
from .contact_sheet import SheetRow, draw_sheet
from .data import read_retriever
from .gallery import read_gallery, refreshed
from .index import to_device


@dataclass(frozen=True)
class Config:
    """What is searched, and with what words."""

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts to search for; none: read from standard input, one a line."""
    index: Path
    """Run folder of retriever.build_index: the pictures that can be found."""
    retriever: Path
    """Run folder of retriever.train."""
    sheet: Path
    """PNG to draw the answers to."""
    beams: int = 10
    """Codes kept at each level."""
    keep: int = 10
    """Pictures shown for each query."""
    scoring: Scoring = "full"
    """Softmax over the whole vocabulary (published), or over the vokens of each level, which is faster."""
    precision: Arithmetic = "auto"
    """Arithmetic of the forward passes; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""

    def __post_init__(self) -> None:
        if self.beams < 1 or self.keep < 1:
            raise BadInput("--beams and --keep must be at least 1")


def typed_queries() -> Iterable[str]:
    """Lines of standard input until it ends, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("search for: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def main(config: Config) -> None:
    if any(not query.strip() for query in config.queries):
        raise BadInput("an empty query finds nothing: write some words")
    gallery = read_gallery(config.index)
    read_retriever(config.retriever, gallery)
    device = pick_device(config.device)
    lm = VokenLM.from_pretrained(config.retriever / "model").to(device)
    writer = make_writer(lm, config.precision)
    levels = to_device(gallery.index, device)
    sheet: list[SheetRow] = []
    for query in config.queries or typed_queries():
        began = time.monotonic()
        if (current := refreshed(gallery)) is not gallery:
            gallery, levels = current, to_device(current.index, device)
        with torch.inference_mode():
            memory = writer.encode(lm.tokenize([query]))
        try:
            beams = beam_search(writer, memory, levels, beams=config.beams, scoring=config.scoring)
        except FloatingPointError as error:
            raise BadInput(str(error)) from None
        found = expand(beams, gallery.index, keep=config.keep)[0]
        print(f'"{query}", {len(gallery):,} pictures, {time.monotonic() - began:.2f} s')
        files = [Path(gallery.picture(row).file) for row in found.rows[: config.keep]]
        for rank, (file, score) in enumerate(zip(files, found.scores, strict=False), start=1):
            print(f"{rank:4d}  {score:8.3f}  {file}")
        answer = SheetRow(query, files, None)
        sheet = [*sheet, answer] if config.queries else [answer]
    if sheet:
        config.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(config.sheet, sheet, title=f"{len(gallery):,} pictures", columns=config.keep)
        print(f"drawn: {config.sheet}")


if __name__ == "__main__":
    run_command(main, Config)
