"""What a run's figures depend on beside its configuration and inputs: versions, machine, threads, device, arithmetic.

`runs` writes it into every manifest, where `tools.repeat` reads it. It says nothing about the content of a run folder,
and two runs that differ in it alone are the same run.
"""

import logging
import os
import platform
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from . import processes

# Module -> distributions that may bring it, for what can change a number or a picture.
DISTRIBUTIONS = {
    "PIL": ("pillow",),
    "accelerate": ("accelerate",),
    "deepspeed": ("deepspeed",),
    "faiss": ("faiss-cpu", "faiss-gpu"),
    "numpy": ("numpy",),
    "open_clip": ("open_clip_torch",),
    "peft": ("peft",),
    "resvg_py": ("resvg-py",),
    "safetensors": ("safetensors",),
    "sentencepiece": ("sentencepiece",),
    "timm": ("timm",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "transformers": ("transformers",),
}
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "LAUNCH",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
)

log = logging.getLogger(__name__)
_chosen: dict[str, str] = {}
_untold: set[str] = set()  # choices that the command's line waits for; empty when it has been said, or need not be


def note(**choices: str) -> None:
    """Keep what this process resolved from a default, such as the device or the arithmetic behind "auto"."""
    _chosen.update(choices)
    log.debug("chosen: %s", choices)
    if _untold and _untold <= _chosen.keys():
        say_choices()


def tell_choices() -> None:
    """Let the main process say on standard error where, and in which precision, it computes, once both are known."""
    if processes.is_main():
        _untold.update(("device", "precision"))


def say_choices() -> None:
    """Say what is known of the device and the precision, unless it has been said; nothing without a device."""
    if not _untold or "device" not in _chosen:
        return
    _untold.clear()
    found, device = machine(), _chosen["device"]
    which = found["gpu"] if device.startswith("cuda") else f"{found['threads']} threads"
    print(f"device: {device} ({which}), precision: {_chosen.get('precision', 'float32')}", file=sys.stderr, flush=True)


def describe() -> dict[str, Any]:
    """The environment of this process, as JSON: of the packages, those that it has loaded."""
    return {
        "python": platform.python_version(),
        "packages": versions(name for name in DISTRIBUTIONS if name in sys.modules),
        "machine": machine(),
        "processes": processes.count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_chosen,
    }


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Installed version of each of `modules` (names in `DISTRIBUTIONS`); one that is not installed is left out."""
    found = {}
    for module in modules:
        for name in DISTRIBUTIONS[module]:
            try:
                found[module] = _version(name)
            except metadata.PackageNotFoundError:
                continue
    return found


@lru_cache
def _version(distribution: str) -> str:
    return metadata.version(distribution)


def machine() -> dict[str, Any]:
    """Class of machine; what only torch knows is left out of a process that has not loaded it."""
    known: dict[str, Any] = {"system": platform.system(), "processor": _processor()}
    torch = sys.modules.get("torch")
    if torch is not None:
        known["threads"] = torch.get_num_threads()
        known["capability"] = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            known["gpu"] = torch.cuda.get_device_name()
            known["cuda"] = torch.version.cuda
    return known


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
