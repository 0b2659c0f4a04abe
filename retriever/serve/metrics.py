"""What the server tells Prometheus: numbers of requests, seconds, batches and pictures; no query and no name of a file.

Of several server processes, each keeps its numbers in files of one folder, as prometheus_client does by itself where
`PROMETHEUS_MULTIPROC_DIR` names one when it is imported. Whichever process is asked then answers for all.
"""

import os
import re
from collections.abc import Sequence
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from .service import Service

Mode = Literal["livesum", "livemostrecent", "liveall"]

NAME = "picture_search"  # before all names
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60)
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OTHER = "other"  # in the place of an address that is none of the server's, so that nobody can make up new ones


class Metrics:
    """The numbers of one server process."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        requests, seconds = f"{NAME}_requests", f"{NAME}_request_duration_seconds"
        self._requests = Counter(requests, "Requests that were answered.", ["endpoint", "status"], registry=own)
        self._seconds = Histogram(
            seconds, "From a request's arrival to the end of its answer.", ["endpoint"], buckets=SECONDS, registry=own
        )
        self._batches = Histogram(
            f"{NAME}_batch_queries", "Queries that one call answers.", buckets=QUERIES, registry=own
        )
        self._waiting = self._gauge("waiting", "Searches and changes in the queues.", "livesum", ["queue"])
        self._pictures = self._gauge("pictures", "Pictures that can be found.", "livemostrecent")
        self._version = self._gauge("index_version", "Number of the index's version.", "livemostrecent")
        self._memory = self._gauge("resident_memory_bytes", "Memory of each server process.", "liveall")

    def _gauge(self, name: str, says: str, mode: Mode, labels: Sequence[str] = ()) -> Gauge:
        """
        Args:
            mode: what prometheus_client makes of the values of several processes.
        """
        return Gauge(f"{NAME}_{name}", says, labels, multiprocess_mode=mode, registry=self.registry)

    def answered(self, endpoint: str | None, status: int, seconds: float) -> None:
        """Count an answer.

        Args:
            endpoint: the address as the server declares it, without what the request put into it.
        """
        self._requests.labels(endpoint or OTHER, str(status)).inc()
        self._seconds.labels(endpoint or OTHER).observe(seconds)

    def called(self, queries: int) -> None:
        """Count a call of the retriever."""
        self._batches.observe(queries)

    def look(self, service: Service) -> None:
        """Note the state of the service."""
        gallery = service.retriever.gallery
        self._waiting.labels("searches").set(len(service.answers))
        self._waiting.labels("changes").set(len(service.changes))
        self._pictures.set(len(gallery))
        if number := re.search(r"\d+$", str(gallery.facts["version"])):
            self._version.set(int(number[0]))
        self._memory.set(psutil.Process().memory_info().rss)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format, of all server processes where there are several."""
        registry = self.registry
        if FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
