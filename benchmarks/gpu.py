"""Check and measure the project on a GPU: everything in one call of a few minutes, which no failure ends early.

In:  nothing; models of the published sizes get random weights.
Out: `<output>/gpu.json`: the machine, every figure with its unit and goal, every failure with its traceback; written
     after each figure. The same as a table on the screen.
Command: python -m benchmarks.gpu [--minutes 8] [--only search training] [--tiny]

Every section runs in a process of its own. A section that fails, hangs or runs out of memory costs its own figures
alone. What would begin after the minutes are over is skipped. On a CPU, `--tiny` shows that everything runs.
"""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA in the parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from models.compute import pick_device
from tools.files import write_json
from tools.logs import table

from .gpu_equality import equality
from .gpu_figures import Figure, Report, cells
from .gpu_models import FULL, TINY, Sizes
from .gpu_rerank import rerank
from .gpu_search import search_llama, search_t5, two_tower
from .gpu_training import (
    measured_peak,
    train_llama,
    train_reranker,
    train_rqvae,
    train_t5_base,
    train_t5_compiled,
    train_t5_large,
)
from .timing import cpu

Section = Callable[..., None]

LEAST_SECONDS = 15.0  # without so much left no section begins: most of it goes into its start
MOST_SECONDS = 150.0  # of a section; then it is stopped
GRACE_SECONDS = 20.0  # past the minutes, for what has begun
NOT_A_GPU = "cpu, not run on a GPU"


class Options(NamedTuple):
    """The command line."""

    minutes: float
    only: tuple[str, ...]
    output: Path
    tiny: bool
    graphs: bool

    @property
    def command(self) -> str:
        """What was typed, but for the folder of the results, which is this machine's."""
        words = ["python -m benchmarks.gpu", f"--minutes {self.minutes:g}"]
        words += [f"--only {' '.join(self.only)}"] if self.only else []
        words += ["--tiny"] if self.tiny else []
        words += [] if self.graphs else ["--no-graphs"]
        return " ".join(words)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL


def describe(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """What the device does at best."""
    peak = measured_peak(report.device, sizes.matrix)
    report.add(f"bf16 matrix product, {sizes.matrix} × {sizes.matrix}", peak / 1e12, "TFLOP/s")
    counts = 1000
    small = torch.zeros(8, device=report.device)
    small.add_(1)
    if report.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(counts):
        small.add_(1)
    report.add("starting one small kernel", (time.perf_counter() - began) / counts * 1e6, "µs")


SECTIONS: dict[str, Section] = {  # in the order of what is wanted most
    "device": describe,
    "equality": equality,
    "search-t5": search_t5,
    "training-t5-base": train_t5_base,
    "two-tower": two_tower,
    "training-llama": train_llama,
    "training-reranker": train_reranker,
    "rerank": rerank,
    "search-llama": search_llama,
    "training-rqvae": train_rqvae,
    "training-t5-large": train_t5_large,
    "training-t5-compiled": train_t5_compiled,
}


def chosen(only: tuple[str, ...]) -> list[str]:
    """Sections by their names or the first part of them; the device is always described."""
    names = [name for name in SECTIONS if any(name == each or name.startswith(f"{each}-") for each in only)]
    return list(dict.fromkeys(["device", *names])) if only else list(SECTIONS)


def facts() -> dict[str, Any]:
    """The machine and its software, as a section's process sees them."""
    here = {
        "device": NOT_A_GPU,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": f"{os.cpu_count()} × {cpu()}",
    }
    if not torch.cuda.is_available():
        return here
    gpu = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "unknown"
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    return {
        **here,
        "device": gpu.name,
        "memory GiB": round(gpu.total_memory / (1 << 30), 1),
        "capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def run_section(name: str, options: Options, deadline: float, sender: "Connection[Any, Any]") -> None:
    """One section, in its own process: sends figures, and for the device its facts."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if name == "device":
        sender.send(facts())
    report = Report(name, pick_device(), sender.send, deadline)
    with report.attempt("section"):
        SECTIONS[name](options.sizes, report, graphs=options.graphs)
    sender.close()


def results_of(name: str, options: Options, deadline: float, method: str) -> Iterator[Any]:
    """What a section's process sends, as it comes; a last figure says how it ended, where it ended badly.

    Args:
        deadline: on `time.monotonic`'s clock; what has begun by then has some grace.
        method: how the process starts.
    """
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_section, args=(name, options, deadline, sender))
    process.start()
    sender.close()
    end = min(time.monotonic() + MOST_SECONDS, deadline + GRACE_SECONDS)
    reason = ""
    while not reason:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            process.kill()
            reason = "stopped: it took too long"
            break
        try:
            yield receiver.recv()
        except EOFError:
            break
    process.join(GRACE_SECONDS)
    if process.is_alive():  # it has sent everything, and does not end
        process.kill()
    elif process.exitcode and not reason:
        reason = f"failed: the process ended with {process.exitcode}"
    if reason:
        yield Figure(name, "section", None, "", note=reason, trace=reason)


class Results:
    """What is known so far, on the screen and in a file."""

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, time.monotonic()
        self.machine: dict[str, Any] = {}
        self.figures: list[Figure] = []
        self.seconds: dict[str, float] = {}
        self.path = options.output / "gpu.json"
        options.output.mkdir(parents=True, exist_ok=True)

    def take(self, result: Any) -> None:
        """Keep what a section has sent."""
        if isinstance(result, Figure):
            self.figures.append(result)
        else:
            self.machine = result
        self.write()

    def write(self) -> None:
        """The whole file, new."""
        goals = [figure for figure in self.figures if figure.goal]
        write_json(
            self.path,
            {
                "command": self.options.command,
                **self.machine,
                "sizes": self.options.sizes.name,
                "seconds": round(time.monotonic() - self.began, 1),
                "seconds of sections": {name: round(value, 1) for name, value in self.seconds.items()},
                "goals missed": [figure.what for figure in goals if figure.met is False],
                "failures": [figure._asdict() for figure in self.figures if figure.trace],
                "figures": [line(figure) for figure in self.figures],
            },
        )

    def show(self, section: str) -> None:
        """One section's table."""
        rows = [cells(figure) for figure in self.figures if figure.section == section]
        if rows:
            print(f"\n{section}, {self.seconds[section]:.0f} s\n{table(rows)}", flush=True)

    def summary(self) -> str:
        """What has a goal, and what failed."""
        rows = [cells(figure) for figure in self.figures if figure.goal or figure.trace]
        title = f"{self.machine.get('device', 'no device')}, {time.monotonic() - self.began:.0f} s -> {self.path}"
        return f"\ngoals and failures: {title}\n" + (table(rows) if rows else "none")


def line(figure: Figure) -> dict[str, Any]:
    """A figure as the file has it."""
    value = None if figure.value is None else float(f"{figure.value:.6g}")
    rest = {name: each for name, each in figure._asdict().items() if name != "trace" and each not in ("", None)}
    return {**rest, "value": value}


def run(options: Options) -> Results:
    """All chosen sections, one after the other."""
    results = Results(options)
    deadline = results.began + 60 * options.minutes
    method = "fork" if sys.platform == "linux" else "spawn"
    for name in chosen(options.only):
        began = time.monotonic()
        if deadline - began < LEAST_SECONDS:
            results.take(Figure(name, "section", None, "", note="skipped: the time is over"))
            continue
        for result in results_of(name, options, deadline, method):
            results.take(result)
        if name == "device" and not results.machine:  # it was not to be had in a forked process
            method = "spawn"
            for result in results_of(name, options, deadline, method):
                results.take(result)
        results.seconds[name] = time.monotonic() - began
        results.write()
        results.show(name)
    print(results.summary(), flush=True)
    return results


def parse(arguments: list[str]) -> Options:
    """The command line; argparse, as a machine with a GPU may lack what the other commands use."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="what would begin later is skipped")
    known = sorted({*SECTIONS, "search", "training"})
    parser.add_argument("--only", nargs="+", default=(), choices=known, help="sections; all by default")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of gpu.json")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights: seconds on a CPU")
    graphs = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--graphs", **graphs, help="record CUDA graphs")  # type: ignore[arg-type]
    found = parser.parse_args(arguments)
    return Options(found.minutes, tuple(found.only), found.output, found.tiny, found.graphs)


def main(arguments: list[str]) -> None:
    run(parse(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
