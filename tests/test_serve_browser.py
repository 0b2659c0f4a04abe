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


def drop(page: Any, files: dict[str, bytes], target: str = "main") -> None:
    """Drop files on a part of the page."""
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
        page.dispatch_event(target, event, {"dataTransfer": transfer})


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
    page.locator("#query").fill("red " * 300)  # the field cuts nothing in silence
    page.locator("form button").click()
    assert page.locator("#problem").text_content() == "The query has 1,199 characters, 1,000 are allowed: shorten it."
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


def test_a_search_by_a_picture_that_stays_outside(opened: Open, tmp_path: Path) -> None:
    page, _, service, complaints = opened
    draw_picture(tmp_path / "mine.png", "blue", "ring", 3)
    ask(page, "a red circle")
    page.locator("#picture").set_input_files(tmp_path / "mine.png")
    until(page, "document.title.startsWith('Like mine.png')")
    settle(page)
    expected = service.retriever.search_image(tmp_path / "mine.png", k=20)
    assert names(page, "pictures") == [found.image for found in expected]
    assert page.locator("#answer-title").text_content() == "Pictures like your mine.png"
    page.locator("#count").select_option("10")  # the controls are for this search too
    until(page, "document.querySelectorAll('#pictures .card').length === 10")
    drop(page, {"a.png": (tmp_path / "mine.png").read_bytes(), "b.png": b"x"}, "#search")
    until(page, "document.title.startsWith('Like a.png')")
    until(page, "document.getElementById('news').textContent.startsWith('Searched by a.png alone')")
    assert len(service.retriever) == 48  # nothing was inserted
    page.go_back()
    until(page, "document.title.startsWith('Like') === false")
    assert complaints == []
    drop(page, {"words.png": b"no picture"}, "#search")
    page.wait_for_selector("#problem:visible")
    assert "Words.png is not a picture that can be read" in page.locator("#problem").text_content()


def test_near_duplicates_the_cut_off_and_what_is_not_read(opened: Open, chain: Chain) -> None:
    page, _, service, complaints = opened
    copies = {f"copy {number}.png": (chain.root / "images" / "red-circle.png").read_bytes() for number in range(3)}
    drop(page, copies)
    until(page, "document.getElementById('news').textContent === '3 pictures were inserted.'")
    ask(page, "a red circle")
    assert page.locator("#pictures .folded:visible").count() == 0
    page.locator("#fold").check()
    until(page, "document.querySelectorAll('#pictures .folded:not([hidden])').length > 0")
    settle(page)
    [expected] = service.retriever.search(["a red circle"], k=20, beams=50, fold=True)
    assert names(page, "pictures") == [found.image for found in expected]
    stands = next(found for found in expected if found.folded)
    details = page.locator("#pictures .card", has_text=stands.image).locator(".folded").first
    assert re.fullmatch(rf"\+{len(stands.folded)} near-duplicates?", details.locator("summary").text_content())
    details.locator("summary").click()
    until(page, "document.querySelector('.folded[open] img') !== null")
    assert [each.get_attribute("alt") for each in details.locator("img").all()] == [one.image for one in stands.folded]
    similar = page.locator("#pictures .similarity").all_text_contents()
    assert similar == [f"cos {one.similarity:.2f}".replace("-", "\u2212") for one in expected]

    page.locator("#least").fill("1")
    page.locator("#least").dispatch_event("change")
    page.wait_for_selector("#none:visible")
    assert page.locator("#none").text_content() == (
        "No picture is close to “a red circle”: none that was found has a similarity of 1.00 or more."
    )
    assert "min_similarity=1" in page.url
    assert "fold=true" in page.url
    page.reload()
    page.wait_for_selector("#none:visible")
    assert page.locator("#fold").is_checked()

    page.locator("#least").fill("0")
    ask(page, "small " * 60)
    told = page.locator("#unread").text_content()
    assert "Words 15 and on of the query are not read by the text tower, which reads 16 tokens." in told
    ask(page, "a ring")
    assert page.locator("#unread:visible").count() == 0
    assert complaints == []


def test_a_picture_whose_file_is_gone_is_marked(opened: Open, tmp_path: Path) -> None:
    page, _, service, complaints = opened
    draw_picture(tmp_path / "late.png", "red", "circle", 5)
    drop(page, {"late.png": (tmp_path / "late.png").read_bytes()})
    until(page, "document.getElementById('news').textContent === '1 picture was inserted.'")
    (service.uploads / "late.png").unlink()
    page.locator("#count").select_option("50")
    ask(page, "a red circle")
    card = page.locator("#pictures .card", has_text="uploads/late.png")
    assert card.locator(".missing").text_content() == "file is gone"
    assert card.locator("img").count() == 0
    assert page.locator("#pictures .missing").count() == 1
    assert [each for each in complaints if "404" not in each] == []  # the card of the insertion may load late
