"""Give every picture its codes.

In:  a `RQ-VAE.train` folder and the feature folder it was trained on.
Out: `<output>/codes.npy` (pictures, levels) int64 and `latents.npy` (pictures, width), in the order of captions.jsonl;
     `codebooks.npy` (books, codebook_size, width); `report.json`, the tokenizer report.
Command: python -m RQ-VAE.generate_codes --features DIR --rqvae DIR --output DIR
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.compute import pick_device
from models.rqvae import BLOCK, RqVae
from tools import runs
from tools.captions import SPLITS
from tools.commands import run_command
from tools.errors import BadInput
from tools.features import Features, Rows, read_features
from tools.files import write_array, write_json
from tools.logs import Tracker
from tools.tokenizer_report import TokenizerReport, make_report


@dataclass(frozen=True)
class Config:
    """Which pictures, which tokenizer, and what happens to collisions."""

    features: Path
    """Feature folder, of the pictures to tokenize."""
    rqvae: Path
    """Run folder of RQ-VAE.train."""
    output: Path
    """Run folder to write."""
    resolve_collisions: bool = True
    """Pictures that would share all codes get their next nearest free code at the last level, the nearest picture
    keeping its own, train pictures first; published: no."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""


class FixedCodes(nn.Module):
    """A tokenizer whose codes are given: the report then speaks of the codes that are written."""

    def __init__(self, model: RqVae, codes: Tensor) -> None:
        super().__init__()
        self.model, self.config, self.fixed = model, model.config, codes

    def prepare(self, features: Tensor) -> Tensor:
        return self.model.prepare(features)

    def codes(self, features: Tensor) -> Tensor:
        assert len(features) == len(self.fixed), f"{len(features)} features, {len(self.fixed)} codes"
        return self.fixed

    def reconstruct(self, codes: Tensor) -> Tensor:
        return self.model.reconstruct(codes)


def resolve_collisions(
    codes: NDArray[np.int64], latents: NDArray[np.float32], model: RqVae, groups: Sequence[Rows]
) -> NDArray[np.int64]:
    """Codes (pictures, levels) in which colliding pictures differ at the last level, where free codes allow.

    Among equal codes the picture nearest to them keeps them; each other one, in that order, takes the nearest last code
    that is free behind the same prefix. With more pictures behind a prefix than codes, collisions stay.

    Args:
        groups: rows, in the order in which they choose; the codes of a group do not depend on the groups after it.
            Train pictures come first: what is trained on must not depend on the pictures of val and test.
    """
    codes = codes.copy()
    last = model.quantizer.codebook(codes.shape[1] - 1).detach().cpu().numpy()
    behind = model.quantizer.decode(torch.from_numpy(codes)).detach().cpu().numpy() - last[codes[:, -1]]
    residuals = latents - behind
    own = ((residuals - last[codes[:, -1]]) ** 2).sum(axis=1)
    taken: dict[bytes, set[int]] = {}
    for rows in groups:
        movers = []
        for row in rows[np.argsort(own[rows], kind="stable")]:
            used = taken.setdefault(codes[row, :-1].tobytes(), set())
            if int(codes[row, -1]) in used:
                movers.append(row)
            used.add(int(codes[row, -1]))
        for row in movers:
            used = taken[codes[row, :-1].tobytes()]
            nearest_first = np.argsort(((residuals[row] - last) ** 2).sum(axis=1), kind="stable")
            codes[row, -1] = next((int(code) for code in nearest_first if int(code) not in used), codes[row, -1])
            used.add(int(codes[row, -1]))
    return codes


def tokenize(model: RqVae, features: Features, config: Config) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Codes (pictures, levels) and latents (pictures, width) of every picture."""
    images = torch.from_numpy(np.array(features.images)).to(next(model.parameters()).device)
    with torch.inference_mode():
        latents = torch.cat([model.encode(model.prepare(block)) for block in torch.split(images, BLOCK)]).cpu().numpy()
        codes = model.codes(images).cpu().numpy()
    if config.resolve_collisions:
        groups = [features.image_rows(split) for split in SPLITS]
        codes = resolve_collisions(codes, latents, model.cpu(), groups)
    return codes, latents


def main(config: Config) -> None:
    features = read_features(config.features)
    rqvae = runs.read_manifest(config.rqvae, "RQ-VAE.train")
    run = runs.begin("RQ-VAE.generate_codes", config, inputs={"features": config.features, "rqvae": config.rqvae})
    if run is None:
        return
    model = RqVae.from_pretrained(config.rqvae).to(pick_device(config.device))
    if model.config.features != features.images.shape[1]:
        raise BadInput(
            f"{config.rqvae} reads features of width {model.config.features}, {config.features} holds width "
            f"{features.images.shape[1]}: give the features the RQ-VAE was trained on"
        )
    before = make_report(model, features, split="val")
    codes, latents = tokenize(model, features, config)
    report: TokenizerReport = make_report(FixedCodes(model.cpu(), torch.from_numpy(codes)), features, split="val")
    write_array(run.folder / "codes.npy", codes)
    write_array(run.folder / "latents.npy", latents)
    write_array(run.folder / "codebooks.npy", model.quantizer.codebooks.detach().numpy())
    write_json(run.folder / "report.json", report._asdict())
    tracker = Tracker(run.folder, job="generate_codes", config=run.started["config"])
    tracker.summary(report.figures())
    tracker.finish()
    print(report.text())
    if config.resolve_collisions:
        print(
            f"(before collisions were resolved: {before.colliding} pictures, {before.colliding / before.pictures:.2%})"
        )
    shared = {key: features.manifest.facts[key] for key in ("captions", "captions_fingerprint")}
    run.finish(
        facts={**rqvae.facts, **shared, "width": model.config.width, "features": str(config.features)},
        metrics={"collisions_before": before.colliding / before.pictures, **report.figures()},
    )


if __name__ == "__main__":
    run_command(main, Config)
