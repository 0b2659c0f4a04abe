"""FSDP2 on two CPU processes: the figures and weights of one process, saved models, resuming, and what is refused."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from models import sharding, training
from models.compute import OPTIMIZERS, make_optimizer
from models.options import LargeModelOptions
from models.stepper import check_sharing, compile_module
from models.voken_lm import VokenLM
from retriever import retrieve, train, train_stage2
from retriever.data import read_data
from tests.chain import Chain, encoder_decoder_config, files_of
from tests.test_pipeline import PowerCut, cut_power_at, t5_config
from tests.test_processes import start
from tests.test_training import llama_config, stage2_config
from tests.tiny import tiny_llama, tiny_t5
from tools import processes, runs
from tools.curves import read_curves
from tools.errors import BadInput
from tools.files import read_json, read_json_lines, write_json
from tools.vokens import VokenSpace

SPACE = VokenSpace(3, 5, shared=False)
TOLD = {  # by `accelerate launch`; the last is accelerate's own default
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip


def train_in_parts(main: Callable[[Any], None], config: Any) -> None:
    """A training in a process that was told of FSDP2, and that ends with its part of the weights alone."""
    AcceleratorState._reset_state(True)
    made: list[tuple[nn.Module, nn.Module]] = []
    real = sharding.shard

    def shard(module: nn.Module) -> nn.Module:
        made.append((module, real(module)))
        return made[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOLD.items():
            patch.setenv(name, value)
        patch.setattr(sharding, "shard", shard)
        main(config)
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    ((module, sharded),) = made
    check_parts(module, sharded)


def check_parts(module: nn.Module, sharded: nn.Module) -> None:
    """About half of the weights are here."""
    assert all(value.numel() == 0 for value in module.parameters())
    every = [value for value in sharded.parameters() if isinstance(value, DTensor)]
    assert len(every) == len(list(sharded.parameters())) == len(list(module.parameters()))
    here = sum(value.to_local().numel() for value in every)
    assert 0.4 < here / sum(value.numel() for value in every) < 0.6


def on_two(main: Callable[[Any], None], config: Any, log: Path) -> None:
    """Train on two processes that share the model in parts."""
    started = start(partial(train_in_parts, main, config), log, anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()


def losses_of(folder: Path) -> list[float | None]:
    return [row["train/loss"] for row in read_curves(folder) if "train/loss" in row]


@pytest.mark.parametrize("kind", ["t5", "lora", "llama", "stage2"])
def test_parts_train_the_same_model(kind: str, chain: Chain, tmp_path: Path) -> None:
    """Losses, validations and the model that is kept are those of one process, to rounding.

    15 captions do not divide by two, nor do 96 by 15; they are read in pieces, and stage 2 mixes its weights.
    """
    settings: dict[str, Any] = {"batch_size": 15, "epochs": 2, "validate_every": 1, "at_once": 4, "accumulate": 2}
    module: Any = train
    if kind == "stage2":
        module, weak = train_stage2, encoder_decoder_config(chain, tmp_path / "weak", epochs=1, lr=1e-5, dropout=0.0)
        train.main(weak)
        build: Any = partial(stage2_config, chain, weak.output, **{**settings, "lr": 1e-2})
    elif kind == "t5":
        build = partial(t5_config, chain, dropout=0.0, **settings)
    else:
        adapters: dict[str, Any] = {} if kind == "lora" else {"lora_rank": 0, "gradient_checkpointing": False}
        build = partial(llama_config, chain, lora_dropout=0.0, **settings, **adapters)
    one, two = build(output=tmp_path / "one"), build(output=tmp_path / "two")
    module.main(one)
    on_two(module.main, two, tmp_path / "log")
    assert files_of(one.output) == files_of(two.output)
    assert losses_of(one.output) == pytest.approx(losses_of(two.output), abs=1e-4)
    metrics = [read_json(config.output / "manifest.json")["metrics"] for config in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1])
    assert metrics[0]["val/epoch"] > 0  # stage 2 did not keep its start
    codes = torch.tensor(read_data(chain.dataset).codes[:2])
    logits = []
    for config in (one, two):
        lm = VokenLM.from_pretrained(config.output / "model")
        with torch.no_grad():
            logits.append(lm(lm.pad(lm.tokenize(["a red circle", "drawing of a blue ring"])), codes))
    assert torch.allclose(logits[0], logits[1], atol=1e-3)


def test_what_parts_have_trained_is_searched_with(chain: Chain, tmp_path: Path) -> None:
    """In bf16, with adapters around weights of bf16; the recall on val is that of the training's own search."""
    config = llama_config(chain, tmp_path / "llama", precision="bf16", epochs=2)
    on_two(train.main, config, tmp_path / "log")
    found = retrieve.Config(
        dataset=chain.dataset, retriever=config.output, output=tmp_path / "found", split="val", pools=("val",),
        beams=config.beams, precision="bf16", device="cpu",
    )  # fmt: skip
    retrieve.main(found)
    lines = [row for _, row in read_json_lines(tmp_path / "found" / "val.jsonl")]
    recall = np.mean([row["image"] in row["ranked"][:1] for row in lines])
    assert recall == pytest.approx(runs.read_manifest(config.output, "retriever.train").metrics["val/R@1"])


def cut_at(call: int, main: Callable[[Any], None], config: Any) -> None:
    """Both processes, which save after every step, end before a step, counted from 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
        patch.setattr(training, "MOST_SAVING", 1e9)
        cut_power_at(patch, torch.nn.utils, "clip_grad_norm_", call)
        with pytest.raises(PowerCut):
            train_in_parts(main, config)


@pytest.mark.parametrize(("build", "weights"), [(t5_config, "model"), (llama_config, "adapter_model")])
def test_a_killed_training_goes_on_to_the_bit(build: Any, weights: str, chain: Chain, tmp_path: Path) -> None:
    """With dropout, on two processes; on one, which holds it whole, it goes on as well."""
    whole, cut, alone = (build(chain, tmp_path / name, epochs=2, accumulate=2) for name in ("whole", "cut", "alone"))
    on_two(train.main, whole, tmp_path / "log")
    for config in (cut, alone):
        started = start(partial(cut_at, 5, train.main, config), tmp_path / "log", anew=True)
        assert started.statuses() == [0, 0], started.log.read_text()
        assert (config.output / "resume" / "state.pt").is_file()
    on_two(train.main, cut, tmp_path / "log")
    assert f"resuming in {cut.output}" in (tmp_path / "log").read_text()
    first, second = (load_file(config.output / "model" / f"{weights}.safetensors") for config in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    manifests = [read_json(config.output / "manifest.json") for config in (whole, cut)]
    assert manifests[0]["metrics"] == manifests[1]["metrics"]
    assert manifests[0]["outputs"]["curves.jsonl"] == manifests[1]["outputs"]["curves.jsonl"]
    train.main(alone)
    assert losses_of(alone.output)[:4] == losses_of(whole.output)[:4]
    assert len(losses_of(alone.output)) == len(losses_of(whole.output))


def test_layers_are_made_whole_one_by_one(tmp_path: Path) -> None:
    t5, llama = tiny_t5(tmp_path / "t5", SPACE), tiny_llama(tmp_path / "llama", SPACE)
    assert [type(layer).__name__ for layer in sharding.layers_of(t5)] == ["T5Block"] * 4
    assert [type(layer).__name__ for layer in sharding.layers_of(llama)] == ["LlamaDecoderLayer"] * 2
    assert list(sharding.layers_of(nn.ModuleDict({"x": nn.ModuleList([nn.ReLU()])}))) == []


def try_optimizers(folder: Path) -> None:
    """Write down how far each optimiser's weights in parts are from whole ones, with its state gathered in between."""
    processes.connect()
    torch.manual_seed(0)
    inputs, net = torch.randn(8, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    apart: dict[str, float] = {}
    useless = {*sharding.NOT_IN_PARTS, "muon", "sparseadam"}  # two refuse the whole net, too
    for name in sorted(OPTIMIZERS.keys() - useless):
        whole, parts = copy.deepcopy(net), copy.deepcopy(net)
        sharded = sharding.shard(parts)
        for module in (whole, sharded):
            optimizer = make_optimizer(name, module, lr=0.01, weight_decay=0.01)
            for step in range(3):
                module(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if module is sharded and step == 1:
                    state = processes.share(sharding.gathered(optimizer.state_dict()))
                    optimizer = make_optimizer(name, module, lr=0.01, weight_decay=0.01)
                    optimizer.load_state_dict(sharding.parted_optimizer(state, optimizer))
        with sharding.whole(parts, sharded):
            pairs = zip(whole.parameters(), parts.parameters(), strict=True)
            apart[name] = max(float((one - other).abs().max()) for one, other in pairs)
    if processes.is_main():
        write_json(folder / "apart.json", apart)


def test_optimizers_work_on_parts_and_their_state_is_whole(tmp_path: Path) -> None:
    started = start(partial(try_optimizers, tmp_path), tmp_path / "log", anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    apart = read_json(tmp_path / "apart.json")
    assert {"adamw", "adam", "sgd", "adagrad"} <= apart.keys()
    assert max(apart.values()) < 1e-6
    with pytest.raises(BadInput, match="FSDP does not train with `optimizer` Adafactor, which needs whole weights"):
        sharding.check_optimizer("Adafactor")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {**TOLD, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_only_version_2_as_it_is(told: pytest.MonkeyPatch) -> None:
    assert sharding.is_asked_for()
    for name, line in (
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params of accelerate's configuration is not supported: .* more GPUs"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing of .* `gradient_checkpointing`"),
    ):
        told.setenv(name, "true")
        with pytest.raises(BadInput, match=line):
            sharding.is_asked_for()
        told.setenv(name, "false")
    told.setenv("FSDP_VERSION", "1")
    with pytest.raises(BadInput, match="FSDP version 1, which is not supported: write `fsdp_version: 2`"):
        sharding.is_asked_for()
    told.setenv("WORLD_SIZE", "1")
    assert not sharding.is_asked_for()


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "llama", SPACE)
    check_sharing("FSDP", whole, torch.bfloat16)
    with pytest.raises(BadInput, match="FSDP does not train with `precision` fp16: write bf16 or fp32"):
        check_sharing("FSDP", whole, torch.float16)
    rounded = nn.Linear(2, 2)
    rounded.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BadInput, match="FSDP does not share weights of `load_in_4bit`"):
        check_sharing("FSDP", rounded, torch.bfloat16)
    always = LargeModelOptions(compile="always")
    with pytest.raises(BadInput, match="`compile` is for whole models, FSDP shares this one"):
        compile_module(whole, always, torch.device("cpu"), shared_by="FSDP")
