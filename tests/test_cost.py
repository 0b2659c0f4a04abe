"""The cost of a chain: times by hand, the recipes' own counts, and one table of it all on models of one layer."""

from pathlib import Path

import pytest
import torch

from benchmarks import cost, devices, kernels
from benchmarks.cost import table_of, time_of
from benchmarks.devices import ASSUMED, Device
from benchmarks.recipes import Recipe, read_recipe
from benchmarks.work import Counts, Data, Kernels, Part, data_of, stages_of, tokenizer_batches
from tests.tiny import rqvae_train
from tools.training_memory import GIB

DEVICE = Device(
    "d", flops=100, exact=10, launch=0.1, bandwidth=10, link=5, memory=GIB, decode=2, cores=4, measured=False
)
COUNTS = Counts(
    trainings={name: Kernels(1000, 10) for name in kernels.TRAININGS},
    searches={"TRAIN_RETRIEVER": 500, "FINETUNE_LLAMA": 500},
    tokenizer=100,
    scoring=500,
)


@pytest.mark.parametrize(
    ("part", "many", "seconds", "bound"),
    [
        (Part("x", 10, kernels=20, flops=100), 1, 20, "kernels"),  # 2 s each, and 1 s of arithmetic
        (Part("x", 10, kernels=20, flops=100), 2, 10, "kernels"),
        (Part("x", 10, kernels=20, flops=100, shared=False), 2, 20, "kernels"),
        (Part("x", 10, kernels=1, flops=100, moved=20), 1, 30, "arithmetic"),  # 1 s of products, 2 s of moving
        (Part("x", 10, flops=100, sent=10, shared=False), 8, 30, "arithmetic"),
        (Part("x", 1, flops=100, pictures=40, workers=2), 1, 10, "pictures"),  # 2 a second on each of 2 cores
        (Part("x", 1, flops=100, pictures=40, workers=2), 8, 5, "pictures"),  # there are 4 cores
        (Part("x", 1, flops=1000, pictures=4, workers=2), 2, 5, "arithmetic"),
    ],
)
def test_a_part_takes_its_largest_time(part: Part, many: int, seconds: float, bound: str) -> None:
    found = time_of(part, DEVICE, many)
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == bound


def steps(recipe: Recipe, stage: str, *, many: int = 1) -> float:
    (found,) = (each for each in stages_of(recipe, COUNTS, devices=many) if each.name.startswith(stage))
    return found.parts[0].times


def test_counts_are_the_recipes_own() -> None:
    better, large = read_recipe("flickr30k", "better"), read_recipe("flickr30k", "large-batch")
    assert data_of(better) == Data(29_000, 1_014, 1_000)
    epoch = -(-29_000 * 5 // 128)
    names = [each.name for each in stages_of(better, COUNTS)]
    assert (
        names.index("03_prepare_emb") < names.index("09_train_retriever_t5") < names.index("15_convert_voken_to_seed")
    )
    plain = next(each for each in stages_of(better, COUNTS) if each.name == "09_train_retriever_t5")
    assert plain.parts[0].times == 100 * epoch
    pseudo = -(-(29_000 + 2_014) * 5 // 128)
    assert steps(better, "10_") == 5 * pseudo
    assert steps(large, "10_", many=8) == 5 * -(-(29_000 + 2_014) * 5 // 1024)


def test_batches_of_the_tokenizer_are_cut_as_it_cuts_them() -> None:
    for name, expected in (("better", (14, 2072)), ("faithful", (10, 16_384))):
        recipe = read_recipe("flickr30k", name)
        config = recipe.config("TRAIN_RQVAE", rqvae_train.Config, features=Path("x"), output=Path("x"))
        assert tokenizer_batches(config, recipe, data_of(recipe)) == expected


def test_more_devices_take_less_time_and_memory() -> None:
    one, many = (
        stages_of(read_recipe("mscoco", name), COUNTS, devices=count)
        for name, count in (("better", 1), ("large-batch", 8))
    )
    device = ASSUMED["h100"]
    hours = [table_of(stages, device, count)[1] for stages, count in ((one, 1), (many, 8))]
    assert hours[1] < hours[0] / 3
    same = {each.name: each.memory for each in one}
    assert all(each.memory == same[each.name] for each in many)  # a device's own part of a batch is as large
    shared = stages_of(read_recipe("mscoco", "better"), COUNTS, devices=8)
    assert all((each.memory or 0) <= (same[each.name] or 0) for each in shared)


def test_stage_11_is_shown_and_not_added() -> None:
    stages = stages_of(read_recipe("flickr30k", "better"), COUNTS)
    lines, hours = table_of(stages, ASSUMED["h100"], 1)
    without, same = table_of(stages[:-1], ASSUMED["h100"], 1)
    assert stages[-1].name.startswith("11_")
    assert hours == same
    assert len(lines) == len(without) + 1


def test_this_machine_is_measured() -> None:
    found = devices.measure(torch.device("cpu"), size=64)
    assert found.measured
    assert min(found.flops, found.launch, found.bandwidth, found.memory, found.decode, found.cores) > 0
    assert "measured here" in devices.rates(found)
    assert "assumed, not measured" in devices.rates(ASSUMED["h100"])


def test_kernels_of_few_layers_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe("flickr30k", "better")
    for name in kernels.LAYERS:
        monkeypatch.setitem(kernels.LAYERS, name, 4)
    found = cost.grown(recipe, cost.count_few(recipe, tmp_path))
    whole = cost._count_at(4, recipe, tmp_path / "whole")
    for name, each in whole.trainings.items():
        assert found.trainings[name].micro_step == pytest.approx(each.micro_step, rel=0.01)
    for name, kernels_of_search in whole.searches.items():
        assert found.searches[name] == pytest.approx(kernels_of_search, rel=0.01)
    assert found.scoring == pytest.approx(whole.scoring, rel=0.01)
    assert found.tokenizer > 50


def test_what_changes_no_kernel_is_counted_once() -> None:
    better = cost.structure(read_recipe("flickr30k", "better"))
    assert better == cost.structure(read_recipe("mscoco", "better"))
    assert better == cost.structure(read_recipe("flickr30k", "large-batch"))
    assert better != cost.structure(read_recipe("flickr30k", "faithful"))


def test_the_command_prints_every_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cost, "count_few", lambda recipe, folder: (COUNTS, COUNTS))
    cost.main(cost.Config(device="h100", datasets=("flickr30k",)))
    text = capsys.readouterr().out
    for run in cost.RUNS:
        assert f"### flickr30k, `RECIPE={run.recipe}`, {run.devices} × H100 80 GB (assumed)" in text
    assert text.count("**the chain**") == len(cost.RUNS)
