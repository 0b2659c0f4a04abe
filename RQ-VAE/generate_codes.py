"""Give every picture its codes.

In:  a `RQ-VAE.train` folder and the feature folder it was trained on.
Out: `<output>/codes.npy` (pictures, levels) int64 and `latents.npy` (pictures, width), in the order of captions.jsonl;
     `codebooks.npy` (books, codebook_size, width); `guide.safetensors` (models/guide.py), where the tokenizer has a
     linear path; `report.json`, the tokenizer report.
Command: python -m RQ-VAE.generate_codes --features DIR --rqvae DIR --output DIR
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.compute import pick_device
from models.guide import GUIDE_NAME, guide_of
from models.hubness import best_strength, fit_hubness
from models.options import DeviceOptions
from models.rqvae import RqVae, tokenize
from tools import runs
from tools.captions import SPLITS
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import read_features, refuse_other_encoder
from tools.files import write_array, write_json
from tools.logs import Tracker
from tools.tokenizer_report import make_report


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DeviceOptions):
    """Which pictures, which tokenizer, and what happens to collisions."""

    features: Path
    """Feature folder, of the pictures to tokenize."""
    rqvae: Path
    """Run folder of RQ-VAE.train."""
    resolve_collisions: bool = True
    """Pictures that would share all codes get their next nearest free code at the last level, the nearest picture
    keeping its own, train pictures first; published: no."""
    hubness: bool = True
    """Learn from the train captions which pictures are near to captions of every kind. Searches with a guide or with
    features correct their cosines for it, with the strength that val chooses (models/hubness.py). Published: no."""


def main(config: Config) -> None:
    features = read_features(config.features)
    rqvae = runs.read_manifest(config.rqvae, "RQ-VAE.train")
    refuse_other_encoder(features.manifest, rqvae)
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
    groups = [features.image_rows(split) for split in SPLITS] if config.resolve_collisions else None
    codes, latents = tokenize(model, features.images, groups=groups)
    given, model = torch.from_numpy(codes), model.cpu()
    report = make_report(model, features, split="val", codes=given, raw=before.raw_recall)
    write_array(run.folder / "codes.npy", codes)
    write_array(run.folder / "latents.npy", latents)
    write_array(run.folder / "codebooks.npy", model.quantizer.codebooks.detach().numpy())
    train = features.image_rows("train")
    if (guide := guide_of(model, given[train if len(train) else slice(None)])) is not None:
        if config.hubness and (hubness := fit_hubness(features)) is not None:
            decoded = guide.decode(given).numpy()
            guide = guide.corrected(hubness, best_strength(hubness, features, pictures=decoded))
        guide.save(run.folder / GUIDE_NAME)
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
