"""Search pictures with words, or with a picture: load an exported retriever once and answer each query.

In:  an exported retriever, and queries on the command line, or one per line on standard input, or a picture
     (--picture).
Out: ranked pictures on standard output; with --json a line of JSON per query; with --sheet a contact sheet.
Command: avg search avg-emoji "outlined drawing of a turtle"
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from retriever.gallery.api import Retriever
from retriever.gallery.search import QueryOptions, answer_all
from tools.command_line.commands import run_command


@dataclass(frozen=True, kw_only=True)
class Config(QueryOptions):
    """What is searched, and for what."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """Exported retriever, or its name on the Hugging Face Hub (owner/name)."""


def main(config: Config) -> None:
    def load() -> Retriever:
        return Retriever.from_pretrained(
            config.folder, device=config.device, precision=config.precision, scoring=config.scoring
        )

    answer_all(config, load)


def run() -> None:
    run_command(main, Config, program="avg search")
