"""How much a command says: quiet, as ever, or all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import run_python
from tools import verbosity
from tools.errors import BadInput

ROOT = Path(__file__).parent.parent
PROGRAM = """
from dataclasses import dataclass
from pathlib import Path
from models.compute import pick_device
from tools import runs
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.logs import progress

@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    lr: float = 0.1

def main(config: Config) -> None:
    run = runs.begin("tools.some", config, inputs={})
    if run is None:
        return
    pick_device("cpu")
    for step in progress(range(3), "counting"):
        pass
    if config.lr > 1:
        raise BadInput(f"--lr {config.lr} is too high")
    print("the result")
    run.finish()

run_command(main, Config)
"""


def run(tmp_path: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    known = {name: value for name, value in os.environ.items() if name != verbosity.VARIABLE}
    return run_python("-c", PROGRAM, "--output", str(tmp_path / "run"), *words, variables={**known, **variables})


def test_as_ever_progress_and_device_are_said(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "the result\n")
    assert "counting: 100%" in done.stderr
    assert "device: cpu" in done.stderr
    assert "tools.runs" not in done.stderr


@pytest.mark.parametrize(("words", "variables"), [(["--quiet"], {}), ([], {"VERBOSITY": "quiet"})])
def test_quiet_leaves_the_result(words: list[str], variables: dict[str, str], tmp_path: Path) -> None:
    done = run(tmp_path, *words, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the result\n", "")


def test_verbose_shows_what_is_logged(tmp_path: Path) -> None:
    done = run(tmp_path, "--verbose", VERBOSITY="quiet")  # the command line wins
    assert done.stdout == "the result\n"
    assert "counting: 100%" in done.stderr
    assert f"DEBUG tools.runs: tools.some writes {tmp_path}/run" in done.stderr
    assert "INFO tools.runs: " in done.stderr


def test_a_refusal_stays_one_line_and_has_its_traceback_with_verbose(tmp_path: Path) -> None:
    quiet = run(tmp_path, "--quiet", "--lr", "2")
    assert (quiet.returncode, quiet.stderr) == (2, "error: --lr 2.0 is too high\n")
    verbose = run(tmp_path, "--verbose", "--lr", "2")
    assert verbose.returncode == 2
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.endswith("\nerror: --lr 2.0 is too high\n")


def test_a_run_is_the_same_run_with_it(tmp_path: Path) -> None:
    assert run(tmp_path, "--quiet", "--lr", "0.2").returncode == 0
    assert "nothing to do" in run(tmp_path, "--lr", "0.2", "--verbose").stdout


def test_another_word_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verbosity.VARIABLE, "loud")
    with pytest.raises(BadInput, match="VERBOSITY=loud: write quiet, normal or verbose"):
        verbosity.begin([])


def test_help_names_both() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.results", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Every command also takes --quiet and --verbose." in " ".join(done.stdout.split())
