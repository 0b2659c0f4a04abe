"""The search page under load: many clients that ask again as soon as they are answered, against a server of its own.

In:  the emoji sample's index, retriever and test captions (`bash scripts/quickstart.sh`).
Out: `benchmarks/results/serve.json`: requests, errors, latencies, queries per second, the server's memory over time.
Command: python -m benchmarks.serve [--clients 64] [--seconds 60]

Server and clients share the machine. A client speaks HTTP over one connection that stays open, and asks for a random
test caption each time; it is an error unless the answer has the status 200, the query that was asked, and pictures.
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
import torch

from retriever.data import read_data
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import write_json
from tools.logs import table

from .timing import MEBIBYTE, cpu

HOST = "127.0.0.1"
WARM_UP_SECONDS = 5.0
START_SECONDS = 300.0
MEMORY_SECONDS = 10.0  # between two looks at the server's memory
ADDRESS = f"http://{HOST}:"


@dataclass(frozen=True)
class Config:
    """How heavy the load is."""

    clients: int = 64
    """Clients that ask at the same time."""
    seconds: float = 60.0
    """How long they ask, after five seconds that do not count."""
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
        if self.clients < 1 or self.seconds <= 0:
            raise BadInput("--clients must be at least 1 and --seconds above 0")


class Tally(NamedTuple):
    """What the clients saw."""

    seconds: list[float]
    """Of each answer."""
    errors: Counter[str]


class Server(NamedTuple):
    """A server that runs."""

    pid: int
    port: int


@contextmanager
def serving(config: Config) -> Iterator[Server]:
    """Start a server on a free port; stop it at the end.

    Raises:
        BadInput: it does not start; the message has its last line.
    """
    command = [sys.executable, "-m", "retriever.serve", "--port", "0", "--host", HOST]
    command += ["--index", str(config.index), "--retriever", str(config.retriever)]
    command += ["--weights", str(config.weights)] if config.weights is not None else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
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
    while time.perf_counter() < until:
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
    tally = Tally([], Counter())
    until = time.perf_counter() + seconds
    seeds = range(seed, seed + config.clients)
    await asyncio.gather(*(client(server, texts, tally, until, seed=each, rerank=config.rerank) for each in seeds))
    return tally


async def status(server: Server) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(HOST, server.port)
    _, body = await get(reader, writer, "/api/status")
    writer.close()
    found: dict[str, Any] = json.loads(body)
    return found


def memory(server: Server) -> float:
    """Mebibytes of the server that lie in memory."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    kibibytes = next(line for line in lines if line.startswith("VmRSS:")).split()[1]
    return round(int(kibibytes) * 1024 / MEBIBYTE, 1)


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
    before = await status(server)
    seen: list[dict[str, float]] = []
    watching = asyncio.create_task(watch(server, seen))
    began = time.perf_counter()
    tally = await load(server, texts, config, config.seconds, seed=0)
    took = time.perf_counter() - began
    watching.cancel()
    seen.append({"second": round(took, 1), "mebibytes": memory(server)})
    after = await status(server)
    milliseconds = np.array(tally.seconds) * 1e3
    answered, calls = (after[name] - before[name] for name in ("answered", "calls"))
    half, most, worst = np.percentile(milliseconds, (50, 95, 99)).round(1).tolist()
    return {
        "pictures": after["pool"],
        "clients": config.clients,
        "re-ranked": config.rerank,
        "seconds": round(took, 1),
        "requests": len(tally.seconds),
        "errors": dict(tally.errors),
        "queries/s": round(len(tally.seconds) / took, 1),
        "milliseconds": {"p50": half, "p95": most, "p99": worst, "max": round(float(milliseconds.max()), 1)},
        "queries a call": round(answered / max(calls, 1), 1),
        "memory before the load": idle,
        "memory": seen,
    }


def main(config: Config) -> None:
    texts = read_data(config.dataset).queries("test").texts
    with serving(config) as server:
        figures = asyncio.run(measure(server, texts, config))
    config.output.mkdir(parents=True, exist_ok=True)
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    write_json(
        config.output / "serve.json",
        {
            "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]),
            "machine": f"{len(os.sched_getaffinity(0))} cores, which the clients share: {kind}",
            "torch": torch.__version__,
            **figures,
        },
    )
    print(
        table([{**figures.pop("milliseconds"), **{name: value for name, value in figures.items() if name != "memory"}}])
    )
    print(table(figures["memory"]))


if __name__ == "__main__":
    run_command(main, Config)
