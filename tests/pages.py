"""A search page over small pictures: the server's parts without a command line."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from retriever.gallery.api import Retriever
from retriever.serve.serve import listen
from retriever.serve.service import Service
from retriever.serve.web import make_app


def make_service(index: Path, retriever: Path, *, batch: int = 64, waiting: int = 512) -> Service:
    """A service over an index, which keeps inserted pictures beside it."""
    loaded = Retriever.from_runs(index=index, retriever=retriever, precision="fp32", device="cpu")
    return Service(loaded, uploads=index.parent / "uploads", batch=batch, waiting=waiting)


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a server on a free port of this machine."""
    with listen("127.0.0.1", 0) as taken:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
