"""Linear layers in the arithmetic that a search runs in: float32, bf16, fp16, or 8-bit integers.

Inference only: the layers give no gradients.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools import environment
from tools.errors import BadInput

from .compute import Precision, pick_dtype

Arithmetic = Precision | Literal["int8"]
Layer = Callable[[Tensor], Tensor]
MakeLinear = Callable[[nn.Linear], nn.Module]
LEAST = 1e-20  # of a row's largest number, where it is quantised: a row of zeros has no scale
PACKED_ROWS = 80  # the height of an input that oneDNN arranges a weight for; others run too


class CastLinear(nn.Module):
    """A linear layer whose weight, and its input at every call, is cast."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs.to(self.dtype), self.weight, self.bias)


class PackedLinear(nn.Module):
    """The same on the CPU, with the weight arranged for oneDNN once, as `torch.compile` does it: about a quarter
    faster in float32 and an eighth in bf16 at 80 rows, twice at 8."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), PACKED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        cast = inputs.to(self.dtype)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(cast, self.weight, self.bias, "none", [], "")
        return output


class Int8Linear(nn.Module):
    """A linear layer in 8-bit integers, with a scale for each row of the weight and of the input. CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = _int8_scales(weight).squeeze(1)
        self.weight = _to_int8(weight, self.scales.unsqueeze(1)).T.contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.float().flatten(0, -2)
        scales = _int8_scales(rows)
        output = torch._int_mm(_to_int8(rows, scales), self.weight).float().mul_(scales).mul_(self.scales)
        if self.bias is not None:
            output.add_(self.bias)
        return output.view(*inputs.shape[:-1], -1)


def choose_linear(arithmetic: Arithmetic, device: torch.device) -> tuple[MakeLinear, torch.dtype]:
    """What makes linear layers of an arithmetic on a device, and the type of what they give.

    Args:
        arithmetic: "auto" as in `pick_dtype`; "int8" quantises weights and inputs row by row and gives float32.

    Raises:
        BadInput: int8 is asked for on a GPU.
    """
    if arithmetic == "int8":
        if device.type != "cpu":
            raise BadInput("`precision` int8 runs on the CPU only: take bf16 on a GPU")
        environment.note(precision="int8")
        return Int8Linear, torch.float32
    dtype = pick_dtype(arithmetic, device)
    packs = device.type == "cpu" and dtype != torch.float16 and torch.backends.mkldnn.is_available()
    return partial(PackedLinear if packs else CastLinear, dtype=dtype), dtype


def weights_dtype(arithmetic: Arithmetic, device: torch.device) -> torch.dtype | None:
    """The type of weights that a search in an arithmetic reads as they are; None for int8, which rounds any."""
    return None if arithmetic == "int8" else pick_dtype(arithmetic, device)


def with_linears(module: nn.Module, make: MakeLinear) -> nn.Module:
    """A copy of the module in eval mode, with other linear layers; the original stays as it is.

    Subclasses of `nn.Linear` stay too: their owners read the weights past `forward`.
    """
    replaced = [child for child in module.modules() if type(child) is nn.Linear]
    shared: dict[int, Any] = {id(part): part for linear in replaced for part in linear.parameters()}
    copied = copy.deepcopy(module, shared).eval()  # what is replaced is not copied first
    _exchange(copied, make)
    return copied


def _exchange(module: nn.Module, make: MakeLinear) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, make(child))
        else:
            _exchange(child, make)


def _int8_scales(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1, keepdim=True).clamp_min(LEAST) / 127


def _to_int8(rows: Tensor, scales: Tensor) -> Tensor:
    return (rows * scales.reciprocal()).round_().to(torch.int8)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of a weight (outputs, inputs) and a bias (outputs,), without gradients."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def fused(layers: list[nn.Linear]) -> nn.Linear:
    """Layers without bias that read the same input, as one."""
    return linear_of(torch.cat([layer.weight.detach() for layer in layers]), None)


def from_conv(layer: Any) -> nn.Linear:
    """A Hugging Face `Conv1D`, as GPT-2 has them: a linear layer that keeps its weight transposed."""
    return linear_of(layer.weight.detach().T.contiguous(), layer.bias)
