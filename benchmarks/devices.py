"""What a device can do, measured here or assumed by name: the figures that the cost of a step follows from."""

import io
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from models.compute import pick_device
from tools.training_memory import GIB

from .timing import machine

PICTURE_SIZE = (500, 375)  # of most pictures of Flickr30k; COCO's are 640 x 480
ENCODED_SIZE = (336, 336)
REPEATS = 5


class Device(NamedTuple):
    """Rates of a device and of the processors beside it."""

    name: str
    flops: float
    """Floating-point operations a second that matrix products reach in bf16"""
    exact: float
    """The same in fp32, without TF32"""
    launch: float
    """Seconds from one kernel to the next where the kernels themselves take no time"""
    bandwidth: float
    """Bytes a second of reading and writing together"""
    link: float
    """Bytes a second that a gradient travels between two devices"""
    memory: float
    """Bytes"""
    decode: float
    """Pictures a second that one core reads, decodes and scales"""
    cores: int
    measured: bool
    """Whether these were measured, or assumed"""


ASSUMED = {
    # 989 TFLOP/s dense in bf16, 67 in fp32 and 3.35 TB/s are the maker's. Assumed: 40 %, 60 % and 80 % of them,
    # 5 microseconds a kernel, 35 % of NVLink's 900 GB/s, 100 pictures a second on each of 16 cores.
    "h100": Device(
        "H100 80 GB (assumed)", 0.4 * 989e12, 0.6 * 67e12, 5e-6, 0.8 * 3.35e12, 0.35 * 900e9, 80e9, 100, 16, False
    ),
    # 312 and 19.5 TFLOP/s and 2.04 TB/s are the maker's; assumed as above, with 600 GB/s of NVLink and 6 microseconds.
    "a100": Device(
        "A100 80 GB (assumed)", 0.4 * 312e12, 0.6 * 19.5e12, 6e-6, 0.8 * 2.04e12, 0.35 * 600e9, 80e9, 100, 16, False
    ),
}


def measure(device: torch.device | None = None, *, size: int | None = None) -> Device:
    """Measure the device that this machine computes on; a link between devices, which one cannot show, is taken as
    that of an A100.

    Args:
        size: rows of the square matrices; by default 8192 on a GPU and 1024 on a CPU.
    """
    device = device or pick_device()
    gpu = device.type == "cuda"
    size = size or (8192 if gpu else 1024)
    bandwidth = measure_bandwidth(device, size)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else _memory_of_the_machine()
    return Device(
        machine(),
        flops=measure_flops(device, size, torch.bfloat16),
        exact=measure_flops(device, size, torch.float32),
        launch=measure_launch(device),
        bandwidth=bandwidth,
        link=ASSUMED["a100"].link,
        memory=memory,
        decode=measure_decode(),
        cores=len(os.sched_getaffinity(0)),
        measured=True,
    )


def measure_flops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: left @ left, device)


def measure_launch(device: torch.device) -> float:
    """Seconds of a kernel that has nothing to do, one of many behind one another."""
    one, count = torch.zeros(1, device=device), 1000

    def many() -> None:
        for _ in range(count):
            one.add_(1)

    return _seconds(many, device) / count


def measure_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a copy, which reads and writes each."""
    array = torch.zeros(16 * size * size, device=device, dtype=torch.uint8)
    other = torch.empty_like(array)
    return 2 * array.numel() / _seconds(lambda: other.copy_(array), device)


def measure_decode() -> float:
    """Pictures a second of one core: a photograph's JPEG, decoded and scaled to a square."""
    noise = np.random.default_rng(0).normal(128, 40, size=(24, 32, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    def decode() -> None:
        with Image.open(io.BytesIO(file.getvalue())) as picture:
            np.asarray(picture.convert("RGB").resize(ENCODED_SIZE, Image.Resampling.BICUBIC))

    return 1 / _seconds(decode, torch.device("cpu"))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of some calls: what the device can do when nothing disturbs it."""
    found = []
    for _ in range(1 + REPEATS):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_of_the_machine() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def rates(device: Device) -> str:
    """One line with every figure of a device."""
    kind = "measured here" if device.measured else "assumed, not measured"
    figures = (
        f"{device.flops / 1e12:.3g} TFLOP/s in bf16 products, {device.exact / 1e12:.3g} in fp32",
        f"{device.launch * 1e6:.2g} µs a kernel",
        f"{device.bandwidth / 1e9:.3g} GB/s",
        f"{device.link / 1e9:.3g} GB/s between devices{' (assumed)' * device.measured}",
        f"{device.memory / GIB:.3g} GiB",
        f"{device.decode:.3g} pictures a second and core on {device.cores} cores",
    )
    return f"{device.name}, {kind}: {', '.join(figures)}"
