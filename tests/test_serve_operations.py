"""The search page's server in operation: its health, its metrics, how it stops, and several processes of it."""

import asyncio
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from uvicorn.supervisors import multiprocess

from retriever.gallery.api import Retriever
from retriever.serve import serve, several
from retriever.serve import service as services
from retriever.serve.batching import Batcher
from retriever.serve.closing import turn_away
from retriever.serve.guard import App
from retriever.serve.life import Life
from retriever.serve.serve import listen
from retriever.serve.service import Service
from retriever.serve.uploads import Upload, store
from retriever.serve.web import make_app
from tests.pages import make_service
from tools import runs
from tools.command_line.commands import quiet_libraries
from tools.errors import BadInput

ROOT = Path(__file__).parent.parent
HERE = "http://127.0.0.1:7860"
READY, LIVE = ("/readyz", "/health/ready"), ("/healthz", "/livez", "/health/live")


@pytest.fixture
def folder(index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index, tmp_path / "index"))


@pytest.fixture
def service(folder: Path, retriever: Path) -> Service:
    return make_service(folder, retriever)


def asked(app: App) -> TestClient:
    return TestClient(app, base_url=HERE, raise_server_exceptions=False)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def statuses(client: httpx.Client | TestClient, paths: tuple[str, ...]) -> set[int]:
    return {client.get(path).status_code for path in paths}


def numbers(client: httpx.Client | TestClient) -> dict[str, float]:
    """The server's metrics: "name{label values}" -> value, without the process ids of several processes."""
    text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        f"{each.name}{{{','.join(value for name, value in each.labels.items() if name != 'pid')}}}": each.value
        for each in samples
    }


def test_a_server_is_ready_when_it_has_loaded_and_until_it_stops(service: Service) -> None:
    gate = threading.Event()
    loaded: list[Service] = []

    def load() -> Service:
        assert gate.wait(60)
        return service

    life = Life(load, loaded=loaded.append)
    with asked(make_app(life)) as client:
        assert statuses(client, READY) == {503}
        assert statuses(client, LIVE) == {200}
        early = client.get("/api/search?q=a")
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        assert early.json() == {"detail": "the server is loading: try again in a moment"}
        assert client.get("/").status_code == 200
        gate.set()
        until(lambda: bool(loaded))
        assert statuses(client, READY + LIVE) == {200}
        assert client.get("/api/search?q=a").status_code == 200
        life.stopping = True
        late = client.get("/api/search?q=a")
        assert (late.status_code, late.headers["connection"]) == (503, "close")
        assert late.json() == {"detail": "the server is stopping: try again in a moment"}
        assert client.get("/readyz").json() == {"detail": "the server is stopping"}
        assert statuses(client, LIVE) == {200}
    assert loaded == [service]
    assert not service.is_alive()


def test_what_cannot_be_loaded_is_told() -> None:
    failures: list[BaseException] = []

    def load() -> Service:
        raise BadInput("there is nothing")

    with asked(make_app(Life(load, failed=failures.append))) as client:
        until(lambda: bool(failures))
        assert statuses(client, READY) == {503}
    assert str(failures[0]) == "there is nothing"


class Pair:
    """Two server processes, as one of them sees them."""

    loaded = 0

    def all_loaded(self) -> bool:
        return self.loaded == 2


def test_no_process_is_ready_while_another_loads(service: Service) -> None:
    pair = Pair()
    life = Life(lambda: service, siblings=pair)
    with asked(make_app(life)) as client:
        until(lambda: life.service is not None)
        assert statuses(client, READY) == {503}
        pair.loaded = 2
        assert statuses(client, READY) == {200}


def test_a_substitute_takes_no_request_before_it_has_loaded(service: Service) -> None:
    pair, gate = Pair(), threading.Event()
    pair.loaded = 2

    def load() -> Service:
        assert gate.wait(60)
        return service

    life = Life(load, siblings=pair)

    async def start() -> bool:
        async with life.run():
            return life.service is not None

    threading.Timer(0.2, gate.set).start()
    assert asyncio.run(start())


def test_an_index_that_cannot_be_read_any_more(service: Service, folder: Path) -> None:
    with asked(make_app(service)) as client:
        assert client.get("/readyz").status_code == 200
        (folder / runs.MANIFEST).rename(folder / "elsewhere")
        service.refresh()
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert str(folder) not in answer.text
        (folder / "elsewhere").rename(folder / runs.MANIFEST)
        service.refresh()
        assert client.get("/readyz").status_code == 200


def test_a_dead_thread_is_not_alive(service: Service) -> None:
    with asked(make_app(service)) as client:
        service.changes.close()
        assert statuses(client, LIVE) == {503}


def test_metrics_count_and_tell_no_words(service: Service) -> None:
    with asked(make_app(service)) as client:
        for query in ("a secret wish", "another"):
            assert client.get("/api/search", params={"q": query}).status_code == 200
        client.get("/api/search")
        client.get("/api/similar/red-circle.png")
        client.get("/pictures/red-circle.png")
        client.get("/pictures/made-up.png")
        client.get("/some/private/name")
        client.get("/", headers={"host": "evil.example"})
        found, text = numbers(client), client.get("/metrics")
    name = "picture_search"
    assert found[f"{name}_requests_total{{/api/search,200}}"] == 2
    assert found[f"{name}_requests_total{{/api/search,422}}"] == 1
    assert found[f"{name}_requests_total{{/api/similar/{{image}},200}}"] == 1
    assert found[f"{name}_requests_total{{/pictures/{{image}},200}}"] == 1
    assert found[f"{name}_requests_total{{/pictures/{{image}},404}}"] == 1
    assert found[f"{name}_requests_total{{other,404}}"] == 1
    assert found[f"{name}_requests_total{{other,421}}"] == 1
    assert found[f"{name}_request_duration_seconds_count{{/api/search}}"] == 3
    assert found[f"{name}_request_duration_seconds_sum{{/api/search}}"] > 0
    assert found[f"{name}_batch_queries_sum{{}}"] == 3  # two searches, one of similar pictures
    assert found[f"{name}_batch_queries_bucket{{1.0}}"] == 3
    assert found[f"{name}_pictures{{}}"] == 48
    assert found[f"{name}_index_version{{}}"] == 0
    assert found[f"{name}_waiting{{searches}}"] == found[f"{name}_waiting{{changes}}"] == 0
    assert found[f"{name}_resident_memory_bytes{{}}"] > 1 << 20
    assert text.headers["content-type"].startswith("text/plain; version=")
    assert not re.search(r"secret|wish|red-circle|made-up|private|evil", text.text)


def test_metrics_see_the_queue_and_the_index(service: Service) -> None:
    began, opened = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        opened.wait(60)

    with asked(make_app(service)) as client:
        service.answers.alone(hold)
        assert began.wait(60)
        left = service.answers.alone(lambda: None)
        assert numbers(client)["picture_search_waiting{searches}"] == 1
        opened.set()
        left.result(60)
        service.retriever.remove(["red-circle.png"])
        found = numbers(client)
        assert (found["picture_search_pictures{}"], found["picture_search_index_version{}"]) == (47, 1)


def test_pages_of_other_sites_read_no_metrics(service: Service) -> None:
    with asked(make_app(service)) as client:
        foreign = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
        for path in ("/metrics", "/readyz", "/healthz"):
            assert client.get(path, headers=foreign).status_code == 403
            assert client.get(path, headers={"host": "evil.example"}).status_code == 421


def test_a_change_waits_for_another_process(service: Service, folder: Path) -> None:
    held = runs.hold(folder)
    with ThreadPoolExecutor(1) as people, asked(make_app(service)) as client:
        waits = people.submit(client.delete, "/api/pictures/red-circle.png")
        time.sleep(3 * services.TRY_SECONDS)
        assert not waits.done()
        held.close()
        assert waits.result(60).json() == {"removed": "red-circle.png", "pool": 47}


def test_a_change_does_not_wait_for_ever(service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "TURN_SECONDS", 0.0)
    with runs.hold(folder), asked(make_app(service)) as client:
        refused = client.delete("/api/pictures/red-circle.png")
    assert refused.status_code == 422
    assert "is in use by another process: wait until it has finished" in refused.json()["detail"]


def test_processes_do_not_take_the_same_file_for_two_uploads(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as people:
        names = list(people.map(lambda number: store(tmp_path, Upload("x.png", b"%d" % number), ".png"), range(64)))
    assert len(set(names)) == 64
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"%d" % number for number in range(64)}


def test_a_name_has_a_file_when_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill leaves no empty one."""
    names: list[str] = []
    write = Path.write_bytes

    def noted(path: Path, content: bytes) -> int:
        names.extend(each.name for each in tmp_path.iterdir())
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", noted)
    assert store(tmp_path, Upload("x.png", b"x"), ".png").read_bytes() == b"x"
    assert all(name.startswith(".") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_an_upload_that_cannot_be_written_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInput, match="cannot be written"):
        store(tmp_path, Upload("x.png", b"x"), ".png")
    assert list(tmp_path.iterdir()) == []


def test_another_process_inserted_picture_is_shown_at_once(service: Service, folder: Path, retriever: Path) -> None:
    other = make_service(folder, retriever)
    with asked(make_app(service)) as client, asked(make_app(other)) as second:
        shown = client.get("/pictures/red-circle.png")
        inserted = client.post("/api/pictures", files=[("pictures", ("x.webp", shown.content))]).json()["inserted"][0]
        assert second.get(f"/{inserted['url']}").status_code == 200
        assert second.delete(f"/api/{inserted['url']}").json()["pool"] == 48
        other.refresh()
        service.refresh()
        assert [each.get("/api/status").json()["pool"] for each in (client, second)] == [48, 48]


def test_connections_that_nobody_accepted_get_an_answer() -> None:
    with listen("127.0.0.1", 0) as taken, ThreadPoolExecutor(4) as people:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        answers = [people.submit(httpx.get, f"{address}/api/status") for _ in range(4)]
        with socket.create_connection(taken.getsockname()):  # it says nothing
            while not all(answer.done() for answer in answers):
                turn_away(taken)
    assert {answer.result().status_code for answer in answers} == {503}
    assert answers[0].result().json() == {"detail": "the server is stopping: try again in a moment"}


def test_a_batcher_waits_no_longer_than_told() -> None:
    opened, batcher = threading.Event(), Batcher(most=1, waiting=2)
    held = batcher.alone(lambda: opened.wait(60))
    until(held.running)
    batcher.close(seconds=0.01)
    assert batcher.is_alive()
    opened.set()
    batcher.close()
    assert not batcher.is_alive()


@contextmanager
def command(*arguments: str) -> Iterator[tuple[psutil.Popen, str]]:
    """A server of its own, and its address."""
    line = [
        sys.executable,
        "-m",
        "retriever.serve",
        *arguments,
        "--port",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    process = psutil.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with process.stdout:
        try:
            found = (re.search(r"http://[\d.:]+", line) for line in process.stdout)
            yield process, next(each[0] for each in found if each)
        finally:
            for each in [process, *(process.children() if process.is_running() else [])]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def keep_asking(address: str, seen: list[str]) -> None:
    """Search over one connection, then over the next, until there is no server."""
    while True:
        with httpx.Client(base_url=address, timeout=300) as client:
            try:
                for _ in range(3):
                    seen.append(str(client.get("/api/status").status_code))
            except httpx.ConnectError as error:
                if "refused" in str(error):
                    return
                seen.append(repr(error))
            except httpx.HTTPError as error:
                seen.append(repr(error))


def served_until_stopped(config: serve.Config, monkeypatch: pytest.MonkeyPatch, during: Callable[[str], None]) -> None:
    """Run the command here, and `during` with its address in a thread, which has to stop it."""
    places: list[str] = []

    def listen_here(host: str, port: int) -> socket.socket:
        taken = listen(host, port)
        places.append(f"http://127.0.0.1:{taken.getsockname()[1]}")
        return taken

    monkeypatch.setattr(serve, "listen", listen_here)

    def visit() -> None:
        until(lambda: bool(places))
        until(lambda: httpx.get(f"{places[0]}/readyz", timeout=300).status_code == 200)
        during(places[0])

    with ThreadPoolExecutor(1) as people:
        visited = people.submit(visit)
        serve.main(config)
        visited.result(300)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Searches begin with the first event, and end with the second; not the one that warms the server up."""
    search, begun, opened = Retriever.search, threading.Event(), threading.Event()

    def wait(retriever: Retriever, queries: Sequence[str], **options: Any) -> Any:
        if queries != ["warm up"]:
            begun.set()
            assert opened.wait(300)
        return search(retriever, queries, **options)

    monkeypatch.setattr(Retriever, "search", wait)
    yield begun, opened
    opened.set()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_answers_what_was_accepted_and_refuses_others(
    folder: Path,
    retriever: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: tuple[threading.Event, threading.Event],
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []
    answers: list[httpx.Response] = []
    begun, opened = held

    def visit(address: str) -> None:
        with ThreadPoolExecutor(2) as people:
            first = people.submit(httpx.get, f"{address}/api/search?q=a", timeout=300)
            assert begun.wait(300)
            second = people.submit(keep_asking, address, seen)
            until(lambda: len(seen) > 3)
            stop()
            until(lambda: "503" in seen)
            assert not first.done()
            opened.set()
            answers.append(first.result(300))
            second.result(300)

    before = signal.getsignal(signal.SIGTERM)
    served_until_stopped(
        serve.Config(index=folder, retriever=retriever, port=0, device="cpu", precision="fp32"), monkeypatch, visit
    )
    assert [(each.status_code, each.headers["connection"]) for each in answers] == [(200, "close")]
    assert set(seen) == {"200", "503"}
    assert capsys.readouterr().out.endswith("stopped\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_is_bounded(
    folder: Path,
    retriever: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: tuple[threading.Event, threading.Event],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A search that does not end is given up."""

    def visit(address: str) -> None:
        with ThreadPoolExecutor(1) as people:
            lost = people.submit(httpx.get, f"{address}/api/search?q=a", timeout=300)
            assert held[0].wait(300)
            stop()
            with suppress(httpx.HTTPError):
                assert lost.result(300).status_code >= 500

    quiet_libraries()  # as the command does, and its own warnings are seen all the same
    monkeypatch.setattr(serve, "CLOSING_SECONDS", 1)
    monkeypatch.setattr(
        logging.getLogger(Life.__module__), "disabled", False
    )  # as a library that an earlier test used may have left it
    config = serve.Config(
        index=folder, retriever=retriever, port=0, stop_seconds=0.2, device="cpu", precision="fp32"
    )  # fmt: skip
    served_until_stopped(config, monkeypatch, visit)
    assert "1 requests were not answered within 0.2 s of the stop" in caplog.text


def test_several_processes_serve_one_index(folder: Path, retriever: Path, tmp_path: Path) -> None:
    options = ("--index", str(folder), "--retriever", str(retriever), "--processes", "2")
    with command(*options) as (process, address):
        with httpx.Client(base_url=address, timeout=300) as client:
            assert client.get("/readyz").status_code == 200
            picture = client.get("/pictures/red-circle.png").content

        def change(name: str) -> int:
            files = [("pictures", (name, picture))]
            return httpx.post(f"{address}/api/pictures", files=files, timeout=300).status_code

        with ThreadPoolExecutor(4) as people:
            assert list(people.map(change, ["x.webp"] * 4)) == [201] * 4
        names = {"x.webp", "x (2).webp", "x (3).webp", "x (4).webp"}
        assert {path.name for path in (tmp_path / "uploads").iterdir()} == names
        for _ in range(8):  # by new connections: both processes answer some
            answer = httpx.get(f"{address}/api/search?q=a&k=64&beams=64", timeout=300).json()
            assert answer["pool"] == 52
        with httpx.Client(base_url=address, timeout=300) as client:
            until(lambda: numbers(client)["picture_search_pictures{}"] == 52)
            assert numbers(client)["picture_search_requests_total{/api/search,200}"] == 8
            assert numbers(client)["picture_search_batch_queries_sum{}"] == 8
            memories = re.findall(r"resident_memory_bytes\{pid=\"(\d+)\"\}", client.get("/metrics").text)
            assert len(set(memories)) == 2
            killed, seen = int(memories[0]), list[str]()
            os.kill(killed, signal.SIGKILL)

            def replaced() -> bool:
                with suppress(httpx.HTTPError):  # the connection was the killed one's
                    pids = set(re.findall(r"pid=\"(\d+)\"", httpx.get(f"{address}/metrics", timeout=300).text))
                    return len(pids) == 2 and str(killed) not in pids
                return False

            until(replaced)
        with ThreadPoolExecutor(2) as people:
            clients = [people.submit(keep_asking, address, seen) for _ in range(2)]
            until(lambda: len(seen) > 3)
            servers = process.children()
            process.send_signal(signal.SIGTERM)
            for each in clients:
                each.result(300)
        assert process.wait(300) == 0
        assert set(seen) <= {"200", "503"}
        assert psutil.wait_procs(servers, timeout=300)[1] == []


def test_a_process_that_dies_while_it_is_asked_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take minutes to answer, as long as it lives."""
    monkeypatch.setattr(multiprocess, "SIGNALS", {})
    monkeypatch.setattr(several, "mark_process_dead", lambda pid: None)
    config = uvicorn.Config("", timeout_worker_healthcheck=3600)

    class Silent(multiprocess.Process):
        def __init__(self, *_: Any) -> None:
            super().__init__(config, [])
            self.process: Any = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))

    monkeypatch.setattr(multiprocess, "Process", Silent)
    with socket.socket() as taken:
        shared = several.Shared.among(1)
        processes = several.Processes(config, taken, shared, ready=lambda count: None, seconds=0)
        processes.init_processes()
        (dying,) = processes.processes
        assert dying.pid is not None
        killer = threading.Timer(0.3, os.kill, (dying.pid, signal.SIGKILL))
        killer.start()
        guard = threading.Thread(target=processes.keep_subprocess_alive, daemon=True)
        guard.start()
        guard.join(120)
        assert not guard.is_alive()
        assert processes.processes != [dying]
        processes.join_all()


def test_what_several_processes_cannot_load_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "retriever.serve", "--folder", str(tmp_path), "--port", "0", "--processes", "2"]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: .* is no exported retriever, .*\n", ended.stderr)
    assert "stopped" not in ended.stdout
