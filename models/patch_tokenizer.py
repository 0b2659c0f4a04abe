"""A picture as tokens of its patches: what stands in for SEED's tokenizer where its weights are not at hand.

The image tower of a two-tower model gives a map of features, averaged over a grid of patches; their main directions
are quantised residually. It has the interface of `models.seed_tokenizer.SeedTokenizer`, is fitted on the dataset's own
train pictures in seconds, and is no SEED: its tokens know nothing of language but what the tower does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.errors import BadInput
from tools.files import read_json, replacing, write_json

from .clip import Activation, Clip, load_clip, patch_map, recorded_activation, with_image_size
from .quantizer import QuantizerConfig, ResidualQuantizer
from .weights import ANEW, read_state

CONFIG_NAME, WEIGHTS_NAME = "patch_tokenizer.json", "patch_tokenizer.safetensors"
KMEANS_ITERATIONS = 10
MOST_VECTORS = 65_536  # that k-means looks at


@dataclass(frozen=True)
class PatchConfig:
    """Where the patches come from and how finely they are told apart."""

    model: str
    """open_clip model name or folder."""
    pretrained: str | None = None
    """Tag or checkpoint file of a model that is given by name."""
    image_size: int | None = None
    """Side of the pictures, in pixels; by default the model's own. Convolutional towers take others."""
    grid: int = 4
    """Patches along a side."""
    width: int = 128
    """Main directions of the patches' features that are kept."""
    levels: int = 2
    """Tokens per patch."""
    codebook_size: int = 1024
    """Tokens per level."""
    activation: Activation = "auto"
    """What the model was trained with, for a checkpoint file that does not tell."""


class PatchTokenizer(nn.Module):
    """Pictures to token ids (batch, grid * grid * levels), a patch's behind one another, row by row.

    Attributes:
        length: tokens a picture.
        codebook_size: distinct tokens; those of level l begin at l * config.codebook_size.
        preprocess: a picture (PIL) as the model takes it, (3, height, width).
    """

    name = "patches"

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        self.length = config.grid * config.grid * config.levels
        self.codebook_size = config.levels * config.codebook_size
        clip = load_clip(config.model, config.pretrained, activation=config.activation)
        self.clip: Clip = clip if config.image_size is None else with_image_size(clip, config.image_size)
        self.visual: nn.Module = self.clip.model.visual
        self.preprocess: Callable[[Any], Tensor] = self.clip.preprocess
        self.mean = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.directions = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.quantizer = ResidualQuantizer(QuantizerConfig(config.width, config.levels, config.codebook_size))

    def to_precision(self, dtype: torch.dtype) -> "PatchTokenizer":
        """Let the image tower compute in another type; the rest stays in float32."""
        self.visual.to(dtype=dtype)
        self.visual.to(memory_format=torch.channels_last)
        return self

    @torch.inference_mode()
    def patches(self, pixels: Tensor) -> Tensor:
        """Features (batch, grid * grid, features) of pixels (batch, 3, height, width), float32."""
        placed = pixels.to(next(self.visual.parameters())).contiguous(memory_format=torch.channels_last)
        grid = nn.functional.adaptive_avg_pool2d(patch_map(self.clip, placed), self.config.grid)
        return grid.flatten(2).transpose(1, 2).float()

    @torch.no_grad()
    def fit(self, patches: Tensor, *, seed: int) -> None:
        """Find the main directions and the codebooks of patches' features (patches, features).

        Raises:
            BadInput: there are fewer patches than codes, or fewer features than directions.
        """
        config = self.config
        if patches.shape[1] < config.width:
            raise BadInput(f"`patch_width` {config.width}: the image tower's features are {patches.shape[1]} wide")
        if len(patches) < max(config.codebook_size, config.width):
            raise BadInput(
                f"{len(patches)} patches are too few for {config.codebook_size} codes of width {config.width}: lower "
                "`codebook_size` and `patch_width`, or give more `fit_pictures`"
            )
        generator = torch.Generator().manual_seed(seed)
        some = patches[torch.randperm(len(patches), generator=generator)[:MOST_VECTORS]]
        self.mean.data = some.mean(dim=0)
        covariance = torch.cov((some - self.mean).T)
        self.directions.data = torch.linalg.eigh(covariance).eigenvectors[:, -config.width :].flip(1).contiguous()
        self.quantizer.start_from(self._narrow(some), iterations=KMEANS_ITERATIONS, generator=generator)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Token ids (batch, length) int64 of pixels (batch, 3, height, width)."""
        patches = self.patches(pixels)
        codes = self.quantizer.encode(self._narrow(patches.flatten(0, 1)))
        offsets = torch.arange(self.config.levels, device=codes.device) * self.config.codebook_size
        return (codes + offsets).view(len(pixels), self.length)

    @property
    def codebook(self) -> Tensor:
        """What each token stands for, (codebook_size, width)."""
        return self.quantizer.codebooks.flatten(0, 1)

    def save_pretrained(self, folder: Path) -> None:
        """Write directions and codebooks, and the configuration, which names the tower."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"mean": self.mean, "directions": self.directions, "codebooks": self.quantizer.codebooks}
        with replacing(folder / WEIGHTS_NAME) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
        write_json(folder / CONFIG_NAME, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "PatchTokenizer":
        """Read what `save_pretrained` wrote, in eval mode.

        Raises:
            BadInput: a file is missing or damaged, or the tower cannot be loaded.
        """
        state = read_state(folder / WEIGHTS_NAME, advice=ANEW)
        try:
            config = read_json(folder / CONFIG_NAME)
            tokenizer = cls(PatchConfig(**{**config, "activation": recorded_activation(config)}))
            tokenizer.mean.data, tokenizer.directions.data = state["mean"], state["directions"]
            tokenizer.quantizer.codebooks.data = state["codebooks"]
        except (KeyError, TypeError) as error:
            raise BadInput(f"{folder} is not a patch tokenizer's ({error}): {ANEW}") from None
        return tokenizer.eval()

    def _narrow(self, patches: Tensor) -> Tensor:
        """The main directions (patches, width) of features (patches, features)."""
        return (patches - self.mean) @ self.directions
