"""Where and in which precision a model runs, and the state a training needs to go on after it was killed."""

import contextlib
import platform
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tools import processes
from tools.errors import BadInput
from tools.files import replacing

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the GPU where there is one: each process of a machine gets its own.

    Raises:
        BadInput: the name is no device, or CUDA is asked for and absent.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name} is not a torch device: write cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: torch sees no CUDA GPU; leave the option out to use the CPU")
    if device.type == "cuda" and device.index is not None:
        if processes.count() > 1:
            raise BadInput(f"--device {name} would be every process's: write cuda, and each gets its own")
        torch.cuda.set_device(device)  # accelerate goes to the current one
    if name == "cuda" and processes.count() > 1:
        own, there = processes.on_this_machine(), torch.cuda.device_count()
        if own >= there:
            raise BadInput(
                f"each process needs a GPU, this machine has {there}: start fewer processes, or name a --device"
            )
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    return device


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the forward pass; "auto" is bf16 where the device computes it in hardware, else fp32."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_computes_bf16() else torch.float32


def _cpu_computes_bf16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Run the enclosed forward pass in `dtype`, or plainly when that is float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def machine() -> str:
    """The class of machine that figures come from."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def make_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """Any optimiser of torch.optim by name (case ignored); biases, norms and scalars get no weight decay.

    Raises:
        BadInput: torch has no optimiser of that name.
    """
    if name.lower() not in OPTIMIZERS:
        raise BadInput(f"--optimizer {name} is not in torch.optim; it has {', '.join(sorted(OPTIMIZERS))}")
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    make: Any = OPTIMIZERS[name.lower()]
    optimizer: torch.optim.Optimizer = make([group for group in groups if group["params"]], lr=lr, **options)
    return optimizer


def warmup_share(step: int, *, steps: int, warmup: float, decay: Literal["none", "linear", "cosine"]) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first `warmup` of all steps, then `decay`."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if decay == "linear":
        return max(0.0, 1.0 - done)
    if decay == "cosine":
        return 0.5 * (1.0 + float(np.cos(np.pi * min(1.0, done))))
    return 1.0


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training's state atomically, with the random generators."""
    generators: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state_all()
    with replacing(path) as temporary:
        torch.save({**state, "generators": generators}, temporary)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote and restore the generators; None when there is none. Never unpickles code."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    generators = state.pop("generators")
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(generators["cuda"][: torch.cuda.device_count()])
    return state
