"""One set of versions: requirements.txt, which environment.yml installs and pyproject.toml names the roots of."""

import re
from pathlib import Path

import yaml

from tools.packages import OLDEST

ROOT = Path(__file__).parent.parent
CONDA_ONLY = ["python=3.11", "pip", "nodejs"]


def pins(path: Path) -> dict[str, set[str]]:
    """Package -> versions, over all environment markers."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line):
            found.setdefault(normal(match[1]), set()).add(match[2])
    return found


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def direct_dependencies() -> dict[str, tuple[int, ...]]:
    """Package -> its oldest version, of a search and of all extras together."""
    text = (ROOT / "pyproject.toml").read_text()
    blocks = re.findall(r"^dependencies = \[(.*?)^\]|^\[project.optional-dependencies\]$(.*?)^\[", text, re.M | re.S)
    found = re.findall(r'"([A-Za-z0-9_-]+)(?:>=([\d.]+))?"', "".join(map("".join, blocks)))
    return {normal(name): version_of(oldest) for name, oldest in found}


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def test_environment_is_named_avg() -> None:
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"] == "avg"


def test_conda_brings_python_alone_and_pip_the_pins() -> None:
    """So nothing is solved that pip has not solved: conda-forge has other builds of these packages, or none."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == [*CONDA_ONLY, {"pip": ["-r requirements.txt"]}]


def test_the_pins_have_every_direct_dependency() -> None:
    assert direct_dependencies().keys() <= pins(ROOT / "requirements.txt").keys()
    assert {"torch", "numpy", "transformers", "fastapi", "peft", "wandb"} <= direct_dependencies().keys()


def test_the_pins_are_not_older_than_the_package_allows() -> None:
    pinned = pins(ROOT / "requirements.txt")
    for name, oldest in direct_dependencies().items():
        assert all(version_of(version) >= oldest for version in pinned[name]), name


def test_the_package_and_the_checkout_ask_for_the_same_oldest_versions() -> None:
    assert {name: direct_dependencies()[name] for name in OLDEST} == OLDEST


def test_condas_python_is_one_that_the_pins_know() -> None:
    required = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert required is not None
    assert int(required[1]) <= int(CONDA_ONLY[0].rpartition(".")[2])


def test_requirements_are_exact() -> None:
    for name in ("requirements.txt", "requirements-cluster.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.match(r"#|-r requirements.txt$|[A-Za-z0-9_.-]+==[^ ;]+( ;.*)?$", line), f"{name}: {line}"


def test_the_pins_of_the_cluster_have_the_extras_packages_and_move_no_other() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^cluster = \[(.*)\]", text, re.MULTILINE)
    assert extra is not None
    beside = pins(ROOT / "requirements-cluster.txt").keys()
    assert {name.partition("[")[0] for name in re.findall(r'"([^"]+)"', extra[1])} <= beside
    assert not beside & pins(ROOT / "requirements.txt").keys()
