"""Turning a configuration dataclass into a command line, and a `BadInput` into one clear line."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import tyro

from . import processes
from .errors import EXIT_BAD_INPUT, BadInput

ConfigT = TypeVar("ConfigT")

EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended
HEAD_START_SECONDS = 2.0  # of the main process when several report a mistake


def run_command(main: Callable[[ConfigT], None], config_type: type[ConfigT], *, shares_work: bool = False) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    Of several processes (`accelerate launch`, `torchrun`) the main one alone runs it, unless it `shares_work`; the
    others then print nothing but errors.

    Ends the process with status 2 and one line on standard error when the input is at fault, with 130 on Ctrl-C, and
    quietly with 141 when whoever reads its output has gone (`| head`).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    if not processes.is_main():
        if not shares_work:
            return
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not shares_work:
        processes.go_alone()
    try:
        main(tyro.cli(config_type, description=sys.modules[main.__module__].__doc__))
    except BadInput as error:
        if not processes.is_main():  # which says the same of most mistakes; the launcher then ends this one
            time.sleep(HEAD_START_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)


def quiet_libraries() -> None:
    """Keep library chatter that no user of these commands can act on off the screen."""
    warnings.filterwarnings("ignore", message=".*nested tensors.*")
    for name in ("open_clip", "transformers", "httpx", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
