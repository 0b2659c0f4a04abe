"""Run a command as a user would, and see how long it takes and how much memory it and its children hold at once."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PAUSE = 0.2  # seconds between two looks
KIB, GIB = 1024, 1 << 30


class Usage(NamedTuple):
    """How a command ended."""

    status: int
    """As the shell has it; below 0: the number of the signal that ended it."""
    seconds: float
    peak: float
    """GiB of memory that is in no file, of all its processes at the same time; what they share counts once."""
    timed_out: bool


def run_and_watch(
    command: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path, most_seconds: float
) -> Usage:
    """Run a command to its end, its output going into a file; end it and its children when it takes too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, peak, timed_out = time.monotonic(), 0, False
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        while process.poll() is None:
            peak = max(peak, sum(map(memory, descendants(process.pid))))
            if time.monotonic() - began > most_seconds and not timed_out:
                timed_out = True
                end(process.pid)
            time.sleep(PAUSE)
    return Usage(process.returncode, time.monotonic() - began, peak / GIB, timed_out)


def descendants(pid: int) -> list[int]:
    """A process and all that it and its children have started and that still run."""
    parents: dict[int, list[int]] = {}
    for child, parent in _parents():
        parents.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def memory(pid: int) -> int:
    """Bytes of a process that no file backs; its share of those that it has in common with others."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return KIB * (sizes.get("Pss_Anon:", 0) + sizes.get("Pss_Shmem:", 0))


def end(pid: int) -> None:
    """End a process, then its children: a parent that outlives a child goes on to its next command."""
    for one in descendants(pid):
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of this machine with its parent."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            behind_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        yield int(path.parent.name), int(behind_name[1])
