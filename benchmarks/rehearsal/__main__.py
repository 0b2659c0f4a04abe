"""Rehearse a published recipe without its data, its models and a GPU: stand-ins in their outer form, the real scripts.

In:  nothing; stand-ins are made below --folder, once.
Out: `<folder>/results/<dataset>.json`, what became of each step; `<folder>/logs/`, what the scripts said.
Command: python -m benchmarks.rehearsal flickr30k; docs/rehearsal.md
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import read_json
from tools.logs import table

from .data import in_own_process
from .rehearse import SCALES, Rehearsal, Row, Scale, facts, markdown


@dataclass(frozen=True)
class Config:
    """What is rehearsed."""

    dataset: Annotated[str, tyro.conf.Positional]
    """flickr30k or mscoco."""
    recipes: tuple[str, ...] = ("better", "faithful")
    """Values of RECIPE, the first of which shares features and image tokens with the others."""
    folder: Path = field(default_factory=lambda: Path(os.environ.get("REHEARSAL", "rehearsal")))
    """Where stand-ins and results go; by default what REHEARSAL names, else rehearsal/."""
    two_processes: bool = True
    """Run trainings and searches of the first recipe on two processes too; never those of mscoco, as two T5-large take
    more than 20 GB."""
    only: str = ""
    """Run only the steps with this in their names; the folders of an earlier rehearsal must be there."""
    resume: bool = False
    """Do not run again what ran before."""
    markdown: bool = False
    """Print the results of an earlier rehearsal as Markdown, and run nothing."""


def main(config: Config) -> None:
    rehearsal = Rehearsal(config.folder, config.dataset, SCALES.get(config.dataset, Scale()))
    if config.markdown:
        if not rehearsal.results.is_file():
            raise BadInput(f"{rehearsal.results} is not there: run scripts/rehearse.sh {config.dataset} first")
        print(markdown([Row(**row) for row in read_json(rehearsal.results)["rows"]]))
        return
    in_own_process(rehearsal.make_stand_ins)
    two = config.two_processes and config.dataset == "flickr30k"
    rehearsal.run(config.recipes, two=two, only=config.only, resume=config.resume)
    print("\n" + table(facts(rehearsal.rows)) + f"\n\nresults: {rehearsal.results}")
    if any(row.state in ("failed", "left out") for row in rehearsal.rows):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, Config)
