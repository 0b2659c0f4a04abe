"""The package `avg`: built offline, installed beside other people's `tools` and `models`, and used from elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from setuptools.errors import SetupError

from package import __main__ as command
from package import build, search
from package.__main__ import SERVER
from retriever import Retriever
from retriever.gallery.package import copy_sources
from tests.hub import stand_in, variables
from tests.test_api import CPU
from tools.command_line import place
from tools.errors import BadInput

ROOT = Path(__file__).parent.parent
BACKEND = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
QUERY = "a red circle"


class Elsewhere(NamedTuple):
    """A Python that has the package, and a folder with other people's `tools` and `models`."""

    programs: Path
    folder: Path

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs / words[0], *words[1:]],
            cwd=self.folder,
            env=plain_environment() | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, program: str, **environment: str) -> str:
        done = self.run("python", "-c", program, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


def plain_environment() -> dict[str, str]:
    """Nothing that leads to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_checked(*words: str | Path, cwd: Path) -> None:
    done = subprocess.run(words, cwd=cwd, env=plain_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, as the build leaves files beside it, with those of an earlier one."""
    folder = tmp_path_factory.mktemp("sources")
    copy_sources(folder)
    stale = folder / "build" / "lib" / "avg" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a new environment's programs; it sees the packages of this one."""
    pytest.importorskip("ensurepip", reason="this Python cannot make environments (apt-get install python3-venv)")
    folder = tmp_path_factory.mktemp("environment")
    run_checked(sys.executable, "-m", "venv", folder, cwd=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel --no-build-isolation --no-deps .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    run_checked(sys.executable, "-c", BACKEND, "build_wheel", folder, cwd=sources)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    run_checked(python / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    for name in ("tools", "models", "retriever"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("OWNER = 'somebody else'\n")
    return Elsewhere(python, folder)


@pytest.fixture(scope="module")
def exported(index: Path, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "toy"
    return Retriever.from_runs(index=index, retriever=retriever, **CPU).save_pretrained(folder, include_pictures=True)


# What is built


def test_the_wheel_has_one_package_its_licence_and_what_a_search_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
        [entry_points] = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
        [licence] = [archive.read(name) for name in names if name.endswith("/licenses/LICENSE")]
    assert {name.split("/")[0] for name in names} == {"avg", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "avg = avg.__main__:main" in entry_points
    assert "License-Expression: CC-BY-NC-4.0\n" in metadata
    assert {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        "sample", "serve", "llama", "captions", "train", "cluster", "benchmarks",
    }  # fmt: skip
    assert {"avg/retriever/gallery/api.py", "avg/retriever/serve/page/index.html", "avg/py.typed"} <= set(names)
    assert not {"avg/build.py", "avg/stale.py", "avg/retriever/train.py", "avg/tools/fetch_emoji.py"} & set(names)


def test_what_is_installed_differs_from_the_checkout_in_imports_alone(wheel: Path) -> None:
    rooms = {new: old for old, new in build.SOURCES.items()}
    with zipfile.ZipFile(wheel) as archive:
        for name in (name for name in archive.namelist() if name.startswith("avg/") and name.endswith(".py")):
            room = next(
                new for new in sorted(rooms, key=len, reverse=True) if name.startswith(new.replace(".", "/") + "/")
            )
            source = ROOT / rooms[room] / name.removeprefix(room.replace(".", "/") + "/")
            pairs = zip(source.read_text().splitlines(), archive.read(name).decode().splitlines(), strict=True)
            changed = [(old, new) for old, new in pairs if old != new]
            assert all(old == new.replace("avg.", "", 1).replace("from avg ", "from package ") for old, new in changed)
            assert all(new.lstrip().startswith(("from avg", "import avg.")) for _, new in changed)


def test_the_source_archive_builds_the_same_wheel(sources: Path, wheel: Path, tmp_path: Path) -> None:
    run_checked(sys.executable, "-c", BACKEND, "build_sdist", tmp_path, cwd=sources)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    run_checked(sys.executable, "-c", BACKEND, "build_wheel", tmp_path, cwd=folder)
    [second] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(second) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        assert all(one.read(name) == two.read(name) for name in one.namelist() if name.startswith("avg/"))


def test_an_editable_installation_is_refused_with_the_way_out(sources: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BACKEND, "build_editable", tmp_path],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "avg cannot be installed as editable: use `pip install .`, or run commands in the checkout" in done.stderr


# The rewriting


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tools import runs\n", "from avg.tools import runs\n"),
        ("from tools.errors import BadInput  # from tools\n", "from avg.tools.errors import BadInput  # from tools\n"),
        ("import models.clip as clip, os\n", "import avg.models.clip as clip, os\n"),
        ("from tools \\\n    import a\n", "from avg.tools \\\n    import a\n"),
        ("import retriever as room\n", "import avg.retriever as room\n"),
        (
            "from models.clip import (\n    a,\n    b as c,\n)\n",
            "from avg.models.clip import (\n    a,\n    b as c,\n)\n",
        ),
        ("x = 'é'; from tools import a; y = 1\n", "x = 'é'; from avg.tools import a; y = 1\n"),
        ("def f():\n    from retriever import g\n", "def f():\n    from avg.retriever import g\n"),
        ("from package.search import run\n", "from avg.search import run\n"),
        ("from .tools import a\nimport toolset\n", "from .tools import a\nimport toolset\n"),
        ("'''\nfrom tools import runs\n'''\n", "'''\nfrom tools import runs\n'''\n"),
    ],
)
def test_imports_of_rooms_are_rewritten_and_nothing_else(source: str, expected: str) -> None:
    assert build.rewritten(source, "x.py") == expected


@pytest.mark.parametrize("source", ["import tools\n", "import tools.runs\n", "from  tools import a\n"])
def test_imports_that_cannot_be_rewritten_stop_the_build(source: str) -> None:
    with pytest.raises(SetupError, match=r"x\.py, line 1: write "):
        build.rewritten(source, "x.py")


def test_modules_are_reached_through_imports_in_functions_and_of_packages(tmp_path: Path) -> None:
    for name, text in (
        ("package/__init__.py", "def f():\n    from tools.a import x\n"),
        ("tools/__init__.py", ""),
        ("tools/a.py", "from . import b\nfrom .inner.c import y\n"),
        ("tools/b.py", "import numpy\n"),
        ("tools/inner/__init__.py", ""),
        ("tools/inner/c.py", "from .. import d\nfrom models import e\n"),
        ("tools/d.py", ""),
        ("tools/unused.py", ""),
        ("models/__init__.py", "e = 1\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(build.reach(tmp_path, ("package",))) == [
        "models", "package", "tools", "tools.a", "tools.b", "tools.d", "tools.inner", "tools.inner.c",
    ]  # fmt: skip
    (tmp_path / "tools" / "b.py").write_text("import tools.gone as gone\n")
    with pytest.raises(SetupError, match=r"tools\.gone is imported, but is no module of the checkout"):
        build.reach(tmp_path, ("package",))


# What is installed


def test_python_finds_what_the_checkout_finds_beside_other_packages_of_these_names(
    elsewhere: Elsewhere, exported: Path
) -> None:
    printed = elsewhere.python(
        "import json, sys, models, retriever, tools\n"
        "assert 'torch' not in sys.modules\n"
        "import avg\n"
        "assert 'torch' not in sys.modules\n"
        f"loaded = avg.Retriever.from_pretrained({str(exported)!r}, device='cpu', precision='fp32')\n"
        f"[found] = loaded.search([{QUERY!r}])\n"
        "owners = [module.OWNER for module in (models, retriever, tools)]\n"
        "others = [name for name in sys.modules if name.startswith(('models.', 'tools.', 'retriever.'))]\n"
        "print(json.dumps([avg.__file__, owners, others, [[one.image, one.score] for one in found]]))\n"
    )
    place, owners, others, found = json.loads(printed)
    assert Path(place).is_relative_to(elsewhere.programs.parent)
    assert owners == ["somebody else"] * 3
    assert others == []
    [expected] = Retriever.load(exported, **CPU).search([QUERY])
    assert found == [[one.image, one.score] for one in expected]


def test_avg_search_answers_on_the_command_line(elsewhere: Elsewhere, exported: Path) -> None:
    done = elsewhere.run(
        "avg", "search", str(exported), QUERY, "--json", "--keep", "3", "--device", "cpu", "--precision", "fp32"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    [expected] = Retriever.load(exported, **CPU).search([QUERY], k=3)
    assert [result["image"] for result in answer["results"]] == [one.image for one in expected]
    assert not list(elsewhere.folder.glob("*.png"))


def test_the_card_of_a_hub_is_enough_for_somebody_who_has_pip(
    elsewhere: Elsewhere, exported: Path, tmp_path: Path
) -> None:
    """Both blocks of it, as they stand."""
    with stand_in() as hub, pytest.MonkeyPatch.context() as patched:
        from tests.hub import use

        use(hub, tmp_path / "cache", patched)
        Retriever.load(exported, **CPU).push_to_hub("someone/toy", include_pictures=True)
        _, shell, _, program, *_ = hub.repositories["someone/toy"]["README.md"].decode().split("```")
        words = shell.removeprefix("bash\n").split()
        assert words[:2] == ["pip", "install"]
        elsewhere.run("pip", "uninstall", "--yes", "avg-retrieval")
        done = elsewhere.run("pip", "install", "--no-deps", *words[2:])
        assert done.returncode == 0, done.stderr
        printed = elsewhere.python(program.removeprefix("python\n"), **variables(hub, tmp_path / "own"))
        assert len(printed.splitlines()) == 10
        assert all(Path(line.split(" ", 2)[2]).is_file() for line in printed.splitlines())


@pytest.fixture
def server(elsewhere: Elsewhere, exported: Path) -> Iterator[str]:
    """Address of `avg serve`."""
    words = [str(elsewhere.programs / "avg"), "serve", str(exported), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        words,
        cwd=elsewhere.folder,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed = iter(process.stdout.readline, "")
    try:
        yield next(line.split(" pictures: ")[1].split()[0] for line in printed if " pictures: " in line)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_avg_serve_shows_the_page_and_answers(server: str) -> None:
    def get(path: str) -> bytes:
        with urllib.request.urlopen(server + path) as answer:
            return bytes(answer.read())

    assert server.startswith("http://127.0.0.1:")
    assert b"<html" in get("/")
    answer: dict[str, Any] = json.loads(get("/api/search?q=a%20red%20circle&k=2"))
    assert len(answer["pictures"]) == 2


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], None, "usage: avg COMMAND"),
        (["--help"], None, "avg search FOLDER"),
        (["serch"], 2, "error: serch is not a command of avg; did you mean search?\n"),
        (["x\x1b"], 2, "error: x\\x1b is not a command of avg: avg --help lists the commands\n"),
        (["search", "nothing", "a"], 2, "error: there is no folder nothing, and it is no name on the Hugging Face Hub"),
        (["search", "--hlp"], 2, "error: --hlp is not an option of this command; did you mean --help?\n"),
        (["search", "--help"], 0, "usage: avg search [-h] [OPTIONS] FOLDER"),
        (["serve", "--help"], 0, "usage: avg serve [-h] [OPTIONS] FOLDER"),
    ],
)
def test_the_command_says_what_it_takes(
    words: list[str], status: int | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["avg", *words])
    with pytest.raises(SystemExit) if status is not None else nullcontext() as ended:
        command.main()
    printed = capsys.readouterr()
    assert said in (printed.err if status else printed.out)
    assert ended is None or ended.value.code == status


def test_the_installed_command_has_a_version(elsewhere: Elsewhere) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", elsewhere.run("avg", "--version").stdout)


def test_serving_without_its_packages_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(SystemExit, match="2"):
        command.need_server()
    assert capsys.readouterr().err == f"error: avg serve needs more: pip install {' '.join(SERVER)}\n"


def test_the_checkout_runs_the_command_too(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search.main(search.Config(folder=str(exported), queries=(QUERY,), keep=1, device="cpu"))
    assert f'"{QUERY}", 48 pictures' in capsys.readouterr().out


def test_run_folders_are_for_the_repository(index: Path, retriever: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pictures' files are relative to it."""
    monkeypatch.setattr(place, "ROOT", index)
    with pytest.raises(BadInput, match=r"is searched in the repository that made it: export it there with scripts/"):
        Retriever.from_runs(index=index, retriever=retriever)
    told = place.with_commands("run scripts/14_build_index.sh --overwrite")
    assert told == "run scripts/14_build_index.sh --overwrite (scripts/ is part of the repository, not of this package)"
    assert place.with_commands("no script") == "no script"
