"""The package `avg` inside an exported folder, so that pip alone can install what reads the folder.

It is built from the checkout that exports. A retriever loaded from an exported folder passes on that package.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tools import runs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "package", "models", "tools", "retriever")
RUNS = ("data", "output")  # of the retriever's folder: what its commands wrote
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
PACKAGE = "package"  # the part of an exported folder


def write_package(folder: Path, earlier: Path | None) -> Path | None:
    """Write the package into a folder that is made for it; returns the wheel, or None where it cannot be made.

    Args:
        earlier: the same part of the exported folder that the retriever was loaded from.
    """
    if earlier is not None and (wheel := wheel_in(earlier)) is not None:
        folder.mkdir()
        return Path(shutil.copy(wheel, folder))
    built = _built()
    if built is None:
        return None
    folder.mkdir()
    name, content = built
    (folder / name).write_bytes(content)
    return folder / name


def wheel_in(folder: Path) -> Path | None:
    """The package in that part of an exported folder."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def copy_sources(folder: Path) -> None:
    """Copy what the package is built from, so that the checkout stays as it is."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=_left_out)
        else:
            shutil.copy(source, folder / name)


def _left_out(place: str, names: list[str]) -> set[str]:
    runs_here = RUNS if Path(place) == ROOT / "retriever" else ()
    return {"__pycache__", *runs_here} & set(names)


@cache
def _built() -> tuple[str, bytes] | None:
    """Name and content of the wheel of this checkout, whose version has its commit; None outside one, or where
    setuptools fails."""
    if not (ROOT / "pyproject.toml").is_file():
        return None
    with tempfile.TemporaryDirectory() as temporary:
        sources, wheels = Path(temporary) / "sources", Path(temporary) / "wheels"
        sources.mkdir()
        copy_sources(sources)
        project = sources / "pyproject.toml"
        commit, plus, changes = runs.current_commit(ROOT).partition("+")
        local = f"{commit[:12]}{plus.replace('+', '.')}{changes}"
        text = project.read_text(encoding="utf-8")
        project.write_text(re.sub(r'(?m)^version = "([\d.]+)"', rf'version = "\1+{local}"', text), encoding="utf-8")
        done = subprocess.run([sys.executable, "-c", BUILD, wheels], cwd=sources, capture_output=True, check=False)
        wheel = wheel_in(wheels)
        if done.returncode or wheel is None:
            return None
        return wheel.name, wheel.read_bytes()
