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
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip import Heads, attach_heads, detach_heads, load_recorded, save_clip
from models.compute import (
    check_optimization,
    load_state,
    make_optimizer,
    pick_device,
    save_state,
    seed_everything,
    warmup_share,
)
from tools import runs
from tools.commands import run_command
from tools.curves import Curves
from tools.errors import BadInput
from tools.features import IMAGES, TEXTS, Features, Floats, normalized, read_features
from tools.files import write_array
from tools.logs import Tracker, progress
from tools.recall import search_recall

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5
BLOCK = 4096


@dataclass(frozen=True)
class Config:
    """How the heads are trained."""

    features: Path
    """Run folder of RQ-VAE.prepare_emb --layer tower."""
    output: Path
    """Run folder to write."""
    epochs: int = 40
    """Passes over the train pictures, one random caption each."""
    batch_size: int = 1024
    """Pairs a batch; each is contrasted with all others."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's weight decay of the matrices."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    temperature: float = 0.07
    """Temperature of the CLIP loss at the start; it is learned."""
    optimizer: str = "adamw"
    """Name of an optimiser of torch.optim."""
    seed: int = 0
    """Seed of batches and captions."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.temperature <= 0:
            raise BadInput("--epochs must be at least 1, --batch-size at least 2, --temperature above 0")
        check_optimization(self)


class TwoHeads(nn.Module):
    """The trainable part: two heads and the scale of the logits."""

    def __init__(self, heads: Heads, temperature: float) -> None:
        super().__init__()
        self.image, self.text = heads.image, heads.text
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def loss(self, images: Tensor, texts: Tensor) -> Tensor:
        """Symmetric cross-entropy over the batch (Radford et al. 2021, figure 3); inputs (batch, tower width)."""
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
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


def train(model: TwoHeads, features: Features, run: runs.Run, config: Config, device: torch.device) -> dict[str, float]:
    """Train for all epochs, saving the state after each. Returns the last validation."""
    rows = features.captioned_rows("train")
    if len(rows) < 2:
        raise BadInput(f"{config.features} has {len(rows)} train pictures with captions: heads need at least 2")
    size = min(config.batch_size, len(rows))
    optimizer = make_optimizer(config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = len(rows) // size
    steps = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_share(step, steps=steps, warmup=config.warmup, decay="cosine")
    )
    tracker = Tracker(run.folder, job="train_heads", config=run.started["config"])
    curves = Curves(config.epochs)
    state_path = run.resume_folder / "state.pt"
    state = load_state(state_path)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curves.restore(state.get("curves"))
        start = state["epoch"]
    bar = progress(range(start, config.epochs), "training heads", total=config.epochs, unit="epoch", initial=start)
    for epoch in bar:
        generator = np.random.default_rng([config.seed, epoch])
        order = generator.permutation(rows)
        total = 0.0
        for chosen in np.array_split(order[: per_epoch * size], per_epoch):
            captions = features.draw_captions(chosen, generator)
            loss = model.loss(
                torch.from_numpy(features.images[chosen]).to(device),
                torch.from_numpy(features.texts[captions]).to(device),
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        tracker.log({"loss": total / per_epoch, "temperature": 1 / model.log_scale.exp().item()}, step=epoch)
        curves.step(epoch + 1, {"train/loss": total / per_epoch})
        bar.set_postfix(loss=f"{total / per_epoch:.3f}", refresh=False)
        save_state(
            state_path,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
                "curves": curves.state(),
            },
        )
        run.note_time()
    figures = validate(model, features, device)
    tracker.log({f"val/{name}": value for name, value in figures.items()})
    tracker.finish()
    curves.mark(config.epochs, {f"val/R@{name}": value for name, value in figures.items()})
    curves.write(run.folder)
    return figures


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
    model = TwoHeads(detach_heads(clip), config.temperature).to(device)
    figures = train(model, features, run, config, device)
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
