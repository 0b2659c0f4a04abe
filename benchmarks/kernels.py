"""Kernels a training step starts: what bounds it on a GPU while its batches are small.

In:  the recipes of scripts/datasets; models of their number of layers with a width of 16, on two short captions.
Out: a table on the screen.
Command: python -m benchmarks.kernels [--datasets flickr30k mscoco] [--operations 12]

The real training of each stage runs on the CPU under bf16 autocast, and every ATen call counts that computes on a GPU:
no views, no allocations. Widths and batches do not change the number. Where CUDA takes another way than the CPU, its
way is taken: dropout and norms are one kernel, and optimiser and clipping work on many tensors in one launch.
Three things differ from a GPU. A call is one kernel, although a few (sort, scatter, the backward pass of attention)
start several; what a training computes on the host is counted too; and at true widths the optimiser's launches on many
tensors, few here, are a few more.
"""

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from models.compute import make_optimizer, seed_everything
from models.norms import fuse_norms
from models.voken_lm import VokenLM
from reranker import train as reranker_train
from reranker.data import read_ranked, read_tokens
from retriever import prepare, train, train_stage2
from retriever.data import read_data
from retriever.training import Training
from tests import folders
from tests.tiny import COLOURS, tokenizer
from tools import captions, runs
from tools.command_line.commands import run_command
from tools.files import write_json_lines
from tools.logs import Tracker, table

from .recipes import Recipe, read_recipe

WIDTH = 16  # of the models
# Layers of the models that the recipes name: (encoder and) decoder, each.
LAYERS = {
    "t5-base": 12,
    "t5-large": 24,
    "meta-llama/Llama-2-7b-hf": 32,
    "meta-llama/Meta-Llama-3-8B": 32,
    "AILab-CVC/seed-llama-8b-sft": 32,
}
NO_KERNEL = {
    "_local_scalar_dense", "_unsafe_view", "alias", "detach", "detach_", "empty", "empty_like", "empty_strided",
    "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "record_stream", "resize_", "set_",
}  # fmt: skip
# Tensors of one launch on many, by the number of lists that it goes over; and parts of 65,536 elements a launch.
STARTED = re.compile(
    r"^\s+(?:\w+ = )?(?:cpp_fused_\w+|extern_kernels\.\w+|(?:torch\.ops\.)?aten\.\w+\.\w+)\(", re.MULTILINE
)
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
PARTS_A_LAUNCH, ELEMENTS_A_PART = 320, 65_536


class KernelCounter(TorchDispatchMode):
    """Counts, while it is entered, the kernels that the enclosed calls would start on a GPU.

    Attributes:
        kernels: by the name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten::") and not func.is_view:
            self.kernels[name.removeprefix("aten::")] += _launches(name.removeprefix("aten::"), args)
        return func(*args, **(kwargs or {}))


def _launches(name: str, args: tuple[Any, ...]) -> int:
    if name in NO_KERNEL:
        return 0
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    if not name.startswith(("_foreach_", "_fused_")) or not lists:
        return 1
    parts = sum(-(-each.numel() // ELEMENTS_A_PART) for each in lists[0])
    tensors = TENSORS_A_LAUNCH[min(len(lists), max(TENSORS_A_LAUNCH))]
    return max(-(-len(lists[0]) // tensors), -(-parts // PARTS_A_LAUNCH))


def count_kernels(step: Callable[[], object]) -> int:
    """Kernels that one call of `step`, on the CPU, would start on a GPU: forward, backward, and what else it does."""
    return sum(kernels_of(step).values())


def kernels_of(step: Callable[[], object]) -> "Counter[str]":
    """The same by the name of the ATen operation."""
    counter = KernelCounter()
    with as_on_a_gpu(), counter:
        step()
    return counter.kernels


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside it, the CPU goes the ways that CUDA would in dropout, norms, clipping and optimisers."""

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def rms_norm(input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return torch.native_layer_norm(input, shape, weight, None, eps or 1e-6)[0]  # another norm, as many kernels

    many = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True)
    optimizers = import_module("torch.optim.optimizer")  # torch.optim has no attribute of that name
    each = mock.patch.object(optimizers, "_get_foreach_kernels_supported_devices", return_value=["cpu"])
    norm = mock.patch("torch.nn.functional.rms_norm", rms_norm)
    with mock.patch("torch.nn.functional.dropout", dropout), norm, many, each:
        yield


@contextlib.contextmanager
def building_as_on_a_gpu() -> Iterator[None]:
    """Inside it, trainings are built as they are for CUDA: with fused optimisers. See `fuse_norms` for the rest."""

    def fused(*words: Any, **options: Any) -> torch.optim.Optimizer:
        return make_optimizer(*words, **{**options, "fused": True})

    with mock.patch("models.stepper.make_optimizer", fused):
        yield


OneTraining = Training | reranker_train.Training


class Counted(NamedTuple):
    """Kernels of one training."""

    micro_step: Counter[str]
    """Of one micro-batch, forward and backward, with what the loop does around it; clipping too."""
    optimizer_step: int

    @property
    def whole(self) -> int:
        """Kernels of a step of one micro-batch."""
        return sum(self.micro_step.values()) + self.optimizer_step


def run_epoch(training: OneTraining, tracker: Tracker) -> None:
    """The steps of a training's next epoch."""
    checkpoint = training.checkpoint
    training.stepper.module.train()
    for batches in checkpoint.steps(training.batches(checkpoint.epoch), seed=training.config.seed):
        checkpoint.record(training.stepper.step(training.loss, batches), tracker)
    checkpoint.epoch_ends()


def count_training(training: OneTraining, tracker: Tracker) -> Counted:
    """Kernels of a training's second epoch: the first makes what later ones find.

    Args:
        training: one that makes a step of each micro-batch (`accumulate` is 1).
    """
    fuse_norms(training.stepper.module)
    run_epoch(training, tracker)
    counter, inside = KernelCounter(), Counter[str]()
    before = register_optimizer_step_pre_hook(lambda *_: inside.subtract(counter.kernels))
    behind = register_optimizer_step_post_hook(lambda *_: inside.update(counter.kernels))
    batches = len(training.batches(0))
    with as_on_a_gpu(), counter:
        run_epoch(training, tracker)
    before.remove()
    behind.remove()
    micro = Counter({name: round((count - inside[name]) / batches) for name, count in counter.kernels.items()})
    return Counted(+micro, round(sum(inside.values()) / batches))


class Small:
    """A dataset of eight captions, and models of any number of layers, in one folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, 0
        self.captions = self._captions()
        self.features = folders.features(root / "03", self.captions)
        rqvae = folders.rqvae(root / "05", self.features)
        codes = folders.codes(root / "06", self.features, rqvae)
        self.dataset = root / "07"
        prepare.main(prepare.Config(codes=codes, output=self.dataset))

    def _captions(self) -> Path:
        """Six pictures; captions of several lengths, so that batches hold padding."""

        def write(here: Path) -> None:
            records = [
                captions.Record(f"{place}.png", f"{place}.png", captions.SPLITS[place % 3], _texts(colour))
                for place, colour in enumerate(COLOURS[:6])
            ]
            captions.write_captions(here / captions.FILE_NAME, records)

        facts = {"images": str(self.root)}
        return folders.finished(self.root / "01", "tools.prepare_captions", write, facts=facts)

    def language_model(self, name: str) -> Path:
        """A model of a name's number of layers, narrow, with random weights."""
        torch.manual_seed(0)
        folder = self.root / name.replace("/", "--")
        if folder.is_dir():
            return folder
        if name.startswith("t5"):
            words = tokenizer(["<pad>", "</s>", "<unk>", "<x>"], end_only=True)
            layers: dict[str, Any] = {"num_layers": LAYERS[name], "num_heads": 2, "d_kv": 8, "d_ff": 32}
            start: dict[str, Any] = {"decoder_start_token_id": 0, "tie_word_embeddings": True}
            T5ForConditionalGeneration(
                T5Config(vocab_size=len(words), d_model=WIDTH, **layers, **start)
            ).save_pretrained(folder)
        else:
            words = tokenizer(["<pad>", "</s>", "<unk>", "<s>"], end_only=False)
            sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
            config = LlamaConfig(vocab_size=len(words), num_hidden_layers=LAYERS[name], **sizes)
            (LlamaModel if "seed" in name else LlamaForCausalLM)(config).save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    def retriever(self, recipe: Recipe, variable: str) -> tuple[OneTraining, Tracker]:
        """Stage 1 as an array of the recipe says."""
        config = recipe.config(variable, train.Config, dataset=self.dataset, output=self._output(recipe, variable))
        config = self._cut(config, language_model=str(self.language_model(config.language_model)))
        run = _begin("retriever.train", config)
        data = read_data(self.dataset)
        return Training(config, data, run, train.build_model(config, data)), _tracker(run)

    def untrained(self, recipe: Recipe) -> VokenLM:
        """Stage 1's model before it is trained."""
        config = recipe.config("TRAIN_RETRIEVER", train.Config, dataset=self.dataset, output=self.root)
        config = self._cut(config, language_model=str(self.language_model(config.language_model)))
        return train.build_model(config, read_data(self.dataset))

    def stage2(self, recipe: Recipe) -> tuple[OneTraining, Tracker]:
        """Stage 2 from an untrained model of stage 1."""
        data = read_data(self.dataset)
        stage1 = recipe.config("TRAIN_RETRIEVER", train.Config, dataset=self.dataset, output=self.root)
        stage1 = self._cut(stage1, language_model=str(self.language_model(stage1.language_model)))
        paths = {"dataset": self.dataset, "stage1": self.root, "output": self._output(recipe, "TRAIN_STAGE2")}
        config = self._cut(recipe.config("TRAIN_STAGE2", train_stage2.Config, **paths))
        run = _begin("retriever.train_stage2", config)
        training = train_stage2.Stage2(config, data, run, self._saved(train.build_model(stage1, data)))
        found = np.zeros_like(training.negatives, shape=(len(training.train_split.texts), config.negatives))
        training.negatives = found
        return training, _tracker(run)

    def _saved(self, lm: VokenLM) -> VokenLM:
        lm.save_pretrained(self.root / "stage1")
        return VokenLM.from_pretrained(self.root / "stage1")

    def reranker(self, recipe: Recipe) -> tuple[OneTraining, Tracker]:
        """The reranker on lists and tokens of the dataset's pictures."""
        lists, tokens = self._reranker_folders()
        paths = {"lists": lists, "tokens": tokens, "output": self._output(recipe, "TRAIN_RERANKER")}
        config = recipe.config("TRAIN_RERANKER", reranker_train.Config, **paths)
        model = str(self.language_model(config.language_model))
        config = self._cut(config, language_model=model, tokenizer=None, negatives=1)
        pictures = read_tokens(tokens)
        run = _begin("reranker.train", config)
        scorer = reranker_train.build_model(config, pictures)
        return reranker_train.Training(config, read_ranked(lists), pictures, run, scorer), _tracker(run)

    def _reranker_folders(self) -> tuple[Path, Path]:
        lists, tokens = self.root / "16", self.root / "15"
        if lists.is_dir():
            return lists, tokens
        folders.tokens(tokens, self.captions)

        def write(here: Path) -> None:
            for split in captions.SPLITS:
                rows = [
                    {"query": text, "picture": 0, "caption": 0, "ranked": [0, 3], "scores": [-1.0, -2.0]}
                    for text in _texts(COLOURS[0])
                ]
                write_json_lines(here / f"{split}-{split}.jsonl", rows)

        kept = {"features": str(self.features), "setting": "inductive"}
        fingerprint = runs.read_manifest(self.captions, "tools.prepare_captions").fingerprint
        facts = {**kept, "captions_fingerprint": fingerprint}
        folders.finished(lists, "retriever.rank_splits", write, facts=facts)
        return lists, tokens

    def _output(self, recipe: Recipe, variable: str) -> Path:
        """A folder of its own for every training."""
        self.made += 1
        return self.root / f"{self.made}-{recipe.name}-{recipe.recipe}-{variable}"

    def _cut(self, config: Any, **changes: Any) -> Any:
        """A configuration for few short epochs on the CPU."""
        settings = {"batch_size": 2, "accumulate": 1, "epochs": 3, "validate_every": 100, "device": "cpu", **changes}
        return dataclasses.replace(config, **settings)


def _texts(colour: str) -> tuple[str, ...]:
    return (
        f"a {colour} circle",
        f"a small picture of a {colour} turtle",
        f"{colour} ring",
        f"drawing of a {colour} cross",
    )


def _begin(command: str, config: Any) -> runs.Run:
    run = runs.begin(command, config, inputs={})
    assert run is not None
    seed_everything(0)
    return run


def _tracker(run: runs.Run) -> Tracker:
    return Tracker(run.folder, job="kernels", config={})


TRAININGS: dict[str, Callable[[Small, Recipe], tuple[OneTraining, Tracker]]] = {
    "TRAIN_RETRIEVER": lambda small, recipe: small.retriever(recipe, "TRAIN_RETRIEVER"),
    "TRAIN_STAGE2": lambda small, recipe: small.stage2(recipe),
    "FINETUNE_LLAMA": lambda small, recipe: small.retriever(recipe, "FINETUNE_LLAMA"),
    "TRAIN_RERANKER": lambda small, recipe: small.reranker(recipe),
}


def count_recipe(small: Small, recipe: Recipe) -> dict[str, Counted]:
    """Kernels of every training of a recipe, by the name of its array of options."""
    with mock.patch.dict(os.environ, {"WANDB_MODE": "disabled"}), quiet(), building_as_on_a_gpu():
        return {name: count_training(*make(small, recipe)) for name, make in TRAININGS.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside it nothing is shown: progress bars, tables and advice of trainings that serve no other purpose."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def model_of(recipe: Recipe, variable: str) -> str:
    """The language model that an array of options names; stage 2 trains stage 1's."""
    words = recipe.values["TRAIN_RETRIEVER" if variable == "TRAIN_STAGE2" else variable]
    return words[words.index("--language-model") + 1]


def compiled_kernels(step: Callable[[], object]) -> int:
    """Kernels that the programs of torch.compile start in `step`, which is called once and compiles them.

    Only what is compiled counts. A CPU's programs fuse as a GPU's do, but for attention, which they write out.
    """
    from torch._inductor.utils import run_and_get_code  # slow to load

    _, programs = run_and_get_code(step)
    return sum(len(STARTED.findall(program)) for program in programs)


def count_compiled(small: Small, recipe: Recipe, variable: str) -> int:
    """Forward and backward of a recipe's T5 as `--compile` has them: counted with one and two layers, and extended."""
    name, counts = model_of(recipe, variable), []
    for layers in (1, 2):
        with mock.patch.dict(LAYERS, {name: layers}), tempfile.TemporaryDirectory() as folder:
            lm = Small(Path(folder)).untrained(recipe)
        tokens, codes = lm.pad(lm.tokenize(_texts(COLOURS[0]))), torch.zeros(4, lm.space.levels, dtype=torch.long)
        lm.train().compile(dynamic=True)
        torch._dynamo.reset()

        def step(lm: VokenLM = lm, tokens: Any = tokens, codes: Tensor = codes) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = lm(tokens, codes)
            logits.sum().backward()

        counts.append(compiled_kernels(step))
    return counts[0] + (LAYERS[name] - 1) * (counts[1] - counts[0])


@dataclass(frozen=True)
class Config:
    """What is counted."""

    datasets: tuple[str, ...] = ("flickr30k", "mscoco")
    """Names in scripts/datasets, or files."""
    recipes: tuple[str, ...] = ("better",)
    """Values of RECIPE."""
    operations: int = 0
    """So many of the most frequent operations are listed for each training."""
    compiled: bool = False
    """Count T5's forward and backward compiled, too; takes minutes and a C++ compiler."""


def main(config: Config) -> None:
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            small = Small(Path(folder))
        for dataset in config.datasets:
            for name in config.recipes:
                recipe = read_recipe(dataset, name)
                if config.compiled:
                    with quiet():
                        compiled = count_compiled(small, recipe, "TRAIN_RETRIEVER")
                    lines.append(f"{dataset} {name} TRAIN_RETRIEVER, compiled: {compiled} for forward and backward")
                for variable, counted in count_recipe(small, recipe).items():
                    training = f"{dataset} {name} {variable}"
                    micro, step = sum(counted.micro_step.values()), counted.optimizer_step
                    rows.append({"training": training, "model": model_of(recipe, variable), "micro-step": micro,
                                 "optimiser": step})  # fmt: skip
                    most = counted.micro_step.most_common(config.operations)
                    lines += [f"{training}: " + ", ".join(f"{count} {name}" for name, count in most)] if most else []
    print(table(rows))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main, Config)
