"""Every example of docs/layouts.md is made and read by the command that stands below it."""

import re
import shlex
from pathlib import Path

import pytest
import tyro
from PIL import Image

from tools import prepare_captions
from tools.captions import read_captions

PAGE = Path(__file__).parent.parent / "docs" / "layouts.md"
PART = re.compile(r"^(#+ [^\n]*)$|^`([^`\n]+)`:$|^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CAR, DOG = ("A red car", "A car"), ("A dog",)
# Split and captions of each picture, in the order of the commands on the page
EXPECTED = [
    {"a.jpg": ("train", ("A red car, parked", 'A car that says "taxi"')), "b.jpg": ("val", DOG)},
    {"a.jpg": ("test", ("A red car, parked", "A car")), "b.jpg": ("test", ("A dog", "A hound"))},
    {"a.jpg": ("test", CAR), "b.jpg": ("test", ("A dog", "A hound"))},
    {"a.jpg": ("test", ("A red car", "Ein rotes Auto")), "b.jpg": ("test", ("A dog", "Ein Hund"))},
    {"images/a.jpg": ("train", ('"Stop" says the sign',)), "images/b.jpg": ("train", ('A 5" ruler',))},
    {"a.jpg": ("test", ("A red car .", "A car is parked ."))},
    {"a.jpg": ("test", ("A red car .", "A car is parked ."))},
    {"a.jpg": ("test", ("A red car , parked .",)), "b.jpg": ("test", ("A dog .",))},
    {"a.jpg": ("train", CAR), "dog": ("test", DOG)},
    {"a.jpg": ("test", ("A red car",)), "b.jpg": ("test", DOG)},
    {"a.jpg": ("train", CAR), "b.jpg": ("train", DOG)},
    {"a.jpg": ("train", CAR), "b.jpg": ("test", DOG)},
    {"images/a.jpg": ("val", CAR), "images/b.jpg": ("val", DOG)},
    {"a.jpg": ("test", CAR), "b.jpg": ("test", DOG)},
    {"a.jpg": ("train", CAR), "b.jpg": ("test", DOG)},
    {"a.jpg": ("test", CAR), "b.jpg": ("test", DOG)},
    {"a.jpg": ("train", CAR), "b.jpg": ("train", DOG)},
    {"a": ("test", ("A red car",))},
    {"a.jpg": ("test", ("A red car",))},
    {"a.jpg": ("test", ()), "b.jpg": ("test", ())},
]


def examples() -> list[tuple[str, list[tuple[str, str]], str]]:
    """Heading, files (their names, or "python" for a program that makes them) and command of each example."""
    found, heading, name = [], "", ""
    files: list[tuple[str, str]] = []
    for match in PART.finditer(PAGE.read_text()):
        if match[1]:
            heading = match[1].strip("# ")
        elif match[2]:
            name = match[2]
        elif match[3] == "bash":
            found.append((heading, files, match[4]))
            files = []
        else:
            files = [*files, (match[3] or name, match[4])]
    return found


EXAMPLES = examples()


def test_each_example_has_an_expectation() -> None:
    assert len(EXAMPLES) == len(EXPECTED)
    assert all(len(content.splitlines()) <= 8 for _, files, _ in EXAMPLES for _, content in files)


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[f"{n}: {each[0]}" for n, each in enumerate(EXAMPLES)])
def test_an_example_is_read(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files, command = EXAMPLES[number]
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "data"):
        Path(folder).mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(f"images/{name}.jpg")
    for name, content in files:
        if name == "python":
            exec(compile(content, "docs/layouts.md", "exec"), {})
        else:
            Path(name).write_text(content)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.prepare_captions"]
    prepare_captions.main(tyro.cli(prepare_captions.Config, args=[*words[3:], "--workers", "0"]))
    read = read_captions(Path("out"))
    assert {record.image: (record.split, record.captions) for record in read.records} == EXPECTED[number]
    assert all((read.images / record.file).is_file() for record in read.records)
