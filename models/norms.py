"""RMS norms as one kernel each: a training on a GPU waits for kernels to start, not for sums, so fewer are faster."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedRmsNorm(nn.Module):
    """T5's and LLaMA's norm (Zhang and Sennrich 2019), whose result is cast once and not by every layer that reads it.

    Hugging Face writes it out in six operations, and in twelve more backwards.

    Attributes:
        weight: (width,) the parameter of the norm that it stands for, under the same name.
        variance_epsilon: of that norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.variance_epsilon = float(cast(float, norm.variance_epsilon))

    def forward(self, states: Tensor) -> Tensor:
        """States (..., width) to the same shape; inside autocast in its arithmetic, else in that of the states."""
        weight = self.weight.to(states.dtype)
        normed = F.rms_norm(states, weight.shape, weight, self.variance_epsilon)
        kind = states.device.type
        return normed.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else normed


def fuse_norms(model: nn.Module) -> int:
    """Put `FusedRmsNorm` in the place of every norm of T5's and LLaMA's kind, in place. Returns how many.

    Parameters stay the same objects under the same names, so that saved weights do not know of it.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")) and hasattr(child, "variance_epsilon")
    ]
    for parent, name, child in found:
        setattr(parent, name, FusedRmsNorm(child))
    return len(found)
