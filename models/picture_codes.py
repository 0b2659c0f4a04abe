"""Pictures to codes in one go: two towers and tokenizer, each in the arithmetic in which the chain uses it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .clip import Clip, detach_heads, encode_images, load_recorded
from .compute import DTYPES
from .rqvae import RqVae


class Coded(NamedTuple):
    """What a batch of pictures gives."""

    features: Tensor
    """(pictures, width) float32, not normalised"""
    codes: Tensor
    """(pictures, levels)"""


class PictureCoder:
    """Image tower, head and tokenizer on one device.

    Args:
        facts: of the feature folder on which the tokenizer was trained: which model, and its precision.
        heads_apart: the features were made in two steps: the tower in the precision of the facts, the head in float32
            on what it gave. Else the whole model has that precision.
    """

    def __init__(self, facts: Mapping[str, Any], tokenizer: RqVae, *, heads_apart: bool, device: torch.device) -> None:
        clip = load_recorded(facts)
        self.head: nn.Module = detach_heads(clip).image.eval().to(device) if heads_apart else nn.Identity()
        del clip.model.text
        dtype = getattr(torch, facts["precision"]) if "precision" in facts else DTYPES["fp32"]
        clip.model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        self.clip: Clip = clip
        self.tokenizer, self.device = tokenizer.to(device).eval(), device

    @torch.inference_mode()
    def code(self, pixels: Tensor) -> Coded:
        """Codes of preprocessed pictures (batch, 3, height, width); collisions stay."""
        features = self.head(encode_images(self.clip, pixels.to(self.device)))
        return Coded(features.cpu(), self.tokenizer.codes(features).cpu())
