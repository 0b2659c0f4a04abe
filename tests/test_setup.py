"""Set-up by `scripts/env.sh`: which Python the scripts use, and which build of torch `.venv` gets.

Stand-ins for uv and Python write down how they were called, and install nothing.
"""

import re
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
    case "$*" in *"--torch-backend"*) ;; *) exit 0 ;; esac
    pins="${*: -1}"
    if [ "$pins" = --dry-run ]; then pins="${*: -2:1}"; fi
    cat "$pins" >>"$PINS"
    if [ -n "$UV_FAILS" ] && grep -q '^torch==' "$pins"; then exit "$UV_FAILS"; fi ;;
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
        """Lines of what was called, with PINS for the file of chosen pins."""
        return re.sub(r"-r /tmp/\S+", "-r PINS", self.calls.read_text()).splitlines()

    def chosen(self) -> list[str]:
        """The pins that uv was given, of each call."""
        return self.pins.read_text().splitlines()


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """With a Python that has every package, and uv."""
    root, programs = tmp_path / "avg", tmp_path / "programs"
    scripts = [f"scripts/{name}.sh" for name in ("env", "place", "venv", "install", "systems", "datasets/emoji")]
    for name in (*scripts, "requirements.txt", "requirements-dev.txt"):
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
    assert said[0].startswith("Setting up .venv with requirements.txt")
    assert said[1] == "Python: .venv; /opt/mine is active but lacks peft"
    assert len(said) == 2
    python = checkout.root / ".venv" / "bin" / "python"
    assert checkout.called() == [
        "uv venv --quiet .venv",
        f"uv pip install --quiet --python {python} -r requirements.txt",
    ]
    again = checkout.source(words="source scripts/env.sh; type -P python; bash -c 'source scripts/env.sh'")
    assert (again.stdout, again.stderr) == (f"{python}\n", "Python: .venv\n")  # once, not in scripts that it calls
    assert checkout.called() == []


def test_an_environment_that_was_cut_short_is_made_anew(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    (checkout.programs / "uv").unlink()
    python = checkout.root / ".venv" / "bin" / "python"
    program(python, '#!/bin/bash\ncase "$*" in "-m pip"*) echo "No module named pip" >&2; exit 1 ;; esac\n')
    assert checkout.source().returncode == 0
    assert checkout.called()[0] == "-m venv .venv"


def test_a_stamp_is_no_proof_that_the_packages_are_there(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source().returncode == 0
    python = checkout.root / ".venv" / "bin" / "python"
    python.write_text(PYTHON.replace('case "$*" in', 'case "$*" in\n*find_spec*torch*) exit 1 ;;', 1))
    done = checkout.source()
    assert (done.returncode, checkout.called()[-1]) == (
        0, f"uv pip install --quiet --python {python} -r requirements.txt",
    )  # fmt: skip
    python.unlink()  # as that of a system that was upgraded
    assert checkout.source().returncode == 0
    assert checkout.called()[0] == "uv venv --quiet .venv"


def test_a_second_script_waits_for_the_first_ones_environment(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    words = "exec 8<scripts/venv.sh; flock 8; (bash scripts/env.sh >said 2>&1; echo $? >>said) 8<&- & "
    words += "for _ in {1..400}; do if grep -qs Waiting said; then break; fi; sleep 0.05; done; "
    words += "cat said; exec 8<&-; wait; cat said"
    done = checkout.source(words=words)
    before, after = done.stdout.split("sets up .venv ...\n", 1)
    assert before == "Waiting for another script, which "
    assert "Setting up .venv" in after
    assert after.endswith("\n0\n")


def test_a_build_of_torch_is_chosen_and_kept(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source(TORCH_BACKEND="cu126").returncode == 0
    python = checkout.root / ".venv" / "bin" / "python"
    install = f"uv pip install --quiet --python {python} --torch-backend cu126 -r PINS"
    assert checkout.called() == ["uv venv --quiet .venv", f"{install} --dry-run", install]
    names = {line.partition("==")[0] for line in checkout.chosen()}
    assert {"torch", "torchvision", "numpy", "transformers"} <= names
    assert not any(name.startswith(("nvidia", "cuda", "triton", "-r", "pytest")) for name in names)
    assert checkout.source().returncode == 0  # unset: the build that is there
    assert checkout.called() == []
    assert checkout.source(TORCH_BACKEND="cpu").returncode == 0  # another one, from nothing
    install = install.replace("cu126", "cpu")
    assert checkout.called() == [
        f"{install} --dry-run",
        "uv venv --quiet .venv",
        install,
    ]
    assert checkout.source(TORCH_BACKEND="").returncode == 0  # empty: PyPI's
    assert checkout.called() == [
        "uv venv --quiet .venv",
        f"uv pip install --quiet --python {python} -r requirements.txt",
    ]


def test_tests_get_their_packages_with_a_build_of_torch_too(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source(TORCH_BACKEND="cpu", REQUIREMENTS="requirements-dev.txt").returncode == 0
    assert {"torch", "pytest", "numpy"} <= {line.partition("==")[0] for line in checkout.chosen()}


def test_a_build_without_the_pinned_torch_gets_its_newest(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    done = checkout.source(TORCH_BACKEND="cu126", UV_FAILS="1")
    assert done.returncode == 0
    assert "TORCH_BACKEND=cu126: no such build of the pinned torch; taking the newest torch that has one" in done.stderr
    assert len(checkout.called()) == 4
    torch = [line for line in checkout.chosen() if re.match("torch(=|$)", line)]
    assert torch[0].startswith("torch==")
    assert set(torch[-2:]) == {"torch"}  # installed


def test_a_build_that_uv_does_not_know_costs_nothing(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    assert checkout.source().returncode == 0
    (checkout.root / ".venv" / "bin" / "mine").touch()
    assert checkout.source(TORCH_BACKEND="cu1", UV_FAILS="2").returncode == 2
    assert len(checkout.called()) == 1
    assert (checkout.root / ".venv" / "bin" / "mine").exists()
    assert checkout.source().returncode == 0
    assert checkout.called() == []  # the environment that was there


def test_the_environment_may_be_a_link(checkout: Checkout) -> None:
    (checkout.programs / "lacks").write_text("torch\n")
    (checkout.root.parent / "volume" / "lost+found").mkdir(parents=True)
    (checkout.root / ".venv").symlink_to(checkout.root.parent / "volume")
    assert checkout.source().returncode == 0
    assert (checkout.root / ".venv").is_symlink()
    assert sorted(path.name for path in (checkout.root.parent / "volume").iterdir())[-1] == "torch-backend"


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
