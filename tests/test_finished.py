"""A finished command line is recognised, and only then."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_runs import Config
from tools import finished, runs


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a command that has run."""
    source = tmp_path / "source.txt"
    source.write_text("one")
    arguments = ["--source", str(source), "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    run = runs.begin("RQ-VAE.train", Config(tmp_path / "run", source), inputs={"source": source})
    assert run is not None
    (run.folder / "table.txt").write_bytes(b"the table \xe9\n")  # as an earlier version wrote it
    run.finish()
    return arguments


def test_same_arguments_and_inputs(done: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 0
    assert capsys.readouterr().out.endswith("is finished; nothing to do.\nthe table \\xe9\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: [*arguments, "--lr", "0.2"],
        lambda arguments: [*arguments, "--overwrite"],
        lambda arguments: [*arguments[:-1], "elsewhere"],
        lambda arguments: arguments[:2],
        lambda arguments: [*arguments[:2], "--output"],
    ],
)
def test_other_arguments(done: list[str], change: Callable[[list[str]], list[str]]) -> None:
    assert finished.main(["-m", "RQ-VAE.train", *change(done)]) == 1


def test_changed_input_other_command_and_torn_manifest(done: list[str]) -> None:
    assert finished.main(["-m", "retriever.train", *done]) == 1
    source, folder = Path(done[1]), Path(done[3])
    source.write_text("two")
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 1
    source.unlink()
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 1
    source.write_text("one")
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 0
    (folder / "manifest.json").write_text("{")
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 1


def test_changed_source(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "source_of", lambda command: "changed")
    assert finished.main(["-m", "RQ-VAE.train", *done]) == 1
