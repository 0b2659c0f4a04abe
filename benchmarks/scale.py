"""The index of very many pictures: how long it takes to build on disk, what it needs, and what a query costs on it.

In:  nothing: the codes are synthetic (benchmarks/codes.py).
Out: `benchmarks/results/scale.json`, a row for each number of pictures that was measured; others' rows stay.
Command: python -m benchmarks.scale --pictures 100000000

Codes and index lie in a temporary folder below --work, which needs 30 bytes a picture. The build runs in a
process of its own, whose peak memory (with the pages of mapped files that it has read) is `build_gib`. The codes are
drawn before, which does not count. The query is a T5-base search of 8 captions with 10 beams, in turn with the same
search of a thousand pictures.
"""

import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.decoding import make_writer
from retriever.gallery.large_index import write_large_index
from retriever.index import VokenIndex, build_index, load_index, to_device
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import new_array, read_array, read_json, write_json
from tools.logs import progress, table

from .calls import engine
from .codes import synthetic_blocks, synthetic_codes
from .rows import Setting
from .shapes import captions, t5_base
from .timing import interleave, machine

LEVELS, FEW, BATCH, BEAMS = 4, 1000, 8, 10
BLOCK = 1 << 22
GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class Config:
    """How many pictures."""

    pictures: tuple[int, ...] = (1_000_000, 100_000_000)
    """Sizes that are measured, one behind the other."""
    repeats: int = 11
    """Rounds of the two searches."""
    work: Path = Path(tempfile.gettempdir())
    """Folder on the disk that is built on."""
    output: Path = Path("benchmarks/results")
    """Folder of scale.json."""

    def __post_init__(self) -> None:
        if not self.pictures or min(self.pictures) < FEW or self.repeats < 1:
            raise BadInput(f"--pictures must be at least {FEW} and --repeats at least 1")


def write_codes(path: Path, pictures: int) -> None:
    """Draw the codes (pictures, levels) and write them as one array."""
    codes = new_array(path, dtype=np.int16, shape=(pictures, LEVELS))
    blocks = synthetic_blocks(pictures, block=BLOCK, levels=LEVELS)
    for number, block in enumerate(progress(blocks, "drawing codes", total=-(-pictures // BLOCK), unit="block")):
        codes[number * BLOCK : number * BLOCK + len(block)] = block
    codes.flush()


def build(codes: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak gibibytes of building an index; to be run in a process of its own."""
    began = time.perf_counter()
    write_large_index(folder, read_array(codes))
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIBIBYTE


def query_ratio(index: VokenIndex, repeats: int) -> float:
    """The time of a search in an index over that in one of a thousand pictures."""
    writer = make_writer(t5_base())
    calls = {}
    for name, each in (("many", index), ("few", build_index(synthetic_codes(FEW)))):
        setting = Setting("T5-base by pool", len(each.pictures), BEAMS, captions(BATCH))
        calls[name] = partial(engine, writer, to_device(each, torch.device("cpu")), setting, scoring="voken")
    timings = interleave(calls, repeats=repeats, memory=False)
    return timings["many"].median / timings["few"].median


def figures(pictures: int, config: Config) -> dict[str, Any]:
    """The row of one number of pictures."""
    with tempfile.TemporaryDirectory(dir=config.work) as temporary:
        codes, folder = Path(temporary) / "codes.npy", Path(temporary) / "index"
        folder.mkdir()
        write_codes(codes, pictures)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, gibibytes = pool.submit(build, codes, folder).result()
        index = load_index(folder, LEVELS)
        row = {
            "pictures": pictures,
            "bytes_a_picture": sum(path.stat().st_size for path in folder.iterdir()) / pictures,
            "tree_bytes_a_picture": index.constraint_bytes / pictures,
            "shared_codes": 1 - index.leaves / pictures,
            "build_seconds": seconds,
            "build_gib": gibibytes,
            "query_over_thousand": query_ratio(index, config.repeats),
        }
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    path = config.output / "scale.json"
    rows = {row["pictures"]: row for row in read_json(path)["rows"]} if path.is_file() else {}
    for pictures in config.pictures:
        stamp = {"command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]]), "machine": machine()}
        rows[pictures] = {**figures(pictures, config), **stamp, "torch": torch.__version__}
        config.output.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rows": [rows[size] for size in sorted(rows)]})
        print(table([{key: value for key, value in rows[pictures].items() if key not in stamp}]), flush=True)


if __name__ == "__main__":
    run_command(main, Config)
