"""Stand-ins for Flickr30k and COCO in the outer form that Karpathy's files and the pictures have.

The records, their splits, keys and numbers are those of the published files; captions and pictures are made up. There
are few distinct pictures: each file is a hard link to one of them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tools.files import replacing

from .words import captions, tokens

Row = dict[str, Any]
ORIENTATION = 0x0112  # EXIF's tag
TURNED = 6  # by a quarter
EACH = 5  # captions of a picture


@dataclass(frozen=True)
class Collection:
    """A data set's counts."""

    name: str
    file: str
    """Name of Karpathy's file."""
    splits: tuple[tuple[str, int], ...]
    """Pictures of each of his splits."""
    more: tuple[tuple[str, int], ...] = ()
    """Captions of a split beyond five a picture."""

    @property
    def in_coco_folders(self) -> bool:
        """Whether a row names a folder and a COCO number."""
        return len(self.splits) > 3


FLICKR30K = Collection("flickr30k", "dataset_flickr30k.json", (("train", 29_000), ("val", 1_014), ("test", 1_000)))
MSCOCO = Collection(
    "mscoco",
    "dataset_coco.json",
    (("train", 82_783), ("restval", 30_504), ("val", 5_000), ("test", 5_000)),
    (("train", 230), ("restval", 82), ("val", 10), ("test", 10)),
)
COLLECTIONS = {each.name: each for each in (FLICKR30K, MSCOCO)}


def write_collection(folder: Path, collection: Collection, *, seed: int, kinds: int) -> None:
    """Write Karpathy's file, and `images/` beside it.

    Args:
        kinds: distinct pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(records(collection, np.random.default_rng(seed)))
    write_rows(folder / collection.file, collection, rows)
    drawn = draw_pictures(folder / "drawn", kinds, seed=seed)
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    for number, row in enumerate(rows):
        link(drawn[number % kinds], images / row.get("filepath", "") / row["filename"])


def write_rows(path: Path, collection: Collection, rows: list[Row]) -> None:
    """Write rows as one of Karpathy's files."""
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump({"images": rows, "dataset": "coco" if collection.in_coco_folders else collection.name}, file)


def write_some(path: Path, collection: Collection, *, of: Path, counts: dict[str, int]) -> None:
    """Write one of Karpathy's files with the first pictures of each split of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, collection, some_rows(of, counts))


def in_own_process(work: Callable[..., object], *values: object, **options: object) -> None:
    """Run a function whose memory must go with it: COCO's records and models take gigabytes."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        pool.submit(work, *values, **options).result()


def some_rows(path: Path, counts: dict[str, int]) -> list[Row]:
    """The first pictures of each split, as they stand in one of Karpathy's files.

    Args:
        counts: pictures of train, val and test; those of restval count as train.
    """
    left, chosen = dict(counts), []
    for row in json.loads(path.read_text())["images"]:
        split = {"restval": "train"}.get(row["split"], row["split"])
        if left[split]:
            left[split] -= 1
            chosen.append(row)
    return chosen


def records(collection: Collection, generator: np.random.Generator) -> Iterator[Row]:
    """The rows of Karpathy's file, in a shuffled order; the first pictures of a split have its further captions."""
    splits = np.repeat([split for split, _ in collection.splits], [count for _, count in collection.splits])
    generator.shuffle(splits)
    more = dict(collection.more)
    numbers = np.sort(generator.permutation(581_929)[: len(splits)] + 1)
    total = EACH * len(splits) + sum(more.values())
    texts, sentence = captions(total, generator), 0
    for picture, (split, number) in enumerate(zip(splits.tolist(), numbers.tolist(), strict=True)):
        extra = min(more.get(split, 0), 1 + picture % 2)
        more[split] = more.get(split, 0) - extra
        own = range(sentence, sentence + EACH + extra)
        sentence += len(own)
        sentences = [
            {"tokens": tokens(text), "raw": text, "imgid": picture, "sentid": each}
            for each, text in zip(own, texts, strict=False)
        ]
        yield _row(collection, split, number, {"sentids": list(own), "imgid": picture, "sentences": sentences})


def _row(collection: Collection, split: str, number: int, row: Row) -> Row:
    """A row with its keys in the published order."""
    if not collection.in_coco_folders:
        names = {"split": split, "filename": f"{1_000_000_000 + number * 7}.jpg"}
        return {key: row[key] for key in ("sentids", "imgid", "sentences")} | names
    folder = "train2014" if split == "train" else "val2014"
    names = {"filepath": folder, "sentids": row["sentids"], "filename": f"COCO_{folder}_{number:012d}.jpg"}
    return names | {"imgid": row["imgid"], "split": split, "sentences": row["sentences"], "cocoid": number}


def draw_pictures(folder: Path, kinds: int, *, seed: int) -> list[Path]:
    """JPEG files: most in RGB; of each eight one is grey, of each sixteen one CMYK, and one turned by its EXIF."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(kinds):
        path = folder / f"{number:03d}.jpg"
        picture, options = _draw(generator), dict[str, Any]()
        if number % 8 == 1:
            picture = picture.convert("L")
        elif number % 16 == 3:
            picture = picture.convert("CMYK")
        elif number % 16 == 6:
            exif = Image.Exif()
            exif[ORIENTATION] = TURNED
            options = {"exif": exif}
        picture.save(path, quality=75, **options)
        paths.append(path)
    return paths


def _draw(generator: np.random.Generator) -> Image.Image:
    """Coloured shapes, 125 or so pixels wide: as tall or wide as the photographs, a quarter of their size."""
    size = (125, 94) if generator.random() < 0.7 else (94, 125)
    picture = Image.new("RGB", size, _colour(generator))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(generator.integers(3, 12))):
        x, y = generator.integers(0, 90, size=2).tolist()
        width, height = generator.integers(8, 60, size=2).tolist()
        shape = pen.ellipse if generator.random() < 0.5 else pen.rectangle
        shape((x, y, x + width, y + height), fill=_colour(generator))
    return picture


def _colour(generator: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = generator.integers(0, 256, size=3).tolist()
    return red, green, blue


def link(source: Path, path: Path) -> None:
    """A hard link, which the check of the pictures takes for a file of its own; a copy where there can be none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
