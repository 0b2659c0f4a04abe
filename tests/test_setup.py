"""Set-up by `scripts/env.sh`: which Python the scripts use, and which build of torch `.venv` gets.

Stand-ins for uv and Python write down how they were called, and install nothing.
"""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import packages

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/bash
here="$(cd "$(dirname "$0")" && pwd)"
case "$*" in
"-m tools.packages"*) cat "$here/lacks" 2>/dev/null ;;
"-m pip"*) echo "pip $*" >>"$CALLS"; case "$*" in *" uv") cp "$STAND_INS/uv" "$here/uv" ;; esac ;;
"-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$*" >>"$CALLS" ;;
esac
exit 0
"""
UV = """#!/bin/bash
echo "uv $*" >>"$CALLS"
case "$1" in
venv) mkdir -p .venv/bin; cp "$STAND_INS/python" .venv/bin/python; echo -n "$VENV_LACKS" >.venv/bin/lacks ;;
pip)
    cat .venv/pins.txt 2>/dev/null >>"$PINS"
    if [ -n "$UV_FAILS" ] && grep -q '^torch==' .venv/pins.txt; then exit "$UV_FAILS"; fi ;;
esac
exit 0
"""


class Checkout(NamedTuple):
    """A copy of what set-up needs, below a folder of programs that stand in for others."""

    root: Path
    programs: Path
    calls: Path
    pins: Path

    def source(self, *, words: str = "source scripts/env.sh", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run words in bash; what was called is written anew."""
        self.calls.write_text("")
        self.pins.write_text("")
        path = variables.pop("PATH", f"{self.programs}:/usr/bin:/bin")
        fixed = {"PATH": path, "CALLS": str(self.calls), "PINS": str(self.pins), "HOME": "/"}
        stand_ins = {"STAND_INS": str(self.root / "stand-ins"), "UV_FAILS": "", "VENV_LACKS": ""}
        return subprocess.run(
            ["bash", "-c", words], cwd=self.root, env=fixed | stand_ins | variables, capture_output=True, text=True
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """With a Python that has every package, and uv."""
    root, programs = tmp_path / "avg", tmp_path / "programs"
    for name in ("scripts/env.sh", "scripts/datasets/emoji.sh", "requirements.txt", "requirements-dev.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name, text in (("python", PYTHON), ("uv", UV)):
        program(root / "stand-ins" / name, text)
        program(programs / name, text)
    program(programs / "python3", PYTHON)
    return Checkout(root, programs, tmp_path / "calls", tmp_path / "pins")


def test_an_active_environment_with_the_packages_is_used(checkout: Checkout) -> None:
    done = checkout.source()
    assert (done.returncode, done.stderr) == (0, f"Python: {checkout.programs}/python, the active one\n")
    assert checkout.called() == []
    assert not (checkout.root / ".venv").exists()
    done = checkout.source(TORCH_BACKEND="cpu")
    assert done.stderr.endswith(", the active one; TORCH_BACKEND is for .venv alone\n")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_lacks_a_package_is_passed_over(checkout: Checkout, variable: str) -> None:
    (checkout.programs / "lacks").write_text("peft\n")
    done = checkout.source(**{variable: "/opt/mine"})
    assert done.returncode == 0
    said = done.stderr.splitlines()
    assert said[0] == "Python: .venv; /opt/mine is active but lacks peft"
    assert said[1].startswith("Setting up .venv with requirements.txt")
    assert len(said) == 2
    python = checkout.root / ".venv" / "bin" / "python"
    assert checkout.called() == [
        "uv venv --quiet .venv",
        f"uv pip install --quiet --python {python} -r requirements.txt",
    ]
    again = checkout.source(words="source scripts/env.sh; type -P python; bash -c 'source scripts/env.sh'")
    assert (again.stdout, again.stderr) == (f"{python}\n", "Python: .venv\n")  # once, not in scripts that it calls
    assert checkout.called() == []


def test_a_build_of_torch_is_chosen_and_kept(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source(TORCH_BACKEND="cu126").returncode == 0
    python = checkout.root / ".venv" / "bin" / "python"
    install = f"uv pip install --quiet --python {python} --torch-backend cu126 -r .venv/pins.txt"
    assert checkout.called() == ["uv venv --quiet .venv", install]
    names = {line.partition("==")[0] for line in checkout.pins.read_text().splitlines()}
    assert {"torch", "torchvision", "numpy", "transformers"} <= names
    assert not any(name.startswith(("nvidia", "cuda", "triton", "-r", "pytest")) for name in names)
    assert checkout.source().returncode == 0  # unset: the build that is there
    assert checkout.called() == []
    assert checkout.source(TORCH_BACKEND="cpu").returncode == 0  # another one, from nothing
    assert checkout.called() == ["uv venv --quiet .venv", install.replace("cu126", "cpu")]
    assert checkout.source(TORCH_BACKEND="").returncode == 0  # empty: PyPI's
    assert checkout.called() == [
        "uv venv --quiet .venv",
        f"uv pip install --quiet --python {python} -r requirements.txt",
    ]


def test_tests_get_their_packages_with_a_build_of_torch_too(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source(TORCH_BACKEND="cpu", REQUIREMENTS="requirements-dev.txt").returncode == 0
    assert {"torch", "pytest", "numpy"} <= {line.partition("==")[0] for line in checkout.pins.read_text().splitlines()}


def test_a_build_without_the_pinned_torch_gets_its_newest(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    done = checkout.source(TORCH_BACKEND="cu126", UV_FAILS="1")
    assert done.returncode == 0
    assert "TORCH_BACKEND=cu126: the pinned torch did not install; trying the newest torch of this build" in done.stderr
    assert len(checkout.called()) == 3
    pins = (checkout.root / ".venv" / "pins.txt").read_text().splitlines()
    assert {"torch", "torchvision"} <= set(pins)
    assert not any(line.startswith(("torch=", "torchvision=")) for line in pins)


def test_a_build_that_uv_does_not_know_ends_the_set_up(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source(TORCH_BACKEND="cu1", UV_FAILS="2").returncode == 2
    assert len(checkout.called()) == 2
    assert checkout.source(TORCH_BACKEND="cu1").returncode == 0  # nothing passes for installed that is not
    assert len(checkout.called()) == 1


def test_uv_comes_from_pypi_where_a_build_of_torch_asks_for_it(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    program(checkout.root / "stand-ins" / "lacks", "")
    program(checkout.programs / "python3", PYTHON.replace('cp "$0" ', 'cp "$STAND_INS/python" '))
    (checkout.programs / "uv").unlink()
    assert checkout.source(TORCH_BACKEND="cpu").returncode == 0
    called = checkout.called()
    assert called[:2] == ["-m venv .venv", "pip -m pip install --quiet --disable-pip-version-check uv"]
    assert called[2].startswith("uv pip install ")
    assert "--torch-backend cpu" in called[2]


def test_an_old_torch_is_not_taken_for_set_up(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    done = checkout.source(TORCH_BACKEND="cu118", VENV_LACKS="torch 2.11 or newer")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: .venv lacks torch 2.11 or newer after its set-up with TORCH_BACKEND=cu118: see docs/setup.md"
    )


def test_this_python_has_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.lacking("requirements-dev.txt") == ""
    monkeypatch.setitem(packages.OLDEST, "transformers", (99, 1))
    assert packages.lacking("requirements.txt") == "transformers 99.1 or newer"
    monkeypatch.setitem(packages.MODULES, "requirements.txt", "torch no_such_package")
    assert packages.lacking("requirements.txt") == "no_such_package"
    monkeypatch.setattr(packages, "OLDEST_PYTHON", (99, 0))
    assert packages.lacking("requirements.txt") == "Python 99.0 or newer"
