"""Add a folder of pictures to the index, without training: the next search finds them.

In:  a `retriever.build_index` folder, and any folder; every picture below it is added.
Out: the index's next version (retriever/gallery.py). An added picture's id is its path below the folder.
Command: python -m retriever.add_pictures --index DIR ~/new_photos
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from models.clip import Pictures, encode_images, load_clip
from models.compute import Precision, pick_device, pick_dtype
from models.rqvae import RqVae, tokenize
from tools import runs
from tools.captions import portable
from tools.commands import run_command
from tools.errors import BadInput
from tools.features import Floats, Rows
from tools.logs import progress
from tools.pictures import find_unreadable, pictures_below, printable
from tools.vokens import Codes

from .gallery import Gallery, Picture, changing, model_content, replace_pictures


@dataclass(frozen=True)
class Config:
    """What is added to which index."""

    folder: tyro.conf.Positional[Path]
    """Folder of the new pictures; folders below it are read too."""
    index: Path
    """Run folder of retriever.build_index."""
    prefix: str = ""
    """Put before each new picture's id, to tell two folders' IMG_0001.jpg apart."""
    replace: bool = False
    """Let pictures take the place of those that have the same id in the index."""
    skip_known: bool = False
    """Leave out pictures whose id is in the index."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read."""
    batch_size: int = 64
    """Pictures that are encoded at once."""
    precision: Precision = "auto"
    """Arithmetic of the image tower; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    workers: int = 2
    """Processes that read pictures; 0 for the main one alone."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is not a folder")
        if self.replace and self.skip_known:
            raise BadInput("--replace and --skip-known contradict each other: give one")
        if self.batch_size < 1 or self.workers < 0:
            raise BadInput("--batch-size must be at least 1 and --workers at least 0")


class Choice(NamedTuple):
    """What changes."""

    added: list[Picture]
    replaced: Rows
    """Rows of the gallery that leave for them."""


def choose(gallery: Gallery, config: Config) -> Choice:
    """Find the folder's pictures; check that they are new and can be read.

    Raises:
        BadInput: there are none, or one is in the index already or cannot be read and nothing says what to do then.
    """
    folder = Path(portable(config.folder))
    new = [Picture(config.prefix + file, str(folder / file)) for file in pictures_below(config.folder)]
    if not new:
        raise BadInput(f"there is no picture below {config.folder}")
    known = known_rows(gallery, new)
    if known and not (config.replace or config.skip_known):
        first, rows = next(iter(known.items()))
        old = gallery.picture(rows[0])
        raise BadInput(
            f"{len(known)} of {len(new)} pictures are in the index already, the first: {first.file} (there: id "
            f"{old.image!r}, file {old.file}); leave them out with --skip-known, put them in the old ones' place with "
            "--replace, or tell other pictures of the same names apart with --prefix"
        )
    added = readable([picture for picture in new if not (config.skip_known and picture in known)], config)
    replaced = {row for picture in added for row in known.get(picture, [])}
    return Choice(added, np.array(sorted(replaced), dtype=np.int64))


def known_rows(gallery: Gallery, new: Sequence[Picture]) -> dict[Picture, list[int]]:
    """Those of the new pictures whose id or file is in the gallery, with the rows that have it."""
    images, files = ({getattr(picture, name): picture for picture in new} for name in Picture._fields)
    known: dict[Picture, list[int]] = {}
    for row, old in enumerate(gallery.pictures()):
        for picture in (images.get(old.image), files.get(old.file)):
            if picture is not None:
                known.setdefault(picture, []).append(row)
    return known


def readable(pictures: list[Picture], config: Config) -> list[Picture]:
    """The pictures that can be read; without --skip-bad, all of them must be."""
    workers = config.workers if len(pictures) > config.batch_size else 0
    reasons = find_unreadable([picture.file for picture in pictures], workers=workers)
    bad = [printable(f"{file}: {reason}") for file, reason in reasons.items() if reason]
    if bad and not config.skip_bad:
        raise BadInput(
            f"{bad[0]} ({len(bad)} of {len(pictures)} pictures cannot be used): mend it, or go on without it with "
            "--skip-bad; nothing was added"
        )
    for line in bad:
        print(f"left out: {line}")
    return [picture for picture in pictures if not reasons[picture.file]]


def check_content(name: str, content: Any, recorded: Any, gallery: Gallery) -> None:
    """Refuse a model that is not the one whose codes the index holds."""
    if content != recorded:
        raise BadInput(
            f"{name} has changed since {gallery.folder} was built, new pictures would get codes of another meaning: "
            "run scripts/14_build_index.sh --overwrite and add them again"
        )


def encode(gallery: Gallery, new: Sequence[Picture], config: Config, device: torch.device) -> Floats:
    """Features (pictures, width) of new pictures, by the model that encoded the gallery's."""
    made_by = gallery.facts["clip"]
    places = (made_by["model"], made_by["pretrained"])
    check_content(made_by["model"], model_content(*places), made_by["content"], gallery)
    clip = load_clip(*places)
    clip.model.to(device=device, dtype=pick_dtype(config.precision, device), memory_format=torch.channels_last)
    pictures = Pictures([picture.file for picture in new], clip.preprocess)
    workers = config.workers if len(new) > config.batch_size else 0
    batches = DataLoader(pictures, batch_size=config.batch_size, num_workers=workers)
    with torch.inference_mode():
        blocks = [encode_images(clip, batch).cpu() for batch in progress(batches, "encoding", total=len(batches))]
    return torch.cat(blocks).numpy()


def code(gallery: Gallery, features: Floats, taken: NDArray[np.integer], device: torch.device) -> Codes:
    """Codes (pictures, levels) of features (pictures, width), collisions resolved where the gallery's were.

    Args:
        taken: (others, levels) codes of the pictures that stay.
    """
    made_by = gallery.facts["rqvae"]
    folder = runs.read_manifest(Path(made_by["path"]), "RQ-VAE.train").folder
    check_content(str(folder), runs.fingerprint(folder), made_by["content"], gallery)
    groups = [np.arange(len(features))] if gallery.facts["resolve_collisions"] else None
    return tokenize(RqVae.from_pretrained(folder).to(device), features, groups=groups, taken=taken).codes


def main(config: Config) -> None:
    began = time.monotonic()
    device = pick_device(config.device)
    with changing(config.index) as gallery:
        choice = choose(gallery, config)
        if not choice.added:
            print(f"nothing to add: no other readable pictures are below {config.folder}; the index stays as it is")
            return
        features = encode(gallery, choice.added, config, device)
        codes = code(gallery, features, np.delete(gallery.codes, choice.replaced, axis=0), device)
        total = replace_pictures(
            gallery,
            removed=choice.replaced,
            added=choice.added,
            codes=codes,
            features=features,
            source=portable(config.folder),
        )
    replaced = f" in the place of {len(choice.replaced):,}" if len(choice.replaced) else ""
    print(f"{len(choice.added):,} pictures added{replaced}, {total:,} can be found, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    run_command(main, Config)
