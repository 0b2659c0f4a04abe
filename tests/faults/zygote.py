"""One process that has loaded the libraries, and forks a child for each command: a second instead of ten.

A request is a line of JSON on standard input (`Request`); on standard output come {"pid"} at once and {"pid", "status"}
when the child has ended. A child leads a process group of its own.
Command: python -m tests.faults.zygote
"""

import atexit
import fcntl
import json
import os
import resource
import runpy
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent.parent
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10  # Linux's FS_IOC_GETFLAGS, _SETFLAGS, FS_IMMUTABLE_FL
CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SPEED = 1 / 20  # of the clock by which trainings decide to save: small ones would never come to it

Action = Literal["count", "kill", "freeze"]


@dataclass(frozen=True)
class Request:
    """One command, and what is to happen to it."""

    module: str
    arguments: list[str]
    folder: str
    """Where it runs; its output goes into `<log>.out` and `<log>.err`, what `action` did into `<log>.note`."""
    log: str
    action: Action = "count"
    """Of the changes below the folder (files opened to write, moved, removed, folders made): count them, or kill the
    process group or make the changed folder immutable right before one."""
    at: int = -1
    """Which one, from 0."""
    file_size: int | None = None
    """RLIMIT_FSIZE in bytes."""


class Watch:
    """An audit hook that sees this process's changes to files below a folder."""

    def __init__(self, request: Request) -> None:
        self.request, self.seen, self.process, self.busy = request, 0, os.getpid(), False
        self.folder = os.path.realpath(request.folder) + os.sep

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or (event != "open" and event not in CHANGES):
            return
        if event == "open" and not (arguments[2] or 0) & WRITING:
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if os.getpid() != self.process or not isinstance(path, (str, os.PathLike)):
            return
        self.busy = True
        try:
            self._change(os.path.abspath(path))  # noqa: PTH100
        finally:
            self.busy = False

    def _change(self, path: str) -> None:
        if not path.startswith(self.folder):
            return
        if self.seen == self.request.at and self.request.action == "kill":
            os.killpg(0, signal.SIGKILL)
        if self.seen == self.request.at and self.request.action == "freeze":
            folder = os.path.dirname(path)  # noqa: PTH120
            Path(f"{self.request.log}.note").write_text(folder)
            set_immutable(Path(folder), True)
        self.seen += 1


def set_immutable(path: Path, on: bool) -> None:
    """Let nobody, root included, change a file, or what a folder holds; or let them again.

    Raises:
        OSError: this file system or user cannot.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        flags = struct.unpack("l", fcntl.ioctl(handle, GET_FLAGS, struct.pack("l", 0)))[0]
        flags = flags | IMMUTABLE if on else flags & ~IMMUTABLE
        fcntl.ioctl(handle, SET_FLAGS, struct.pack("l", flags))
    finally:
        os.close(handle)


def run_child(request: Request) -> int:
    """Be `python -m <module> <arguments>`. Returns the exit status."""
    for number, (name, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), (f"{request.log}.out", os.O_WRONLY), (f"{request.log}.err", os.O_WRONLY))
    ):
        os.dup2(os.open(name, mode), number)
    os.chdir(request.folder)
    sys.argv = [request.module, *request.arguments]
    watch = Watch(request)
    sys.addaudithook(watch)
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    if request.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.file_size, free[1]))
    status = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    if request.action == "count":
        watch.busy = True
        Path(f"{request.log}.note").write_text(str(watch.seen))
    return status


def serve(modules: list[str]) -> None:
    """Load the modules, then fork a child for each request until standard input ends."""
    import torch

    import models.training

    torch.set_num_threads(1)
    models.training.SAVE_EVERY_SECONDS *= SPEED
    for module in modules:
        import_module(module)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting = b""
    say({"ready": True})
    while True:
        ready, _, _ = select.select([0, reading], [], [])
        if reading in ready:
            os.read(reading, 4096)
            for pid, status in ended():
                say({"pid": pid, "status": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                fork(Request(**json.loads(line)))


def fork(request: Request) -> None:
    """Start a child and say its number."""
    pid = os.fork()
    os.setpgid(pid, pid or os.getpid())  # on both sides: it may be killed before it has begun
    if pid:
        say({"pid": pid})
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        status = run_child(request)
    finally:
        os._exit(status)


def ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, with their wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def say(value: dict[str, Any]) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


class Zygote:
    """The other side: start commands, and wait for them."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.statuses, self.started, self.waiting = process, dict[int, int](), list[int](), b""

    def start(self, request: Request) -> int:
        """Start a command. Returns the number of its process, which is its group's too."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        self.process.stdin.flush()
        while not self.started:
            self._read(None)
        return self.started.pop()

    def wait(self, pid: int, seconds: float | None = None) -> int | None:
        """The exit status of a command (a signal as its negative); None while it runs after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while pid not in self.statuses:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._read(left) and left == 0:
                return None
        return self.statuses.pop(pid)

    def _read(self, seconds: float | None) -> bool:
        assert self.process.stdout is not None
        handle = self.process.stdout.fileno()
        if not select.select([handle], [], [], seconds)[0]:
            return False
        data = os.read(handle, 1 << 16)
        assert data, "the zygote has ended"
        *lines, self.waiting = (self.waiting + data).split(b"\n")
        for line in lines:
            value = json.loads(line)
            if "status" in value:
                self.statuses[value["pid"]] = value["status"]
            elif "pid" in value:
                self.started.append(value["pid"])
        return True


def environment() -> dict[str, str]:
    """Of every command here: one thread, nothing from a network."""
    alone = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **alone, "PYTHONPATH": str(ROOT)}


@contextmanager
def zygote(modules: list[str]) -> Iterator[Zygote]:
    """Start a zygote that has loaded the modules; it ends with the context."""
    command = [sys.executable, "-m", "tests.faults.zygote", *modules]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Zygote(process)
        finally:
            process.kill()  # closing its standard input would not do while another process holds the other end too


if __name__ == "__main__":
    serve(sys.argv[1:])
