"""Write the features of the index's pictures as an index of faiss, in the layout of an index folder of clip-retrieval.

In:  a `retriever.gallery.build` folder that keeps features.
Out: `<output>/`
         image.index                  faiss.IndexFlatIP of the normalised features behind an IndexIDMap2
         metadata/metadata_0.parquet  id (the number in image.index), key (the picture's id), image_path and caption
         img_emb/img_emb_0.npy        (pictures, width) float16, with --embeddings: clip-retrieval's embeddings folder
Command: python -m retriever.gallery.export_faiss --index DIR FOLDER

A search with a query's normalised feature gives the cosines of a two-tower search, and its order. The captions are
empty: an index of live pictures knows none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from tools.clip_retrieval import write_parquet
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import replacing, write_array

from .answers import need_features
from .compact import BLOCK
from .gallery import Gallery, read_gallery
from .options import IndexOptions

INDEX = "image.index"


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions):
    """Whose features are written, and where."""

    folder: tyro.conf.Positional[Path]
    """Folder to write."""
    embeddings: bool = False
    """Write the features as clip-retrieval's embeddings, too, from which it makes indexes of other kinds."""


def write_flat_index(path: Path, gallery: Gallery) -> None:
    """Write the features as faiss reads them; the number of a picture is its place in the index."""
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(width_of(gallery)))
    for start in range(0, len(gallery), BLOCK):
        rows = gallery.rows[start : start + BLOCK]
        block = np.ascontiguousarray(gallery.read_features(rows), dtype=np.float32)
        index.add_with_ids(block, np.arange(start, start + len(block)))
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


def width_of(gallery: Gallery) -> int:
    """Numbers of a feature."""
    return int(gallery.read_features(gallery.rows[:1]).shape[1])


def write_metadata(path: Path, gallery: Gallery) -> None:
    """Write which picture each number is."""
    pictures = list(gallery.pictures())
    below = gallery.files_below.resolve()
    columns: dict[str, list[Any]] = {
        "id": list(range(len(pictures))),
        "key": [picture.image for picture in pictures],
        "image_path": [picture.file if "://" in picture.file else str(below / picture.file) for picture in pictures],
        "caption": [""] * len(pictures),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, columns)


def main(config: Config) -> None:
    if config.folder.exists() and not (config.folder.is_dir() and not any(config.folder.iterdir())):
        raise BadInput(f"{config.folder} is there already: name another folder")
    gallery = read_gallery(config.index)
    need_features(gallery)
    config.folder.mkdir(parents=True, exist_ok=True)
    write_metadata(config.folder / "metadata" / "metadata_0.parquet", gallery)
    if config.embeddings:
        (config.folder / "img_emb").mkdir()
        write_array(config.folder / "img_emb" / "img_emb_0.npy", np.asarray(gallery.read_features()))
    write_flat_index(config.folder / INDEX, gallery)
    print(f"{len(gallery):,} pictures of {width_of(gallery)} numbers -> {config.folder}")


if __name__ == "__main__":
    run_command(main, Config)
