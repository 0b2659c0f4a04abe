"""The Gradio Space, over an exported retriever: what it needs, and what it answers."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import SpaceCard
from PIL import Image

import package
from retriever import Retriever
from tests.test_api import CPU

SPACE = Path(__file__).parent.parent / "space"


@pytest.fixture(scope="module")
def exported(index: Path, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "toy"
    return Retriever.from_runs(index=index, retriever=retriever, **CPU).save_pretrained(folder, include_pictures=True)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """space/app.py, with the checkout's package in the place of the installed one."""
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install gradio)")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setitem(sys.modules, "avg", package)
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_is_what_the_hub_takes_for_a_space() -> None:
    data: dict[str, Any] = SpaceCard.load(SPACE / "README.md").data.to_dict()
    assert data["sdk"] == "gradio"
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["sdk_version"])
    assert (SPACE / data["app_file"]).is_file()
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") for line in lines)  # the address is the user's own


def test_it_uses_nothing_but_the_packages_public_names() -> None:
    names = re.findall(r"^from avg import (.*)$", (SPACE / "app.py").read_text(), re.MULTILINE)
    assert [set(line.split(", ")) <= set(package.__all__) for line in names] == [True]
    assert "avg." not in (SPACE / "app.py").read_text()


def test_words_and_pictures_are_answered_with_thumbnails(app: ModuleType, exported: Path) -> None:
    retriever = Retriever.load(exported, **CPU)
    expected = retriever.search(["a red circle"], k=4)[0]
    pictures, notes = app.by_words(retriever, "a red circle", 4)
    assert [label for _, label in pictures] == [f"{one.score:.2f}  {one.image}" for one in expected]
    assert all(max(picture.size) <= app.SIDE for picture, _ in pictures)
    assert notes == ""
    pictures, _ = app.by_picture(retriever, Image.open(expected[0].file), 1)
    assert [label.split()[1] for _, label in pictures] == [expected[0].image]


def test_what_cannot_be_shown_is_said(app: ModuleType, exported: Path) -> None:
    retriever = Retriever.load(exported, **CPU)
    _, notes = app.by_words(retriever, "a red circle " * 200, 3)
    assert "reads" in notes
    [found] = retriever.search(["a red circle"], k=1)
    hidden = found[0].file.rename(found[0].file.with_suffix(".hidden"))
    try:
        pictures, notes = app.by_words(retriever, "a red circle", 1)
    finally:
        hidden.rename(found[0].file)
    assert (pictures, notes) == ([], f"found, but without a file here: {found[0].image}")
    content = found[0].file.read_bytes()
    found[0].file.write_bytes(content[: len(content) // 2])
    try:
        pictures, notes = app.by_words(retriever, "a red circle", 2)
    finally:
        found[0].file.write_bytes(content)
    assert len(pictures) == 1
    assert notes.startswith(f"found, but not shown: {found[0].image}: picture unreadable")
    calls: list[Callable[[], object]] = [
        lambda: app.by_words(retriever, "  ", 3),
        lambda: app.by_picture(retriever, None, 3),
    ]
    for call, said in zip(calls, ("an empty query finds nothing", "there is no picture"), strict=True):
        with pytest.raises(app.gr.Error, match=said):
            call()


def test_the_page_is_served_on_this_machine(app: ModuleType, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("gradio_client")
    page = app.make_page(Retriever.load(exported, **CPU))
    page.launch(server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True)
    try:
        answer, notes = client.Client(page.local_url, verbose=False).predict("a red circle", 2, api_name="/words")
    finally:
        page.close()
    assert len(answer) == 2
    assert all(Path(each["image"]).is_file() for each in answer)
    assert notes == ""


@pytest.mark.parametrize(
    ("name", "said"), [("", "set the variable RETRIEVER"), ("nothing", "there is no folder nothing")]
)
def test_a_space_without_a_retriever_says_so(
    app: ModuleType, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRIEVER", name)
    with pytest.raises(SystemExit, match=said):
        app.main()
