"""Bulk encoding against the plain loop: the same pictures, models and batches, side by side in one run.

In:  the emoji sample's captions, features and tokenizer.
Out: `benchmarks/results/bulk.json`.
Command: python -m benchmarks.bulk --pictures 1024 --rounds 2

The plain loop is that of RQ-VAE.prepare_emb on picture files, then the head and the tokenizer. It runs in one process
with as many threads of torch and as many reading processes as bulk encoding has workers, and in as many processes with
one thread and one reading process each. Bulk encoding reads tar shards of the same pictures with workers of one thread.
Seconds count from the first batch or shard on; what comes before, loading models and starting Ray, is `start`. Seconds
of CPU are those of all processes that read, decode and compute.
"""

import io
import os
import resource
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from models.clip import Pictures
from models.picture_codes import PictureCoder
from models.rqvae import RqVae
from tools import runs
from tools.captions import read_captions
from tools.cluster import Places, spread
from tools.code_tables import Tables
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.features import HEADS, TOWERS
from tools.files import read_array, write_json
from tools.logs import table
from tools.stored_pictures import find_shards
from tools.vokens import VokenSpace

from .timing import machine

encode_shards: Any = import_module("RQ-VAE.encode_shards")
prepare_emb: Any = import_module("RQ-VAE.prepare_emb")
SAMPLE = Path("RQ-VAE/output/emoji")
BATCH = 64
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}  # as scripts/env.sh has it


@dataclass(frozen=True)
class Config:
    """What is encoded, and how often."""

    captions: Path = Path("RQ-VAE/data/emoji/01_prepare_captions")
    """Run folder of tools.prepare_captions."""
    features: Path = SAMPLE / "04_train_heads"
    """Feature folder whose model encodes."""
    rqvae: Path = SAMPLE / "05_train_rqvae"
    """Run folder of RQ-VAE.train."""
    pictures: int = 1024
    """Pictures of a round, the first of the captions."""
    shard: int = 128
    """Pictures of a shard."""
    workers: int = 2
    """Of bulk encoding; threads and reading processes of the plain loop."""
    rounds: int = 2
    """How often each is run, in turn."""
    output: Path = Path("benchmarks/results")
    """Folder of bulk.json."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.shard, self.workers, self.rounds) < 1:
            raise BadInput("`pictures`, `shard`, `workers` and `rounds` must be at least 1")


class Timed(encode_shards.ShardEncoder):
    """A worker that says when it worked."""

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        return {**super().__call__(job), "began": began, "ended": time.time()}


def pack(files: list[Path], folder: Path, size: int) -> None:
    """Write pictures into tar shards; a picture's key is its place."""
    for start in range(0, len(files), size):
        with tarfile.open(folder / f"{start:08d}.tar", "w") as archive:
            for place, file in enumerate(files[start : start + size], start):
                content = file.read_bytes()
                member = tarfile.TarInfo(f"{place:08d}{file.suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def plain(files: list[Path], threads: int, config: Config, folder: Path) -> dict[str, Any]:
    """Codes of the plain loop in this process, and when it began and ended.

    Args:
        threads: of torch; as many processes read pictures.
    """
    torch.set_num_threads(threads)
    made = runs.read_manifest(config.features, TOWERS, HEADS)
    tokenizer = RqVae.from_pretrained(config.rqvae)
    coder = PictureCoder(made.facts, tokenizer, heads_apart=made.command == HEADS, device=torch.device("cpu"))
    pictures = Pictures([str(file) for file in files], coder.clip.preprocess)
    rows = np.arange(len(files))
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    began, cpu = time.time(), seconds_of_cpu()
    with torch.inference_mode():
        blocks = prepare_emb.encode(
            folder, pictures, parts, lambda pixels: coder.code(pixels).codes.float(), workers=threads
        )
    codes = np.concatenate([read_array(block) for block in blocks]).astype(np.int64)
    return {"codes": codes, "began": began, "ended": time.time(), "cpu": seconds_of_cpu() - cpu}


def plain_processes(count: int, threads: int, files: list[Path], config: Config, folder: Path) -> dict[str, Any]:
    """Codes, and seconds, of the plain loop in so many new processes, each with its part of the files."""
    asked, share = time.time(), -(-len(files) // count)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        starts = range(0, len(files), share)
        waiting = [
            pool.submit(plain, files[start : start + share], threads, config, folder / str(start)) for start in starts
        ]
        said = [each.result() for each in waiting]
    return summed(said, [each["codes"] for each in said], asked)


def summed(said: list[dict[str, Any]], codes: list[Any], asked: float) -> dict[str, Any]:
    """Of processes that began and ended at these times: codes, and seconds until the first began, and of all work."""
    began, ended = min(each["began"] for each in said), max(each["ended"] for each in said)
    cpu = sum(each["cpu"] for each in said)
    return {"codes": np.concatenate(codes), "start": began - asked, "clock": ended - began, "cpu": cpu}


def bulk(shards: Path, config: Config, folder: Path) -> dict[str, Any]:
    """Codes, and seconds, of bulk encoding."""
    asked = time.time()
    made, space = (
        runs.read_manifest(config.features, TOWERS, HEADS),
        runs.read_manifest(config.rqvae, "RQ-VAE.train").facts,
    )
    arguments = {
        **{
            "facts": made.facts,
            "heads_apart": made.command == HEADS,
            "rqvae": str(config.rqvae),
            "tables": str(folder),
            "made_by": "",
        },
        **{"space": [space[name] for name in VokenSpace._fields], "keep_features": False, "accept_torn": False},
        **{"columns": [None, None], "batch_size": BATCH, "device": "cpu"},
    }
    found = find_shards(str(shards))
    jobs = [shard._asdict() for shard in found]
    said = list(spread(Timed, arguments, jobs, Places(workers=config.workers, threads=1, gpu=False)))
    tables = Tables(str(folder))
    codes = [block.codes for shard in found for block in tables.blocks(shard.name, features=False)]
    return summed(said, codes, asked)


def seconds_of_cpu() -> float:
    """Of this process, and of those that it has started and waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(config: Config) -> None:
    os.environ.update(ALLOCATOR)  # for the processes that are started
    captions = read_captions(config.captions)
    files = [captions.images / record.file for record in captions.records[: config.pictures]]
    threaded, processes, bulky = (
        f"{way} {config.workers}" for way in ("plain, threads", "plain, processes", "bulk, workers")
    )
    found: dict[str, list[dict[str, Any]]] = {threaded: [], processes: [], bulky: []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "shards").mkdir()
        pack(files, work / "shards", config.shard)
        for number in range(config.rounds):
            found[threaded].append(plain_processes(1, config.workers, files, config, work / f"threads-{number}"))
            found[processes].append(plain_processes(config.workers, 1, files, config, work / f"plain-{number}"))
            found[bulky].append(bulk(work / "shards", config, work / f"bulk-{number}"))
    rows = [row(name, each, found[threaded][0]["codes"]) for name, each in found.items()]
    print(table(rows))
    ratios = {
        f"{kind}, against {name}": rows[2][kind] / next(each[kind] for each in rows if each["way"] == name)
        for name in (threaded, processes)
        for kind in ("pictures/second", "pictures/CPU second")
    }
    for kind, ratio in ratios.items():
        print(f"bulk encoding has {ratio:.2f} x the {kind}")
    config.output.mkdir(parents=True, exist_ok=True)
    sizes = {"pictures": len(files), "shard": config.shard, "workers": config.workers, "rounds": config.rounds}
    write_json(config.output / "bulk.json", {"machine": machine(), **sizes, "rows": rows, "ratios": ratios})


def row(name: str, rounds: list[dict[str, Any]], wanted: Any) -> dict[str, Any]:
    """Medians over the rounds, and how many pictures got other codes than `wanted` (pictures, levels)."""
    times = {kind: median(each[kind] for each in rounds) for kind in ("start", "clock", "cpu")}
    return {
        "way": name,
        "start, s": times["start"],
        "pictures/second": len(wanted) / times["clock"],
        "pictures/CPU second": len(wanted) / times["cpu"],
        "other codes": int((rounds[0]["codes"] != wanted).any(axis=1).sum()),
    }


if __name__ == "__main__":
    run_command(main, Config)
