"""Hours and memory of each stage of each recipe, before anybody spends them.

In:  the recipes of scripts/datasets, sizes of models, and rates of a device: measured here, or assumed by name.
Out: tables on the screen, in Markdown, as docs/cost.md has them.
Command: python -m benchmarks.cost [--device h100] [--datasets flickr30k mscoco]

A repetition (a step, a batch of a search) takes the larger of two times: that of starting its kernels, and that of
computing and moving what it has to. Reading pictures goes on beside. Kernels are counted on the real trainings
(benchmarks/kernels.py); operations and bytes follow from the sizes (benchmarks/work.py).
"""

import os
import tempfile
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch

from models.decoding import make_writer
from models.rqvae import RqVae
from reranker.rerank import score_lists
from retriever.retrieve import search_queries
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.training_memory import GIB

from .devices import ASSUMED, Device, measure, rates
from .kernels import LAYERS, TRAININGS, Small, building_as_on_a_gpu, count_recipe, kernels_of, model_of, quiet
from .recipes import Recipe, read_recipe
from .work import SOME, Counts, Kernels, Part, Stage, stages_of

HOUR = 3600
FEW_LAYERS = (2, 3)
SIZES = {  # options of a training that change no kernel, with their values
    "--accumulate", "--at-once", "--batch-size", "--beams", "--discriminative-weight", "--epochs", "--language-model",
    "--lora-alpha", "--lora-rank", "--lr", "--max-source", "--negatives", "--temperature",
    "--top-k", "--validate-every",
    "--validate-queries", "--warmup", "--weight-decay", "--width", "--hidden", "--codebook-size",
}  # fmt: skip


class Run(NamedTuple):
    """A recipe on so many devices."""

    recipe: str
    devices: int


RUNS = (Run("better", 1), Run("faithful", 1), Run("better", 8), Run("large-batch", 8))


@dataclass(frozen=True)
class Config:
    """Which device, and what runs on it."""

    device: Literal["here", "h100", "a100"] = "here"
    """here: rates are measured on this machine; otherwise they are assumed (benchmarks/devices.py)."""
    datasets: tuple[str, ...] = ("flickr30k", "mscoco")
    """Names in scripts/datasets, or files."""


class Time(NamedTuple):
    """Seconds of a part, and what they are spent on."""

    seconds: float
    bound: str


def time_of(part: Part, device: Device, devices: int) -> Time:
    """Seconds of a part on so many devices, and what bounds it."""
    computed = (
        part.flops / device.flops + part.exact / device.exact + part.moved / device.bandwidth + part.sent / device.link
    )
    times = part.times / devices if part.shared else part.times
    work = {"kernels": times * part.kernels * device.launch, "arithmetic": times * computed}
    if part.times == 1 and part.shared:  # it stands for all repetitions
        work["arithmetic"] = computed / devices
    if part.pictures:
        work["pictures"] = part.pictures / (device.decode * min(part.workers * devices, device.cores))
    bound = max(work, key=work.__getitem__)
    return Time(work[bound], bound)


def count_few(recipe: Recipe, folder: Path) -> tuple[Counts, Counts]:
    """Kernels of everything that a recipe repeats, of models of `FEW_LAYERS` layers."""
    few, more = (_count_at(layers, recipe, folder / f"{recipe.name}-{recipe.recipe}-{layers}") for layers in FEW_LAYERS)
    return few, more


def grown(recipe: Recipe, counted: tuple[Counts, Counts]) -> Counts:
    """Kernels of a recipe's own models: each layer starts as many."""
    few, more = counted

    def grow(variable: str, low: float, high: float) -> float:
        layers, (first, second) = LAYERS[model_of(recipe, variable)], FEW_LAYERS
        return low + (layers - first) * (high - low) / (second - first)

    trainings = {
        name: Kernels(*(grow(name, *pair) for pair in zip(few.trainings[name], more.trainings[name], strict=True)))
        for name in few.trainings
    }
    searches = {name: grow(name, few.searches[name], more.searches[name]) for name in few.searches}
    return Counts(trainings, searches, few.tokenizer, grow("TRAIN_RERANKER", few.scoring, more.scoring))


def structure(recipe: Recipe) -> str:
    """The options of a recipe's trainings that say which kernels they start: what is counted once for all of them."""
    kept = []
    for variable in (*TRAININGS, "TRAIN_RQVAE"):
        inside = False
        for word in recipe.values[variable]:
            inside = word in SIZES or (inside and not word.startswith("--"))
            kept += [] if inside else [word]
        kept.append("")
    return " ".join(kept)


def _count_at(layers: int, recipe: Recipe, folder: Path) -> Counts:
    """The same of models with so many layers."""
    shallow = mock.patch.dict(LAYERS, dict.fromkeys(LAYERS, layers))
    with mock.patch.dict(os.environ, {"WANDB_MODE": "disabled"}), shallow, quiet(), building_as_on_a_gpu():
        small = Small(folder)
        counted = count_recipe(small, recipe)
        trainings = {
            name: Kernels(sum(each.micro_step.values()), each.optimizer_step) for name, each in counted.items()
        }
        return Counts(trainings, count_searches(small, recipe), count_tokenizer(recipe), count_scoring(small, recipe))


def count_searches(small: Small, recipe: Recipe) -> dict[str, float]:
    """Kernels of one batch of a search, by the array of options that names the model."""
    return {
        variable: count_search(*small.retriever(recipe, variable)) for variable in ("TRAIN_RETRIEVER", "FINETUNE_LLAMA")
    }


def count_search(training: Any, tracker: Any) -> int:
    """Kernels of one batch of the search that a training's validation makes."""
    training.stepper.module.eval()
    writer, data = make_writer(training.lm, "fp32"), training.data

    def search() -> None:
        queries, rows = training.val_split.queries, data.rows("all")
        search_queries(writer, queries, data.codes, rows, beams=4, keep=4, batch_size=64, quiet=True)

    return sum(kernels_of(search).values())


def count_scoring(small: Small, recipe: Recipe) -> int:
    """Kernels of one batch of the reranker's scoring, pictures that are read for it included."""
    training: Any = small.reranker(recipe)[0]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "quiet": True}
    return sum(kernels_of(lambda: score_lists(training.scorer, training.tokens, training.val, **options)).values())


def count_tokenizer(recipe: Recipe) -> int:
    """Kernels of one step of the RQ-VAE with its optimiser."""
    config = recipe.config("TRAIN_RQVAE", import_module("RQ-VAE.train").Config, features=SOME, output=SOME)
    narrow = replace(config, width=8, hidden=tuple(8 for _ in config.hidden), codebook_size=8)
    model = RqVae(narrow.rqvae(8)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randn(16, 8)

    def step() -> None:
        losses = model(rows[torch.arange(16)], rows[torch.arange(16)])
        optimizer.zero_grad()
        losses.total(config.alignment_weight).backward()
        optimizer.step()

    step()
    return sum(kernels_of(step).values())


def table_of(stages: list[Stage], device: Device, devices: int) -> tuple[list[str], float]:
    """Lines of a table, and the hours of the whole chain; stage 11 is not of it."""
    lines = ["| stage | hours | bound by | repetitions | GiB |", "|---|---|---|---|---|"]
    total = 0.0
    for stage in stages:
        times = [time_of(part, device, devices) for part in stage.parts]
        seconds = sum(time.seconds for time in times)
        main = max(range(len(times)), key=[time.seconds for time in times].__getitem__)
        memory = "–" if stage.memory is None else f"{stage.memory / GIB:.0f}"
        repetitions = f"{stage.parts[main].times:,.0f}" if stage.parts[main].times > 1 else "–"
        outside = stage.name.startswith("11_")
        total += 0 if outside else seconds
        name = f"*{stage.name}, in its place*" if outside else f"`{stage.name}`"
        lines.append(f"| {name} | {seconds / HOUR:.2f} | {times[main].bound} | {repetitions} | {memory} |")
    lines.append(f"| **the chain** | **{total / HOUR:.1f}** | | | |")
    return lines, total / HOUR


def main(config: Config) -> None:
    device = measure() if config.device == "here" else ASSUMED[config.device]
    print(rates(device))
    summary = ["| dataset | recipe | devices | hours | times as fast as `better` on one |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for dataset in config.datasets:
            first, counted = 0.0, dict[str, tuple[Counts, Counts]]()
            for run in RUNS:
                recipe = read_recipe(dataset, run.recipe)
                same = structure(recipe)
                if same not in counted:
                    counted[same] = count_few(recipe, Path(folder))
                counts = grown(recipe, counted[same])
                try:
                    stages = stages_of(recipe, counts, devices=run.devices)
                except KeyError as error:
                    raise BadInput(
                        f"{dataset} names {error}, whose sizes nobody knows: see tools/training_memory.py"
                    ) from None
                lines, hours = table_of(stages, device, run.devices)
                first = first or hours
                print(f"\n### {dataset}, `RECIPE={run.recipe}`, {run.devices} × {device.name}\n")
                print("\n".join(lines), flush=True)
                summary.append(f"| {dataset} | {run.recipe} | {run.devices} | {hours:.1f} | {first / hours:.1f} × |")
    print("\n" + "\n".join(summary))


if __name__ == "__main__":
    run_command(main, Config)
