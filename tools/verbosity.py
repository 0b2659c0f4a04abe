"""How much a command says: `--quiet` and `--verbose` of every command, or VERBOSITY for all stages of a script.

normal   results on standard output, progress and notes as they come
quiet    no progress bars, and nothing about Python and device; results, warnings and errors stay
verbose  also what the commands and their libraries log, with the time, and the traceback of a refusal

Neither is part of a configuration, so a run is the same run with any of them.
"""

import logging
import os
import sys
from collections.abc import Sequence

from . import processes
from .errors import BadInput

VARIABLE = "VERBOSITY"
QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
OPTIONS = {f"--{QUIET}": QUIET, f"--{VERBOSE}": VERBOSE}
ROOMS = ("RQ-VAE", "models", "reranker", "retriever", "tools")
HELP = f"Every command also takes {' and '.join(OPTIONS)}."


def without(arguments: Sequence[str]) -> list[str]:
    """The words of a command line that are about the command itself.

    >>> without(["--quiet", "--lr", "0.1"])
    ['--lr', '0.1']
    """
    return [word for word in arguments if word not in OPTIONS]


def begin(arguments: Sequence[str]) -> list[str]:
    """Let this process, and those that it starts, say as much as a command line asks for, which wins over VERBOSITY.

    Returns:
        `without` the arguments.

    Raises:
        BadInput: VERBOSITY has another value.
    """
    for word in arguments:
        if word in OPTIONS:
            os.environ[VARIABLE] = OPTIONS[word]
    if (chosen := os.environ.get(VARIABLE) or NORMAL) not in (QUIET, NORMAL, VERBOSE):
        raise BadInput(f"{VARIABLE}={chosen}: write {QUIET}, {NORMAL} or {VERBOSE}, or leave it out")
    if chosen == VERBOSE:
        _log_everything()
    return without(arguments)


def is_quiet() -> bool:
    return os.environ.get(VARIABLE) == QUIET


def is_verbose() -> bool:
    return os.environ.get(VARIABLE) == VERBOSE


def _log_everything() -> None:
    """Show what the rooms log at any level, and libraries from INFO on, on standard error."""
    which = f" process {processes.number()}" if processes.count() > 1 else ""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s{which} %(levelname)s %(name)s: %(message)s"
    )
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.DEBUG)
