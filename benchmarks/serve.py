"""The search page under load: many clients that ask again as soon as they are answered, against a server of its own.

In:  the emoji sample's index, retriever and test captions (`bash scripts/quickstart.sh`).
Out: `benchmarks/results/serve.json`: requests, errors, latencies, queries per second and per second of a core's time,
     the server's memory over time, and whether the goals are met.
Command: python -m benchmarks.serve [--clients 64] [--seconds 60] [--cores 1]   # what one core serves
         python -m benchmarks.serve --seconds 1200                              # whether the memory grows

Server and clients share the machine, and with --cores the server keeps to its first cores, the clients to the others
where there are some. A client speaks HTTP over one connection of this machine that stays open, and asks for a random
test caption each time; it is an error unless the answer has the status 200, the query that was asked, and pictures.
The memory is that of all server processes; pages that they share count once. It is looked at every second, and every
tenth look is written down. Its growth compares the median of all looks in the last third of the time after two minutes
with that of the first third: batches of other sizes need more or less.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from retriever.data import read_data
from retriever.serve.metrics import NAME
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import write_json
from tools.logs import table

from .timing import MEBIBYTE, cpu

HOST = "127.0.0.1"
WARM_UP_SECONDS = 5.0
START_SECONDS = 300.0
MEMORY_SECONDS, TOLD = 1.0, 10  # between two looks at the server's memory; the looks of which one is written down
SETTLED_SECONDS, LEAST_LOOKS = 120.0, 30  # after which memory should not grow; looks of each third that tell
MOST_GROWTH, MOST_SPREAD = 0.03, 2.5  # the goals: of the memory, and of the slowest answers
BATCHES = f"{NAME}_batch_queries"
ADDRESS = f"http://{HOST}:"


@dataclass(frozen=True)
class Config:
    """How heavy the load is."""

    clients: int = 64
    """Clients that ask at the same time."""
    seconds: float = 60.0
    """How long they ask at most, after five seconds that do not count."""
    requests: int = 1_000_000
    """How many requests they send at most."""
    processes: int = 1
    """Server processes."""
    cores: int | None = None
    """Cores of the server, the machine's first; by default it shares all of them with the clients."""
    index: Path = Path("retriever/output/emoji/14_index")
    """Run folder of retriever.gallery.build."""
    retriever: Path = Path("retriever/output/emoji/10_stage2/retriever+stage2")
    """Run folder of retriever.train or retriever.train_stage2."""
    weights: Path | None = Path("reranker/output/emoji/18_test/retriever+stage2")
    """Run folder of reranker.test."""
    dataset: Path = Path("retriever/output/emoji/07_dataset")
    """Run folder of retriever.prepare, whose test captions are asked."""
    rerank: bool = True
    """Re-rank by features, as the page does by default."""
    output: Path = Path("benchmarks/results")
    """Folder of serve.json."""

    def __post_init__(self) -> None:
        if self.clients < 1 or self.requests < 1 or self.processes < 1 or self.seconds <= 0:
            raise BadInput("--clients, --requests and --processes must be at least 1, and --seconds above 0")
        if self.cores is not None and not 1 <= self.cores <= len(cores()):
            raise BadInput(f"--cores is a number from 1 to {len(cores())}, the cores that this command may use")


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


class Tally(NamedTuple):
    """What the clients saw."""

    seconds: list[float]
    """Of each answer."""
    errors: Counter[str]
    left: Iterator[int]
    """As many as may still be sent."""


class Server(NamedTuple):
    """A server that runs."""

    pid: int
    port: int

    def processes(self) -> list[psutil.Process]:
        """It, and those that it started."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


def threads(config: Config) -> dict[str, str]:
    """The environment of a server that may use so many cores: its threads would else be as many as the machine's."""
    return {} if config.cores is None else {"OMP_NUM_THREADS": str(max(config.cores // config.processes, 1))}


def divide_cores(server: int, count: int | None) -> None:
    """Give a process that has just begun, and all that it starts, the first cores, and this one the others.

    Args:
        server: its id.
    """
    if count is not None:
        os.sched_setaffinity(server, cores()[:count])
        os.sched_setaffinity(0, cores()[count:] or cores())


@contextmanager
def serving(config: Config) -> Iterator[Server]:
    """Start a server on a free port; stop it at the end.

    Raises:
        BadInput: it does not start; the message has its last line.
    """
    command = [sys.executable, "-m", "retriever.serve", "--port", "0", "--host", HOST]
    command += [
        "--processes",
        str(config.processes),
        "--index",
        str(config.index),
        "--retriever",
        str(config.retriever),
    ]
    command += ["--weights", str(config.weights)] if config.weights is not None else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, **threads(config)}
        )
        divide_cores(process.pid, config.cores)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if ADDRESS in line:
                    yield Server(process.pid, int(line.partition(ADDRESS)[2].split()[0]))
                    return
            said.seek(0)
            raise BadInput(f"the server did not start: {said.read().strip().splitlines()[-1:]}")
        finally:
            process.terminate()
            process.wait(START_SECONDS)


async def get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> tuple[int, bytes]:
    """Status and body of one GET over an open connection."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].split()[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def client(server: Server, texts: list[str], tally: Tally, until: float, *, seed: int, rerank: bool) -> None:
    """Ask until the time is over."""
    generator = np.random.default_rng(seed)
    connection = await asyncio.open_connection(HOST, server.port)
    while time.perf_counter() < until and next(tally.left, None) is not None:
        query = texts[generator.integers(len(texts))]
        began = time.perf_counter()
        try:
            path = f"/api/search?{urlencode({'q': query, 'k': 20, 'rerank': rerank})}"
            status, body = await get(*connection, path)
            if problem := problem_of(status, body, query):
                tally.errors[problem] += 1
        except Exception as error:
            tally.errors[type(error).__name__] += 1
            connection[1].close()
            connection = await asyncio.open_connection(HOST, server.port)
        tally.seconds.append(time.perf_counter() - began)
    connection[1].close()


def problem_of(status: int, body: bytes, query: str) -> str:
    """Why an answer is none; nothing where it is one."""
    if status != 200:
        return f"status {status}"
    answer = json.loads(body)
    if answer["query"] != query:
        return "answer to another query"
    return "" if answer["pictures"] else "no pictures"


async def load(server: Server, texts: list[str], config: Config, seconds: float, *, seed: int) -> Tally:
    """All clients at once."""
    tally = Tally([], Counter(), iter(range(config.requests)))
    until = time.perf_counter() + seconds
    seeds = range(seed, seed + config.clients)
    await asyncio.gather(*(client(server, texts, tally, until, seed=each, rerank=config.rerank) for each in seeds))
    return tally


async def counts(server: Server) -> dict[str, float]:
    """What the server, all its processes together, has counted: its metrics that have no labels."""
    reader, writer = await asyncio.open_connection(HOST, server.port)
    _, body = await get(reader, writer, "/metrics")
    writer.close()
    families = text_string_to_metric_families(body.decode())
    return {each.name: each.value for family in families for each in family.samples if not each.labels}


def memory(server: Server) -> float:
    """Mebibytes of the server's processes that lie in memory; what several share counts once."""
    return round(sum(each.memory_full_info().pss for each in server.processes()) / MEBIBYTE, 1)


def core_seconds(server: Server) -> float:
    """Seconds of cores that the server's processes have used."""
    return float(sum(sum(each.cpu_times()[:2]) for each in server.processes()))


def growth(seen: list[dict[str, float]]) -> float | None:
    """Of the memory after two minutes, as a share; None where the run was too short to tell."""
    late = [each["mebibytes"] for each in seen if each["second"] >= SETTLED_SECONDS]
    third = len(late) // 3
    if third < LEAST_LOOKS:
        return None
    return round(float(np.median(late[-third:]) / np.median(late[:third])) - 1, 4)


def goals(figures: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each goal is met; None where the run was too short to tell."""
    times, grown = figures["milliseconds"], figures["memory growth after two minutes"]
    return {
        "no errors": not figures["errors"],
        f"p99 at most {MOST_SPREAD} x p50": times["p99"] <= MOST_SPREAD * times["p50"],
        f"memory growth at most {MOST_GROWTH:.0%}": None if grown is None else grown <= MOST_GROWTH,
    }


async def watch(server: Server, seen: list[dict[str, float]]) -> None:
    """Note the server's memory again and again."""
    began = time.perf_counter()
    while True:
        seen.append({"second": round(time.perf_counter() - began, 1), "mebibytes": memory(server)})
        await asyncio.sleep(MEMORY_SECONDS)


async def measure(server: Server, texts: list[str], config: Config) -> dict[str, Any]:
    """Figures of one server under load."""
    idle = memory(server)
    await load(server, texts, config, WARM_UP_SECONDS, seed=config.clients)
    before = await counts(server)
    seen: list[dict[str, float]] = []
    watching = asyncio.create_task(watch(server, seen))
    began, used = time.perf_counter(), core_seconds(server)
    tally = await load(server, texts, config, config.seconds, seed=0)
    took, used = time.perf_counter() - began, core_seconds(server) - used
    watching.cancel()
    seen.append({"second": round(took, 1), "mebibytes": memory(server)})
    after = await counts(server)
    milliseconds = np.array(tally.seconds) * 1e3
    answered, calls = (after[name] - before[name] for name in (f"{BATCHES}_sum", f"{BATCHES}_count"))
    half, most, worst = np.percentile(milliseconds, (50, 95, 99)).round(1).tolist()
    figures = {
        "pictures": int(after[f"{NAME}_pictures"]),
        "clients": config.clients,
        "processes": config.processes,
        "cores": config.cores,
        "re-ranked": config.rerank,
        "seconds": round(took, 1),
        "requests": len(tally.seconds),
        "errors": dict(tally.errors),
        "queries/s": round(len(tally.seconds) / took, 1),
        "core seconds": round(used, 1),
        "queries per core second": round(len(tally.seconds) / max(used, 1e-9), 1),
        "milliseconds": {"p50": half, "p95": most, "p99": worst, "max": round(float(milliseconds.max()), 1)},
        "queries a call": round(answered / max(calls, 1), 1),
        "memory before the load": idle,
        "memory growth after two minutes": growth(seen),
        "memory": [*seen[:-1:TOLD], seen[-1]],
    }
    return {**figures, "goals": goals(figures)}


def main(config: Config) -> None:
    texts, machine_cores = read_data(config.dataset).queries("test").texts, len(cores())
    with serving(config) as server:
        figures = asyncio.run(measure(server, texts, config))
    config.output.mkdir(parents=True, exist_ok=True)
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    write_json(
        config.output / "serve.json",
        {
            "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
            "machine": f"{machine_cores} cores, which the clients share: {kind}",
            "torch": torch.__version__,
            **figures,
        },
    )
    memories, met = figures.pop("memory"), figures.pop("goals")
    print(table([{**figures.pop("milliseconds"), **figures}]))
    print(table(memories))
    print(table([{name: {True: "met", False: "missed", None: "run too short"}[each] for name, each in met.items()}]))


if __name__ == "__main__":
    run_command(main, Config)
