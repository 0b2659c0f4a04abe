"""The search page in headless Chromium, as a person uses it. Skipped where there is no Playwright or Chromium."""

import base64
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from retriever.serve.service import Service
from tests.chain import Chain
from tests.pages import make_service, served
from tests.tiny import draw_picture

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKUP = "<img src=x onerror=alert(1)> ü & 100%.png"
SECONDS = 20

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")


class Open(NamedTuple):
    """A page in a browser, and what it speaks to."""

    page: Any
    address: str
    service: Service
    complaints: list[str]
    """Errors of its scripts, dialogs, and requests to other servers."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any, index: Path, retriever: Path, tmp_path: Path) -> Iterator[Open]:
    service = make_service(Path(shutil.copytree(index, tmp_path / "index")), retriever)
    with served(service) as address:
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        complaints: list[str] = []

        def refuse(dialog: Any) -> None:
            complaints.append(dialog.message)
            dialog.dismiss()

        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend([message.text] * (message.type in ("error", "warning"))))
        page.on("dialog", refuse)
        page.on("request", lambda request: complaints.extend(foreign(request.url, address)))
        page.goto(address)
        yield Open(page, address, service, complaints)
        page.close()


def foreign(url: str, address: str) -> list[str]:
    """The address of a request, where it leads elsewhere."""
    return [] if url.startswith((address, "blob:")) else [url]


def until(page: Any, expression: str, argument: str | None = None) -> None:
    """Wait until an expression is true; the page's policy forbids Playwright's own way, which is `eval`."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end, f"{expression} did not come true: {page.locator('body').inner_text()}"
        page.wait_for_timeout(20)


def names(page: Any, grid: str) -> list[str]:
    """Ids in a grid, best first."""
    texts: list[str] = page.locator(f"#{grid} .name").all_text_contents()
    return texts


def ask(page: Any, query: str) -> None:
    """Search with the keyboard, and wait for the answer."""
    page.locator("#query").fill(query)
    page.keyboard.press("Enter")
    until(page, "text => document.title.startsWith(text)", query)
    settle(page)


def settle(page: Any) -> None:
    """Wait until an answer is drawn and its pictures are loaded."""
    page.wait_for_selector("#answers:not([aria-busy])", state="attached")
    until(page, "[...document.querySelectorAll('#answers img')].every(image => image.complete)")


def drop(page: Any, files: dict[str, bytes]) -> None:
    """Drop files on the page."""
    encoded = [[name, base64.b64encode(content).decode()] for name, content in files.items()]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, content] of files) {
                const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        encoded,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": transfer})


def test_search_insert_find_and_remove(opened: Open, chain: Chain) -> None:
    page, _, service, complaints = opened
    assert page.evaluate("document.activeElement.id") == "query"
    until(page, "document.getElementById('pool').textContent === '48 pictures can be found'")
    page.locator("#count").select_option("50")
    ask(page, "a red circle")
    [expected] = service.retriever.search(["a red circle"], k=50)
    assert names(page, "pictures") == [found.image for found in expected]
    assert page.evaluate("[...document.querySelectorAll('#pictures img')].every(image => image.naturalWidth > 0)")

    picture = (chain.root / "images" / "red-circle.png").read_bytes()
    drop(page, {MARKUP: picture, "words.png": b"no picture"})
    until(page, "document.getElementById('news').textContent === '1 picture was inserted.'")
    settle(page)
    assert page.locator("#pool").text_content() == "49 pictures can be found"
    assert "words.png is not a picture that can be read" in page.locator("#refused").text_content()
    image = f"uploads/{MARKUP}"
    assert names(page, "inserted") == [image]
    assert image in names(page, "pictures")  # the search was repeated
    ask(page, "a red ring")
    assert image in names(page, "pictures")

    page.locator("#pictures .card", has_text=image).locator(".picture").click()
    until(page, "id => document.title.startsWith('Like ' + id)", image)
    settle(page)
    assert names(page, "pictures")[1:11] == [found.image for found in service.retriever.similar(image, by="vokens")]
    page.locator("#by").select_option("features")
    until(page, "document.getElementById('answer-note').textContent.includes('cosine')")
    settle(page)
    assert names(page, "pictures")[:2] == [image, "red-circle.png"]  # of which it is a copy
    page.go_back()
    until(page, "document.getElementById('answer-note').textContent.includes('vokens')")
    page.go_back()
    until(page, "document.title.startsWith('a red ring')")
    settle(page)

    page.locator("#pictures .card", has_text=image).locator(".remove").click()
    until(page, "document.getElementById('pool').textContent === '48 pictures can be found'")
    settle(page)
    assert image not in names(page, "pictures")
    assert names(page, "inserted") == []
    assert page.locator("#pictures .remove:visible").count() == 0
    assert complaints == []


def test_switches_and_the_address(opened: Open) -> None:
    page, address, service, complaints = opened
    page.goto(f"{address}/?q=a+blue+line&beams=7&rerank=true&share=0.8&k=10&two_tower=true")
    page.wait_for_selector("#pictures .card")
    settle(page)
    retriever = service.retriever
    [expected], [beside] = (
        retriever.search(["a blue line"], beams=7, share=0.8),
        retriever.two_tower(["a blue line"], k=10),
    )
    assert names(page, "pictures") == [found.image for found in expected]
    assert names(page, "beside-pictures") == [found.image for found in beside]
    assert "re-ranked by features, share 0.80" in page.locator("#answer-note").text_content()
    page.locator("#rerank").uncheck()
    until(page, "document.getElementById('answer-note').textContent.endsWith('not re-ranked')")
    settle(page)
    [plain] = retriever.search(["a blue line"], beams=7, rerank=False)
    assert names(page, "pictures") == [found.image for found in plain]
    assert "rerank=false" in page.url
    shown = names(page, "pictures")
    page.reload()
    page.wait_for_selector("#pictures .card")
    settle(page)
    assert names(page, "pictures") == shown
    page.locator("#two-tower").uncheck()
    page.wait_for_selector("#beside", state="hidden")

    details = page.locator("#pictures .vokens").first
    details.locator("summary").click()
    page.wait_for_selector("#pictures .step")
    steps = retriever.vokens("a blue line", plain[0].codes, top=3)
    assert details.locator(".written span:nth-child(2)").all_text_contents() == [step.written.token for step in steps]
    assert complaints == []


def test_mistakes_are_told_in_words(opened: Open) -> None:
    page, address, service, complaints = opened
    page.locator("#query").fill("   ")
    page.locator("form button").click()
    assert page.locator("#problem").text_content() == "Write some words to search for."
    page.goto(f"{address}/?like=no+such.png")
    page.wait_for_selector("#problem:visible")
    assert page.locator("#problem").text_content() == "No picture of the index is called no such.png."
    assert [each for each in complaints if "404" not in each] == []  # Chromium writes that down itself
    service.answers.close()
    page.goto(f"{address}/?q=a+ring")
    page.wait_for_selector("#problem:visible")
    assert page.locator("#problem").text_content() == "Too many requests wait: try again in a moment."


@pytest.mark.parametrize("path", ["/?q=a+red+ring&two_tower=true", "/docs"])
def test_it_fits_narrow_windows_and_screen_readers(path: str, opened: Open, tmp_path: Path) -> None:
    page, address, _, complaints = opened
    page.set_viewport_size({"width": 340, "height": 700})
    page.goto(address + path)
    page.wait_for_selector("#pictures .card, section table")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input:not([type=file]), select, button, img')].filter(each => !(
            each.labels?.length || each.textContent.trim() || each.alt || each.querySelector('img[alt]:not([alt=""])')
        )).map(each => each.outerHTML)"""
    )
    assert unnamed == []
    assert complaints == []


def test_pictures_can_be_chosen_with_a_dialogue(opened: Open, tmp_path: Path) -> None:
    page, _, service, complaints = opened
    for number in range(3):
        draw_picture(tmp_path / f"n° {number}.png", "black", "cross", number)
    until(page, "document.getElementById('pool').textContent !== ''")
    page.locator("#files").set_input_files(sorted(tmp_path.glob("*.png")))
    until(page, "document.getElementById('news').textContent === '3 pictures were inserted.'")
    assert sorted(names(page, "inserted")) == [f"uploads/n° {number}.png" for number in range(3)]
    assert len(service.retriever) == 51
    assert re.fullmatch(r"51 pictures can be found", page.locator("#pool").text_content())
    assert complaints == []
