"""A server process from its start to its end: it loads, it serves, it finishes what it has accepted, and it ends."""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any, Protocol

from . import return_free_memory
from .guard import App, Message, Receive, Scope, Send
from .metrics import Metrics
from .service import Service

LATE = "late"  # what a request's scope says of one that came when the server was stopping
GRACE_SECONDS = 1.0  # in which a server that stops still tells clients so: their connections end with an answer
STOP_SECONDS = 25.0  # Kubernetes and the like kill after 30
LOOK_SECONDS = 1.0  # between two looks at what other processes changed in the index
RETURN_LOOKS = 20  # after which free memory goes back to the system
SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class Unready(Exception):
    """The server still loads, or it stops."""


class Siblings(Protocol):
    """The server processes that share an address."""

    def all_loaded(self) -> bool:
        """Whether each of them could answer by now."""


class Life:
    """Where one server process stands."""

    def __init__(
        self,
        load: Callable[[], Service],
        *,
        loaded: Callable[[Service], None] = lambda service: None,
        failed: Callable[[BaseException], None] = lambda error: None,
        siblings: Siblings | None = None,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        """
        Args:
            load: makes the service; runs in a thread of its own, while the process tells that it is not ready.
            loaded, failed: called with the outcome, in the event loop.
            siblings: processes that share the address. While one of them loads, none is ready. Where they all have
                loaded, this process is a substitute, and takes no request before it has loaded.
            stop_seconds: that requests may take which are under way when the process is told to stop.
        """
        self.metrics = Metrics()
        self.service: Service | None = None
        self.stopping = False
        self.under_way = 0
        """Requests that came before the process was told to stop, and have no answer yet."""
        self._load, self._loaded, self._failed = load, loaded, failed
        self._siblings, self._stop_seconds = siblings, stop_seconds
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, service: Service) -> "Life":
        """The life of a service that is loaded."""
        life = cls(lambda: service)
        life._serve(service)
        return life

    def not_ready(self) -> str:
        """Why the process should be sent no requests; nothing where it should."""
        if self.stopping:
            return "the server is stopping"
        if self.service is None or (self._siblings is not None and not self._siblings.all_loaded()):
            return "the server is loading"
        return "" if self.service.usable else "the index cannot be searched: the server's output says more"

    def is_alive(self) -> bool:
        """Whether the process can still answer, or will when it has loaded."""
        return self.service is None or self.service.is_alive()

    def serving(self, *, late: bool) -> Service:
        """The service, for a request.

        Args:
            late: whether the request came when the process was stopping.

        Raises:
            Unready: it cannot be answered here.
        """
        if late or self.service is None:
            raise Unready(f"{'the server is stopping' if late else 'the server is loading'}: try again in a moment")
        return self.service

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """The application's lifespan, within that of the server that runs it."""
        substitute = self._siblings is not None and self._siblings.all_loaded()
        if self.service is None:
            loading = self._start(self._loading())
            if substitute:
                await asyncio.wait([loading])
        watching = self._start(self._watching())
        with self._signals():
            yield
        watching.cancel()
        if self.service is not None:
            await asyncio.to_thread(self.service.close, seconds=self._stop_seconds)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)  # the loop itself would let go of it
        task.add_done_callback(self._tasks.discard)
        return task

    async def _loading(self) -> None:
        outcome: Future[Service] = Future()

        def load() -> None:
            try:
                outcome.set_result(self._load())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=load, name="loading", daemon=True).start()
        try:
            service = await asyncio.wrap_future(outcome)
        except Exception as error:
            self._failed(error)
            return
        self._serve(service)
        self._loaded(service)

    def _serve(self, service: Service) -> None:
        service.answers.called = self.metrics.called
        self.metrics.look(service)
        self.service = service

    async def _watching(self) -> None:
        """See what other processes change, also while nobody searches."""
        for look in count(1):
            await asyncio.sleep(LOOK_SECONDS)
            if self.service is not None:
                await asyncio.to_thread(self.service.refresh)
                self.metrics.look(self.service)
            if look % RETURN_LOOKS == 0:
                await asyncio.to_thread(return_free_memory)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stand before the server's own handlers, which close the connections at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        servers = {each: signal.getsignal(each) for each in SIGNALS}

        def end(number: int) -> None:
            handler = servers[signal.Signals(number)]
            if callable(handler):
                handler(number, None)

        def handle(number: int, _: FrameType | None) -> None:
            if not self.stopping:
                self.stopping = True
                loop.call_soon_threadsafe(lambda: self._start(self._finish(lambda: end(number))))
            elif number == signal.SIGINT:
                end(number)  # a second Ctrl-C does not wait

        for each in SIGNALS:
            signal.signal(each, handle)
        try:
            yield
        finally:
            for each, handler in servers.items():
                signal.signal(each, handler)

    async def _finish(self, end: Callable[[], None]) -> None:
        """Wait for what is under way, then let the server end."""
        until = time.monotonic() + self._stop_seconds
        if self.service is not None:
            await asyncio.sleep(min(GRACE_SECONDS, self._stop_seconds))
        while self.under_way and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.under_way:
            log.warning("%d requests were not answered within %g s of the stop", self.under_way, self._stop_seconds)
        end()


class Door:
    """Counts requests as they come and go; when the server stops, tells each client to come by another connection."""

    def __init__(self, app: App, life: Life) -> None:
        self.app, self.life = app, life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        life, began, status = self.life, time.perf_counter(), 500
        late = scope[LATE] = life.stopping

        async def send_last(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if life.stopping:
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        life.under_way += not late
        try:
            await self.app(scope, receive, send_last)
        finally:
            life.under_way -= not late
            with suppress(OSError):  # of a full disk, where several processes share their numbers
                life.metrics.answered(endpoint_of(scope), status, time.perf_counter() - began)


def endpoint_of(scope: Scope) -> str | None:
    """The address of a request's endpoint as it is declared: `/api/similar/{image}`."""
    path = getattr(scope.get("route"), "path", None)
    return None if path is None else str(path).replace(":path}", "}")
