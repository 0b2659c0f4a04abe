"""The counter of kernels: by hand on a few operations, and on whole trainings of narrow models."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kernels
from benchmarks.kernels import Small, count_kernels, count_training, kernels_of, quiet
from benchmarks.recipes import read_recipe
from tests.warm import run_python
from tools.errors import BadInput


def test_views_and_allocations_start_no_kernel() -> None:
    matrix = torch.ones(4, 6)
    assert count_kernels(lambda: matrix.t().reshape(3, 8)[:1].unsqueeze(0).detach()) == 1  # the reshape copies
    assert count_kernels(lambda: torch.empty(4).view(2, 2)) == 0
    assert kernels_of(lambda: (matrix @ matrix.t()).relu_().sum()) == {"mm": 1, "relu_": 1, "sum": 1}


def test_forward_and_backward_of_a_layer() -> None:
    layer, rows = nn.Linear(3, 2), torch.ones(5, 3)
    found = kernels_of(lambda: layer(rows).sum().backward())
    # addmm and sum; the loss's gradient, the weight's, and the bias's sum
    assert found == {"addmm": 1, "sum": 2, "ones_like": 1, "mm": 1}


def test_dropout_is_one_kernel_as_on_a_gpu() -> None:
    rows = torch.ones(5, 3, requires_grad=True)
    dropout = nn.Dropout(0.5)
    found = kernels_of(lambda: dropout(rows))
    assert found == {"native_dropout": 1}
    assert not kernels_of(lambda: dropout.eval()(rows))


def test_a_fused_norm_is_one_kernel_as_on_a_gpu() -> None:
    rows, weight = torch.ones(5, 3, requires_grad=True), nn.Parameter(torch.ones(3))
    found = kernels_of(lambda: torch.nn.functional.rms_norm(rows, (3,), weight, 1e-6).sum().backward())
    assert found == {"native_layer_norm": 1, "native_layer_norm_backward": 1, "sum": 1, "ones_like": 1}


def test_an_optimiser_works_on_many_tensors_in_one_launch() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(70)]
    for weight in weights:
        weight.grad = torch.ones(2)
    found = kernels_of(torch.optim.SGD(weights, lr=0.1).step)
    assert found == {"_foreach_add_": 2}  # 64 tensors a launch that goes over two lists
    large = [torch.empty(kernels.ELEMENTS_A_PART * 1000, device="meta") for _ in range(2)]
    assert kernels_of(lambda: torch._foreach_mul_(large, 2.0)) == {"_foreach_mul_": 7}  # 2,000 parts, 320 a launch


def test_kernels_grow_with_layers_and_not_with_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe("flickr30k", "better")
    found = []
    for layers in (1, 2, 3):
        monkeypatch.setitem(kernels.LAYERS, "t5-base", layers)
        with quiet():
            small = Small(tmp_path / str(layers))
            found.append(count_training(*small.retriever(recipe, "TRAIN_RETRIEVER")).whole)
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], abs=3)  # and launches of the optimiser
    assert found[1] - found[0] > 100


@pytest.mark.parametrize("variable", kernels.TRAININGS)
@pytest.mark.parametrize("recipe", ["better", "faithful"])
def test_every_training_of_a_recipe_is_counted(
    variable: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in kernels.LAYERS:
        monkeypatch.setitem(kernels.LAYERS, name, 1)
    with quiet():
        training = kernels.TRAININGS[variable](Small(tmp_path), read_recipe("mscoco", recipe))
        found = count_training(*training)
    assert found.optimizer_step > 1
    assert found.micro_step["mm"] + found.micro_step["addmm"] > 10


def test_a_recipe_is_what_bash_reads_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.sh"
    path.write_text(
        'STAGES="01_a\n02_b@llama"\nEMPTY=()\nWORDS=(--a "two words" --b "")\n'
        'if [ "$RECIPE" = faithful ]; then WORDS+=(--more); fi\n'
    )
    found = read_recipe(str(path), "better")
    assert found.stages == [("01_a", "retriever"), ("02_b", "llama")]
    assert found.values["EMPTY"] == []
    assert found.values["WORDS"] == ["--a", "two words", "--b", ""]
    assert read_recipe(str(path), "faithful").values["WORDS"][-1] == "--more"


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no scripts/datasets/nothing\.sh"):
        read_recipe("nothing", "better")
    (tmp_path / "broken.sh").write_text("echo ${UNSET:?set it}\n")
    with pytest.raises(BadInput, match="UNSET: set it"):
        read_recipe(str(tmp_path / "broken.sh"), "better")


COMPILED = """
import torch
from benchmarks.kernels import compiled_kernels
layer, rows = torch.nn.Linear(3, 2), torch.ones(5, 3)
print(compiled_kernels(lambda: torch.compile(lambda: layer(rows).relu().mul(2).sum())().backward()))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile writes C++ for a CPU")
def test_a_compiled_step_starts_fewer_kernels() -> None:
    """In a process of its own: what the compiler leaves in one does not survive the forks of other tests."""
    known = {**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "1"}  # or it compiles programs to find out
    done = run_python("-c", COMPILED, variables=known)
    assert done.returncode == 0, done.stderr
    layer, rows = nn.Linear(3, 2), torch.ones(5, 3)
    # the product, and the rest of the forward pass as one; the gradient of what was one, and the weight's
    assert int(done.stdout) in range(3, 6)
    assert count_kernels(lambda: layer(rows).relu().mul(2).sum().backward()) > 6
