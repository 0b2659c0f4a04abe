"""The preflight of devices: the GPUs that nvidia-smi sees, the driver that torch wants, and memory.

Nothing here imports torch: what it was built for stands in its version.py.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..training_memory import GIB, Training, need
from .models import shape_of
from .needs import MISSING, OK, UNKNOWN, Finding, Need

DRIVERS = {11: 450, 12: 525, 13: 580}  # the oldest that runs a major version of CUDA
COMPATIBLE = Path("/usr/local/cuda/compat")  # NVIDIA's package for older drivers, in its containers
QUERY = "name,memory.total,driver_version"
NVIDIA_SMI_SECONDS = 20


class Gpu(NamedTuple):
    """A GPU that this process may use."""

    name: str
    memory: int
    """Bytes"""
    driver: str


@functools.cache
def gpus_here() -> list[Gpu]:
    """The GPUs that nvidia-smi lists, of those that CUDA_VISIBLE_DEVICES leaves."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    found = [Gpu(name, int(memory) << 20, driver) for name, memory, driver in rows if memory.isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    numbers = [int(word) for word in visible.split(",") if word.strip().isdigit()]
    named = [word for word in visible.split(",") if word.startswith(("GPU-", "MIG-"))]
    return found[: len(named)] if named else [found[number] for number in numbers if number < len(found)]


def cuda_of_torch() -> int | None:
    """The major version of CUDA that the installed torch was built for; None for a build without."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"""^cuda[^=\n]*=\s*['"](\d+)""", text, re.MULTILINE)
    return int(found[1]) if found else None


def check_processes(wanted: Need) -> Iterator[Finding]:
    """launch: the command that starts several processes, as typed; gpu: whether a GPU is expected."""
    gpus, count = gpus_here(), processes_here(wanted.values.get("launch", ""))
    if not gpus:
        if wanted.values.get("gpu"):
            yield Finding(wanted.stage, "no NVIDIA GPU is seen", UNKNOWN, "on a CPU these sizes take weeks")
        return
    what = f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / GIB:.0f} GiB, driver {gpus[0].driver}"
    yield Finding(wanted.stage, what, OK, "")
    yield from _check_driver(wanted.stage, gpus[0])
    if count > len(gpus) and "--cpu" not in wanted.values["launch"].split():
        advice = f"--num_processes {len(gpus)} in LAUNCH"
        yield Finding(wanted.stage, f"LAUNCH starts {count} processes, for {len(gpus)} GPUs", MISSING, advice)


def _check_driver(stage: str, gpu: Gpu) -> Iterator[Finding]:
    cuda, major = cuda_of_torch(), gpu.driver.partition(".")[0]
    if cuda is None:
        advice = "TORCH_BACKEND=auto for a build with CUDA, or CUDA_VISIBLE_DEVICES= to compute on the CPU"
        yield Finding(stage, "a GPU, and torch is built for CPUs alone", MISSING, advice)
    elif major.isdigit() and int(major) < DRIVERS.get(cuda, 0):
        what = f"driver {gpu.driver}, torch is built for CUDA {cuda}"
        advice = f"a driver of {DRIVERS[cuda]} or newer, or TORCH_BACKEND=auto for a build that fits"
        yield Finding(stage, what, UNKNOWN if COMPATIBLE.is_dir() else MISSING, advice)


def processes_here(launch: str) -> int:
    """Processes that a launcher starts on this machine.

    >>> processes_here("accelerate launch --multi_gpu --num_processes 16 --num_machines 2"), processes_here("")
    (8, 1)
    """
    counts = _counts(launch)
    return counts["nproc_per_node"] or max(1, counts["num_processes"] // max(1, counts["num_machines"]))


def processes_in_all(launch: str) -> int:
    """Processes that a launcher starts on all machines together.

    >>> processes_in_all("torchrun --nnodes 2 --nproc-per-node 8"), processes_in_all("")
    (16, 1)
    """
    counts = _counts(launch)
    return counts["nproc_per_node"] * max(1, counts["nnodes"]) or max(1, counts["num_processes"])


def _counts(launch: str) -> dict[str, int]:
    """The numbers that the options of accelerate and torchrun give."""
    counts = {"num_processes": 1, "nproc_per_node": 0, "num_machines": 1, "nnodes": 1}
    for name in counts:
        if found := re.search(rf"--{name.replace('_', '[-_]')}[= ]+(\d+)", launch):
            counts[name] = int(found[1])
    return counts


def check_memory(wanted: Need) -> Iterator[Finding]:
    """model: a language model; launch; weights: bytes a weight where it is only read, with room: GiB beside them;
    or the fields of `Training`, with batch: texts or groups of a batch of all processes, at_once: how many of them a
    process reads in one pass (0: its whole part), and each: sequences of a group, in the place of `sequences`."""
    shape, gpus = shape_of(wanted.values["model"]), gpus_here()
    if shape is None or not gpus:
        return
    least, most = _read_only(wanted, shape.parameters) if "weights" in wanted.values else _trained(wanted)
    card = min(gpus, key=lambda gpu: gpu.memory)
    what = f"{wanted.values['model']}: about {most / GIB:.0f} GiB of a GPU's {card.memory / GIB:.0f}"
    if most <= card.memory:
        yield Finding(wanted.stage, what, OK, "")
        return
    parts = any(way in wanted.values.get("launch", "") for way in ("zero", "deepspeed", "fsdp"))
    certain = least > card.memory and not parts
    yield Finding(wanted.stage, what, MISSING if certain else UNKNOWN, wanted.values.get("advice", "a larger GPU"))


def _read_only(wanted: Need, parameters: int) -> tuple[int, int]:
    least = parameters * int(wanted.values["weights"])
    return least, least + int(float(wanted.values.get("room", 0)) * GIB)


def _trained(wanted: Need) -> tuple[int, int]:
    """Bytes without which it cannot be, and the estimate of the peak."""
    training = _training(wanted)
    assert training is not None
    found = need(training)
    return found.fixed, found.peak


def trained_weights(wanted: Need) -> int:
    """Weights that a training trains; 0 where nothing is trained or nobody knows the model."""
    training = None if "weights" in wanted.values else _training(wanted)
    return training.trained if training else 0


def _training(wanted: Need) -> Training | None:
    shape = shape_of(wanted.values["model"])
    if shape is None:
        return None
    numbers = {name: int(value) for name, value in wanted.values.items() if name in Training._fields}
    part = -(-int(wanted.values["batch"]) // processes_in_all(wanted.values.get("launch", "")))
    most = int(wanted.values.get("at_once", 0)) or part
    numbers["sequences"] = min(part, most) * int(wanted.values.get("each", 1))
    return Training(shape, **numbers)  # type: ignore[arg-type]
