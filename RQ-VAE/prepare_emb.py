"""Encode each picture and each caption once with a two-tower model.

In:  a finished `tools.prepare_captions` folder; an open_clip model by name and tag, by checkpoint, or by folder.
Out: `<output>/images.npy`, `<output>/texts.npy` (tools/features.py). A batch is a block (tools/blocks.py): several
     processes share them, and a killed run goes on where it was.
     With --embeddings, vectors that clip-retrieval computed with that model are taken, and not computed again; they
     are normalised.
Command: python -m RQ-VAE.prepare_emb --captions DIR --model ViT-L-14-336 --pretrained openai --output DIR
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.clip import (
    Activation,
    Clip,
    Pictures,
    TextEncoder,
    detach_heads,
    encode_images,
    feature_dtype,
    load_clip,
)
from models.compute import Precision, pick_device
from models.lengths import tell_overlong
from models.options import DeviceOptions
from tools import processes, runs
from tools.blocks import Blocks
from tools.captions import CaptionSet, mend_picture, portable, read_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.command_line.place import NameOrPath
from tools.embeddings import (
    Embeddings,
    read_embeddings,
    rows_of_captions,
    rows_of_pictures,
    same_space,
    spread,
)
from tools.errors import BadInput
from tools.features import IMAGES, TAKEN, TEXTS, Rows, normalized
from tools.files import new_array, read_array, replacing, write_array
from tools.logs import progress

NAMED = "the model that was named"


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DeviceOptions):
    """What is encoded, by which model, and how fast."""

    captions: Path
    """Run folder of tools.prepare_captions."""
    model: NameOrPath
    """open_clip model name, or folder of an open_clip model."""
    pretrained: NameOrPath | None = None
    """Tag or checkpoint file, for a model given by name."""
    activation: Activation = "auto"
    """What the model was trained with, for a checkpoint file that does not tell: quick_gelu for weights of OpenAI, DFN
    and MetaCLIP, gelu for those of LAION and DataComp. auto: as tag, model name or file tell."""
    layer: Literal["embedding", "tower"] = "embedding"
    """Features of the shared space, or what the projection heads read (for RQ-VAE.train_heads)."""
    embeddings: Path | None = None
    """Folder of clip-retrieval with this model's vectors of these pictures, and of the captions where it has them all;
    the rest is encoded."""
    batch_size: int = 64
    """Pictures per batch; captions go in batches of four times as many."""
    precision: Precision = "auto"
    """Arithmetic of the towers, weights included; auto: fp32 on a GPU, bf16 on CPUs with bf16 units, else fp32. The
    features are stored in fp32."""
    workers: int = 2
    """Processes that read pictures."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise BadInput("--batch-size must be at least 1 and --workers at least 0")
        if self.embeddings is not None and self.layer == "tower":
            raise BadInput("--embeddings are of the shared space: leave --layer tower out")


class Texts(Dataset[Tensor]):
    """Token ids by row of a list of texts."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> Tensor:
        return self.tokens[row]


def encode(
    folder: Path, dataset: Dataset[Tensor], batches: list[Rows], forward: Callable[[Tensor], Tensor], *, workers: int
) -> list[Path]:
    """Encode `batches` of dataset rows, this process its share of those that are missing.

    Returns:
        one file per batch, of vectors (batch, width), from all processes.
    """
    work = Blocks(folder, len(batches))
    left: Any = [batches[number] for number in work.left]
    loader = DataLoader(dataset, batch_sampler=left, num_workers=workers if len(left) > 1 else 0)
    for number, batch in zip(work.left, progress(loader, folder.name), strict=True):
        write_array(work.path(number), forward(batch).cpu().numpy())
    return work.gather()


def merge(path: Path, blocks: list[Path], batches: list[Rows], *, scatter: Sequence[Rows] | None, rows: int) -> None:
    """Write the vectors of all batches as one array (rows, width).

    Args:
        scatter: for each dataset row the array rows it fills; None when they are the same.
    """
    shape = (rows, read_array(blocks[0]).shape[1])
    with replacing(path) as temporary:
        array = new_array(temporary, dtype=np.float32, shape=shape)
        for batch, block in zip(batches, blocks, strict=True):
            for row, vector in zip(batch, read_array(block), strict=True):
                array[row if scatter is None else scatter[row]] = vector
        array.flush()


def encode_all_images(run: runs.Run, clip: Clip, captions: CaptionSet, config: Config) -> None:
    """Write images.npy."""
    rows = np.arange(len(captions.records))
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    files = [record.file for record in captions.records]
    blocks = encode(
        run.resume_folder / "images",
        Pictures(files, clip.preprocess, folder=captions.images, advice=mend_picture()),
        batches,
        lambda pixels: encode_images(clip, pixels),
        workers=config.workers,
    )
    if processes.is_main():
        merge(run.folder / IMAGES, blocks, batches, scatter=None, rows=len(rows))


def encode_all_texts(run: runs.Run, clip: Clip, captions: CaptionSet, config: Config, device: torch.device) -> None:
    """Write texts.npy: each distinct caption once, in batches of similar length."""
    rows_of: dict[str, list[int]] = {}
    texts = [text for record in captions.records for text in record.captions]
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    if not texts:
        if processes.is_main():
            write_array(run.folder / TEXTS, np.zeros((0, 0), np.float32))
        return
    encoder = TextEncoder(clip, device)
    tell_overlong(encoder, texts)
    tokens = encoder.tokens(list(rows_of))
    batches = encoder.batches(tokens, 4 * config.batch_size)
    blocks = encode(run.resume_folder / "texts", Texts(tokens), batches, encoder.encode_batch, workers=0)
    if processes.is_main():
        scatter = [np.array(rows) for rows in rows_of.values()]
        merge(run.folder / TEXTS, blocks, batches, scatter=scatter, rows=len(texts))


def take(run: runs.Run, embeddings: Embeddings, clip: Clip, captions: CaptionSet, device: torch.device) -> bool:
    """Write images.npy from vectors that are there, and texts.npy where there are those of all captions: the main
    process does, and all look.

    Returns:
        whether there are those of all captions.

    Raises:
        BadInput: a picture has no vector, or they are not of this model.
    """
    pictures = rows_of_pictures(embeddings, captions)
    if len(unusable := np.intersect1d(pictures, embeddings.unusable())):
        raise BadInput(
            f"{embeddings.folder}: the vector of row {unusable[0]} has no direction: leave the embeddings out"
        )
    some = spread(len(pictures))
    files = [captions.records[row].file for row in some]
    pixels = Pictures(files, clip.preprocess, folder=captions.images, advice=mend_picture())
    computed = encode_images(clip, torch.stack([pixels[place] for place in range(len(pixels))])).cpu().numpy()
    cosine = same_space(embeddings.images(pictures[some]), computed, embeddings.folder, NAMED)
    print(f"{len(some)} pictures encoded to compare them with {embeddings.folder}: median cosine {cosine:.3f}")
    if processes.is_main():
        write_array(run.folder / IMAGES, normalized(embeddings.images(pictures)))
    rows = rows_of_captions(embeddings, captions, pictures)
    if rows is None or not len(rows):
        return False
    some = spread(len(rows))
    texts = [text for record in captions.records for text in record.captions]
    encoded = TextEncoder(clip, device).encode([texts[row] for row in some]).cpu().numpy()
    same_space(embeddings.texts(rows[some]), encoded, embeddings.folder, NAMED)
    if processes.is_main():
        write_array(run.folder / TEXTS, normalized(embeddings.texts(rows)))
    return True


def main(config: Config) -> None:
    captions = read_captions(config.captions)
    inputs = {"captions": config.captions}
    if Path(config.model).is_dir():
        inputs["model"] = Path(config.model)
    embeddings = None if config.embeddings is None else read_embeddings(config.embeddings)
    listings = {} if config.embeddings is None else {"embeddings": config.embeddings}
    run = runs.begin("RQ-VAE.prepare_emb", config, inputs=inputs, listings=listings)
    if run is None:
        return
    runs.check_files(captions.images)
    device = pick_device(config.device)
    dtype = feature_dtype(config.precision, device)
    clip = load_clip(config.model, config.pretrained, activation=config.activation)
    if config.layer == "tower":
        detach_heads(clip)
    clip.model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        if embeddings is None:
            encode_all_images(run, clip, captions, config)
        if embeddings is None or not take(run, embeddings, clip, captions, device):
            encode_all_texts(run, clip, captions, config, device)
    run.finish(
        facts={
            "model": config.model,
            "pretrained": config.pretrained,
            "activation": clip.activation,
            "layer": config.layer,
            "precision": str(dtype).removeprefix("torch."),
            "captions": portable(config.captions),
            "captions_fingerprint": captions.manifest.fingerprint,
            **({} if config.embeddings is None else {TAKEN: portable(config.embeddings)}),
        }
    )
    done = "encoded" if embeddings is None else f"taken from {embeddings.folder} or encoded"
    print(f"{len(captions.records):,} pictures and their captions {done} ({dtype}, {device}) -> {run.folder}")


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
