"""Copies of a process that has loaded the libraries and run nothing: they start at once, where a new one takes seconds.

The first use starts that process, which lives as long as the tests do.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
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
    for descriptor, path in enumerate((Path(os.devnull), out, errors)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    kind, program, *arguments = words
    sys.argv = [program if kind == "-m" else kind, *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, main.__dict__)
