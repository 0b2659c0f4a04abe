"""Run folders in detail: what their records hold, what counts as changed, and the exact words of refusals."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.chain import files_of
from tests.folders import Config as Plain
from tests.folders import finished
from tests.test_runs import Config, begin, finish
from tools import environment, processes, runs
from tools.clear import clear_all
from tools.command_line.command_names import EARLIER, scripts_of_commands
from tools.errors import BadInput
from tools.files import hash_file, read_json, verified_hash


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "source.txt").write_text("one")
    return Config(tmp_path / "run", tmp_path / "source.txt")


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """`refusal` collects: what is there before need not be gone through each time."""
    gc.freeze()


def begun(config: Config) -> runs.Run:
    run = begin(config)
    assert run is not None
    return run


def stopped(config: Config) -> runs.Run:
    """A run whose process has gone."""
    run = begun(config)
    assert run.lock is not None
    run.lock.close()
    return run


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(BadInput) as refused:
        call(*arguments, **options)
    message = str(refused.value)
    del refused
    gc.collect()  # the error keeps its frames, and they the folder's lock
    return message


def test_each_script_runs_a_command() -> None:
    root = Path(runs.__file__).parent.parent
    assert len(scripts_of_commands()) == 19  # stages 09 and 11 are one command
    for command, script in scripts_of_commands().items():
        path = root / command.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert f"run {command} " in (root / script).read_text()
        assert runs.source_of(command)


def test_a_run_of_an_earlier_name_is_read_and_not_made_again(tmp_path: Path) -> None:
    for earlier, name in EARLIER.items():
        folder = finished(tmp_path / earlier, earlier, lambda here: None, facts={})
        assert runs.read_manifest(folder, name).command == runs.read_manifest(folder, earlier).command == name
        assert runs.begin(name, Plain(folder), inputs={}) is None


# Records


def test_what_a_run_under_way_records(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--lr", "0.1"])
    run = runs.begin(
        "tools.files", config, inputs={"source": config.source, "also": config.source},
        listings={"folder": config.source.parent / "empty"},
    )  # fmt: skip
    assert run is not None
    content = hash_file(config.source)
    assert read_json(config.output / "started.json") == run.started == {
        "command": "tools.files",
        "arguments": ["--lr", "0.1"],
        "source": runs.source_of("tools.files"),
        "config": {"source": str(config.source), "lr": 0.1},
        "inputs": {
            "also": {"path": str(config.source), "by": "content", "fingerprint": content},
            "source": {"path": str(config.source), "by": "content", "fingerprint": content},
            "folder": {
                "path": str(config.source.parent / "empty"), "by": "listing",
                "fingerprint": runs.fingerprint(config.source.parent / "empty", "listing"),
            },
        },
    }  # fmt: skip
    assert list(run.started["inputs"]) == ["also", "source", "folder"]


def test_what_a_finished_run_records(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "current_commit", lambda: "abc")
    monkeypatch.setattr(environment, "describe", lambda: {"python": "3"})
    run = begun(config)
    (run.folder / "deep").mkdir()
    (run.folder / "deep" / "b.txt").write_text("b")
    (run.folder / "a.txt").write_text("a")
    manifest = run.finish(facts={"levels": 4}, metrics={"loss": 0.5})
    values = read_json(config.output / "manifest.json")
    assert values.pop("checksum") == runs._hash_value(values)
    seconds = values.pop("seconds")
    assert 0 <= seconds < 60
    assert values == {
        **run.started,
        "outputs": {"a.txt": hash_file(run.folder / "a.txt"), "deep/b.txt": hash_file(run.folder / "deep" / "b.txt")},
        "facts": {"levels": 4}, "metrics": {"loss": 0.5}, "commit": "abc", "environment": {"python": "3"}, "format": 1,
    }  # fmt: skip
    assert list(values["outputs"]) == ["a.txt", "deep/b.txt"]
    assert (manifest.folder, manifest.seconds) == (config.output, seconds)
    assert {**dataclasses.asdict(manifest), "folder": None, "seconds": None} == {
        **values,
        "folder": None,
        "seconds": None,
    }
    assert manifest.fingerprint == runs.fingerprint(config.output)
    assert begin(config) is None  # its lock is free again


def test_a_run_without_figures_has_none(config: Config) -> None:
    manifest = begun(config).finish()
    assert (manifest.facts, manifest.metrics, manifest.outputs) == ({}, {}, {})


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    run = begun(replace(config, output=config.output.with_name("short")))
    clock[0] = 100.129
    assert run.finish().seconds == 0.13
    clock[0] = 100.0
    run = begun(config)
    (run.resume_folder / "state").write_text("x")
    for now, so_far in ((103.5, 3.5), (104.0, 4.0)):
        clock[0] = now
        run.note_time()
        assert read_json(config.output / "started.json")["seconds"] == so_far
    clock[0] = 200.0  # what came behind the last note is lost
    assert run.lock is not None
    run.lock.close()
    again = begun(config)
    clock[0] = 201.256
    assert again.finish().seconds == 5.26


def test_the_names_of_a_run_folder(config: Config) -> None:
    run = begun(config)
    (run.resume_folder / "state").write_text("x")
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "resume", "started.json"]
    run.finish()
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "manifest.json"]


def test_a_folder_is_made_with_those_above_it(config: Config, tmp_path: Path) -> None:
    assert begin(replace(config, output=tmp_path / "a" / "b" / "c")) is not None
    assert refusal(begin, replace(config, output=config.source)) == (
        f"{config.source} cannot be a folder, {config.source} is a file: name another --output"
    )


# What counts as the same run


@dataclass(frozen=True)
class Everything:
    """A configuration with every field that does not change what is computed."""

    output: Path
    lr: float = 0.1
    workers: int = 0
    device: str | None = None
    api_key_variable: str = "A"
    requests_per_minute: float = 1.0
    parallel: int = 1
    retries: int = 1
    skip_refused: bool = False
    overwrite: bool = False


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 3}, {"device": "cuda:1"}, {"api_key_variable": "B"}, {"requests_per_minute": 2.0}, {"parallel": 2},
        {"retries": 9}, {"skip_refused": True},
    ],
)  # fmt: skip
def test_how_a_run_is_made_does_not_make_it_another(change: dict[str, Any], tmp_path: Path) -> None:
    config = Everything(tmp_path / "run")
    run = runs.begin("tools.files", config, inputs={})
    assert run is not None
    assert run.started["config"] == {"lr": 0.1}
    run.finish()
    assert runs.begin("tools.files", replace(config, **change), inputs={}) is None


def test_what_differs_is_named(config: Config, tmp_path: Path) -> None:
    finish(config)
    config.source.write_text("two")
    assert refusal(begin, replace(config, lr=0.2)) == (
        f"{config.output} holds another run (--lr was 0.1, now 0.2; source ({config.source}) has changed since): add "
        "--overwrite or name another --output"
    )
    config.source.write_text("one")
    assert refusal(runs.begin, "tools.example", config, inputs={"source": config.source, "more": config.source}) == (
        f"{config.output} holds another run (more ({config.source}) has changed since): add --overwrite or name "
        "another --output"
    )
    (tmp_path / "three").write_text("one")
    assert refusal(runs.begin, "tools.example", replace(config, source=tmp_path / "three"), inputs={}) == (
        f"{config.output} holds another run (--source was {config.source}, now {tmp_path / 'three'}; source was "
        "given): add --overwrite or name another --output"
    )
    assert refusal(runs.begin, "tools.other", config, inputs={"source": config.source}) == (
        f"{config.output} was made by tools.example: name another --output"
    )


def test_what_is_not_the_default_is_compared_too(config: Config) -> None:
    finish(replace(config, lr=0.5))
    assert begin(replace(config, lr=0.5)) is None
    assert "(--lr was 0.5, now 0.1)" in refusal(begin, config)


def test_a_field_of_several_words_is_named_as_it_is_typed(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Words:
        output: Path
        batch_size_now: int = 1
        overwrite: bool = False

    run = runs.begin("tools.files", Words(tmp_path / "run"), inputs={})
    assert run is not None
    run.finish()
    with pytest.raises(BadInput, match=r"--batch-size-now was 1, now 2"):
        runs.begin("tools.files", Words(tmp_path / "run", 2), inputs={})


def test_a_strangers_files_are_named_and_left(config: Config) -> None:
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("years of work")
    assert refusal(begin, config) == (
        f"{config.output} holds files no run of this project left (thesis.tex): name another --output"
    )
    assert refusal(begin, replace(config, overwrite=True)) == (
        f"{config.output} holds files that no run of this project left: --overwrite will not remove them, "
        "move them away"
    )
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "thesis.tex"]


def test_overwriting_leaves_nothing_of_the_run_before(config: Config) -> None:
    finish(config)
    (config.output / "deep" / "er").mkdir(parents=True)
    (config.output / "deep" / "er" / "file").write_text("old")
    run = begun(replace(config, lr=0.3, overwrite=True))
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "started.json"]
    assert run.started["config"]["lr"] == 0.3


def test_overwriting_what_was_not_finished_and_what_is_new(config: Config) -> None:
    (stopped(config).folder / "half.txt").write_text("half")
    run = begun(replace(config, overwrite=True))
    assert not (config.output / "half.txt").exists()
    assert run.lock is not None
    assert begin(replace(config, output=config.output.with_name("new"), overwrite=True)) is not None


def test_a_finished_run_says_so_and_an_unfinished_one_goes_on(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(config)
    (run.folder / "half.txt").write_text("half")
    (run.folder / ".torn.1.part").write_text("to")
    again = begun(config)
    assert capsys.readouterr().out == f"tools.example: resuming in {config.output}.\n"
    assert again.started == run.started
    assert [path.name for path in config.output.glob("*.txt")] == ["half.txt"]
    assert not (config.output / ".torn.1.part").exists()
    again.finish()
    assert begin(config) is None
    assert capsys.readouterr().out == f"tools.example: {config.output} is finished; nothing to do.\n"


def test_leftovers_without_work_in_them_go(config: Config) -> None:
    run = stopped(config)
    (run.folder / "resume" / "empty").mkdir(parents=True)
    begun(replace(config, lr=0.5))
    assert not (config.output / "resume").exists()


# Several processes


def test_the_other_processes_share_the_main_ones_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"command": "tools.example"}
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "share", lambda value: (started, False))
    run = begun(config)
    assert (run.folder, run.started, run.lock) == (config.output, started, None)
    assert isinstance(run.began, float)
    assert not config.output.exists()
    run.note_time()  # is the main one's
    assert not config.output.exists()
    told = object()
    monkeypatch.setattr(processes, "share", lambda value: told)
    assert run.finish() is told
    assert not config.output.exists()


def test_the_other_processes_end_with_the_main_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "share", lambda value: (None, True))
    with pytest.raises(SystemExit) as ended:
        begin(config)
    assert ended.value.code == 2
    monkeypatch.setattr(processes, "share", lambda value: (None, False))
    assert begin(config) is None  # finished


def test_the_main_process_tells_the_others(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    came: list[str] = []
    monkeypatch.setattr(processes, "connect", lambda: came.append("connect"))
    monkeypatch.setattr(processes, "wait", lambda: came.append("wait"))

    def share(value: Any) -> Any:
        told.append(value)
        return value

    monkeypatch.setattr(processes, "share", share)
    run = begun(config)
    manifest = run.finish()
    assert told == [(run.started, False), manifest]
    assert came == ["connect", "wait"]
    with pytest.raises(BadInput):
        begin(replace(config, lr=0.2))
    assert begin(config) is None
    assert told[2:] == [(None, True), (None, False)]


# Reading


def test_why_a_folder_is_not_read(config: Config, tmp_path: Path) -> None:
    commands = ("RQ-VAE.train", "tools.unknown")
    assert refusal(runs.read_manifest, tmp_path / "nothing", *commands) == (
        f"{tmp_path / 'nothing'} has no manifest.json: run scripts/05_train_rqvae.sh or tools.unknown first"
    )
    stopped(config)
    assert refusal(runs.read_manifest, config.output, "RQ-VAE.train") == (
        f"{config.output} was not finished: run scripts/05_train_rqvae.sh first"
    )
    finish(config)
    assert refusal(runs.read_manifest, config.output, *commands) == (
        f"{config.output} was made by tools.example, not by RQ-VAE.train or tools.unknown: name a "
        "folder that scripts/05_train_rqvae.sh or tools.unknown made"
    )
    assert runs.read_manifest(config.output, "RQ-VAE.train", "tools.example").command == "tools.example"


def test_a_manifest_of_an_earlier_version_is_read(config: Config) -> None:
    finish(config)
    values = read_json(config.output / "manifest.json")
    for name in ("checksum", "environment", "format"):
        del values[name]
    (config.output / "manifest.json").write_text(json.dumps(values))
    manifest = runs.read_manifest(config.output, "tools.example")
    assert (manifest.environment, manifest.format) == ({}, 1)
    assert begin(config) is None


def test_a_run_from_before_a_field_existed_had_its_default(config: Config) -> None:
    finish(config)
    values = read_json(config.output / "manifest.json")
    runs.write_manifest(config.output, {**values, "config": {"source": str(config.source)}})
    assert begin(config) is None
    assert "(--lr was 0.1, now 0.2)" in refusal(begin, replace(config, lr=0.2))


def test_an_input_that_changed_is_refused(config: Config) -> None:
    manifest = finish(config)
    assert runs.unchanged_input(manifest, "source") == config.source
    config.source.write_text("two")
    assert refusal(runs.unchanged_input, manifest, "source") == (
        f"{config.source} has changed since {config.output} was made: run tools.example --overwrite"
    )
    assert refusal(runs.unchanged_input, replace(manifest, command="RQ-VAE.train"), "source") == (
        f"{config.source} has changed since {config.output} was made: run scripts/05_train_rqvae.sh --overwrite"
    )


def test_a_listed_input_is_compared_by_its_listing(config: Config, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_text("one")
    run = runs.begin("tools.example", config, inputs={}, listings={"files": tmp_path / "files"})
    assert run is not None
    manifest = run.finish()
    (tmp_path / "files" / "a").write_text("two")  # as long as before
    for name in (".DS_Store", "Thumbs.db", "@eaDir/a", ".dtrash/a"):  # which no picture's listing takes
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text("a system's")
    (tmp_path / "files" / "gone").symlink_to("nowhere")
    assert runs.unchanged_input(manifest, "files") == tmp_path / "files"
    (tmp_path / "files" / "a").write_text("three")
    with pytest.raises(BadInput, match="has changed since"):
        runs.unchanged_input(manifest, "files")


def test_clearing_is_all_or_nothing(tmp_path: Path) -> None:
    folders = [finished(tmp_path / name, "tools.example", lambda here: None, facts={}) for name in "abc"]
    before = files_of(tmp_path)
    lock = runs.hold(folders[1])
    assert "is in use" in refusal(clear_all, folders)
    lock.close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("mine")
    assert "no run of this project left" in refusal(clear_all, [*folders, tmp_path / "mine"])
    (tmp_path / "mine" / "text").unlink()
    (tmp_path / "mine").rmdir()
    assert files_of(tmp_path) == before
    clear_all([*folders, tmp_path / "never made"])
    assert files_of(tmp_path) == []


def test_a_manifest_may_speak_of_other_files(config: Config) -> None:
    manifest = finish(config)
    (config.output / "more").write_text("more")
    runs.replace_outputs(manifest, [config.output / "more"], {"levels": 5})
    changed = runs.read_manifest(config.output, "tools.example")
    assert changed.outputs == {"more": hash_file(config.output / "more")}
    assert changed == replace(manifest, outputs=changed.outputs, facts={"levels": 5})
    assert "folder" not in read_json(config.output / "manifest.json")


def test_a_held_folder_is_refused(config: Config, tmp_path: Path) -> None:
    held = runs.hold(tmp_path)
    assert refusal(runs.hold, tmp_path) == (f"{tmp_path} is in use by another process: wait until it has finished")
    held.close()
    runs.hold(tmp_path).close()


def test_all_but_one_folder_of_a_pattern_go(tmp_path: Path) -> None:
    for name in ("best-1", "best-2", "other"):
        (tmp_path / name / "deep").mkdir(parents=True)
    runs.keep_only(tmp_path, "best-*", tmp_path / "best-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-2", "other"]
    runs.keep_only(tmp_path, "best-*", None)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# Content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "files" / "a").write_text("one")
    (tmp_path / "files" / "deep" / "b").write_text("two")
    return tmp_path / "files"


@pytest.mark.parametrize("by", ["content", "listing"])
def test_a_folder_is_its_files_wherever_it_lies(by: str, folder: Path) -> None:
    before = runs.fingerprint(folder, by)
    assert len(before) == 32
    (folder / "empty").mkdir()
    assert runs.fingerprint(folder.rename(folder.with_name("moved")), by) == before
    shutil.copytree(folder.with_name("moved"), folder)
    assert runs.fingerprint(folder, by) == before
    (folder / "deep" / "b").rename(folder / "b")
    assert runs.fingerprint(folder, by) != before


def test_a_listing_sees_names_and_sizes_and_a_content_all(folder: Path) -> None:
    content, listing = runs.fingerprint(folder), runs.fingerprint(folder, "listing")
    assert content != listing
    (folder / "deep" / "b").write_text("owt")
    assert runs.fingerprint(folder, "listing") == listing
    assert runs.fingerprint(folder) != content
    (folder / "deep" / "b").write_text("longer")
    assert runs.fingerprint(folder, "listing") != listing


def test_files_count_in_the_order_of_their_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the disk gives them in."""
    before = [runs.fingerprint(folder, by) for by in ("content", "listing")]
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern), reverse=True))
    assert [runs.fingerprint(folder, by) for by in ("content", "listing")] == before


def test_a_run_folder_is_its_outputs_and_facts(config: Config) -> None:
    manifest = finish(config)
    before = runs.fingerprint(config.output)
    assert before == manifest.fingerprint
    (config.output / "not an output").write_text("x")
    assert runs.fingerprint(config.output) == before
    assert replace(manifest, metrics={"loss": 9.0}, seconds=9.0, config={}, commit="x").fingerprint == before
    assert replace(manifest, facts={"levels": 5}).fingerprint != before
    assert replace(manifest, outputs={}).fingerprint != before
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert replace(manifest, facts=one).fingerprint == replace(manifest, facts=two).fingerprint


def test_what_does_not_exist_has_no_content(tmp_path: Path) -> None:
    assert refusal(runs.fingerprint, tmp_path / "x") == f"{tmp_path / 'x'} does not exist"


def test_the_source_of_a_command_is_all_code_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.source_of("no.such.command") == ""
    assert runs.source_of("tools.runs") == runs.source_of("tools.files") != runs.source_of("RQ-VAE.train")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "tools" / "runs.py"))
    (tmp_path / "room" / "deep").mkdir(parents=True)
    for name in ("b.py", "a.py"):
        (tmp_path / "room" / name).write_text(name)
    before = runs.source_of("room.a")
    assert before == runs.source_of("room.b")
    assert len(before) == 32
    (tmp_path / "room" / "notes.txt").write_text("x")
    (tmp_path / "room" / "folder.py").mkdir()
    assert runs.source_of("room.a") == before
    (tmp_path / "room" / "deep" / "c.py").write_text("c")
    assert runs.source_of("room.a") == before
    assert runs.source_of("room.deep.c") not in ("", before)
    (tmp_path / "room" / "b.py").write_text("other")
    assert runs.source_of("room.a") != before


def test_the_commit_and_whether_there_are_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.current_commit() == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    assert runs.current_commit() == "unknown"
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert runs.current_commit() == commit
    (tmp_path / "untracked").write_text("x")
    assert runs.current_commit() == commit
    (tmp_path / "file").write_text("two")
    assert runs.current_commit() == f"{commit}+changes"
    (tmp_path / ".git" / "index").write_text("damaged")
    assert runs.current_commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert runs.current_commit() == "unknown"


# Damage


def damaged(config: Config, name: str, content: str | None) -> str:
    path = config.output / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    messages = {refusal(runs.read_manifest, config.output, "tools.example"), refusal(begin, config)}
    assert len(messages) == 1
    return messages.pop()


def test_a_damaged_output_is_named(config: Config) -> None:
    finish(config)
    path = config.output / "result.txt"
    assert damaged(config, "result.txt", "other") == (
        f"{path} is damaged, it has changed since it was made: run tools.example --overwrite"
    )
    assert damaged(config, "result.txt", None) == f"{path} is missing: run tools.example --overwrite"


def test_a_damaged_manifest_is_named(config: Config) -> None:
    finish(config)
    path = config.output / "manifest.json"
    values = read_json(path)
    assert damaged(config, "manifest.json", "{") == (
        f"{path} is damaged (line 1: not valid JSON (Expecting property name enclosed in double quotes)): run "
        "tools.example --overwrite"
    )
    assert damaged(config, "manifest.json", "[]") == (
        f"{path} is damaged (it holds a list): run tools.example --overwrite"
    )
    without = {name: value for name, value in values.items() if name != "facts"}
    assert damaged(config, "manifest.json", json.dumps(without)) == (
        f"{path} is damaged (it has no facts): run tools.example --overwrite"
    )
    for change in ({"facts": {"levels": 5}}, {"unknown": 1}):
        assert damaged(config, "manifest.json", json.dumps({**values, **change})) == (
            f"{path} is damaged (its checksum is another): run tools.example --overwrite"
        )


def test_damage_in_an_input_names_the_script_that_made_it(config: Config, tmp_path: Path) -> None:
    made = runs.begin("RQ-VAE.train", replace(config, output=tmp_path / "made"), inputs={})
    assert made is not None
    for name in ("a.txt", "b.txt"):
        (made.folder / name).write_text(name)
    made.finish()
    (made.folder / "a.txt").write_text("other")
    message = (
        f"{made.folder / 'a.txt'} is damaged, it has changed since it was made: run scripts/05_train_rqvae.sh "
        "--overwrite"
    )
    assert refusal(runs.begin, "tools.example", config, inputs={"made": made.folder}) == message
    assert refusal(runs.check_files, made.folder) == message
    assert refusal(runs.check_files, made.folder / "a.txt") == message
    runs.check_files(made.folder / "b.txt")  # is whole
    runs.check_files(tmp_path / "source.txt")  # is no run's
    (made.folder / ".lock").unlink()
    runs.check_files(made.folder)  # a stranger's manifest.json


def test_files_need_not_be_read_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(config)
    (config.output / "result.txt").write_text("other")
    monkeypatch.setenv("VERIFY", "off")
    assert runs.read_manifest(config.output, "tools.example").metrics == {"loss": 0.5}
    (config.output / "result.txt").unlink()
    with pytest.raises(BadInput, match=r"result\.txt is missing"):
        runs.read_manifest(config.output, "tools.example")


def test_paths_are_named_as_the_user_knows_them(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(config)
    (config.output / "result.txt").write_text("other")
    monkeypatch.chdir(config.output.parent)
    assert refusal(runs.check_files, config.output).startswith("run/result.txt is damaged")


def test_a_lock_does_not_outlive_its_process_in_a_child(config: Config) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from tools import runs\n"
        f"held = runs.hold(Path({str(config.source.parent)!r}))\n"
        "if not os.fork(): sys.stdin.read()"  # goes on when its parent has gone
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        assert parent.wait() == 0
        runs.hold(config.source.parent).close()


@pytest.mark.parametrize("commands", [(), ("RQ-VAE.train",), ("RQ-VAE.train", "tools.unknown")])
@pytest.mark.parametrize("name", ["04_train_heads", "mine"])
def test_a_damaged_record_names_the_scripts_that_may_have_made_it(
    name: str, commands: tuple[str, ...], tmp_path: Path
) -> None:
    """Those of the commands that are asked for, else that of the folder's name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").write_bytes(b"\xff")
    by_name = {"mine": f"the command that made {tmp_path / name}", "04_train_heads": "scripts/04_train_heads.sh"}[name]
    asked = {
        (): by_name,
        ("RQ-VAE.train",): "scripts/05_train_rqvae.sh",
        ("RQ-VAE.train", "tools.unknown"): "scripts/05_train_rqvae.sh or tools.unknown",
    }[commands]
    call = runs.read_manifest if commands else runs.fingerprint
    assert refusal(call, tmp_path / name, *commands) == (
        f"{tmp_path / name / 'manifest.json'} is damaged (is not UTF-8 text (byte 0): save it as UTF-8): run {asked} "
        "--overwrite"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"command": 3}, "its command is a int"),
        ({"config": []}, "its config is a list"),
        ({"inputs": None}, "its inputs is a NoneType"),
        ({"outputs": "x"}, "its outputs is a str"),
        ({"facts": 1.5}, "its facts is a float"),
        ({"metrics": []}, "its metrics is a list"),
        ({"format": "1"}, "its format is no number"),
        ({"format": True}, "its format is no number"),
    ],
)
def test_values_of_another_kind_are_damage(change: dict[str, Any], reason: str, config: Config) -> None:
    finish(config)
    values = read_json(config.output / "manifest.json")
    runs.write_manifest(config.output, {**values, **change})
    assert refusal(runs.read_manifest, config.output, "tools.example") == (
        f"{config.output / 'manifest.json'} is damaged ({reason}): run tools.example --overwrite"
    )


@pytest.mark.parametrize("name", ["command", "arguments", "source", "config", "inputs"])
def test_a_record_of_a_run_under_way_may_be_damaged_too(name: str, config: Config) -> None:
    run = stopped(config)
    (run.folder / "half.txt").write_text("half")
    values = read_json(config.output / "started.json")
    (config.output / "started.json").write_text(json.dumps({key: values[key] for key in values if key != name}))
    assert refusal(begin, config) == (
        f"{config.output / 'started.json'} is damaged (it has no {name}): run tools.example --overwrite"
    )


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, "an earlier version of this project (format 0, this one reads 1): run tools.example --overwrite"),
        (2, "a later version of this project (format 2, this one reads 1): update the project (git pull), or name "
            "another folder"),
    ],
)  # fmt: skip
def test_folders_of_other_versions_are_refused(number: int, line: str, config: Config) -> None:
    finish(config)
    runs.write_manifest(config.output, {**read_json(config.output / "manifest.json"), "format": number})
    assert refusal(runs.read_manifest, config.output, "tools.example") == f"{config.output} was made by {line}"
    line = line.replace("tools.example", "tools.example or scripts/05_train_rqvae.sh")
    message = refusal(runs.read_manifest, config.output, "tools.example", "RQ-VAE.train")
    assert message == f"{config.output} was made by {line}"


def test_a_folder_that_changes_while_it_is_read_is_read_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the index does: its manifest goes over to other files, and then the old ones go."""
    manifest = finish(config)
    (config.output / "other.txt").write_text("other")
    found = verified_hash

    def meanwhile(path: Path) -> str:
        if path.name == "result.txt":
            runs.replace_outputs(manifest, [config.output / "other.txt"], {"levels": 9})
            path.unlink()
        return found(path)

    monkeypatch.setattr(runs, "verified_hash", meanwhile)
    assert runs.read_manifest(config.output, "tools.example").facts == {"levels": 9}


def test_a_manifest_that_is_damaged_while_its_folder_is_read_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(config)
    path = config.output / "manifest.json"

    def meanwhile(file: Path) -> str:
        path.write_text("[]")
        return "other"

    monkeypatch.setattr(runs, "verified_hash", meanwhile)
    assert refusal(runs.read_manifest, config.output, "tools.example") == (
        f"{path} is damaged (it holds a list): run tools.example --overwrite"
    )


def test_the_main_process_alone_looks_for_damage(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(config)
    (config.output / "result.txt").write_text("other")
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert runs.read_manifest(config.output, "tools.example").facts == {"levels": 4}
