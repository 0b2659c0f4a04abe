"""The processes of one command: `accelerate launch` and `torchrun` start several, and each knows its number.

With one process everything here is free, and torch is not loaded. With several, process 0 is the main one: it alone
opens run folders, prints, and writes results; the others share its work.
"""

import fcntl
import hashlib
import os
import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadInput

ValueT = TypeVar("ValueT")

PATIENCE = timedelta(hours=12)  # for the slowest process; the launcher ends the others when one dies


def number() -> int:
    """This process's number among all of all machines, from 0."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """Processes of all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_this_machine() -> int:
    """This process's number on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that opens run folders, prints, and writes results."""
    return number() == 0


def go_alone() -> None:
    """Let this process forget the others, and all that `accelerate launch` was told of them."""
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith("ACCELERATE_"):
            del os.environ[name]


def share_whole_models() -> None:
    """Forget that `accelerate launch` was told to share a model in parts: each process keeps a whole copy."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU":
            del os.environ[name]


def connect() -> None:
    """Join the other processes; nothing with one process, or when it is done already."""
    if count() > 1:
        _group()


def share(value: ValueT) -> ValueT:
    """The main process's value, in every process. It is pickled: only for values of our own making."""
    if count() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    _talk(dist.broadcast_object_list, values, src=0, group=_group())
    return values[0]


def collect(value: ValueT) -> list[ValueT]:
    """Every process's value, in the order of their numbers, in every process."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    _talk(dist.all_gather_object, values, value, group=_group())
    return values


def wait() -> None:
    """Wait until every process is here."""
    collect(None)


def say_once(line: str) -> None:
    """Print a line on standard error, unless another process of this launch has printed it on this machine.

    Whoever comes first prints, and the others wait until it has: so the line stands there before any of them ends, and
    a launcher ends the rest.
    """
    try:
        file = _said(line).open("a") if count() > 1 else None
    except OSError:  # a full disk, perhaps: better twice than never
        file = None
    if file is None:
        print(line, file=sys.stderr, flush=True)
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_size == 0:
            print(line, file=sys.stderr, flush=True)
            file.write("said\n")
            file.flush()


def _said(line: str) -> Path:
    """The file that tells whether a process of this launch has said a line; a launcher is its processes' parent."""
    parent = os.getppid()
    try:
        state = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        began = state.rpartition(")")[2].split()[19]
    except OSError:
        began = ""
    launch = (parent, began, *(os.environ.get(name) for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")), line)
    return (
        Path(tempfile.gettempdir()) / f"avg-said-{hashlib.blake2b(repr(launch).encode(), digest_size=12).hexdigest()}"
    )


@cache
def _group() -> Any:
    """A group for messages between the processors; the gradients' own group may run on the GPUs."""
    import torch
    import torch.distributed as dist

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers reads no weights, but in one process
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _talk(call: Any, *args: Any, **options: Any) -> None:
    try:
        call(*args, **options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"process {number()} of {count()} lost another one ({reason}): the cause stands in that one's output; "
            "start the same command again, it resumes"
        ) from None
