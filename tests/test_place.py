"""A relative path that a user types is seen from where the user stands, in every position and every script."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.command_line.place import (
    VARIABLE,
    NameOrPath,
    for_user,
    seen_from,
    typed_elsewhere,
    typed_here,
    with_commands,
)

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command whose positional words are no paths."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    output: Path = Path("unset")
    weights: Path | None = None
    sources: tuple[Path, ...] = ()
    model: NameOrPath = "t5"
    other: NameOrPath | None = None
    name: str = "x"
    names: tuple[str, ...] = ()
    count: int = 0
    switch: bool = False


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A command whose positional word is a path."""

    folder: tyro.conf.Positional[Path]
    prefix: str = ""
    skip: bool = False
    output: Path | None = None


NAMES = st.sampled_from(
    ["holiday", "a b", "é", "2024/car.jpg", "./x", "../x", "../../y/z", ".", "t5-base", "/absolute"]
)
PATHS = {"folder", "output", "weights", "sources"}
EITHER = {"model", "other"}


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[Any, list[str]]:
    """A configuration, and words for some of its options in any order, as `--a b` or `--a=b`."""
    config: Any
    config, positional = draw(st.sampled_from([(Words, "words"), (Folder, "folder")]))
    parts: list[list[str]] = []
    for field in draw(st.permutations([name for name in config.__dataclass_fields__ if name != positional])):
        kind = draw(st.sampled_from(["--a b", "--a=b", "left out"]))
        name = f"--{field}"
        if kind == "left out":
            continue
        if field in ("switch", "skip"):
            parts.append([draw(st.sampled_from([name, name.replace("--", "--no-")]))])
        elif field == "count":
            parts.append([name, "3"])
        elif field in ("sources", "names"):
            parts.append([name, *draw(st.lists(NAMES, min_size=1, max_size=3))])
        else:
            parts.append([name, draw(NAMES)] if kind == "--a b" else [f"{name}={draw(NAMES)}"])
    own = [draw(NAMES)] if positional == "folder" else draw(st.lists(NAMES, max_size=2))
    several = [number for number, part in enumerate(parts) if part[0] in ("--sources", "--names")]
    places = [number for number in range(len(parts) + 1) if number - 1 not in several]  # else they would be its values
    if own:
        parts.insert(draw(st.sampled_from(places)), own)
    return config, [word for part in parts for word in part]


@settings(deadline=None)
@given(line=command_lines(), fixed=st.booleans())
def test_typed_paths_lead_to_the_same_files_and_other_words_stay(line: tuple[Any, list[str]], fixed: bool) -> None:
    config, words = line
    folder = ROOT / "docs" / "somewhere"
    before = ["--output", "script's/own"] if fixed and not any(word.startswith("--output") for word in words) else []
    arguments = [*before, *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{len(words)} {folder}")
        resolved = typed_here(config, arguments)
        assert typed_here(config, resolved) == resolved  # no word counts as typed any more
    assert len(resolved) == len(arguments)
    typed, seen = (vars(tyro.cli(config, args=each)) for each in (arguments, resolved))
    for name, value in typed.items():
        if name in PATHS and value not in (None, (), Path("unset")) and not (before and name == "output"):
            values = value if isinstance(value, tuple) else (value,)
            found = seen[name] if isinstance(value, tuple) else (seen[name],)
            wanted = [os.path.normpath(folder / each) for each in values]  # no part of it is a link
            assert [os.path.normpath(ROOT / each) for each in found] == wanted
        elif name in EITHER and str(value).startswith(("./", "../")):
            assert os.path.normpath(ROOT / seen[name]) == os.path.normpath(folder / value)
        else:
            assert seen[name] == value


def test_a_name_of_a_model_is_a_path_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"2 {tmp_path}")
    assert typed_here(Words, ["--model", "t5-base"]) == ["--model", "t5-base"]
    (tmp_path / "t5-base").mkdir()
    monkeypatch.setenv(VARIABLE, f"2 {tmp_path}")
    assert typed_here(Words, ["--model", "t5-base"]) == ["--model", str(tmp_path / "t5-base")]


def test_behind_a_double_dash_all_words_are_positional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"2 {tmp_path}")
    assert typed_here(Folder, ["--", "--skip"]) == ["--", str(tmp_path / "--skip")]


def test_at_the_root_words_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a finished run is recognised by the words that its manifest has."""
    monkeypatch.setenv(VARIABLE, f"2 {ROOT}")
    assert not typed_elsewhere()
    assert typed_here(Words, ["--output", "./a/../b"]) == ["--output", "./a/../b"]
    monkeypatch.delenv(VARIABLE)
    assert typed_here(Words, ["--output", "b"]) == ["--output", "b"]


def test_the_parent_of_a_link_is_that_of_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert seen_from(tmp_path / "link", "../x") == str(tmp_path / "a" / "x")  # as `ls ../x` has it
    assert seen_from(tmp_path, "link/x") == str(tmp_path / "link" / "x")
    assert seen_from(ROOT / "docs", "../README.md") == "README.md"


def test_scripts_in_messages_can_be_typed_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "run scripts/06_generate_codes.sh or bash scripts/a/b.sh; see scripts/datasets/emoji.sh"
    wanted = "run bash {}scripts/06_generate_codes.sh or bash {}scripts/a/b.sh; see scripts/datasets/emoji.sh"
    assert with_commands(said) == wanted.format("", "")
    monkeypatch.setenv(VARIABLE, f"0 {tmp_path}")
    assert with_commands(said) == wanted.format(f"{ROOT}/", f"{ROOT}/")


def script(name: str, *words: str, cwd: Path, python: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{name}.sh"), *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "DATASET": "emoji", **variables},
    )  # fmt: skip


def test_a_script_and_its_launcher_hand_the_place_on(tmp_path: Path, warm_python: Path) -> None:
    """The folder is missing, and the message says which one: the one beside the user."""
    for launch in ("", f"{sys.executable}"):
        done = script("add_pictures", "--skip-known", "holiday", cwd=tmp_path, python=warm_python, LAUNCH=launch)
        assert done.returncode == 2
        assert f"{tmp_path}/holiday is not a folder" in done.stderr
    (tmp_path / "holiday").mkdir()
    done = script("add_pictures", "--index", "holiday", "--skip-known", "holiday", cwd=tmp_path, python=warm_python)
    advice = f"DATASET=emoji bash {ROOT}/scripts/14_build_index.sh"
    assert f"error: {tmp_path}/holiday has no manifest.json: run {advice} first" in done.stderr


def test_words_of_a_query_stay_words(tmp_path: Path, warm_python: Path) -> None:
    (tmp_path / "car").mkdir()
    done = script("search", "car", "--index", "car", cwd=tmp_path, python=warm_python)
    assert f"{tmp_path}/car has no manifest.json" in done.stderr


@pytest.mark.parametrize(
    "variable", ["PICTURES", "CAPTIONS_FILE", "SEED_WEIGHTS", "LLAMA", "RQVAE", "TRAINED", "DATASET"]
)
def test_paths_in_variables_are_seen_from_there(tmp_path: Path, variable: str) -> None:
    name = "mine.sh" if variable == "DATASET" else "mine"
    (tmp_path / name).write_text("")
    source = f'source {shlex.quote(str(ROOT / "scripts/place.sh"))}; printf %s "${variable}"; pwd'
    environment = {**os.environ, variable: name, "LAUNCH": "accelerate launch --config_file mine"}
    done = subprocess.run(["bash", "-euc", source], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / name}{ROOT}\n"
    if variable in ("DATASET", "LLAMA"):  # a name where no such file is there
        (tmp_path / name).unlink()
        done = subprocess.run(["bash", "-euc", source], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == f"{name}{ROOT}\n"


def test_a_script_knows_its_name_from_any_folder() -> None:
    done = subprocess.run(
        ["bash", "../scripts/09_train_retriever_t5.sh"], cwd=ROOT / "docs", capture_output=True, text=True,
        env={**os.environ, "SYSTEM": "llama", "DATASET": "emoji"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith(f".sh: DATASET=emoji SYSTEM=llama bash {ROOT}/scripts/11_finetune_retriever_llama.sh\n")


def test_quickstart_refuses_what_it_does_not_hand_on(warm_python: Path) -> None:
    done = script("quickstart", "--lr", "0.1", cwd=ROOT, python=warm_python)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --lr is not an option of quickstart.sh, which takes --over")


def test_files_are_shown_as_the_user_can_use_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert for_user(Path("a/b.jpg")) == Path("a/b.jpg")
    monkeypatch.setenv(VARIABLE, f"0 {tmp_path}")
    assert for_user(Path("a/b.jpg")) == Path.cwd() / "a/b.jpg"
