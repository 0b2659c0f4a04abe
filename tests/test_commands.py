"""How a command ends: bad input is one line, a closed pipe is nothing at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.command_line.commands import help_text

ROOT = Path(__file__).parent.parent
PROGRAM = """
'''A command.'''
from dataclasses import dataclass
from tools.command_line.commands import run_command
from tools.errors import BadInput

@dataclass(frozen=True)
class Config:
    lines: int = 1

def main(config: Config) -> None:
    {body}

run_command(main, Config)
"""


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("raise BadInput('x.csv, line 3: no caption')", 2, "error: x.csv, line 3: no caption\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; the same command resumes\n"),
        ("[print('y' * 1000, flush=True) for _ in range(1000)]", 141, ""),
    ],
)
def test_a_command_ends_without_a_traceback(body: str, status: int, errors: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == errors
    assert process.wait() == status


def test_help_names_the_command_and_keeps_its_paragraphs_apart() -> None:
    for name in ("tools.results", "retriever.serve"):
        done = subprocess.run(
            [sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(f"usage: python -m {name} [-h] [OPTIONS]\n")
    written = "One thing.\n\nIn:  a folder,\n     whole.\nOut: a file.\nCommand: python -m a\n         python -m b\n"
    shown = ["One thing.", "In:  a folder, whole.", "Out: a file.", "Command: python -m a", "python -m b"]
    assert help_text(written).split("\n\n") == shown
