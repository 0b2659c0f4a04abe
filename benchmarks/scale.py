"""The index of very many pictures: what building it on disk takes, and what a query and a change cost on it.

In:  nothing: the codes are synthetic (benchmarks/codes.py).
Out: `benchmarks/results/scale.json`, a row for each number of pictures that was measured; others' rows stay.
Command: python -m benchmarks.scale --pictures 100000000

Codes and index lie in a temporary folder below --work, which needs 30 bytes a picture. The build runs in a
process of its own, whose peak memory (with the pages of mapped files that it has read) is `build_gib`. The codes are
drawn before, which does not count. The query is a T5-base search of 8 captions with 10 beams, in turn with the same
search of a thousand pictures.

With --change the index becomes a gallery with ids and files, which needs another 250 bytes a picture. A process of its
own then adds pictures one by one, without encoding them: it opens the gallery, looks for the picture's id, file and
codes in it, and publishes a version. `add_one_seconds` is the median, `add_one_slowest` the slowest, and `add_one_mib`
what the process needed beyond its start, pages of mapped files included.
"""

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from models.decoding import make_writer
from retriever.gallery.contents import unknown
from retriever.gallery.gallery import COMMAND, FOLDERS
from retriever.gallery.large_index import write_large_index
from retriever.gallery.pictures import STORE, Picture, write_store
from retriever.gallery.publish import changing, replace_pictures, version_facts
from retriever.gallery.segments import CODES, SEGMENT, Block
from retriever.index import VokenIndex, build_index, load_index, to_device
from tools import runs
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import new_array, read_array, read_json, write_json
from tools.logs import progress, table

from .calls import engine
from .codes import synthetic_blocks, synthetic_codes
from .rows import Setting
from .shapes import captions, t5_base
from .timing import interleave, machine, status

LEVELS, FEW, BATCH, BEAMS = 4, 1000, 8, 10
BLOCK = 1 << 22
MEBIBYTE, GIBIBYTE = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Config:
    """How many pictures."""

    pictures: tuple[int, ...] = (1_000_000, 100_000_000)
    """Sizes that are measured, one behind the other."""
    change: bool = True
    """Measure the adding of a picture, too."""
    repeats: int = 11
    """Rounds of the two searches, and pictures that are added."""
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
    return time.perf_counter() - began, status("VmHWM") / GIBIBYTE  # not ru_maxrss: it begins with the parent's


def query_ratio(index: VokenIndex, repeats: int) -> float:
    """The time of a search in an index over that in one of a thousand pictures."""
    writer = make_writer(t5_base())
    calls = {}
    for name, each in (("many", index), ("few", build_index(synthetic_codes(FEW)))):
        setting = Setting("T5-base by pool", len(each.pictures), BEAMS, captions(BATCH))
        calls[name] = partial(engine, writer, to_device(each, torch.device("cpu")), setting, scoring="voken")
    timings = interleave(calls, repeats=repeats, memory=False)
    return timings["many"].median / timings["few"].median


@dataclass(frozen=True)
class Made:
    """The configuration of the gallery's run folder."""

    output: Path
    overwrite: bool = False


def name_of(number: int) -> Picture:
    return Picture(f"{number:010}.jpg", f"photos/{number % 1000:03}/{number:010}.jpg")


def make_gallery(codes: Path, index: Path, folder: Path) -> None:
    """Make a gallery of an index, whose files it takes, and synthetic names."""
    run = runs.begin(COMMAND, Made(folder), inputs={})
    assert run is not None
    segment = index.rename(folder / SEGMENT.format(0))
    codes.rename(segment / CODES)
    pictures = len(read_array(segment / CODES))
    nothing = unknown(1)[0]
    write_store(segment / STORE, ((name_of(number), nothing) for number in range(pictures)))
    facts = {"levels": LEVELS, "codebooks": "synthetic", FOLDERS: [], "history": []}
    run.finish(facts={**version_facts(0, pictures, {segment.name: pictures}), **facts})


def add_one_by_one(folder: Path, count: int) -> tuple[list[float], float]:
    """Seconds that adding each of some pictures takes, and mebibytes; to be run in a process of its own."""
    before = status("VmHWM")
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        with changing(folder) as gallery:
            picture = name_of(10**9 + len(gallery))
            assert not gallery.with_images([picture.image]) | gallery.with_files([picture.file])
            codes = gallery.read_codes(np.array([number]))
            gallery.codes_behind(codes[:, :-1], without=np.empty(0, dtype=np.int64))
            added = Block(codes, [picture], None, unknown(1))
            replace_pictures(gallery, removed=np.empty(0, dtype=np.int64), added=added, source="benchmark")
        seconds.append(time.perf_counter() - began)
    return seconds, (status("VmHWM") - before) / MEBIBYTE


def change_costs(codes: Path, index: Path, folder: Path, repeats: int) -> dict[str, float]:
    """What adding one picture takes."""
    make_gallery(codes, index, folder)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, mebibytes = pool.submit(add_one_by_one, folder, repeats).result()
    return {"add_one_seconds": median(seconds), "add_one_slowest": max(seconds), "add_one_mib": mebibytes}


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
        del index
        if config.change:
            row |= change_costs(codes, folder, Path(temporary) / "gallery", config.repeats)
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
