"""The search page's server: answers, batches, pictures that come and go, and whom it refuses."""

import asyncio
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from benchmarks import serve as bench
from retriever.gallery import add as add_pictures
from retriever.gallery import build as build_index
from retriever.serve import serve, uploads
from retriever.serve import service as services
from retriever.serve.batching import Batcher, Busy
from retriever.serve.guard import Guard
from retriever.serve.service import Service
from retriever.serve.web import MOST_PICTURES, PAGE, make_app
from tests.chain import Chain
from tests.pages import make_service, served
from tests.tiny import draw_picture
from tools.errors import BadInput

ROOT = Path(__file__).parent.parent
HERE = "http://127.0.0.1:7860"
WIDE = {"k": 64, "beams": 64}  # all pictures of the index
SCRIPT = "<script>alert(1)</script>.png"


@pytest.fixture
def folder(index: Path, tmp_path: Path) -> Path:
    """An index of 48 pictures that the test may change."""
    return Path(shutil.copytree(index, tmp_path / "index"))


@pytest.fixture
def service(folder: Path, retriever: Path) -> Service:
    return make_service(folder, retriever)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url=HERE, raise_server_exceptions=False) as client:
        yield client


def drawn(colour: str = "red", shape: str = "circle", seed: int = 7, *, kind: str = "PNG") -> bytes:
    """A picture as a file's content."""
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as buffer:
        draw_picture(Path(folder) / "x.png", colour, shape, seed)
        with Image.open(Path(folder) / "x.png") as picture:
            picture.save(buffer, kind)
        return buffer.getvalue()


def blank(width: int, height: int) -> bytes:
    with io.BytesIO() as buffer:
        Image.new("RGB", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()


def insert(client: httpx.Client | TestClient, **pictures: bytes) -> Any:
    return client.post("/api/pictures", files=[("pictures", (name, content)) for name, content in pictures.items()])


def ids(pictures: Sequence[dict[str, Any]]) -> list[str]:
    return [picture["id"] for picture in pictures]


def everything(client: TestClient, query: str = "a red circle") -> set[str]:
    """Ids of all pictures that a search can find."""
    return set(ids(client.get("/api/search", params={"q": query, **WIDE}).json()["pictures"]))


def test_an_answer_is_the_retrievers(client: TestClient, service: Service) -> None:
    for options in ({}, {"rerank": False}, {"beams": 7, "k": 3}, {"share": 0.8}, {"share": 0.0}):
        answer = client.get("/api/search", params={"q": " a red circle ", **options}).json()
        [expected] = service.retriever.search(["a red circle"], **options)
        assert ids(answer["pictures"]) == [found.image for found in expected]
        assert [one["score"] for one in answer["pictures"]] == pytest.approx([one.score for one in expected], abs=1e-4)
        assert [tuple(one["codes"]) for one in answer["pictures"]] == [one.codes for one in expected]
        assert answer["query"] == "a red circle"
        assert answer["two_tower"] is None
        assert answer["pool"] == 48
        assert answer["share"] == (
            0 if options.get("rerank") is False else options.get("share", service.retriever.source.share)
        )
        assert answer["beams"] == options.get("beams", 50 if answer["share"] else 10)
        assert min(value for value in answer["timings"].values() if value is not None) >= 0


def test_two_tower_results_stand_beside(client: TestClient, service: Service) -> None:
    answer = client.get("/api/search", params={"q": "a red circle", "k": 5, "two_tower": True}).json()
    [expected] = service.retriever.two_tower(["a red circle"], k=5)
    assert ids(answer["two_tower"]) == [found.image for found in expected]
    assert len(answer["two_tower"]) == 5
    assert answer["timings"]["two_tower"] > 0


def test_vokens_and_alike_pictures(client: TestClient, service: Service) -> None:
    [[found]] = service.retriever.search(["a red circle"], k=1)
    answer = client.get("/api/vokens", params={"q": "a red circle", "id": found.image, "top": 2}).json()
    steps = service.retriever.vokens("a red circle", found.codes, top=2)
    assert [level["written"]["code"] for level in answer["levels"]] == list(found.codes)
    assert [level["written"]["token"] for level in answer["levels"]] == [step.written.token for step in steps]
    assert [len(level["alternatives"]) for level in answer["levels"]] == [len(step.alternatives) for step in steps]
    assert all(0 <= level["written"]["probability"] <= 1 for level in answer["levels"])
    alike = client.get("/api/similar/red-circle.png", params={"k": 4, "by": "features"}).json()
    assert alike["picture"]["id"] == "red-circle.png"
    assert alike["by"] == "features"
    assert ids(alike["pictures"]) == [one.image for one in service.retriever.similar("red-circle.png", k=4)]


def test_pictures_whose_codes_begin_alike(client: TestClient, service: Service) -> None:
    """In the order of the vokens they share, then of their features, counted by hand."""
    gallery = service.retriever.gallery
    own = gallery.row("red-circle.png")
    cosines = gallery.read_features().astype(np.float32) @ gallery.read_features()[own].astype(np.float32)
    codes = gallery.read_codes().tolist()

    def leading(row: int) -> int:
        return next((level for level in range(3) if codes[row][level] != codes[own][level]), 3)

    others = sorted(set(range(48)) - {own}, key=lambda row: (-leading(row), -cosines[row]))
    answer = client.get("/api/similar/red-circle.png", params={"k": 20}).json()
    assert answer["by"] == "vokens"
    assert ids(answer["pictures"]) == [gallery.picture(row).image for row in others[:20]]
    assert [picture["score"] for picture in answer["pictures"]] == [leading(row) for row in others[:20]]
    assert {leading(row) for row in others[:20]} >= {0, 1}


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("search", 422, "q: field required"),
        ("search?q=", 422, "q: string should have at least 1 character"),
        ("search?q=%20%09", 422, "an empty query finds nothing: write some words"),
        (f"search?q={'x' * 1001}", 422, "q: string should have at most 1000 characters"),
        ("search?q=a&k=0", 422, "k: input should be greater than or equal to 1"),
        ("search?q=a&beams=101", 422, "beams: input should be less than or equal to 100"),
        ("search?q=a&share=nan", 422, "share: .*"),
        ("similar/no%20such.png", 404, "no picture of the index is called no such.png"),
        ("vokens?q=a&id=no%20such.png", 404, "no picture of the index is called no such.png"),
        ("nothing", 404, "Not Found"),
    ],
)
def test_a_wrong_request_gets_one_line(client: TestClient, path: str, status: int, detail: str) -> None:
    response = client.get(f"/api/{path}")
    assert response.status_code == status
    assert re.fullmatch(detail, response.json()["detail"])


class Gate:
    """Holds a batcher's thread until it is opened."""

    def __init__(self, batcher: Batcher) -> None:
        self.opened = threading.Event()
        began = threading.Event()

        def hold() -> bool:
            began.set()
            return self.opened.wait(30)

        self.held: Future[Any] = batcher.alone(hold)
        assert began.wait(30)

    def open_when(self, batcher: Batcher, waiting: int) -> None:
        """Open it when so many questions stand behind it."""
        while len(batcher) < waiting:
            time.sleep(0.001)
        self.opened.set()


def count_calls(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Queries of each call of the retriever's search from now on."""
    calls: list[list[str]] = []
    search = service.retriever.search

    def counted(queries: Sequence[str], **options: Any) -> Any:
        calls.append(list(queries))
        return search(queries, **options)

    monkeypatch.setattr(service.retriever, "search", counted)
    return calls


def test_queries_that_wait_together_share_a_call(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "line")]
    alone = [client.get("/api/search", params={"q": query}).json() for query in queries]
    assert [answer["together"] for answer in alone] == [1] * 6
    calls = count_calls(service, monkeypatch)
    with ThreadPoolExecutor(9) as people:
        gate = Gate(service.answers)
        asked = [people.submit(client.get, "/api/search", params={"q": query}) for query in queries]
        others = [
            people.submit(client.get, "/api/search", params={"q": query, "rerank": False}) for query in queries[:3]
        ]
        gate.open_when(service.answers, 9)
        answers, plain = ([each.result().json() for each in group] for group in (asked, others))
    assert sorted(map(sorted, calls)) == sorted([sorted(queries), sorted(queries[:3])])
    for answer, expected in zip(answers, alone, strict=True):
        assert ids(answer["pictures"]) == ids(expected["pictures"])
        assert answer["query"] == expected["query"]
        assert answer["together"] == 6
    assert [answer["together"] for answer in plain] == [3] * 3
    status = client.get("/api/status").json()
    assert (status["waiting"], status["answered"], status["calls"]) == (0, 6 + 1 + 9, 6 + 1 + 2)


def test_a_batch_is_no_larger_than_allowed() -> None:
    batcher, sizes = Batcher(most=4, waiting=10), []

    def call(asked: list[int]) -> list[int]:
        sizes.append(len(asked))
        return [2 * one for one in asked]

    gate = Gate(batcher)
    futures = [batcher.ask(call, number, kind="k") for number in range(10)]
    with pytest.raises(Busy):
        batcher.ask(call, 10, kind="k")
    gate.opened.set()
    assert [future.result(30).value for future in futures] == [2 * number for number in range(10)]
    assert sizes == [4, 4, 2]
    batcher.close()
    with pytest.raises(Busy):
        batcher.ask(call, 1, kind="k")


def test_what_waits_when_the_server_stops_is_refused() -> None:
    batcher = Batcher(most=4, waiting=10)
    gate = Gate(batcher)
    left = batcher.ask(lambda asked: asked, 1, kind="k")
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(Busy):
        left.result(30)
    gate.opened.set()
    closing.join()
    assert gate.held.done()


def test_a_query_that_fails_does_not_fail_the_others(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = service.retriever.search

    def fails(queries: Sequence[str], **options: Any) -> Any:
        if "poison" in queries:
            raise RuntimeError("secret")
        return search(queries, **options)

    monkeypatch.setattr(service.retriever, "search", fails)
    with ThreadPoolExecutor(3) as people:
        gate = Gate(service.answers)
        asked = [
            people.submit(client.get, "/api/search", params={"q": query}) for query in ("a line", "poison", "a ring")
        ]
        gate.open_when(service.answers, 3)
        first, bad, last = (each.result() for each in asked)
    assert (first.status_code, bad.status_code, last.status_code) == (200, 500, 200)
    assert bad.json()["detail"] == "the server failed at this (RuntimeError): its output says more"
    assert "x-content-type-options" in bad.headers


def test_too_many_queries_are_told_to_come_back(folder: Path, retriever: Path) -> None:
    service = make_service(folder, retriever, waiting=2)
    with TestClient(make_app(service), base_url=HERE) as client, ThreadPoolExecutor(2) as people:
        gate = Gate(service.answers)
        asked = [people.submit(client.get, "/api/search?q=a") for _ in range(2)]
        while len(service.answers) < 2:
            time.sleep(0.001)
        refused = client.get("/api/search?q=b")
        gate.opened.set()
        assert [each.result().status_code for each in asked] == [200, 200]
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "too many requests wait" in refused.json()["detail"]


def test_an_answer_that_takes_too_long_is_given_up(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "ANSWER_SECONDS", 0.05)
    calls = count_calls(service, monkeypatch)
    gate = Gate(service.answers)
    response = client.get("/api/search?q=a")
    gate.opened.set()
    assert response.status_code == 504
    assert gate.held.result(30)
    service.answers.alone(lambda: None).result(30)
    assert calls == []


def test_inserted_pictures_are_found_shown_and_removed(
    client: TestClient, service: Service, chain: Chain, tmp_path: Path
) -> None:
    before = everything(client)
    red = (chain.root / "images" / "red-circle.png").read_bytes()
    answer = insert(client, **{"mein Bild ä.png": red, "plain.JPG": drawn("blue", "ring", kind="JPEG")})
    assert answer.status_code == 201
    assert ids(answer.json()["inserted"]) == ["uploads/mein Bild ä.png", "uploads/plain.jpg"]
    assert answer.json()["pool"] == 50
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == ["mein Bild ä.png", "plain.jpg"]
    assert everything(client) == before | {"uploads/mein Bild ä.png", "uploads/plain.jpg"}
    alike = client.get("/api/similar/red-circle.png", params={"k": 1, "by": "features"}).json()
    [copy] = alike["pictures"]
    assert (copy["id"], copy["inserted"]) == ("uploads/mein Bild ä.png", True)
    assert alike["picture"]["inserted"] is False
    shown = client.get(f"/{copy['url']}")
    with Image.open(io.BytesIO(shown.content)) as thumbnail, Image.open(io.BytesIO(red)) as original:
        assert thumbnail.size == original.size
        difference = np.asarray(thumbnail.convert("RGB")).astype(int) - np.asarray(original.convert("RGB")).astype(int)
        assert np.abs(difference).mean() < 12
    gone = client.delete(f"/api/{copy['url']}")
    assert gone.json() == {"removed": "uploads/mein Bild ä.png", "pool": 49}
    assert everything(client) == before | {"uploads/plain.jpg"}
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["plain.jpg"]
    assert client.get(f"/{copy['url']}").status_code == 404
    assert client.delete(f"/api/{copy['url']}").status_code == 404


def test_other_pictures_can_be_removed_and_their_files_stay(client: TestClient, chain: Chain) -> None:
    assert client.delete("/api/pictures/red-circle.png").json()["pool"] == 47
    assert "red-circle.png" not in everything(client)
    assert (chain.root / "images" / "red-circle.png").is_file()


def test_the_last_picture_stays(client: TestClient, service: Service) -> None:
    names = sorted(everything(client))
    service.retriever.remove(names[1:])
    response = client.delete(f"/api/pictures/{names[0]}")
    assert response.status_code == 422
    assert "an index holds at least one" in response.json()["detail"]


def test_names_of_uploads_are_made_safe(service: Service, tmp_path: Path) -> None:
    """Through a real server: the test client reads percent signs in addresses twice."""
    names = (
        "../../evil.png",
        "C:\\temp\\evil.png",
        SCRIPT,
        ".hidden.png",
        "a?b#c%2F&d.png",
        f"{'x' * 300}.png",
        "日本.gif",
    )
    with served(service) as address, httpx.Client(base_url=address) as client:
        found = ids(insert(client, **{name: drawn() for name in names}).json()["inserted"])
        assert found == [
            "uploads/evil.png",
            "uploads/evil (2).png",
            "uploads/script>.png",  # what stands behind the last slash
            "uploads/hidden.png",
            "uploads/a?b#c%2F&d.png",
            f"uploads/{'x' * 120}.png",
            "uploads/日本.png",
        ]
        assert sorted(f"uploads/{path.name}" for path in (tmp_path / "uploads").iterdir()) == sorted(found)
        answer = client.get("/api/search", params={"q": "a red circle", **WIDE}).json()
        assert set(found) < set(ids(answer["pictures"]))
        for shown in answer["pictures"]:
            assert client.get(f"/{shown['url']}").headers["content-type"] == "image/webp"
            alike = client.get(f"/api/similar/{shown['url'].removeprefix('pictures/')}").json()
            assert alike["picture"]["id"] == shown["id"]


def test_ids_with_markup_slashes_and_dots(client: TestClient, folder: Path, chain: Chain) -> None:
    """Ids that other commands give: any text at all."""
    photos = folder.parent / "photos"
    draw_picture(photos / "a b" / "ü.png", "red", "ring", 3)
    prefix = "<script>alert('x')</script>/../"
    add_pictures.main(add_pictures.Config(folder=photos, index=folder, prefix=prefix, device="cpu", workers=0))
    image = f"{prefix}a b/ü.png"
    answer = client.get("/api/search", params={"q": "a red ring", **WIDE}).json()  # sees what another process added
    [found] = [picture for picture in answer["pictures"] if picture["id"] == image]
    assert answer["pool"] == 49
    assert re.fullmatch(r"pictures/[\w%.-]+", found["url"])
    assert client.get(f"/{found['url']}").status_code == 200
    assert client.delete(f"/api/{found['url']}").json()["removed"] == image
    assert (photos / "a b" / "ü.png").is_file()
    assert image not in everything(client)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "picture file is empty: send the whole file"),
        (b"<html>not a picture</html>", r"is not a picture that can be read \(file is no picture\)"),
        (drawn()[:-30], r"is not a picture that can be read \(picture unreadable \(image file is truncated\)\)"),
        (b"%PDF-1.4", "send a whole JPEG, PNG, WebP, GIF, BMP, DIB, TIFF, JPEG 2000, AVIF"),
        (drawn(kind="ICO"), "is not a picture that can be read"),
        (drawn() + b" " * 3000, "3,[0-9]{3} bytes, 3,000 are allowed: make it smaller"),
        (blank(80, 50), "80 × 50 pixels, 2,000 in all are allowed"),
        (blank(402, 2), "picture more than 200 times as long as wide"),
    ],
)
def test_what_is_no_picture_is_refused(
    content: bytes, reason: str, client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 3000)
    monkeypatch.setattr(uploads, "MOST_PIXELS", 2000)
    response = insert(client, **{"some.png": content})
    assert response.status_code == 422
    assert re.match(r"some\.png", response.json()["detail"])
    assert re.search(reason, response.json()["detail"])
    assert not (folder.parent / "uploads").exists()
    answer = insert(client, **{"good.png": drawn(), "bad.png": content})  # the others go in
    assert answer.status_code == 201
    assert ids(answer.json()["inserted"]) == ["uploads/good.png"]
    assert [refused["name"] for refused in answer.json()["refused"]] == ["bad.png"]
    assert answer.json()["pool"] == 49


def test_uploads_of_wrong_forms(client: TestClient, folder: Path) -> None:
    many = insert(client, **{f"{number}.png": drawn() for number in range(MOST_PICTURES + 1)})
    assert (many.status_code, many.json()["detail"]) == (422, "33 pictures at once are too many: send 32 at most")
    for request in ({"data": {"pictures": "words"}}, {"content": b"x"}, {"files": {"other": b"x"}}):
        assert client.post("/api/pictures", **request).status_code in (400, 422)
    assert not (folder.parent / "uploads").exists()
    assert client.get("/api/status").json()["pool"] == 48


def test_a_failed_insertion_leaves_nothing(
    client: TestClient, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> list[str]:
        raise BadInput("the index is in use by another process: wait until it has finished")

    monkeypatch.setattr(service.retriever, "add", fails)
    response = insert(client, **{"good.png": drawn()})
    assert response.status_code == 422
    assert "in use by another process" in response.json()["detail"]
    assert list((folder.parent / "uploads").iterdir()) == []


def test_only_files_of_the_index_are_given_out(client: TestClient, folder: Path, chain: Chain) -> None:
    for path in (
        "..%2F..%2Fetc%2Fpasswd",
        "%2Fetc%2Fpasswd",
        str(chain.root / "images" / "red-circle.png"),
        "page",
        "%00",
    ):
        assert client.get(f"/pictures/{path}").status_code == 404, path
    for path in ("/page/..%2Fserve.py", "/page/%2e%2e/serve.py", "/page/../../pyproject.toml"):
        assert client.get(path).status_code == 404, path
    first = client.get("/pictures/red-circle.png")
    same = client.get("/pictures/red-circle.png", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, same.status_code, same.content) == (200, 304, b"")


def test_a_picture_whose_file_is_gone_is_still_listed(client: TestClient, folder: Path) -> None:
    [inserted] = insert(client, **{"good.png": drawn()}).json()["inserted"]
    (folder.parent / "uploads" / "good.png").unlink()
    response = client.get(f"/{inserted['url']}")
    assert response.status_code == 404
    assert response.json()["detail"] == "the file of uploads/good.png is gone or damaged (picture missing)"
    assert inserted["id"] in everything(client)
    assert client.delete(f"/api/{inserted['url']}").status_code == 200


REFUSED = [
    ("GET", {"host": "evil.example"}, 421),
    ("GET", {"host": "evil.example:7860"}, 421),
    ("GET", {"host": "127.0.0.1.evil.example"}, 421),
    ("GET", {"host": "192.168.0.7:7860"}, 421),
    ("GET", {"host": ""}, 421),
    ("GET", {"host": "[::1"}, 421),
    ("GET", {"host": "127.0.0.1:7860"}, None),
    ("GET", {"host": "LOCALHOST:80"}, None),
    ("GET", {"host": "[::1]:7860"}, None),
    ("GET", {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ("GET", {"host": "localhost", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
    ("GET", {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, None),
    ("GET", {"host": "localhost", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, None),
    ("POST", {"host": "localhost", "content-length": "10", "origin": "http://evil.example"}, 403),
    ("POST", {"host": "localhost:1", "content-length": "10", "origin": "http://localhost:2"}, 403),
    ("POST", {"host": "localhost", "content-length": "10", "origin": "null"}, 403),
    ("POST", {"host": "localhost", "sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"}, 403),
    ("POST", {"host": "localhost", "content-length": "10", "origin": "http://localhost"}, None),
    ("POST", {"host": "localhost", "content-length": "10"}, None),
    ("POST", {"host": "localhost", "content-length": "101"}, 413),
    ("POST", {"host": "localhost", "transfer-encoding": "chunked"}, 411),
    ("POST", {"host": "localhost", "content-length": "-1"}, 411),
    ("DELETE", {"host": "localhost", "origin": "http://evil.example"}, 403),
    ("DELETE", {"host": "localhost"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "headers", "status"), REFUSED)
def test_whom_the_guard_refuses(method: str, headers: dict[str, str], status: int | None) -> None:
    guard = Guard(None, names=frozenset(), any_address=False, most_bytes=100)  # type: ignore[arg-type]
    refusal = guard.refusal(method, headers)
    assert (refusal and refusal[0]) == status


def test_names_and_addresses_that_were_allowed() -> None:
    guard = Guard(None, names=frozenset({"box.lan"}), any_address=True, most_bytes=100)  # type: ignore[arg-type]
    for host, allowed in (("box.lan:7860", True), ("192.168.0.7", True), ("other.lan", False), ("localhost", True)):
        assert (guard.refusal("GET", {"host": host}) is None) == allowed


def test_pages_of_other_sites_change_nothing(client: TestClient) -> None:
    picture = {"files": [("pictures", ("x.png", drawn()))]}
    evil = {"origin": "http://evil.example"}
    for response in (
        client.post("/api/pictures", headers=evil, **picture),  # type: ignore[arg-type]
        client.delete("/api/pictures/red-circle.png", headers=evil),
    ):
        assert response.status_code == 403
        assert response.json()["detail"] == "pages of other sites may not use this server"
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/status").json()["pool"] == 48
    assert client.post("/api/pictures", headers={"origin": HERE}, **picture).status_code == 201  # type: ignore[arg-type]


def test_the_description_is_whole(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.")
    assert set(described["paths"]) == {
        "/api/search", "/api/similar", "/api/similar/{image}", "/api/vokens", "/api/pictures", "/api/pictures/{image}",
        "/api/status", "/pictures/{image}", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    names = re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(described))
    assert set(names) == set(described["components"]["schemas"]) | set(names)
    for operation in (each for path in described["paths"].values() for each in path.values()):
        assert operation["description"]
        declared = [part for part in operation.get("parameters", []) if part["in"] == "path"]
        assert [part["name"] for part in declared] == (
            ["image"] if "Id" not in operation["summary"] and declared else []
        )
        assert "4XX" in operation["responses"]
        assert "422" not in operation["responses"]


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs", *(f"/page/{file.name}" for file in PAGE.iterdir())):
        response = client.get(path)
        assert response.status_code == 200
        assert set(re.findall(r"\bhttps?://[^\"' ]*", response.text)) <= {"http://www.w3.org/2000/svg"}
        assert "default-src 'none'" in response.headers["content-security-policy"]
        for part in re.findall(r'(?:src|href)="(page/[^"]+)"', response.text):
            assert (PAGE / part.removeprefix("page/")).is_file()
    assert "innerHTML" not in "".join(file.read_text() for file in PAGE.iterdir())


def test_an_index_without_features(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    build_index.main(
        build_index.Config(
            dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "bare", keep_features=False
        )
    )  # fmt: skip
    with TestClient(make_app(make_service(tmp_path / "bare", retriever)), base_url=HERE) as client:
        assert client.get("/api/status").json()["features"] is False
        answer = client.get("/api/search?q=a+red+circle").json()
        assert (answer["share"], answer["beams"], len(answer["pictures"])) == (0, 10, 10)
        assert client.get("/api/search?q=a&share=0.5").status_code == 422
        assert client.get("/api/search?q=a&two_tower=true").status_code == 422
        assert len(client.get("/api/similar/red-circle.png").json()["pictures"]) == 10
        assert client.get("/api/similar/red-circle.png?by=features").status_code == 422
        assert insert(client, **{"new.png": drawn()}).json()["pool"] == 49


def test_the_command_serves_until_it_is_stopped(
    folder: Path, retriever: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[uvicorn.Server] = []

    class Stopped(uvicorn.Server):
        """Answers one request, then ends as on Ctrl-C."""

        def run(self, sockets: list[socket.socket] | None = None) -> None:
            begun.append(self)
            with TestClient(self.config.app, base_url=HERE) as client:  # type: ignore[arg-type]
                while client.get("/readyz").status_code == 503:
                    time.sleep(0.01)
                assert len(everything(client)) == 48
                assert sockets is not None
                assert insert(client, **{"new.png": drawn()}).status_code == 201
            raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn, "Server", Stopped)
    serve.main(serve.Config(index=folder, retriever=retriever, port=0, device="cpu", precision="fp32"))
    printed = capsys.readouterr().out
    assert re.search(r"^48 pictures: http://127\.0\.0\.1:\d+ \(Ctrl-C stops\)$", printed, re.M)
    assert printed.endswith("stopped\n")
    assert len(begun) == 1
    assert (folder.parent / "uploads" / "new.png").is_file()


def test_a_port_in_use_is_one_line(folder: Path, retriever: Path) -> None:
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"cannot listen on 127\.0\.0\.1, port {port} \(Address already in use\)"):
            serve.main(serve.Config(index=folder, retriever=retriever, port=port))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "lets other machines search, insert and remove, without a login: add --allow-network"),
        ({"port": 70000}, "--port is a number from 0 to 65535"),
        ({"batch": 0}, "--batch and --waiting must be at least 1"),
        ({"processes": 0}, "--processes is a number from 1 to 64, --stop-seconds one from 0 to 3600"),
        ({"stop_seconds": -1.0}, "--stop-seconds one from 0 to 3600"),
        ({"retriever": None}, "give --index and --retriever, or --folder"),
        ({"folder": Path("x")}, "give --index and --retriever, or --folder"),
        ({"index": None, "retriever": None}, "give --index and --retriever, or --folder"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        serve.Config(**{"index": Path("i"), "retriever": Path("r"), **options})


def test_another_address_is_warned_of(
    folder: Path, retriever: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(serve, "listen", lambda host, port: socket.socket())
    serve.main(
        serve.Config(index=folder, retriever=retriever, host="0.0.0.0", port=0, allow_network=True, device="cpu")
    )
    assert "warning: without a login, whoever reaches 0.0.0.0 may insert and remove pictures" in capsys.readouterr().out


def test_the_benchmark_sees_answers_and_errors(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.05)
    config = bench.Config(clients=4, seconds=0.5)
    with served(service) as address:
        server = bench.Server(os.getpid(), int(address.rpartition(":")[2]))
        figures = asyncio.run(bench.measure(server, ["a red circle", "a blue line & more"], config))
        assert figures["errors"] == {}
        assert figures["requests"] >= 4
        assert 1 <= figures["queries a call"] <= 4
        assert 0 < figures["milliseconds"]["p50"] <= figures["milliseconds"]["p99"] <= figures["milliseconds"]["max"]
        assert [look["mebibytes"] > 0 for look in figures["memory"]] == [True, True]
        assert figures["queries per core second"] > 0
        assert figures["goals"]["no errors"] is True
        assert figures["goals"]["memory growth at most 3%"] is None
        few = asyncio.run(bench.measure(server, ["a red circle"], replace(config, seconds=300, requests=9)))
        assert few["requests"] == 9
        monkeypatch.setattr(service.retriever, "search", lambda *_, **__: 1 / 0)
        broken = asyncio.run(bench.measure(server, ["a red circle"], config))
    assert broken["errors"] == {"status 500": broken["requests"]}


@pytest.mark.parametrize(("mebibytes", "grown"), [(1.0, 0.1), (0.1, 0.01), (0.0, 0.0), (-1.0, -0.1)])
def test_the_growth_of_memory_that_moves_with_batches(mebibytes: float, grown: float) -> None:
    """A line through 20 minutes, on which every other look is higher; before two minutes it may do what it likes."""
    late = range(120, 1201, 10)
    seen = [{"second": float(each), "mebibytes": 10.0 * each} for each in range(0, 120, 10)]
    seen += [{"second": float(each), "mebibytes": 720 + mebibytes * (each - 120) / 10 + each % 20} for each in late]
    found = bench.growth(seen)
    assert found == pytest.approx(grown, abs=0.012)
    figures = {"milliseconds": {"p50": 100.0, "p99": 250.0}, "errors": {}, "memory growth after two minutes": found}
    assert list(bench.goals(figures).values()) == [True, True, grown < 0.05]
    assert bench.growth(seen[:20]) is None


def test_the_benchmark_gives_the_server_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, list[int]] = {}
    monkeypatch.setattr(bench, "cores", lambda: [2, 3, 5])
    monkeypatch.setattr(os, "sched_setaffinity", given.__setitem__)
    bench.divide_cores(17, None)
    assert given == {}
    bench.divide_cores(17, 1)
    assert given == {17: [2], 0: [3, 5]}
    bench.divide_cores(17, 3)
    assert given == {17: [2, 3, 5], 0: [2, 3, 5]}
    with pytest.raises(BadInput, match="--cores is a number from 1 to 3"):
        bench.Config(cores=4)


def test_what_the_benchmark_takes_for_an_error() -> None:
    answer = json.dumps({"query": "a", "pictures": [{}]}).encode()
    assert bench.problem_of(200, answer, "a") == ""
    assert bench.problem_of(503, answer, "a") == "status 503"
    assert bench.problem_of(200, answer, "b") == "answer to another query"
    assert bench.problem_of(200, answer.replace(b"{}", b""), "a") == "no pictures"


@pytest.mark.parametrize(
    ("name", "module"), [("search", "gallery.search"), ("serve", "serve"), ("export", "gallery.export")]
)
def test_scripts_take_the_datasets_best_system(name: str, module: str) -> None:
    """Where no SYSTEM is set, under `set -u`; LAUNCH prints the command in the place of running it."""
    path = f"{Path(sys.executable).parent}:/bin:/usr/bin"
    environment = {"PATH": path, "CONDA_PREFIX": "here", "LAUNCH": "echo", "HOME": "/"}
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), "words"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert printed.startswith(f"-m retriever.{module} --index retriever/output/emoji/14_index")
    assert "--retriever retriever/output/emoji/10_stage2/retriever+stage2 " in printed
    assert "--weights reranker/output/emoji/18_test/retriever+stage2 " in printed
    assert printed.endswith("words\n")
