"""One set of versions: environment.yml and pyproject.toml against requirements.txt."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONDA_ONLY = {"python", "pip", "nodejs"}


def pins(path: Path) -> dict[str, set[str]]:
    """Package -> versions, over all environment markers."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line):
            found.setdefault(normal(match[1]), set()).add(match[2])
    return found


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def environment() -> dict[str, str]:
    """Package -> version of environment.yml, pip's included."""
    found = {}
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        lines = entry["pip"] if isinstance(entry, dict) else [entry]
        for line in lines:
            name, _, version = re.sub("==", "=", line).partition("=")
            found[normal(name)] = version
    return found


def direct_dependencies() -> set[str]:
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert block is not None
    return {normal(name) for name in re.findall(r'"([^"]+)"', block[1])}


def test_environment_is_named_avg() -> None:
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"] == "avg"


def test_environment_has_the_versions_of_the_requirements() -> None:
    required = pins(ROOT / "requirements.txt")
    for name, version in environment().items():
        if name in CONDA_ONLY:
            continue
        pinned = required["faiss-cpu" if name == "faiss-gpu" else name]
        assert version in pinned, f"environment.yml has {name} {version}, requirements.txt {pinned}"


def test_environment_lists_the_direct_dependencies_and_no_others() -> None:
    listed = set(environment()) - CONDA_ONLY
    assert (listed - {"faiss-gpu"}) | {"faiss-cpu"} == direct_dependencies()


def test_requirements_are_exact() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.match(r"#|-r requirements.txt$|[A-Za-z0-9_.-]+==[^ ;]+( ;.*)?$", line), f"{name}: {line}"
