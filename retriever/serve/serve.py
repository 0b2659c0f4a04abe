"""The search page: a web server that answers queries, takes new pictures and lets go of old ones.

In:  a `retriever.gallery.build` folder and the retriever's run folder, or a folder of `retriever.gallery.export`.
Out: http://127.0.0.1:7860 until it is stopped (Ctrl-C); pictures that are inserted lie in a folder beside the index.
Command: python -m retriever.serve --index DIR --retriever DIR [--weights DIR]
         python -m retriever.serve --folder DIR

There is no login: who reaches the server may search, insert and remove. docs/serve.md says more.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tools.errors import BadInput

from ..gallery.api import Retriever
from ..retrieve import SearchOptions
from .guard import is_loopback
from .service import Service
from .web import make_app

UPLOADS = "uploads"
IDLE_SECONDS = 30  # after which a silent connection is closed
CONNECTIONS = 2048


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

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.allow_network:
            raise BadInput(
                f"--host {self.host} lets other machines search, insert and remove, without a login: add "
                "--allow-network where that is meant"
            )
        if not 0 <= self.port < 65536 or self.batch < 1 or self.waiting < 1:
            raise BadInput("--port is a number from 0 to 65535; --batch and --waiting must be at least 1")


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


def main(config: Config) -> None:
    serve(config, lambda: load(config))


def serve(config: ServerOptions, load: Callable[[], Retriever]) -> None:
    """Take the port, load a retriever and answer until the process is stopped."""
    taken = listen(config.host, config.port)
    with taken:
        retriever = load()
        retriever.search(["warm up"])  # nobody's first query waits for what is loaded only then
        uploads = config.uploads or retriever.gallery.folder.parent / UPLOADS
        service = Service(retriever, uploads=uploads, batch=config.batch, waiting=config.waiting)
        app = make_app(service, names=frozenset(config.names), any_address=config.allow_network)
        if config.allow_network:
            print(f"warning: without a login, whoever reaches {config.host} may insert and remove pictures", flush=True)
        print(f"{len(retriever):,} pictures: {address(config, taken)} (Ctrl-C stops)", flush=True)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                limit_concurrency=CONNECTIONS,
                backlog=CONNECTIONS,
            )
        )
        try:
            server.run(sockets=[taken])
        except KeyboardInterrupt:
            print("stopped")
