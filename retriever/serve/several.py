"""Several server processes behind one address: uvicorn's supervisor starts them, and replaces one that dies."""

import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from tools.errors import BadInput

from .metrics import FOLDER
from .service import Service

HEALTH_SECONDS = 60  # in which a process answers its supervisor: imports keep it from that for some
QUEUE = 2048  # connections that wait to be accepted
THREADS = "OMP_NUM_THREADS"


class Shared(NamedTuple):
    """What the server processes know of each other, and the supervisor of them."""

    processes: int
    loaded: "Synchronized[int]"
    """Processes that have ever loaded"""
    pictures: "Synchronized[int]"
    failures: "SimpleQueue[str]"
    """Why processes could not load"""

    @classmethod
    def among(cls, processes: int) -> "Shared":
        context = get_context("spawn")
        return cls(processes, context.Value("i", 0), context.Value("q", 0), context.SimpleQueue())

    def all_loaded(self) -> bool:
        return self.loaded.value >= self.processes

    def has_loaded(self, service: Service) -> None:
        self.pictures.value = len(service.retriever)
        with self.loaded.get_lock():
            self.loaded.value += 1

    def has_failed(self, error: BaseException) -> None:
        """End the process in a way that the supervisor takes for hopeless."""
        if not isinstance(error, BadInput):
            traceback.print_exception(error)
        self.failures.put(str(error) if isinstance(error, BadInput) else f"a server process could not load: {error!r}")
        os._exit(STARTUP_FAILURE)


class Processes(Multiprocess):
    """uvicorn's supervisor, which also says when all processes have loaded, and ends those that do not stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        taken: socket.socket,
        shared: Shared,
        *,
        ready: Callable[[int], None],
        seconds: float,
    ) -> None:
        """
        Args:
            config: its app makes the application in each process.
            ready: called with the number of pictures once all processes have loaded.
            seconds: after which processes that do not stop are killed.
        """
        super().__init__(config, [taken])
        self._shared, self._ready, self._seconds = shared, ready, seconds
        self._is_ready = False

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:  # the child's end: were it open here too, a death would look like a delay
            process.child_conn.close()
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            assert pid is not None, "it was started"
            mark_process_dead(pid)
            if not self.should_exit.is_set():
                print(f"warning: server process {pid} died; another one takes its place", flush=True)
        for each in self.sockets:
            each.listen(QUEUE)  # a process that starts makes the queue as short as what it accepts at once
        if not self._is_ready and self._shared.all_loaded():
            self._is_ready = True
            self._ready(self._shared.pictures.value)

    def join_all(self) -> None:
        until = time.monotonic() + self._seconds
        for process in self.processes:
            process.process.join(max(until - time.monotonic(), 0))
            if process.process.is_alive():
                process.process.kill()
                process.process.join()


@contextmanager
def shared_numbers(processes: int) -> Iterator[None]:
    """Let server processes that are started from here keep their metrics in one folder, and divide the cores."""
    threads = str(max(len(os.sched_getaffinity(0)) // processes, 1))
    with tempfile.TemporaryDirectory(prefix="picture-search-") as folder:
        ours = {THREADS: os.environ.get(THREADS, threads), FOLDER: folder}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def end_with_supervisor() -> None:
    """Let this process stop when the one that started it is gone, as after `kill -9`."""
    supervisor = parent_process()
    assert supervisor is not None, "a server process is started by another one"

    def wait() -> None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()
