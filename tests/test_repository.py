"""What stands around the code: workflows, hooks, image and site name things that are there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def scripts_in(text: str) -> set[str]:
    return set(re.findall(r"bash (scripts/[\w/]+\.sh)", text))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_pins_major_versions(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_the_scripts_that_they_run_are_there() -> None:
    files = [*WORKFLOWS, *(ROOT / name for name in ("Dockerfile", "CONTRIBUTING.md", ".pre-commit-config.yaml"))]
    found = set[Path]().union(*(scripts_in(path.read_text()) for path in files))
    found |= scripts_in((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert {"scripts/test.sh", "scripts/pythons.sh", "scripts/quickstart.sh", "scripts/dev.sh"} <= found
    assert all((ROOT / script).is_file() for script in found)


def test_ci_does_what_the_local_ci_does() -> None:
    local = set(re.findall(r"\$scripts/(\w+\.sh)", (ROOT / ".ci" / "run").read_text()))
    commands = " ".join(step.get("run", "") for step in steps(ROOT / ".github" / "workflows" / "tests.yml"))
    assert {Path(script).name for script in scripts_in(commands)} == local


def test_the_pythons_of_ci_are_those_that_are_checked() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    checked = re.search(r"PYTHONS:-([\d. ]+)\}", (ROOT / "scripts" / "pythons.sh").read_text())
    assert checked is not None
    assert jobs["tests"]["strategy"]["matrix"]["python"] == checked[1].split()
    (setup,) = [step for step in jobs["pythons"]["steps"] if "setup-python" in step.get("uses", "")]
    assert sorted(setup["with"]["python-version"].split(), key=lambda each: int(each[2:])) == checked[1].split()


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    places = {name: set(ROOT.glob(name)) for names in copied for name in names if name != "."}
    assert all(places.values())
    found = set[Path]().union(*places.values())
    assert not {path.relative_to(ROOT).as_posix() for path in found} & set(ignored)
    assert set(ROOT.glob("requirements*.txt")) <= found  # venv.sh would else find other pins than those of the image
    assert json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())["build"]["dockerfile"]


def test_the_site_lists_pages_that_are_there() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for part in config["nav"] for pages in part.values() if isinstance(pages, list) for page in pages]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(listed) == len(set(listed)) > 10
    assert set(listed) <= pages | {"contributing.md", "changelog.md"}
