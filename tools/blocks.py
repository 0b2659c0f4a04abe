"""Work cut into numbered blocks, each result a file: processes share the blocks, and a killed run keeps what it has.

    work = Blocks(run.resume_folder / "images", count=len(batches))
    for number in progress(work.left, "encoding"):
        write_array(work.path(number), encode(batches[number]))
    for number, path in enumerate(work.gather()):  # all of them, in order, in every process
        ...

What a block holds must not depend on the number of processes: then neither does the merged result.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from . import processes
from .errors import BadInput

SECONDS_TO_APPEAR = 120.0  # a folder that machines share shows a new file late


class Blocks:
    """The blocks of one piece of work.

    Attributes:
        count: blocks of all processes together.
        left: numbers of this process's blocks that have no file yet, in order.
    """

    def __init__(self, folder: Path, count: int, *, suffix: str = ".npy") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.count, self.suffix = folder, count, suffix
        missing = [number for number in range(count) if processes.is_main() and not self.path(number).exists()]
        missing = processes.share(missing)  # one looks for all: parts of different lists would leave blocks out
        self.left = missing[processes.number() :: processes.count()]

    def path(self, number: int) -> Path:
        """The file of a block, to be written in one step (`tools.files.replacing`)."""
        return self.folder / f"{number:06d}{self.suffix}"

    def gather(self) -> list[Path]:
        """Wait for the other processes; then all blocks' files, in order.

        Raises:
            BadInput: a file does not appear: this machine does not share the folder.
        """
        processes.wait()
        paths = [self.path(number) for number in range(self.count)]
        wait_for(paths)
        return paths


def wait_for(paths: Sequence[Path]) -> None:
    """Wait for files that another machine has written: a shared folder may show them late.

    Raises:
        BadInput: a file does not appear: this machine does not share the folder.
    """
    began = time.monotonic()
    while hidden := [path for path in paths if not path.exists()]:
        if time.monotonic() - began > SECONDS_TO_APPEAR:
            raise BadInput(f"{hidden[0]} is finished but not to be seen here: all machines must share the folder")
        time.sleep(1)
