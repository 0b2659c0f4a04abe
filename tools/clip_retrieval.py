"""Write features in the layout of clip-retrieval, which its index, its back end and other programs read.

In:  a `RQ-VAE.prepare_emb` or `RQ-VAE.train_heads` folder.
Out: `<output>/`, in parts of --rows rows:
         img_emb/img_emb_0.npy        (rows, width) float16, the pictures' normalised features
         text_emb/text_emb_0.npy      (rows, width) float16, the captions' (--by caption)
         metadata/metadata_0.parquet  image_path, caption, and key (the picture's id) and split, a row each
Command: python -m tools.clip_retrieval --features DIR --output DIR

A row is a caption with its picture, as clip-retrieval has it of pairs; pictures without captions are left out. With
--by picture, it is a picture: its caption is the first that it has, or empty, and there is no text_emb.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .captions import read_captions
from .command_line.commands import run_command
from .errors import BadInput
from .features import Features, Floats, Rows, normalized, read_features
from .files import replacing, write_array

By = Literal["caption", "picture"]
Kind = Literal["float16", "float32"]


@dataclass(frozen=True)
class Config:
    """What is written, and how."""

    features: Path
    """Run folder of RQ-VAE.prepare_emb or RQ-VAE.train_heads."""
    output: Path
    """Folder to write."""
    by: By = "caption"
    """A row is a caption with its picture, or a picture."""
    rows: int = 1_000_000
    """Rows a part at most."""
    dtype: Kind = "float16"
    """Numbers of the features; clip-retrieval's own are float16."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise BadInput(f"--rows must be at least 1, not {self.rows}")


def table_of(features: Features, images: Path, pictures: Rows, captions: Rows | None) -> dict[str, list[Any]]:
    """Columns of the metadata.

    Args:
        images: folder of the picture files.
        pictures: (rows,) row of each picture.
        captions: (rows,) row of each caption; None for the first of each picture.
    """
    records = [features.records[row] for row in pictures.tolist()]
    if captions is None:
        texts = [record.captions[0] if record.captions else "" for record in records]
    else:
        all_texts = [text for record in features.records for text in record.captions]
        texts = [all_texts[row] for row in captions.tolist()]
    return {
        "image_path": [str(images / record.file) for record in records],
        "caption": texts,
        "key": [record.image for record in records],
        "split": [record.split for record in records],
    }


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a table, atomically."""
    import pyarrow
    from pyarrow import parquet

    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def parts(rows: Rows, size: int) -> Iterator[tuple[str, Rows]]:
    """Number of each part, padded as clip-retrieval pads it, and its rows."""
    starts = range(0, len(rows), size)
    digits = len(str(len(starts) - 1))
    return ((f"{number:0{digits}d}", rows[start : start + size]) for number, start in enumerate(starts))


def write_part(folder: Path, kind: str, number: str, vectors: Floats, dtype: Kind) -> None:
    """Write one `.npy` file of normalised features (rows, width)."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    kept: NDArray[np.floating] = normalized(vectors).astype(dtype)
    write_array(folder / kind / f"{kind}_{number}.npy", kept)


def write_features(features: Features, images: Path, config: Config) -> int:
    """Write all parts. Returns the number of rows."""
    by_caption = config.by == "caption"
    rows = np.arange(len(features.owners if by_caption else features.records), dtype=np.int64)
    owner: Callable[[Rows], Rows] = features.owners.__getitem__ if by_caption else lambda chosen: chosen
    (config.output / "metadata").mkdir(parents=True, exist_ok=True)
    for number, chosen in parts(rows, config.rows):
        pictures = owner(chosen)
        write_part(config.output, "img_emb", number, features.images[pictures], config.dtype)
        if by_caption:
            write_part(config.output, "text_emb", number, features.texts[chosen], config.dtype)
        columns = table_of(features, images, pictures, chosen if by_caption else None)
        write_parquet(config.output / "metadata" / f"metadata_{number}.parquet", columns)
    return len(rows)


def main(config: Config) -> None:
    if config.output.is_dir() and any(config.output.iterdir()):
        raise BadInput(f"{config.output} holds something already: name another --output")
    features = read_features(config.features)
    captions = read_captions(Path(features.manifest.facts["captions"]))
    if config.by == "caption" and not len(features.owners):
        raise BadInput(f"{config.features} has no captions: write the pictures alone with --by picture")
    count = write_features(features, captions.images.resolve(), config)
    left_out = len(features.records) - len(np.unique(features.owners)) if config.by == "caption" else 0
    note = f"; {left_out:,} pictures without a caption left out (--by picture has them)" if left_out else ""
    print(f"{count:,} rows of {features.images.shape[1]} numbers -> {config.output}{note}")


if __name__ == "__main__":
    run_command(main, Config)
