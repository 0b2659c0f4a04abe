"""Bulk encoding against the plain loop: the same pictures, models and batches, side by side in one run.

In:  the emoji sample's captions, features and tokenizer.
Out: `benchmarks/results/bulk.json`.
Command: python -m benchmarks.bulk --pictures 2048 --rounds 2

The plain loop is that of RQ-VAE.prepare_emb on picture files, then the head and the tokenizer, with as many threads of
torch and as many reading processes as bulk encoding has workers. Bulk encoding reads tar shards of the same pictures
with workers of one thread each. Seconds on the clock count from the first batch or shard on: loading models and
starting Ray are the row `start`. Seconds of CPU are those of all processes that read, decode and compute.
"""

import io
import resource
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
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
from tools.files import write_json
from tools.logs import table
from tools.stored_pictures import find_shards
from tools.vokens import VokenSpace

from .timing import machine

encode_shards: Any = import_module("RQ-VAE.encode_shards")
prepare_emb: Any = import_module("RQ-VAE.prepare_emb")
SAMPLE = Path("RQ-VAE/output/emoji")
BATCH = 64


@dataclass(frozen=True)
class Config:
    """What is encoded, and how often."""

    captions: Path = Path("RQ-VAE/data/emoji/01_prepare_captions")
    """Run folder of tools.prepare_captions."""
    features: Path = SAMPLE / "04_train_heads"
    """Feature folder whose model encodes."""
    rqvae: Path = SAMPLE / "05_train_rqvae"
    """Run folder of RQ-VAE.train."""
    pictures: int = 2048
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


def plain(files: list[Path], config: Config, folder: Path) -> dict[str, Any]:
    """Codes, and seconds, of the plain loop."""
    torch.set_num_threads(config.workers)
    began = time.time()
    made = runs.read_manifest(config.features, TOWERS, HEADS)
    tokenizer = RqVae.from_pretrained(config.rqvae)
    coder = PictureCoder(made.facts, tokenizer, heads_apart=made.command == HEADS, device=torch.device("cpu"))
    pictures = Pictures([str(file) for file in files], coder.clip.preprocess)
    rows = np.arange(len(files))
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    start, cpu = time.time(), seconds_of_cpu()
    with torch.inference_mode():
        blocks = prepare_emb.encode(
            folder, pictures, parts, lambda pixels: coder.code(pixels).codes.float(), workers=config.workers
        )
    codes = np.concatenate([np.load(block) for block in blocks]).astype(np.int64)
    return {"codes": codes, "start": start - began, "clock": time.time() - start, "cpu": seconds_of_cpu() - cpu}


def bulk(shards: Path, config: Config, folder: Path) -> dict[str, Any]:
    """Codes, and seconds, of bulk encoding."""
    began = time.time()
    facts = runs.read_manifest(config.rqvae, "RQ-VAE.train").facts
    arguments = {
        **{"features": str(config.features), "rqvae": str(config.rqvae), "tables": str(folder), "made_by": ""},
        **{"space": [facts[name] for name in VokenSpace._fields], "keep_features": False, "accept_torn": False},
        **{"columns": [None, None], "batch_size": BATCH, "device": "cpu"},
    }
    found = find_shards(str(shards))
    jobs = [shard._asdict() for shard in found]
    said = list(spread(Timed, arguments, jobs, Places(workers=config.workers, threads=1, gpu=False)))
    start, end = min(each["began"] for each in said), max(each["ended"] for each in said)
    tables = Tables(str(folder))
    codes = [block.codes for shard in found for block in tables.blocks(shard.name, features=False)]
    cpu = sum(each["cpu"] for each in said)
    return {"codes": np.concatenate(codes), "start": start - began, "clock": end - start, "cpu": cpu}


def seconds_of_cpu() -> float:
    """Of this process, and of those that it has started and waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(config: Config) -> None:
    captions = read_captions(config.captions)
    files = [captions.images / record.file for record in captions.records[: config.pictures]]
    found: dict[str, list[dict[str, Any]]] = {"plain loop": [], "bulk": []}
    with tempfile.TemporaryDirectory() as work:
        shards = Path(work) / "shards"
        shards.mkdir()
        pack(files, shards, config.shard)
        for number in range(config.rounds):
            found["plain loop"].append(plain(files, config, Path(work) / f"plain-{number}"))
            found["bulk"].append(bulk(shards, config, Path(work) / f"bulk-{number}"))
    wanted = found["plain loop"][0]["codes"]
    rows = []
    for name, each in found.items():
        times = {kind: median(one[kind] for one in each) for kind in ("start", "clock", "cpu")}
        other = int((each[0]["codes"] != wanted).any(axis=1).sum())
        rates = {f"pictures_per_{kind}_second": len(files) / times[kind] for kind in ("clock", "cpu")}
        rows.append({"way": name, "start_seconds": times["start"], **rates, "other_codes": other})
    ratios = {
        kind: rows[1][f"pictures_per_{kind}_second"] / rows[0][f"pictures_per_{kind}_second"]
        for kind in ("clock", "cpu")
    }
    print(table(rows))
    print("bulk / plain loop: " + ", ".join(f"{value:.2f} by {kind}" for kind, value in ratios.items()))
    config.output.mkdir(parents=True, exist_ok=True)
    sizes = {"pictures": len(files), "shard": config.shard, "workers": config.workers, "rounds": config.rounds}
    write_json(config.output / "bulk.json", {"machine": machine(), **sizes, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    run_command(main, Config)
