"""Generation beside approximate nearest neighbours at pools of many sizes: bytes, building, milliseconds, recall.

In:  nothing: codes and features are synthetic. Features are unit vectors of width 64 around 2,000 centres; CLIP's have
     512 to 768 numbers, which makes faiss's flat and HNSW indexes 8 to 12 times as large.
Out: `benchmarks/results/rivals.json`, a row for each system and pool; rows of others stay.
Command: python -m benchmarks.rivals --pictures 1000000

What would need more than `--memory` is not built, and its row says how much it needs. faiss flat has half precision as
well, for pools whose fp32 vectors do not fit. From fifty million pictures, IVF-PQ finds its lists by an HNSW graph, as
faiss advises. `recall` is the share of the
exact ten that a search finds; these come from a scan of all vectors. Generation is timed with a T5-base of random
weights, and its recall depends on the model: none is measured here.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from models.decoding import make_writer
from retriever.gallery.large_index import write_index
from retriever.index import load_index, to_device
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.features import Floats, normalized
from tools.files import read_array, read_json, write_json
from tools.logs import progress, table

from .calls import engine
from .rows import Setting
from .scale import LEVELS, write_codes
from .shapes import TextTower, captions, clip_tokens, t5_base, text_tower
from .timing import interleave, machine

WIDTH, CENTRES, BLOCK = 64, 2000, 1 << 20
BATCH, FOUND, BEAMS = 8, 10, 10
LINKS, HNSW_BUILD, HNSW_SEARCH = 16, 60, 64
PROBES, PQ_BYTES = 32, 16
MOST_LISTS, TRAINED_ON = 16_384, 40  # of IVF-PQ; vectors a list
GRAPHED, ROUNDS = 50_000_000, 10  # pictures from which IVF-PQ finds lists by a graph; rounds of k-means then
GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class Config:
    """Which pools."""

    pictures: tuple[int, ...] = (1_000_000,)
    """Sizes that are measured, one behind the other."""
    systems: tuple[str, ...] = ("generation", "faiss flat", "faiss HNSW", "faiss IVF-PQ")
    """Those that are measured."""
    memory: float = 12.0
    """GiB that an index may take while it is built."""
    repeats: int = 7
    """Rounds of all searches."""
    threads: int = 2
    """Of faiss while it builds; searches have one."""
    work: Path = Path(tempfile.gettempdir())
    """Folder on the disk where codes are sorted."""
    output: Path = Path("benchmarks/results")
    """Folder of rivals.json."""

    def __post_init__(self) -> None:
        if not self.pictures or min(self.pictures) < 10_000 or self.repeats < 1:
            raise BadInput("--pictures must be at least 10000 and --repeats at least 1")


def vectors(count: int) -> Iterator[Floats]:
    """Features (at most BLOCK, WIDTH) of a pool, block by block; each time the same."""
    for number, start in enumerate(range(0, count, BLOCK)):
        yield drawn(min(BLOCK, count - start), seed=number)


def drawn(count: int, *, seed: int) -> Floats:
    """Unit vectors (count, WIDTH) around the centres."""
    centres = np.random.default_rng(0).normal(size=(CENTRES, WIDTH)).astype(np.float32)
    generator = np.random.default_rng((1, seed))
    found = centres[generator.integers(CENTRES, size=count)]
    found += generator.standard_normal(found.shape, dtype=np.float32)
    return normalized(found)


def queries() -> Floats:
    """Features (BATCH, WIDTH) that ask for pictures."""
    return drawn(BATCH, seed=1 << 20)


def exact_rows(count: int) -> NDArray[np.int64]:
    """Rows (BATCH, FOUND) of the nearest vectors, by a scan."""
    best: Floats = np.empty((BATCH, 0), dtype=np.float32)
    rows: NDArray[np.int64] = np.empty((BATCH, 0), dtype=np.int64)
    for number, block in enumerate(vectors(count)):
        best = np.concatenate([best, queries() @ block.T], axis=1)
        own = np.broadcast_to(number * BLOCK + np.arange(len(block)), (BATCH, len(block)))
        rows = np.concatenate([rows, own], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :FOUND]
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return rows


@dataclass(frozen=True)
class Rival:
    """One index of faiss."""

    name: str
    parameters: str
    make: Any
    """Gives the empty index."""
    bytes_a_picture: float
    trained_on: int = 0
    """Vectors."""


def rivals_at(pool: int) -> list[Rival]:
    lists, graphed = min(int(4 * math.sqrt(pool)), MOST_LISTS), pool >= GRAPHED

    def hnsw() -> Any:
        index = faiss.IndexHNSWFlat(WIDTH, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
        return index

    def inverted() -> Any:
        finder = f"_HNSW{2 * LINKS}" if graphed else ""
        index: Any = faiss.index_factory(WIDTH, f"IVF{lists}{finder},PQ{PQ_BYTES}", faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.min_points_per_centroid = PROBES, 1
        if graphed:
            index.cp.niter = ROUNDS
        return index

    links = f"{LINKS} links, ef {HNSW_BUILD}/{HNSW_SEARCH}"
    cells = f"{lists} lists{' by HNSW' if graphed else ''}, {PROBES} probed, {PQ_BYTES} bytes"
    half = partial(faiss.IndexScalarQuantizer, WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    return [
        Rival("faiss flat", "", partial(faiss.IndexFlatIP, WIDTH), 4 * WIDTH),
        Rival("faiss flat", "fp16", half, 2 * WIDTH),
        Rival("faiss HNSW", links, hnsw, 4 * WIDTH + 8 * LINKS + 8),
        Rival("faiss IVF-PQ", cells, inverted, PQ_BYTES + 8, trained_on=TRAINED_ON * lists),
    ]


def built(rival: Rival, pool: int, threads: int) -> tuple[Any, float]:
    """The index, and the seconds of building it without those of drawing the vectors."""
    index, seconds = rival.make(), 0.0
    faiss.omp_set_num_threads(threads)
    if rival.trained_on:
        step = max(1, pool // rival.trained_on)
        sample = np.concatenate([block[::step].copy() for block in vectors(pool)])  # a view would keep its block
        began = time.perf_counter()
        index.train(sample)
        seconds = time.perf_counter() - began
    total = -(-pool // BLOCK)
    for block in progress(vectors(pool), rival.name, total=total, unit="block"):
        began = time.perf_counter()
        index.add(block)
        seconds += time.perf_counter() - began
    return index, seconds


def shared(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Share of the exact rows (queries, k) that are found (queries, k)."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def search_one(index: Any, asked: Floats) -> NDArray[np.int64]:
    faiss.omp_set_num_threads(1)
    rows: NDArray[np.int64] = index.search(asked, FOUND)[1]
    return rows


def faiss_row(rival: Rival, pool: int, config: Config, exact: NDArray[np.int64]) -> dict[str, Any]:
    needed = pool * rival.bytes_a_picture / GIBIBYTE
    row: dict[str, Any] = {"system": rival.name, "parameters": rival.parameters}
    if needed > config.memory:
        return {**row, "bytes_a_picture": rival.bytes_a_picture, "not_built": f"needs {needed:.0f} GiB"}
    index, seconds = built(rival, pool, config.threads)
    timing = interleave({"": partial(search_one, index, queries())}, repeats=config.repeats, memory=False)[""]
    return {
        **row,
        "bytes_a_picture": len(faiss.serialize_index(index)) / pool if pool <= BLOCK else rival.bytes_a_picture,
        "build_seconds": seconds,
        "query_ms": 1000 * timing.median / BATCH,
        "recall": shared(search_one(index, queries()), exact),
    }


def generation_row(pool: int, config: Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=config.work) as temporary:
        codes, folder = Path(temporary) / "codes.npy", Path(temporary) / "index"
        folder.mkdir()
        write_codes(codes, pool)
        began = time.perf_counter()
        write_index(folder, read_array(codes))
        seconds = time.perf_counter() - began
        index = load_index(folder, LEVELS)
        levels = to_device(index, torch.device("cpu"))
        writer, setting = make_writer(t5_base()), Setting("T5-base", pool, BEAMS, captions(BATCH))
        timing = interleave(
            {"": partial(engine, writer, levels, setting, scoring="voken")}, repeats=config.repeats, memory=False
        )[""]
        return {
            "system": "generation", "parameters": f"{BEAMS} beams",
            "bytes_a_picture": (index.constraint_bytes + index.map_bytes) / pool,
            "build_seconds": seconds, "query_ms": 1000 * timing.median / BATCH,
        }  # fmt: skip


def tower_ms(config: Config) -> float:
    """Milliseconds a query of CLIP ViT-L/14's text tower, which two-tower search needs besides."""
    tower, tokens = TextTower(text_tower("fp32", torch.device("cpu"), tuned=True), trimmed=True), captions(BATCH)
    timing = interleave({"": partial(tower.encode, clip_tokens(tokens))}, repeats=config.repeats, memory=False)[""]
    return 1000 * timing.median / BATCH


def main(config: Config) -> None:
    torch.set_num_threads(1)
    path = config.output / "rivals.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    for pool in config.pictures:
        rows = [row for row in rows if row["pictures"] != pool or row["system"] not in config.systems]
        exact = exact_rows(pool)
        systems = [partial(generation_row, pool, config)] if "generation" in config.systems else []
        rivals = [rival for rival in rivals_at(pool) if rival.name in config.systems]
        systems += [partial(faiss_row, rival, pool, config, exact) for rival in rivals]
        stamp = {
            "command": " ".join(["python -m benchmarks.rivals", *sys.argv[1:]]), "machine": machine(),
            "text_tower_ms": round(tower_ms(config), 2),
        }  # fmt: skip
        for system in systems:
            found = {key: round(value, 4) if isinstance(value, float) else value for key, value in system().items()}
            rows.append({"pictures": pool, **found, **stamp})
            config.output.mkdir(parents=True, exist_ok=True)
            write_json(path, {"rows": sorted(rows, key=lambda row: row["pictures"])})
            print({"pictures": pool, **found}, flush=True)
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("command", "machine"))
    print(table([{key: row.get(key, "") for key in columns} for row in rows]))


if __name__ == "__main__":
    run_command(main, Config)
