"""Work that is done in threads while its results are used."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")


def ahead(
    items: Iterator[ItemT], function: Callable[[ItemT], ValueT], most: int, threads: int
) -> Iterator[tuple[ItemT, ValueT]]:
    """Items in their order, each with what the function makes of it in one of several threads.

    Args:
        items: are taken in a thread of their own; what that raises is raised here, behind the items before it.
        most: items that are taken before they are asked for.
    """
    found: queue.Queue[tuple[ItemT, Future[ValueT]] | BaseException | None] = queue.Queue(most)
    stopped = threading.Event()
    with ThreadPoolExecutor(threads) as pool:

        def take() -> None:
            end: BaseException | None = None
            try:
                for item in items:
                    if stopped.is_set():
                        break
                    found.put((item, pool.submit(function, item)))
            except BaseException as error:  # it is raised where it is seen
                end = error
            found.put(end)

        taking = threading.Thread(target=take, daemon=True)
        taking.start()
        try:
            while isinstance(pair := found.get(), tuple):
                yield pair[0], pair[1].result()
            if pair is not None:
                raise pair
        finally:
            stopped.set()
            while taking.is_alive():  # it may wait for room
                with contextlib.suppress(queue.Empty):
                    found.get(timeout=0.05)
