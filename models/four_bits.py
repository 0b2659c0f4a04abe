"""Frozen weights of a large model in 4 bits while its adapters learn (QLoRA, Dettmers et al. 2023), by bitsandbytes.

The adapters learn around rounded weights, and so a saved model is read with the same rounding: `reader` gives plain
layers that compute what the 4-bit ones did.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from tools.errors import BadInput

from .options import LoraOptions
from .pretrained import load_whole
from .weights import first_line

PACKAGE = "bitsandbytes"
STORED_AS = torch.uint8  # two weights in each
REARRANGES = "support_avx512bf16_for_cpu"  # attribute of the package's linear layers


def check_four_bits(options: LoraOptions, device: str | None) -> None:
    """Refuse 4 bits where they cannot be computed.

    Args:
        device: as the user named it. The CPU has to be named, as it takes far longer.

    Raises:
        BadInput: bitsandbytes is missing, or there is no GPU and the CPU was not asked for.
    """
    if not options.load_in_4bit:
        return
    need_package("`load_in_4bit` needs")
    if device is None and not torch.cuda.is_available():
        raise BadInput(
            "`load_in_4bit` needs a GPU, and torch sees none: leave the option out, or give `device` cpu, which "
            "computes the same and takes longer"
        )


def need_package(why: str) -> None:
    """
    Raises:
        BadInput: bitsandbytes is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise BadInput(f"{why} {PACKAGE}: install it with 'pip install {PACKAGE}' into the Python in use")


def load_in_4bit(loader: Any, name: str, *, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """A pretrained model on a device, its linear layers but the head in 4 bits, and all else in `dtype`.

    Args:
        dtype: of the sums, too, and of what is rounded.

    Raises:
        BadInput: bitsandbytes is too old for this transformers, or cannot be used here.
    """
    from transformers import BitsAndBytesConfig

    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model = load_whole(
            loader, name, dtype=dtype, quantization_config=rounding, device_map={"": str(device)}, **options
        )
    except ImportError as error:
        raise BadInput(f"`load_in_4bit` cannot use {PACKAGE}: {first_line(error)}") from None
    for module in model.modules():  # or a validation on the CPU rearranges weights, and no gradient passes them again
        if hasattr(module, REARRANGES):
            setattr(module, REARRANGES, False)
    return model


def reader(rounded_in: str) -> Callable[..., Any]:
    """What reads a model for adapters that learned around its weights in 4 bits: a `load_whole` that rounds them.

    A GPU does the rounding, where there is one: one CPU thread needs seven minutes for 7B.

    Args:
        rounded_in: the type that the weights had when they were rounded, as torch names it.
    """

    def load(loader: Any, name: str, *, dtype: torch.dtype | Literal["auto"], **options: Any) -> Any:
        need_package(f"adapters of {name} were trained with `load_in_4bit`, and to read them takes")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_in_4bit(loader, name, dtype=getattr(torch, rounded_in), device=device, **options)
        plain = model.dequantize().cpu()
        return plain if dtype == "auto" else plain.to(dtype)

    return load


def name_of(dtype: torch.dtype) -> str:
    """As torch names it.

    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def holds_four_bits(module: nn.Module) -> bool:
    """Whether a module has weights in 4 bits."""
    return any(value.dtype == STORED_AS for value in module.parameters())
