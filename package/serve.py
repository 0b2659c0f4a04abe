"""The search page of an exported retriever: a web server that answers queries, takes new pictures and lets go of old
ones.

In:  an exported retriever.
Out: http://127.0.0.1:7860 until it is stopped (Ctrl-C); pictures that are inserted lie in a folder beside the index.
Command: avg serve avg-emoji

There is no login: who reaches the server may search, insert and remove.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro

from retriever.serve import end, keep_caches_small

keep_caches_small()

from retriever.gallery.api import Retriever  # noqa: E402
from retriever.serve.serve import ServerOptions, serve  # noqa: E402
from tools.command_line.commands import run_command  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Config(ServerOptions):
    """What is served, and where."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """Exported retriever, or its name on the Hugging Face Hub (owner/name)."""


def load(config: Config) -> Retriever:
    return Retriever.from_pretrained(
        config.folder, device=config.device, precision=config.precision, scoring=config.scoring
    )


def main(config: Config) -> None:
    serve(config, partial(load, config))


def run() -> None:
    run_command(main, Config, program="avg serve")
    end()
