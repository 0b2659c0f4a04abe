"""Give every picture its image tokens: SEED's ids, or tokens of its patches where SEED's weights are not at hand.

In:  a `tools.prepare_captions` folder. For SEED `seed_quantizer.pt` and the ViT (`eva_vit_g.pth`, or a BLIP-2 model);
     for patches a two-tower model, whose patches' codebooks are fitted here, on train pictures.
Out: `<output>/tokens.npy` and `codebook.npy` (reranker/data.py). Keyed by picture, not by its vokens: pictures that
     share their vokens keep their own tokens. Several processes share the pictures, and a killed run goes on.
Command: python -m reranker.convert --captions DIR --tokenizer seed --quantizer seed_quantizer.pt --vision eva_vit_g.pth
         --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from models.clip import Activation, Pictures
from models.compute import Precision, pick_device, pick_dtype
from models.options import DeviceOptions
from models.patch_tokenizer import CONFIG_NAME, PatchConfig, PatchTokenizer
from models.seed_tokenizer import Interpolation, SeedTokenizer
from tools import processes, runs
from tools.blocks import Blocks, wait_for
from tools.captions import CaptionSet, mend_picture, portable, read_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.command_line.place import NameOrPath
from tools.errors import BadInput
from tools.files import read_array, write_array
from tools.logs import progress

from .data import CODEBOOK, TOKENS

FITTED = "tokenizer"  # folder of a fitted patch tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DeviceOptions):
    """Which pictures, and which tokenizer."""

    captions: Path
    """Run folder of tools.prepare_captions."""
    tokenizer: Literal["seed", "patches"] = "seed"
    """SEED-2's tokenizer (published), or tokens of patches that are fitted on the train pictures."""
    quantizer: Path | None = None
    """seed: seed_quantizer.pt."""
    vision: NameOrPath | None = None
    """seed: eva_vit_g.pth, or a BLIP-2 model's folder or Hugging Face name."""
    interpolation: Interpolation = "bilinear"
    """seed: how pictures become 224 pixels wide and high; SEED's own scripts: bilinear."""
    model: NameOrPath | None = None
    """patches: open_clip model name or folder."""
    pretrained: NameOrPath | None = None
    """patches: tag or checkpoint file, for a model given by name."""
    activation: Activation = "auto"
    """patches: what the model was trained with, for a checkpoint file that does not tell."""
    image_size: int | None = None
    """patches: side of the pictures in pixels; by default the model's own."""
    grid: int = 4
    """patches: patches along a side."""
    patch_width: int = 128
    """patches: main directions of the features that are kept."""
    levels: int = 2
    """patches: tokens per patch."""
    codebook_size: int = 1024
    """patches: tokens per level."""
    fit_pictures: int = 4096
    """patches: train pictures that the codebooks are fitted on, at most."""
    seed: int = 0
    """patches: which pictures these are, and where k-means starts."""
    batch_size: int = 64
    """Pictures per batch."""
    precision: Precision = "auto"
    """Arithmetic of the image tower; what follows it is fp32. auto: bf16 or fp16 on a GPU and on CPUs with bf16
    units, else fp32."""
    workers: int = 2
    """Processes that read pictures."""

    def __post_init__(self) -> None:
        counts = (self.grid, self.patch_width, self.levels, self.codebook_size, self.fit_pictures, self.batch_size)
        if min(counts) < 1 or self.workers < 0 or self.seed < 0:
            raise BadInput(
                "--grid, --patch-width, --levels, --codebook-size, --fit-pictures and --batch-size must be at least 1, "
                "--workers and --seed at least 0"
            )
        if self.tokenizer == "seed" and (self.quantizer is None or self.vision is None):
            raise BadInput("--tokenizer seed needs --quantizer seed_quantizer.pt and --vision eva_vit_g.pth")
        if self.tokenizer == "patches" and self.model is None:
            raise BadInput("--tokenizer patches needs the --model whose patches become tokens")

    def inputs(self) -> dict[str, Path]:
        """Files and folders that are read whole."""
        named = {"captions": self.captions, "quantizer": self.quantizer, "vision": self.vision, "model": self.model}
        return {name: Path(path) for name, path in named.items() if path and Path(path).exists()}


def seed_tokenizer(config: Config) -> SeedTokenizer:
    """SEED's tokenizer with its public weights."""
    assert config.quantizer is not None
    assert config.vision is not None
    tokenizer = SeedTokenizer.from_checkpoints(config.quantizer, config.vision, interpolation=config.interpolation)
    if tokenizer.account is not None:
        print(tokenizer.account.summary)
    return tokenizer


def patch_tokenizer(config: Config, run: runs.Run, captions: CaptionSet, device: torch.device) -> PatchTokenizer:
    """A tokenizer of patches: fitted by the main process, or by an earlier start of this run."""
    folder = run.folder / FITTED
    if processes.is_main() and not (folder / CONFIG_NAME).is_file():
        assert config.model is not None
        tokenizer = PatchTokenizer(
            PatchConfig(
                config.model,
                config.pretrained,
                config.image_size,
                config.grid,
                config.patch_width,
                config.levels,
                config.codebook_size,
                config.activation,
            )
        )
        tokenizer.to_precision(pick_dtype(config.precision, device)).to(device)
        files = [record.file for record in captions.records if record.split == "train"]
        if not files:
            raise BadInput(f"{config.captions} has no train pictures, which tokens of patches are fitted on")
        order = np.random.default_rng(config.seed).permutation(len(files))[: config.fit_pictures]
        loader = loading([files[place] for place in order], tokenizer, captions, config)
        patches = torch.cat([tokenizer.patches(pixels).flatten(0, 1).cpu() for pixels in progress(loader, "fitting")])
        tokenizer.cpu().fit(patches, seed=config.seed)
        tokenizer.save_pretrained(folder)
    processes.wait()
    wait_for([folder / CONFIG_NAME])
    return PatchTokenizer.from_pretrained(folder)


def loading(files: list[str], tokenizer: SeedTokenizer | PatchTokenizer, captions: CaptionSet, config: Config) -> Any:
    """Batches of pixels of picture files."""
    pictures = Pictures(files, tokenizer.preprocess, folder=captions.images, advice=mend_picture())
    return DataLoader(pictures, batch_size=config.batch_size, num_workers=config.workers)


def encode(
    run: runs.Run, tokenizer: SeedTokenizer | PatchTokenizer, captions: CaptionSet, config: Config
) -> NDArray[np.int32]:
    """Write tokens.npy; what it holds, in every process."""
    files = [record.file for record in captions.records]
    batches = [files[start : start + config.batch_size] for start in range(0, len(files), config.batch_size)]
    work = Blocks(run.resume_folder / "tokens", len(batches))
    left = [file for number in work.left for file in batches[number]]
    if left:
        batches_left = loading(left, tokenizer, captions, config)  # cut as the blocks are: only the last may be short
        for number, pixels in zip(work.left, progress(batches_left, "encoding"), strict=True):
            write_array(work.path(number), tokenizer.encode(pixels).cpu().numpy().astype(np.int32))
    tokens: NDArray[np.int32] = np.concatenate([read_array(block) for block in work.gather()])
    if processes.is_main():
        write_array(run.folder / TOKENS, tokens)
        write_array(run.folder / CODEBOOK, tokenizer.codebook.detach().float().cpu().numpy())
    return tokens


def main(config: Config) -> None:
    captions = read_captions(config.captions)
    run = runs.begin("reranker.convert", config, inputs=config.inputs())
    if run is None:
        return
    runs.check_files(captions.images)
    device = pick_device(config.device)
    if config.tokenizer == "seed":
        tokenizer: SeedTokenizer | PatchTokenizer = seed_tokenizer(config)
    else:
        tokenizer = patch_tokenizer(config, run, captions, device)
    tokenizer.to_precision(pick_dtype(config.precision, device)).to(device)
    tokens = encode(run, tokenizer, captions, config)
    used, distinct = len(np.unique(tokens)), len(np.unique(tokens, axis=0))
    run.finish(
        facts={
            "tokenizer": config.tokenizer,
            "length": tokenizer.length,
            "codebook_size": tokenizer.codebook_size,
            "captions": portable(config.captions),
            "captions_fingerprint": captions.manifest.fingerprint,
        },
        metrics={"tokens_used": used / tokenizer.codebook_size, "pictures_with_own_tokens": distinct / len(tokens)},
    )
    print(
        f"{len(tokens):,} pictures, {tokenizer.length} tokens each ({config.tokenizer}); {used:,} of "
        f"{tokenizer.codebook_size:,} tokens used, {len(tokens) - distinct} pictures share all tokens with another"
    )


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
