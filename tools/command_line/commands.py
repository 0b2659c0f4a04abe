"""Turning a configuration dataclass into a command line, and what its user can mend into one clear line."""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NoReturn, TypeVar

from .. import environment, processes, verbosity
from ..errors import EXIT_BAD_INPUT, BadInput
from ..logs import end_progress
from .arguments import check_arguments, check_numbers, with_options
from .failures import explain
from .place import typed_here, with_commands
from .sweeps import of_trial

ConfigT = TypeVar("ConfigT")

EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended
GRACE_SECONDS = 2.0  # in which a launcher ends a process that has only lost another one
TAKES_MEMORY = ("batch_size", "pairs", "search_batch", "memory", "beams", "workers")  # options that say how much


def run_command(
    main: Callable[[ConfigT], None],
    config_type: type[ConfigT],
    *,
    shares_work: bool = False,
    program: str | None = None,
) -> None:
    """Parse the command line into `config_type` and call `main` with it. The help begins with main's module docstring.

    Args:
        program: how the command is typed; by default `python -m` and its module.

    Of several processes (`accelerate launch`, `torchrun`) the main one alone runs it, unless it `shares_work`; the
    others then print nothing but errors.

    Ends the process with status 2 and one line on standard error when the input is at fault, or the machine (a full
    disk, a permission, too little memory), with 130 on Ctrl-C, and quietly with 141 when whoever reads its output has
    gone (`| head`).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not processes.is_main():
        if not shares_work:
            return
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not shares_work:
        processes.go_alone()
    import tyro  # here and not above: the commands' functions are of use without it

    config: ConfigT | None = None
    try:
        sys.argv[1:] = verbosity.begin(sys.argv[1:])
        quiet_libraries()
        if not verbosity.is_quiet():
            environment.tell_choices()
        check_arguments(config_type, sys.argv[1:])
        sys.argv[1:] = typed_here(config_type, sys.argv[1:])
        put_own_options_first(config_type)
        description = help_text(f"{sys.modules[main.__module__].__doc__ or ''}\n\n{verbosity.HELP}")
        config = tyro.cli(config_type, prog=program or command_line(), description=description)
        check_numbers(config)
        main(of_trial(config))
    except BadInput as error:
        told = str(error).rpartition("BadInput: ")[2]
        _refuse(with_options(told, config_type))  # of a DataLoader's worker it comes with its traceback
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        options = [f"--{name.replace('_', '-')}" for name in TAKES_MEMORY if hasattr(config, name)]
        place = getattr(config, "output", None) or getattr(config, "index", None) or "the current folder"
        line = explain(error, place=str(place), options=" or ".join(options) or "the size of the input")
        if line is None:
            raise
        _refuse(line)


def put_own_options_first(config_type: type[ConfigT]) -> None:
    """Order a configuration's fields as its help shows them: those of the command before those that others have too."""
    classes = [each for each in config_type.__mro__ if is_dataclass(each)]
    own = {name: number for number, each in enumerate(classes) for name in reversed(each.__annotations__)}
    known: dict[str, Any] = config_type.__dataclass_fields__  # type: ignore[attr-defined]
    for name in sorted(known, key=lambda name: own[name]):
        known[name] = known.pop(name)


def command_line() -> str:
    """How the running command is started, as it is typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def help_text(documentation: str) -> str:
    """A module's docstring as its command's help shows it: paragraphs, "In:", "Out:" and each command line apart."""
    paragraphs: list[str] = []
    apart = True
    for line in map(str.strip, documentation.splitlines()):
        if apart or re.match(r"(In|Out|Command): |python -m ", line):
            paragraphs.append(line)
        else:
            paragraphs[-1] += f" {line}"
        apart = not line
    return "\n\n".join(filter(None, map(str.strip, paragraphs)))


def _refuse(line: str) -> NoReturn:
    if verbosity.is_verbose():
        traceback.print_exc()
    if not processes.is_main():  # the launcher ends this one when the main one's mistake is the cause
        time.sleep(GRACE_SECONDS)
    end_progress()
    processes.say_once(f"error: {with_commands(line.strip())}")
    sys.exit(EXIT_BAD_INPUT)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Keep library chatter that no user of these commands can act on off the screen, unless it is asked for."""
    warnings.filterwarnings("ignore", message=".*nested tensors.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view.*")  # nothing writes into it
    warnings.filterwarnings("ignore", message="Detected pickle protocol.*")  # of a file that is then refused
    warnings.filterwarnings("ignore", message=".*decompression bomb DOS attack.*")  # half of what would be refused
    warnings.filterwarnings("ignore", message="CUDA initialization.*")  # which models.compute says in one line
    if verbosity.is_verbose():
        return
    for name in ("open_clip", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_error)  # of what a library logs by no name; its level would be that of our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
