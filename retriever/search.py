"""Search pictures with words: load the trained retriever once, answer each query, draw the answers.

In:  a `retriever.train` folder, its dataset, and queries on the command line, or one a line on standard input.
Out: ranked pictures on standard output, and a contact sheet of the last answer.
Command: python -m retriever.search --retriever DIR --dataset DIR "outlined drawing of a turtle"
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
from .data import read_data, read_retriever
from .index import build_index, to_device
from .retrieve import Pool


@dataclass(frozen=True)
class Config:
    """What is searched, and with what words."""

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts to search for; none: read from standard input, one a line."""
    dataset: Path
    """Run folder of retriever.prepare."""
    retriever: Path
    """Run folder of retriever.train."""
    sheet: Path
    """PNG to draw the answers to."""
    pool: Pool = "all"
    """Pictures that may be found: one split's, or all."""
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
    data = read_data(config.dataset)
    read_retriever(config.retriever, data)
    device = pick_device(config.device)
    lm = VokenLM.from_pretrained(config.retriever / "model").to(device)
    writer = make_writer(lm, config.precision)
    rows = data.rows(config.pool)
    if not len(rows):
        raise BadInput(f"{config.dataset} has no pictures in pool {config.pool}: choose another --pool")
    index = build_index(data.codes[rows])
    levels = to_device(index, device)
    files = [data.image_folder / file for file in data.files]
    sheet: list[SheetRow] = []
    for query in config.queries or typed_queries():
        began = time.monotonic()
        with torch.inference_mode():
            memory = writer.encode(lm.tokenize([query]))
        beams = beam_search(writer, memory, levels, beams=config.beams, scoring=config.scoring)
        found = expand(beams, index, keep=config.keep)[0]
        print(f'"{query}", {len(rows):,} pictures, {time.monotonic() - began:.2f} s')
        shown = list(zip(found.rows, found.scores, strict=True))[: config.keep]
        for rank, (row, score) in enumerate(shown, start=1):
            print(f"{rank:4d}  {score:8.3f}  {files[rows[row]]}")
        answer = SheetRow(query, [files[rows[row]] for row, _ in shown], None)
        sheet = [*sheet, answer] if config.queries else [answer]
    if sheet:
        config.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(config.sheet, sheet, title=f"pool {config.pool}, {len(rows):,} pictures", columns=config.keep)
        print(f"drawn: {config.sheet}")


if __name__ == "__main__":
    run_command(main, Config)
