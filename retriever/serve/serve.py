"""The search page: a web server that answers queries, takes new pictures and lets go of old ones.

In:  a `retriever.gallery.build` folder and the retriever's run folder, or a folder of `retriever.gallery.export`.
Out: http://127.0.0.1:7860 until it is stopped (Ctrl-C, SIGTERM); inserted pictures lie in a folder beside the index.
Command: python -m retriever.serve --index DIR --retriever DIR [--weights DIR]
         python -m retriever.serve --folder DIR

There is no login: who reaches the server may search, insert and remove. docs/serve.md says more.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from tqdm import tqdm

from tools.command_line.commands import quiet_libraries
from tools.errors import BadInput

from ..gallery.api import Retriever
from ..retrieve import SearchOptions
from .closing import PatientProtocol, turn_away
from .guard import App, is_loopback
from .life import STOP_SECONDS, Life
from .service import Service
from .several import HEALTH_SECONDS, Processes, Shared, end_with_supervisor, shared_numbers
from .web import make_app

UPLOADS = "uploads"
IDLE_SECONDS = 30  # after which a silent connection is closed
CONNECTIONS = 2048
CLOSING_SECONDS = 2  # for connections that are still open when a server stops, after what it finishes
MOST_PROCESSES, LONGEST_STOP = 64, 3600


@dataclass(frozen=True, kw_only=True)
class ServerOptions(SearchOptions):
    """Where it is served."""

    uploads: Path | None = None
    """Folder for pictures that are inserted; by default "uploads" beside the index."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7860
    """Port to listen on; 0: any that is free."""
    allow_network: bool = False
    """Let --host be an address that other machines reach: everyone there may search, insert and remove."""
    names: tuple[str, ...] = ()
    """Host names by which browsers reach the server, where they use neither localhost nor an address."""
    batch: int = 64
    """Queries that are answered together at most."""
    waiting: int = 512
    """Queries that wait at most; others are told to try again."""
    processes: int = 1
    """Server processes behind the one address, each with the models in its own memory."""
    stop_seconds: float = STOP_SECONDS
    """Seconds in which requests that are under way are finished when the server is told to stop."""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.allow_network:
            raise BadInput(
                f"--host {self.host} lets other machines search, insert and remove, without a login: add "
                "--allow-network where that is meant"
            )
        if not 0 <= self.port < 65536 or self.batch < 1 or self.waiting < 1:
            raise BadInput("--port is a number from 0 to 65535; --batch and --waiting must be at least 1")
        if not 1 <= self.processes <= MOST_PROCESSES or not 0 <= self.stop_seconds <= LONGEST_STOP:
            raise BadInput(
                f"--processes is a number from 1 to {MOST_PROCESSES}, --stop-seconds one from 0 to {LONGEST_STOP}"
            )


@dataclass(frozen=True, kw_only=True)
class Config(ServerOptions):
    """What is served, and where."""

    index: Path | None = None
    """Run folder of retriever.gallery.build."""
    retriever: Path | None = None
    """Run folder of retriever.train or retriever.train_stage2."""
    weights: Path | None = None
    """Run folder of reranker.test, passed over while there is none."""
    folder: Path | None = None
    """In the place of these: a folder that retriever.gallery.export wrote."""

    def __post_init__(self) -> None:
        runs = (self.index, self.retriever)
        if (self.folder is None) == (None in runs) or (self.folder is not None and any((*runs, self.weights))):
            raise BadInput("give --index and --retriever, or --folder")
        super().__post_init__()


def listen(host: str, port: int) -> socket.socket:
    """Take a port, before anything is loaded.

    Raises:
        BadInput: it is in use, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BadInput(f"--host {host} is no address of this machine ({error.strerror})") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(CONNECTIONS)  # a bound port alone could be taken a second time; browsers wait from now on
    except OSError as error:
        taken.close()
        raise BadInput(f"cannot listen on {host}, port {port} ({error.strerror}): name another --port") from None
    return taken


def load(config: Config) -> Retriever:
    """The retriever that the configuration names."""
    if config.folder is not None:
        return Retriever.from_pretrained(
            config.folder, device=config.device, precision=config.precision, scoring=config.scoring
        )
    assert config.index is not None, "checked with the configuration"
    assert config.retriever is not None, "checked with the configuration"
    return Retriever.from_runs(
        index=config.index,
        retriever=config.retriever,
        weights=config.weights,
        device=config.device,
        precision=config.precision,
        scoring=config.scoring,
    )


def address(config: ServerOptions, taken: socket.socket) -> str:
    """What to open in a browser."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{taken.getsockname()[1]}"


def load_service(config: ServerOptions, load: Callable[[], Retriever]) -> Service:
    """The service of a retriever, ready for the first query."""
    retriever = load()
    retriever.search(["warm up"])  # nobody's first query waits for what is loaded only then
    uploads = config.uploads or retriever.gallery.folder.parent / UPLOADS
    return Service(retriever, uploads=uploads, batch=config.batch, waiting=config.waiting)


def make_life_app(config: ServerOptions, life: Life) -> App:
    return make_app(life, names=frozenset(config.names), any_address=config.allow_network)


def make_process_app(config: ServerOptions, load: Callable[[], Retriever], shared: Shared) -> App:
    """The application of one server process of several, made in that process."""
    quiet_libraries()
    tqdm.set_lock(threading.RLock())  # its own is known to all processes, and this one is ended without taking it down
    end_with_supervisor()
    life = Life(
        partial(load_service, config, load),
        loaded=shared.has_loaded,
        failed=shared.has_failed,
        siblings=shared,
        stop_seconds=config.stop_seconds,
    )
    return make_life_app(config, life)


def settings(app: App | Callable[[], App], **options: Any) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        limit_concurrency=CONNECTIONS,
        http=PatientProtocol,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        **options,
    )


def serve_alone(
    config: ServerOptions, load: Callable[[], Retriever], taken: socket.socket, ready: Callable[[int], None]
) -> None:
    """Serve from this process until it is told to stop.

    Raises:
        Exception: what was to be served cannot be loaded.
    """
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        signal.raise_signal(signal.SIGTERM)

    life = Life(
        partial(load_service, config, load),
        loaded=lambda service: ready(len(service.retriever)),
        failed=failed,
        stop_seconds=config.stop_seconds,
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: uvicorn ends with either
    try:
        uvicorn.Server(settings(make_life_app(config, life), backlog=CONNECTIONS)).run(sockets=[taken.dup()])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    if failures:
        raise failures[0]


def serve_in_processes(
    config: ServerOptions, load: Callable[[], Retriever], taken: socket.socket, ready: Callable[[int], None]
) -> None:
    """Serve from several processes until this one is told to stop.

    Raises:
        BadInput: what was to be served cannot be loaded.
    """
    shared = Shared.among(config.processes)
    with shared_numbers(config.processes):
        options = settings(
            partial(make_process_app, config, load, shared),
            factory=True,
            workers=config.processes,
            timeout_worker_healthcheck=HEALTH_SECONDS,
            backlog=1,  # at once by one process: the others shall have some of those that come together
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # here: the supervisor's own words are ours
        seconds = config.stop_seconds + 2 * CLOSING_SECONDS
        Processes(options, taken, shared, ready=ready, seconds=seconds).run()
    if not shared.failures.empty():
        raise BadInput(shared.failures.get())


def main(config: Config) -> None:
    serve(config, partial(load, config))


def serve(config: ServerOptions, load: Callable[[], Retriever]) -> None:
    """Take the port, load a retriever and answer until the process is stopped.

    Args:
        load: called in each server process, to which it is sent.
    """
    taken = listen(config.host, config.port)
    with taken:
        place = address(config, taken)
        if config.allow_network:
            print(f"warning: without a login, whoever reaches {config.host} may insert and remove pictures", flush=True)

        def ready(pictures: int) -> None:
            print(f"{pictures:,} pictures: {place} (Ctrl-C stops)", flush=True)

        (serve_alone if config.processes == 1 else serve_in_processes)(config, load, taken, ready)
        turn_away(taken)
    print("stopped")
