"""Encode each picture and each caption once with a two-tower model.

In:  a finished `tools.prepare_captions` folder; an open_clip model by name and tag, by checkpoint, or by folder.
Out: `<output>/images.npy`, `<output>/texts.npy` (tools/features.py), written as they are computed: a killed run goes
     on where it was.
Command: python -m RQ-VAE.prepare_emb --captions DIR --model ViT-L-14-336 --pretrained openai --output DIR
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.clip import (
    Clip,
    Pictures,
    detach_heads,
    encode_images,
    encode_tokens,
    load_clip,
    text_lengths,
    trim_padding,
)
from models.compute import Precision, pick_device, pick_dtype
from tools import runs
from tools.captions import CaptionSet, portable, read_captions
from tools.commands import run_command
from tools.errors import BadInput
from tools.features import IMAGES, TEXTS, Rows
from tools.files import read_json, write_json
from tools.logs import progress

SAVE_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Config:
    """What is encoded, by which model, and how fast."""

    captions: Path
    """Run folder of tools.prepare_captions."""
    model: str
    """open_clip model name, or folder of an open_clip model."""
    output: Path
    """Run folder to write."""
    pretrained: str | None = None
    """Tag or checkpoint file, for a model given by name."""
    layer: Literal["embedding", "tower"] = "embedding"
    """Features of the shared space, or what the projection heads read (for RQ-VAE.train_heads)."""
    batch_size: int = 64
    """Pictures a batch; captions go in batches of four times as many."""
    precision: Precision = "auto"
    """Arithmetic of the towers; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32. The features are
    stored in fp32."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    workers: int = 2
    """Processes that read pictures."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise BadInput("--batch-size must be at least 1 and --workers at least 0")


class Texts(Dataset[Tensor]):
    """Token ids by row of a list of texts."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> Tensor:
        return self.tokens[row]


def fill(
    path: Path,
    dataset: Dataset[Tensor],
    batches: list[Rows],
    encode: Callable[[Tensor], Tensor],
    *,
    scatter: Sequence[Rows] | None,
    rows: int,
    state: Path,
    workers: int,
) -> None:
    """Encode `batches` of dataset rows into the array `path` (rows, width), going on where `state` says.

    Args:
        scatter: for each dataset row the array rows it fills; None when they are the same.
        state: small JSON file {"batches": done, "width": w}, written after the rows it speaks of.
    """
    done = read_json(state)["batches"] if state.is_file() else 0
    array = open_memmap(path, mode="r+") if done else None
    left: Any = batches[done:]
    loader = DataLoader(dataset, batch_sampler=left, num_workers=workers if len(batches) - done > 1 else 0)
    bar = progress(loader, path.name, total=len(batches), initial=done)
    saved = time.monotonic()
    for number, (chosen, batch) in enumerate(zip(batches[done:], bar, strict=True), start=done + 1):
        vectors = encode(batch).cpu().numpy()
        if array is None:
            array = open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, vectors.shape[1]))
        for row, vector in zip(chosen, vectors, strict=True):
            array[row if scatter is None else scatter[row]] = vector
        if number == len(batches) or time.monotonic() - saved > SAVE_EVERY_SECONDS:
            array.flush()
            write_json(state, {"batches": number})
            saved = time.monotonic()


def encode_all_images(run: runs.Run, clip: Clip, captions: CaptionSet, config: Config) -> None:
    """Write images.npy."""
    rows = np.arange(len(captions.records))
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    fill(
        run.folder / IMAGES,
        Pictures([record.file for record in captions.records], clip.preprocess, folder=captions.images),
        batches,
        lambda pixels: encode_images(clip, pixels),
        scatter=None,
        rows=len(rows),
        state=run.resume_folder / "images.json",
        workers=config.workers,
    )


def encode_all_texts(run: runs.Run, clip: Clip, captions: CaptionSet, config: Config, device: torch.device) -> None:
    """Write texts.npy: each distinct caption once, in batches of similar length."""
    rows_of: dict[str, list[int]] = {}
    texts = [text for record in captions.records for text in record.captions]
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    if not texts:
        np.save(run.folder / TEXTS, np.zeros((0, 0), np.float32))
        return
    tokens = clip.tokenizer(list(rows_of))
    order = np.argsort(text_lengths(clip, tokens).numpy(), kind="stable")
    size = 4 * config.batch_size
    fill(
        run.folder / TEXTS,
        Texts(tokens),
        [order[start : start + size] for start in range(0, len(order), size)],
        lambda batch: encode_tokens(clip, trim_padding(clip, batch).to(device)),
        scatter=[np.array(rows) for rows in rows_of.values()],
        rows=len(texts),
        state=run.resume_folder / "texts.json",
        workers=0,
    )


def main(config: Config) -> None:
    captions = read_captions(config.captions)
    inputs = {"captions": config.captions}
    if Path(config.model).is_dir():
        inputs["model"] = Path(config.model)
    run = runs.begin("RQ-VAE.prepare_emb", config, inputs=inputs)
    if run is None:
        return
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    clip = load_clip(config.model, config.pretrained)
    if config.layer == "tower":
        detach_heads(clip)
    clip.model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        encode_all_images(run, clip, captions, config)
        encode_all_texts(run, clip, captions, config, device)
    run.finish(
        facts={
            "model": config.model,
            "pretrained": config.pretrained,
            "layer": config.layer,
            "precision": str(dtype).removeprefix("torch."),
            "captions": portable(config.captions),
            "captions_fingerprint": captions.manifest.fingerprint,
        }
    )
    print(f"{len(captions.records):,} pictures and their captions encoded ({dtype}, {device}) -> {run.folder}")


if __name__ == "__main__":
    run_command(main, Config)
