"""Join an ImageNet image tower and a sentence encoder into one open_clip model, for data that CLIP has not seen.

In:  weights of a timm image model, and a folder of a Hugging Face sentence encoder.
Out: `<output>/clip/`, an open_clip model folder whose two projection heads are untrained (RQ-VAE.train_heads).
Command: python -m RQ-VAE.assemble_clip --image-tower NAME --image-weights FILE --text-tower DIR --output DIR
"""

from dataclasses import dataclass
from pathlib import Path

from models.clip import assemble_clip, save_clip
from models.compute import seed_everything
from tools import runs
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """The two towers and the space between them."""

    image_weights: Path
    """Weights of the image tower: safetensors, or a state dict torch loads without unpickling code."""
    text_tower: Path
    """Folder of the sentence encoder: config.json, model.safetensors, tokenizer files."""
    image_tower: str = "tf_efficientnet_lite0"
    """timm's name of the image tower."""
    width: int = 512
    """Width of the shared space."""
    image_size: int = 192
    """Side of the pictures the image tower reads, in pixels."""
    seed: int = 0
    """Seed of the untrained heads."""

    def __post_init__(self) -> None:
        if not self.image_weights.is_file():
            raise BadInput(f"--image-weights {self.image_weights} does not exist")
        if not (self.text_tower / "config.json").is_file():
            raise BadInput(f"--text-tower {self.text_tower} is not a model folder: it has no config.json")
        if self.width < 1 or self.image_size < 1 or self.seed < 0:
            raise BadInput("--width and --image-size must be at least 1, --seed at least 0")


def main(config: Config) -> None:
    inputs = {"image_weights": config.image_weights, "text_tower": config.text_tower}
    run = runs.begin("RQ-VAE.assemble_clip", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    clip = assemble_clip(
        image_tower=config.image_tower,
        image_weights=config.image_weights,
        text_tower=config.text_tower,
        width=config.width,
        image_size=config.image_size,
    )
    save_clip(run.folder / "clip", clip)
    run.finish(facts={"width": config.width})
    print(f"{config.image_tower} + {config.text_tower.name} -> {run.folder / 'clip'} (heads untrained)")


if __name__ == "__main__":
    run_command(main, Config)
