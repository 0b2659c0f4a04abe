"""Training steps by CUDA graphs, without a GPU: with the recorded work run plainly from its own buffers; and, on
tensors that only pretend to lie on a GPU, that the losses of both stages never wait for one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models import graphed_step
from models.batches import Batch, Part
from models.graphed_step import GraphedStep, Inputs, Loss
from models.options import LargeModelOptions, TrainingOptions
from models.stepper import Stepper
from models.voken_lm import Memory, Tokens, VokenLM
from retriever.losses import Discriminative, Targets, generative_loss
from retriever.train_stage2 import Config, Stage2
from tests.test_graphs import MAKE, SPACE, NoCopies, alone, pretend
from tests.tiny import tiny_t5

TEXTS = ["a red circle", "turtle", "a blue ring", "red", "a big picture of an outlined green cross a", "drawing of a"]
BATCHES = [[0, 1, 2], [3, 4, 5], [2, 1, 0], [5, 3, 4], [1, 2, 0], [4, 3]]  # of two shapes, and one that comes once


class Replayed:
    """Stands in for a graph: a replay computes the loss anew."""

    def __init__(self, work: Callable[[], Tensor], value: Tensor) -> None:
        self.work, self.value = work, value

    def replay(self) -> None:
        self.value.copy_(self.work())


def record(work: Callable[[], Tensor], *, pool: Any = None, stream: Any = None) -> tuple[Replayed, Tensor]:
    """As the real one, it runs the work several times first, which leaves gradients behind."""
    for _ in range(3):
        value = work()
    return Replayed(work, value), value


def training_of(lm: VokenLM, *, accumulate: int, at_once: int | None, graphed: bool) -> tuple[Stepper, Loss]:
    options = TrainingOptions(epochs=1, batch_size=3, lr=1e-2, weight_decay=0.01, warmup=0.0)
    large = LargeModelOptions(precision="fp32", max_grad_norm=1.0, accumulate=accumulate, at_once=at_once)
    stepper = Stepper(lm.train(), options, steps=10, decay="linear", large=large)
    assert stepper.graphed is None, "a CPU has no graphs"
    if graphed:
        stepper.graphed = GraphedStep(lm, lm.device)
    token_ids = lm.tokenize(TEXTS)
    codes = torch.from_numpy(np.random.default_rng(0).integers(SPACE.codebook_size, size=(len(TEXTS), 4)))

    def read(part: Part) -> Inputs:
        return lm.pad([token_ids[row] for row in part.rows]), Targets(codes[part.rows], None), None

    def loss_of(texts: Tokens, targets: Targets, features: Tensor | None) -> Tensor:
        assert features is None
        return generative_loss(lm(texts, targets.codes), targets, lm, temperature=0.5, end=True)

    return stepper, Loss(read, loss_of)


def run(stepper: Stepper, loss: Loss, accumulate: int) -> list[float]:
    batches = [Batch(np.array(rows), 0, 0, number) for number, rows in enumerate(BATCHES)]
    groups = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    return [stepper.step(loss, some).item() for some in groups]


@pytest.mark.parametrize(("accumulate", "at_once"), [(1, None), (2, None), (2, 2)])
def test_steps_by_graphs_are_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, at_once: int | None
) -> None:
    """Dropout's masks too: recording leaves random numbers, gradients and buffers as they were."""
    monkeypatch.setattr(graphed_step, "record", record)
    found = []
    for graphed in (False, True):
        lm = tiny_t5(tmp_path / str(graphed), SPACE)
        stepper, loss = training_of(lm, accumulate=accumulate, at_once=at_once, graphed=graphed)
        found.append((run(stepper, loss, accumulate), lm.state_dict(), stepper.graphed))
    (plain, weights, _), (by_graphs, others, graphs) = found
    assert by_graphs == pytest.approx(plain, rel=1e-6)
    assert all(torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)
    assert graphs is not None
    assert len(graphs.recorded) < len(graphs.seen), "the shape that came once was recorded"
    assert graphs.recorded
    assert None not in graphs.recorded.values()


def test_a_shape_that_cannot_be_recorded_runs_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(work: Callable[[], Tensor], **_: Any) -> Any:
        work()
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(graphed_step, "record", breaks)
    losses = []
    for graphed in (False, True):
        stepper, loss = training_of(
            tiny_t5(tmp_path / str(graphed), SPACE), accumulate=1, at_once=None, graphed=graphed
        )
        losses.append(run(stepper, loss, 1))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    said = "note: some steps run without a CUDA graph, and take longer: CUDA out of memory\n"
    assert capsys.readouterr().out == said


def test_what_is_in_the_way_of_graphs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_t5(tmp_path, SPACE)
    lm.model.gradient_checkpointing_enable()
    options = TrainingOptions(epochs=1, batch_size=3, lr=1e-2, weight_decay=0.01, warmup=0.0)
    assert Stepper(lm, options, steps=1, decay="linear", graphs=True).graphed is None
    assert capsys.readouterr().out == (
        "note: `graphs` records nothing: there is no GPU, activations are computed twice\n"
    )


def test_shapes_tell_types_and_absent_inputs_apart() -> None:
    one, other = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    keys = {tuple(graphed_step.shapes(each)) for each in ((one, None), (None, one), (other, None), (one, one))}
    assert len(keys) == 4
    copied = graphed_step.mapped(torch.clone, (Targets(one, None), other))
    assert isinstance(copied[0], Targets)
    assert copied[0].shares is None
    assert [each is one for each in graphed_step.leaves(copied)] == [False, False]


@alone
@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*", "ignore:.*data pointer of FakeTensor.*")
@pytest.mark.parametrize("form", get_args(Discriminative))
@pytest.mark.parametrize("kind", MAKE)
def test_losses_never_wait_for_a_gpu_or_copy_to_it(tmp_path: Path, kind: str, form: Discriminative) -> None:
    """The forward passes of both stages, on tensors without values; no backward pass runs on such."""
    lm = MAKE[kind](tmp_path, SPACE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(lm)
        lm.train()
        training = Stage2.__new__(Stage2)
        training.config = Config(
            dataset=tmp_path, stage1=tmp_path, output=tmp_path, discriminative=form, label_temperature=1.0
        )
        training.lm, training.device, training.dtype = lm, torch.device("cuda"), torch.bfloat16
        training.stepper = Any  # type: ignore[assignment]
        training.stepper.model = lm
        place: dict[str, Any] = {"device": "cuda"}
        codes = torch.zeros(4, 4, dtype=torch.long, **place)
        targets = Targets(codes, torch.zeros(4, 4, 32, **place))
        ids = torch.zeros(4, 8, dtype=torch.long, **place)
        texts: Tokens | Memory = Tokens(ids, torch.ones_like(ids))
        if lm.frozen_encoder:
            texts = Memory(torch.zeros(4, 8, lm.state_width, **place), torch.ones_like(ids))
        rivals = torch.zeros(4, 3, 4, dtype=torch.long, **place)
        rest = torch.zeros(4, 2, dtype=torch.bool, **place), torch.zeros(4, dtype=torch.long, **place)
        with NoCopies():
            both = training.loss_of(texts, targets, None, rivals, *rest)
            generative = super(Stage2, training).loss_of(texts, targets, None)
        assert {both.device.type, generative.device.type} == {"cuda"}
