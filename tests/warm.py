"""Copies of a process that has loaded the libraries and run nothing: they start at once, where a new one takes seconds.

The first use starts that process, which lives as long as the tests do.
"""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOADED = ["peft", "reranker.train", "tests.test_sharding"]  # what is not installed is passed over


def warm_context() -> Any:
    """`multiprocessing`, whose processes are such copies. They have the environment that the first of them found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    return context


def run_python(*words: str, variables: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """What `python -m module ...` or `python -c program ...` does at the root, without standard input.

    Args:
        variables: the environment; by default that of this process.
    """
    environment = dict(os.environ if variables is None else variables)
    with tempfile.TemporaryDirectory() as folder:
        out, errors = (Path(folder) / name for name in ("out", "errors"))
        process = warm_context().Process(target=_be_python, args=(words, environment, out, errors))
        process.start()
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), errors.read_text())


def _be_python(words: tuple[str, ...], environment: dict[str, str], out: Path, errors: Path) -> None:
    _run(words, environment, ROOT, [os.open(path, os.O_RDWR | os.O_CREAT) for path in (os.devnull, out, errors)])


def _run(words: Sequence[str], environment: Mapping[str, str], folder: Path, files: Sequence[int]) -> None:
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that the module was loaded before
    kind, program, *arguments = words
    sys.argv = [program if kind == "-m" else kind, *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, main.__dict__)


PROGRAM = """#!{python} -ISs
import json, os, socket, sys
if sys.argv[1:2] not in (["-m"], ["-c"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    wanted = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]) + "\\n"
    socket.send_fds(server, [wanted.encode()], [0, 1, 2])
    status = int(server.makefile().read())
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextmanager
def python_of_scripts(folder: Path) -> Iterator[Path]:
    """A folder for the front of PATH: the `python` in it does what Python does, in a copy that has the libraries.

    A signal ends that program alone, not the copy.
    """
    address = folder / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        program = folder / "python"
        program.write_text(PROGRAM.format(python=sys.executable, address=str(address)), encoding="utf-8")
        program.chmod(0o755)
        yield folder
        server.shutdown(socket.SHUT_RDWR)


def _answer(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # it was closed
            return
        threading.Thread(target=_answer_one, args=(client,), daemon=True).start()


def _answer_one(client: socket.socket) -> None:
    with client:
        data, files, _, _ = socket.recv_fds(client, 1 << 16, 3)
        while not data.endswith(b"\n"):
            data += client.recv(1 << 16)
        words, environment, folder = json.loads(data)
        process = warm_context().Process(target=_run_for, args=(words, environment, folder, [*map(DupFd, files)]))
        process.start()
        for file in files:
            os.close(file)
        process.join()
        client.sendall(str(process.exitcode).encode())


def _run_for(words: list[str], environment: dict[str, str], folder: Path, files: list[Any]) -> None:
    _run(words, environment, folder, [file.detach() for file in files])
