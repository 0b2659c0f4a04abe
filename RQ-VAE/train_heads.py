"""Train projection heads on locked towers with the CLIP loss (LiT: Zhai et al. 2022, section 3).

In:  a `RQ-VAE.prepare_emb --layer tower` folder: what the heads read, computed once.
Out: `<output>/clip/`, the two-tower model with its new heads (an open_clip folder); `<output>/images.npy` and
     `texts.npy`, the features of the new shared space, for the next stages; `curves.jsonl` (tools/curves.py).
Command: python -m RQ-VAE.train_heads --features DIR --output DIR
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.batches import Part, drawn
from models.clip import Heads, attach_heads, detach_heads, load_recorded, save_clip
from models.compute import pick_device, seed_everything
from models.options import TrainingOptions, ValidationOptions, examples_of_epoch
from models.stepper import Stepper
from models.training import Checkpoint
from tools import runs
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import IMAGES, TEXTS, Features, Floats, normalized, read_features
from tools.files import write_array
from tools.logs import Tracker, progress
from tools.recall import search_recall

HEADS = "heads.safetensors"  # of the best checkpoint so far
MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5
BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TrainingOptions, ValidationOptions):
    """How the heads are trained."""

    features: Path
    """Run folder of RQ-VAE.prepare_emb --layer tower."""
    epochs: int = 40
    """Passes over the train pictures, one random caption each."""
    batch_size: int = 1024
    """Pairs per batch; each is contrasted with all others."""
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    temperature: float = 0.07
    """Temperature of the CLIP loss at the start; it is learned."""
    image_dropout: float = 0.0
    """Share of the image tower's values that training hides from the image head, drawn anew for each picture. Few
    pictures are otherwise learned by heart."""
    validate_every: int = 10

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        ValidationOptions.__post_init__(self)
        if self.epochs < 1 or self.batch_size < 2 or self.temperature <= 0:
            raise BadInput("--epochs must be at least 1, --batch-size at least 2, --temperature above 0")
        if not 0 <= self.image_dropout < 1:
            raise BadInput(f"--image-dropout must be at least 0 and below 1, not {self.image_dropout}")


class TwoHeads(nn.Module):
    """The trainable part: two heads and the scale of the logits."""

    def __init__(self, heads: Heads, temperature: float, image_dropout: float = 0.0) -> None:
        super().__init__()
        self.image, self.text, self.image_dropout = heads.image, heads.text, image_dropout
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Symmetric cross-entropy over the batch (Radford et al. 2021, figure 3); inputs (batch, tower width)."""
        seen = F.dropout(images, self.image_dropout, self.training)
        image, text = F.normalize(self.image(seen), dim=1), F.normalize(self.text(texts), dim=1)
        logits = image @ text.T * self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def apply_head(head: nn.Module, vectors: Floats, device: torch.device) -> Floats:
    """Vectors (rows, tower width) through a head in eval mode: (rows, shared width)."""
    head.eval()
    with torch.inference_mode():
        blocks = [
            head(torch.from_numpy(vectors[start : start + BLOCK].copy()).to(device)).cpu().numpy()
            for start in range(0, len(vectors), BLOCK)
        ]
    head.train()
    return np.concatenate(blocks)


def validate(model: TwoHeads, features: Features, device: torch.device) -> dict[str, float]:
    """Recall of the val captions over the val pictures."""
    images, texts = features.image_rows("val"), features.text_rows("val")
    if not len(texts):
        return {}
    image_vectors = normalized(apply_head(model.image, features.images[images], device))
    text_vectors = normalized(apply_head(model.text, features.texts[texts], device))
    targets = np.searchsorted(images, features.owners[texts])
    return search_recall(text_vectors, image_vectors, targets).recall()


def batches_of(features: Features, config: Config, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch, of equal size, each (batch, 2) rows of the features' pictures and of their captions.

    Raises:
        BadInput: fewer than two train pictures have captions.
    """
    rows = features.captioned_rows("train")
    if len(rows) < 2:
        raise BadInput(f"{config.features} has {len(rows)} train pictures with captions: heads need at least 2")
    size = min(config.batch_size, len(rows))
    examples = examples_of_epoch(config, count=len(rows))
    count = (examples or len(rows)) // size
    generator = np.random.default_rng([config.seed, epoch])
    order = rows[drawn(len(rows), examples, generator)][: count * size]
    return [
        np.stack([chosen, features.draw_captions(chosen, generator)], axis=1) for chosen in np.array_split(order, count)
    ]


def train(model: TwoHeads, features: Features, run: runs.Run, config: Config) -> dict[str, float]:
    """Train, saving the state now and then, and leave the model as it was when it was best on val.

    Without val captions it stays as it is at the end.

    Args:
        model: on the device where it is trained.

    Returns:
        Recall on val; empty without val captions.
    """
    steps = config.epochs * len(batches_of(features, config, 0))
    stepper = Stepper(model, config, steps=steps, decay="cosine")
    checkpoint = Checkpoint(run, stepper, epochs=config.epochs, points=config.epochs, patience=config.patience)
    checkpoint.resume()
    tracker = Tracker(run.folder, job="train_heads", config=run.started["config"])

    def loss(part: Part) -> Tensor:
        pictures, captions = part.rows[:, 0], part.rows[:, 1]
        images, texts = torch.from_numpy(features.images[pictures]), torch.from_numpy(features.texts[captions])
        value: Tensor = stepper.model(images.to(stepper.device), texts.to(stepper.device))
        return value

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / HEADS)

    epochs = range(checkpoint.epoch, config.epochs)
    bar = progress(epochs, "training heads", total=config.epochs, unit="epoch", initial=checkpoint.epoch)
    for epoch in bar:
        if checkpoint.over:
            break
        batches = batches_of(features, config, epoch)
        steps_of_epoch = checkpoint.steps(batches, seed=config.seed, shown=False)
        mean = sum(stepper.step(loss, some).item() for some in steps_of_epoch) / len(batches)
        checkpoint.epoch_ends()
        tracker.log({"loss": mean, "temperature": 1 / model.log_scale.exp().item()}, step=checkpoint.epoch)
        checkpoint.curves.step(checkpoint.epoch, {"train/loss": mean})
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if checkpoint.validation_is_due(config.validate_every):
            figures = validate(model, features, stepper.device)
            tracker.log({f"val/{name}": value for name, value in figures.items()}, step=checkpoint.epoch)
            checkpoint.curves.mark(checkpoint.epoch, {f"val/R@{name}": value for name, value in figures.items()})
            checkpoint.keep_best(figures, save, score=None if figures else float(epoch))
        checkpoint.save_if_due()
    checkpoint.save()
    tracker.finish()
    checkpoint.curves.write(run.folder)
    model.load_state_dict(load_file(checkpoint.best_folder / HEADS))
    print(checkpoint.told())
    return {name: value for name, value in checkpoint.best.items() if name not in ("mean", "epoch")}


def main(config: Config) -> None:
    features = read_features(config.features, layer="tower")
    run = runs.begin("RQ-VAE.train_heads", config, inputs={"features": config.features})
    if run is None:
        return
    seed_everything(config.seed)
    device = pick_device(config.device)
    facts = features.manifest.facts
    clip = load_recorded(facts)
    if not clip.config:
        raise BadInput(f"{facts['model']}: heads can be saved for named models and folders: download it as a folder")
    model = TwoHeads(detach_heads(clip), config.temperature, config.image_dropout).to(device)
    figures = train(model, features, run, config)
    write_array(run.folder / IMAGES, apply_head(model.image, features.images, device))
    write_array(run.folder / TEXTS, apply_head(model.text, features.texts, device))
    model.cpu()
    attach_heads(clip, Heads(model.image, model.text))
    with torch.no_grad():
        clip.model.logit_scale.copy_(model.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)))
    save_clip(run.folder / "clip", clip)
    shared = {key: facts[key] for key in ("captions", "captions_fingerprint", "precision")}
    run.finish(
        facts={**shared, "model": str(run.folder / "clip"), "pretrained": None, "layer": "embedding"}, metrics=figures
    )
    print("val, two-tower: " + ", ".join(f"R@{name} {value:.1%}" for name, value in figures.items()))


if __name__ == "__main__":
    run_command(main, Config)
