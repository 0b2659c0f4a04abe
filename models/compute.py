"""Where and in which precision a model runs, and the state a training needs to go on after it was killed."""

import contextlib
import inspect
import os
import pickle
import platform
import random
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tools import environment, processes
from tools.errors import BadInput
from tools.files import replacing
from tools.texts import did_you_mean

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OLDEST_DRIVERS = {12: 525, 13: 580}  # CUDA's major version -> the first driver that runs it
OPTIMIZERS = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the GPU where there is one: each process of a machine gets its own.

    Raises:
        BadInput: the name is no device, CUDA is asked for and absent, a GPU is there that torch does not see, or torch
            was not built for the card.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            refuse_unseen_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"`device` {name} is not a torch device: write cpu, cuda or cuda:N") from None
    if device.type == "meta":
        raise BadInput("`device` meta computes nothing: write cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"`device` {name}: torch sees no CUDA GPU; leave the option out to use the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"`device` {name}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if device.type == "cuda" and device.index is not None:
        if processes.count() > 1:
            raise BadInput(f"`device` {name} would be every process's: write cuda, and each gets its own")
        torch.cuda.set_device(device)  # accelerate goes to the current one
    if name == "cuda" and processes.count() > 1:
        own, there = processes.on_this_machine(), torch.cuda.device_count()
        if own >= there:
            raise BadInput(
                f"each process needs a GPU, this machine has {there}: start fewer processes, or name a `device`"
            )
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    if device.type == "cuda":
        refuse_unknown_card(device)
    environment.note(device=str(device))
    return device


def refuse_unseen_gpu() -> None:
    """Stop where `nvidia-smi` sees a GPU and torch does not, unless CUDA_VISIBLE_DEVICES hides it.

    Raises:
        BadInput: it does; the line has the driver, the CUDA that torch was built for, and what to do.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return
    found = _driver_and_card()
    if found is None:
        return
    driver, card = found
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    needed = OLDEST_DRIVERS.get(int((torch.version.cuda or "0").partition(".")[0]))
    if needed is not None and int(driver.partition(".")[0]) >= needed:
        way = (
            "the driver is new enough: check CUDA_VISIBLE_DEVICES and that the driver was loaded after its last update"
        )
    else:
        newer = "" if needed is None else f", or install driver {needed} or newer"
        way = f"set TORCH_BACKEND=auto and start the script again{newer}"
    raise BadInput(
        f"nvidia-smi sees {card} with driver {driver}, but torch {torch.__version__} sees no GPU, it {built}: "
        f"{way}; `device` cpu computes without it"
    )


def _driver_and_card() -> tuple[str, str] | None:
    """Driver and name of the first GPU that `nvidia-smi` sees; None where it sees none."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"(\d+[\d.]*), *(.+)", done.stdout)
    return None if found is None else (found[1], found[2].strip())


def refuse_unknown_card(device: torch.device) -> None:
    """Stop where torch has no code for a card of this compute capability.

    Raises:
        BadInput: it has none.
    """
    built = torch.cuda.get_arch_list()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says it in many lines
        capability = torch.cuda.get_device_capability(device)
    if built and torch.version.hip is None and not runs_on(capability, built):
        raise BadInput(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) is built for {', '.join(built)}: set TORCH_BACKEND "
            "to a build for this card, such as cu126 for Volta, and start the script again; `device` cpu computes "
            "without it"
        )


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of torch's architectures runs on a card: binaries within a major version, PTX on all later cards.

    >>> runs_on((8, 9), ["sm_80", "sm_90"]), runs_on((7, 0), ["sm_75", "sm_80"])
    (True, False)
    >>> runs_on((12, 1), ["sm_90a", "compute_120"])
    True
    """
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        low = (int(major), int(minor))
        if low <= capability and (kind == "compute" or low[0] == capability[0]):
            return True
    return False


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the forward pass; "auto" is bf16 on a GPU and on CPUs with bf16 units, else fp32.

    GPUs before Ampere compute bf16 by other units, which is slow. fp16 would be quicker there, but T5 overflows in it.
    """
    dtype = _fastest(device) if precision == "auto" else DTYPES[precision]
    environment.note(precision=str(dtype).removeprefix("torch."))
    return dtype


def _fastest(device: torch.device) -> torch.dtype:
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


def check_optimizer(name: str) -> None:
    """Refuse what is no optimiser of torch.optim."""
    if name.lower() not in OPTIMIZERS:
        near = did_you_mean(name.lower(), OPTIMIZERS)
        raise BadInput(f"`optimizer` {name} is not in torch.optim; it has {', '.join(sorted(OPTIMIZERS))}{near}")


def make_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, fused: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Any optimiser of torch.optim by name (case ignored); biases, norms and scalars get no weight decay.

    Args:
        fused: update all parameters in a few kernels, where the optimiser can.

    Raises:
        BadInput: torch has no optimiser of that name.
    """
    check_optimizer(name)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    make: Any = OPTIMIZERS[name.lower()]
    if fused and "fused" in inspect.signature(make).parameters:
        options["fused"] = True
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
    """Seed Python, NumPy and torch; on a GPU, let torch take algorithms that give the same sums twice, or warn."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # which finds bugs, and costs time
        torch.use_deterministic_algorithms(True, warn_only=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training's state atomically, with the random generators."""
    generators: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state_all()
    with replacing(path) as temporary:
        torch.save({**state, "generators": generators}, temporary)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote and restore the generators; None when there is none. Never unpickles code.

    Raises:
        BadInput: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        generators = state.pop("generators")
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{path} is damaged ({reason}): start the training again with `overwrite`") from None
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(generators["cuda"][: torch.cuda.device_count()])
    return state
