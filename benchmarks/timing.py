"""Times of functions measured side by side: each in turn, again and again, so that a slow moment meets all of them.

On the CPU the figure is the process's CPU time with one thread, which other processes disturb least; on a GPU it is the
time on the clock until the device has finished. Peak memory is what a call held at most beyond what was held before it.
"""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

NameT = TypeVar("NameT", bound=Hashable)

MEBIBYTE = 1 << 20
PEAK_RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    least: float
    most: float
    repeats: int
    peak_mebibytes: float | None
    """None where the system does not tell"""


def interleave(
    functions: Mapping[NameT, Callable[[], object]], *, repeats: int, warm_up: bool = True, memory: bool = True
) -> dict[NameT, Timing]:
    """Time functions against each other: `repeats` rounds, in each round every function once.

    Args:
        warm_up: call each once before, so that no other call pays for what is allocated only once.
        memory: call each once more before, to find its peak memory.
    """
    peaks: dict[NameT, float | None] = {}
    if warm_up:
        for function in functions.values():
            function()
    if memory:
        peaks = {name: peak_memory(function) for name, function in functions.items()}
    seconds: dict[NameT, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(time_once(function))
    return {
        name: Timing(median(each), min(each), max(each), repeats, peaks.get(name)) for name, each in seconds.items()
    }


def time_once(function: Callable[[], object]) -> float:
    """Seconds of one call: CPU time, or time on the clock where a GPU works."""
    if not torch.cuda.is_available():
        began = time.process_time()
        function()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(function: Callable[[], object]) -> float | None:
    """Mebibytes that one call holds at most, beyond what is held before it; of the GPU's memory where there is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        PEAK_RESET.write_text("5")
    except OSError:
        function()
        return None
    before = status("VmRSS")
    function()
    return (status("VmHWM") - before) / MEBIBYTE


def machine() -> str:
    """The class of machine the figures come from."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"1 thread of a CPU, {cpu()}"


def cpu() -> str:
    """The kind of processor."""
    units = [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16") if name in _cpu_flags()]
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return kind + (f", {' '.join(units)}" if units else "")


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
