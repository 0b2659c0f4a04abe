"""Run folders: finished, resumed, refused, and never half-written."""

import gc
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tools import runs
from tools.errors import BadInput
from tools.files import read_array, read_json, read_json_lines, replacing


@dataclass(frozen=True)
class Config:
    output: Path
    source: Path
    lr: float = 0.1
    workers: int = 1
    overwrite: bool = False


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "source.txt").write_text("one")
    return Config(tmp_path / "run", tmp_path / "source.txt")


def begin(config: Config) -> runs.Run | None:
    return runs.begin("tools.example", config, inputs={"source": config.source})


def finish(config: Config) -> runs.Manifest:
    run = begin(config)
    assert run is not None
    (run.folder / "result.txt").write_text("result")
    (run.resume_folder / "state").write_text("state")
    return run.finish(facts={"levels": 4}, metrics={"loss": 0.5})


def test_a_finished_folder_holds_exactly_its_outputs_and_the_manifest(config: Config) -> None:
    manifest = finish(config)
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "manifest.json", "result.txt"]
    assert list(manifest.outputs) == ["result.txt"]
    assert manifest.facts == {"levels": 4}
    assert runs.read_manifest(config.output, "tools.example") == manifest


def test_the_same_command_again_does_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    finish(config)
    assert begin(replace(config, workers=8)) is None  # how many workers read changes nothing
    assert "finished" in capsys.readouterr().out


def test_another_configuration_is_refused_until_overwrite(config: Config) -> None:
    finish(config)
    with pytest.raises(BadInput, match=r"--lr was 0.1, now 0.2.*--overwrite"):
        begin(replace(config, lr=0.2))
    run = begin(replace(config, lr=0.2, overwrite=True))
    assert run is not None
    assert not (config.output / "result.txt").exists()


def test_a_changed_input_is_noticed(config: Config) -> None:
    finish(config)
    config.source.write_text("two")
    with pytest.raises(BadInput, match=r"source .* has changed"):
        begin(config)


def test_a_moved_input_with_equal_content_is_the_same(config: Config) -> None:
    finish(config)
    moved = config.source.rename(config.source.with_name("moved.txt"))
    assert begin(replace(config, source=moved)) is None


def test_a_run_that_stopped_is_resumed_with_its_files(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os; from pathlib import Path; from tests.test_runs import Config, begin\n"
        f"run = begin(Config(Path({str(config.output)!r}), Path({str(config.source)!r})))\n"
        "(run.resume_folder / 'state').write_text('half'); (run.folder / '.x.1.part').write_text('torn'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with pytest.raises(BadInput, match="was not finished"):
        runs.read_manifest(config.output, "tools.example")
    run = begin(config)
    assert run is not None
    assert "resuming" in capsys.readouterr().out
    assert (run.resume_folder / "state").read_text() == "half"
    assert not list(run.folder.glob(".*.part"))


def test_a_state_to_resume_from_is_kept_when_there_are_no_outputs_yet(config: Config) -> None:
    run = begin(config)
    assert run is not None
    (run.resume_folder / "state").write_text("hours of work")
    assert run.lock is not None
    run.lock.close()
    with pytest.raises(BadInput, match=r"--lr was 0.1, now 0.5"):
        begin(replace(config, lr=0.5))
    again = begin(config)
    assert again is not None
    assert (again.resume_folder / "state").read_text() == "hours of work"


def test_a_run_killed_before_its_first_state_starts_again(config: Config) -> None:
    run = begin(config)
    assert run is not None
    run.resume_folder.mkdir(exist_ok=True)
    (run.folder / "images" / "style").mkdir(parents=True)
    assert run.lock is not None
    run.lock.close()
    assert begin(replace(config, lr=0.5)) is not None  # nothing to lose


def test_a_manifest_that_was_just_written_is_enough(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(config)
    assert run is not None
    (run.resume_folder / "state").write_text("state")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_drop_leftovers", lambda folder: 1 / 0)  # killed right behind the manifest
        with pytest.raises(ZeroDivisionError):
            run.finish()
    assert run.lock is not None
    run.lock.close()
    assert begin(config) is None
    assert [path.name for path in config.output.iterdir() if path.name != ".lock"] == ["manifest.json"]


def test_an_overwrite_that_was_cut_short_can_be_repeated(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(config)
    (config.output / "folder").mkdir()
    (config.output / "folder" / "file").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(replace(config, overwrite=True))
    gc.collect()
    with pytest.raises(BadInput, match="was not finished"):
        runs.read_manifest(config.output, "tools.example")
    assert begin(replace(config, lr=0.2, overwrite=True)) is not None


def test_two_processes_do_not_share_a_folder(config: Config) -> None:
    run = begin(config)
    assert run is not None
    with pytest.raises(BadInput, match="in use by another process"):
        begin(config)


def test_a_strangers_folder_is_left_alone(config: Config) -> None:
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="no run of this project"):
            begin(replace(config, overwrite=overwrite))
    assert (config.output / "thesis.tex").exists()


def test_a_missing_stage_names_its_script(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"scripts/05_train_rqvae\.sh"):
        runs.read_manifest(tmp_path, "RQ-VAE.train")


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"), (b"[1]\n", "line 1: expected a JSON object")],
)
def test_bad_json_lines_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_json_lines(tmp_path / "rows.jsonl"))


def test_bad_json_and_arrays_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1,\n')
    with pytest.raises(BadInput, match=r"x\.json, line 2"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.npy").write_text("no array")
    with pytest.raises(BadInput, match=r"x\.npy is not a readable"):
        read_array(tmp_path / "x.npy")
