"""CUDA graphs without a GPU: their shapes and buffers with the work run plainly, and, on tensors that only pretend to
lie on a GPU, that the recorded work never waits for one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import graphs
from models.arithmetic import Arithmetic
from models.decoding import Scoring, make_writer
from models.graphs import Replay
from models.guide import Guide
from models.voken_lm import Memory, Tokens, VokenLM
from retriever import graphed_search
from retriever.beam import Beams, beam_search, search_steps
from retriever.graphed_search import GraphedSearch, fill, filled, shape_of
from retriever.index import DeviceLevel, build_index, to_device
from retriever.queries import LiveQueries
from retriever.retrieve import search_queries
from tests.tiny import tiny_encoder_decoder, tiny_llama, tiny_t5
from tests.warm import run_python
from tools.vokens import VokenSpace

SPACE = VokenSpace(4, 32, shared=False)
MAKE: dict[str, Callable[[Path, VokenSpace], VokenLM]] = {
    "t5": tiny_t5,
    "llama": tiny_llama,
    "encoder-decoder": tiny_encoder_decoder,
}
TEXTS = ["a red circle", "drawing of a small blue ring", "turtle", "a big picture of an outlined green cross a", "red"]


def levels_of(pictures: int) -> list[DeviceLevel]:
    codes = np.random.default_rng(0).integers(0, 32, size=(pictures, 4)).astype(np.int16)
    return to_device(build_index(codes), torch.device("cpu"))


def both(lm: VokenLM, queries: int, levels: list[DeviceLevel], **options: Any) -> tuple[Beams, Beams, GraphedSearch]:
    """What the search finds plainly, and by graphs."""
    writer = make_writer(lm)
    token_ids = lm.tokenize(TEXTS[:queries])
    with torch.inference_mode():
        plain = beam_search(writer, writer.encode(token_ids), levels, **options)
    search = GraphedSearch(writer, levels, **options)
    return plain, search(search.encode(token_ids)), search


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("scoring", "score_end"), [("full", True), ("voken", False)])
def test_filled_shapes_find_the_same(tmp_path: Path, kind: str, scoring: Scoring, score_end: bool) -> None:
    lm, levels = MAKE[kind](tmp_path, SPACE), levels_of(200)
    for queries in (1, 3, 5):
        plain, found, search = both(lm, queries, levels, beams=6, scoring=scoring, score_end=score_end)
        assert torch.equal(found.leaves, plain.leaves)
        assert torch.allclose(found.scores, plain.scores, atol=1e-5)
        assert list(search.searches) == [(1 << (queries - 1).bit_length(), next(iter(search.encoders))[1])]
        assert search.failures == []


def test_a_whole_split_is_ranked_the_same(tmp_path: Path) -> None:
    lm = tiny_t5(tmp_path, SPACE)
    codes = np.random.default_rng(0).integers(0, 32, size=(120, 4))
    options: dict[str, Any] = {"beams": 5, "keep": 5, "batch_size": 2, "quiet": True}
    queries, rows = LiveQueries(lm, TEXTS), np.arange(20, 120)
    plain, found = (
        search_queries(make_writer(lm), queries, codes, rows, graphs=graphs, **options) for graphs in (False, True)
    )
    assert [each.rows for each in found] == [each.rows for each in plain]
    assert [each.scores for each in found] == [pytest.approx(each.scores, abs=1e-5) for each in plain]


def test_an_index_smaller_than_the_beams_has_empty_places(tmp_path: Path) -> None:
    plain, found, _ = both(tiny_t5(tmp_path, SPACE), 2, levels_of(3), beams=6, scoring="voken")
    assert torch.equal(found.leaves, plain.leaves)
    assert found.scores.isinf().equal(plain.scores.isinf())


def test_memories_of_other_lengths_are_filled_and_answered(tmp_path: Path) -> None:
    """Stored encoder states come as they are, not through `encode`."""
    lm, levels = tiny_encoder_decoder(tmp_path, SPACE), levels_of(100)
    writer = make_writer(lm)
    search = GraphedSearch(writer, levels, beams=4)
    with torch.inference_mode():
        memory = writer.encode(lm.tokenize(TEXTS[:3]))
        plain = beam_search(writer, memory, levels, beams=4)
    assert torch.equal(search(memory).leaves, plain.leaves)
    assert torch.equal(search(memory).leaves, plain.leaves)  # the same shape again
    assert list(search.searches) == [(4, 8)]


def test_shapes_are_recorded_once_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_search, "MOST_SHAPES", 2)
    lm = tiny_t5(tmp_path, SPACE)
    search = GraphedSearch(make_writer(lm), levels_of(50), beams=2)
    for queries in (1, 2, 1, 3):
        search.encode(lm.tokenize(TEXTS[:queries]))
    assert [shape[0] for shape in search.encoders] == [1, 4]


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    lm = tiny_t5(tmp_path, SPACE)
    nn.init.constant_(lm.model.get_decoder().final_layer_norm.weight, torch.nan)
    search = GraphedSearch(make_writer(lm), levels_of(50), beams=2)
    with pytest.raises(FloatingPointError, match="not numbers"):
        search(search.encode(lm.tokenize(TEXTS[:1])))


def test_shapes_by_hand() -> None:
    assert [shape_of(*each) for each in ((1, 1), (2, 8), (3, 9), (512, 128))] == [(1, 8), (2, 8), (4, 16), (512, 128)]
    tokens = filled([[5, 6], [7], [8, 9, 1]], padding=0)
    assert tokens.ids.tolist()[1:] == [[7] + [0] * 7, [8, 9, 1] + [0] * 5, [5, 6] + [0] * 6]
    assert tokens.mask.sum(dim=1).tolist() == [2, 1, 3, 2]
    memory = fill(Memory(torch.ones(3, 5, 2), torch.ones(3, 5, dtype=torch.long)))
    assert memory.states.shape == (4, 8, 2)
    assert memory.mask.sum(dim=1).tolist() == [5] * 4


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


class RecordedOnGpu:
    """Stands in for a graph: a replay computes the outputs anew, in place."""

    def __init__(self, work: Callable[[], tuple[Tensor, ...]], outputs: tuple[Tensor, ...]) -> None:
        self.work, self.outputs = work, outputs

    def replay(self) -> None:
        for own, new in zip(self.outputs, self.work(), strict=True):
            own.copy_(new)


def test_a_replay_fills_the_recorded_tensors_and_hands_out_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(work: Callable[[], Any], *, pool: Any = None, stream: Any = None) -> Any:
        outputs = work()
        return RecordedOnGpu(work, outputs), outputs

    monkeypatch.setattr(graphs, "record", record)
    replay = Replay(lambda x: (x * 2,), [torch.ones(2).as_subclass(OnGpu)])
    (first,) = replay(torch.tensor([1.0, 2.0]))
    (second,) = replay(torch.tensor([3.0, 4.0]))
    assert (first.tolist(), second.tolist()) == ([2.0, 4.0], [6.0, 8.0])


def test_what_cannot_be_recorded_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(work: Callable[[], Any], *, pool: Any = None, stream: Any = None) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", record)
    replay = Replay(lambda x: (x * 2,), [torch.ones(2).as_subclass(OnGpu)])
    assert replay.failures == ["operation not permitted when stream is capturing"]
    assert replay(torch.tensor([1.0, 2.0]))[0].tolist() == [2.0, 4.0]


ALONE = "TESTS_OF_A_FAKE_GPU"  # after such a test a process that is forked crashes: they run in one of their own
alone = pytest.mark.skipif(ALONE not in os.environ, reason="run by test_on_a_gpu_that_is_not_there")


def test_on_a_gpu_that_is_not_there() -> None:
    options = ["-q", "-p", "no:cacheprovider", "-k", "never_wait or nothing_that"]
    files = ["tests/test_graphs.py", "tests/test_graphed_step.py"]
    done = run_python("-m", "pytest", *options, *files, variables={**os.environ, ALONE: "yes"})
    assert done.returncode == 0, done.stdout + done.stderr


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices; a copy of nothing is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten._to_copy", "aten.copy_")) and result.numel():
            devices = {each.device.type for each in (*args, result) if isinstance(each, Tensor)}
            assert len(devices) == 1, f"{func} copies between {devices}"
        return result


def pretend(module: nn.Module) -> None:
    """Put a module's weights on a GPU that is not there; inside a `FakeTensorMode`."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(on_gpu(value), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer)


def on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@alone
@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*", "ignore:.*data pointer of FakeTensor.*")
@pytest.mark.parametrize(
    ("kind", "arithmetic"), [("t5", "fp32"), ("t5", "bf16"), ("llama", "fp32"), ("encoder-decoder", "fp32")]
)
def test_nothing_that_is_recorded_waits_for_a_gpu_or_copies_to_it(
    tmp_path: Path, kind: str, arithmetic: Arithmetic
) -> None:
    """Tensors without values cannot answer what only a wait for the GPU could tell: asking fails."""
    lm, levels = MAKE[kind](tmp_path, SPACE), levels_of(100)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(lm)
        writer = make_writer(lm, arithmetic)
        placed = [
            level._replace(bases=on_gpu(level.bases), deltas=on_gpu(level.deltas), codes=on_gpu(level.codes))
            for level in levels
        ]
        ids = torch.zeros(4, 8, dtype=torch.long, device="cuda")
        scorings: tuple[tuple[Scoring, bool], ...] = (("full", True), ("voken", False))
        for scoring, score_end in scorings:
            with NoCopies(), torch.no_grad():
                memory = writer.read(Tokens(ids, torch.ones_like(ids)))
                found, broken = search_steps(writer, memory, placed, beams=4, scoring=scoring, score_end=score_end)
            assert found.leaves.shape == (4, 4)
            assert {part.device.type for part in (*found, broken)} == {"cuda"}
            with pytest.raises(DataDependentOutputException):
                bool(broken)
        shapes: tuple[tuple[int, ...], ...] = ((4, 32, 6), (6, 16), (16,), (4,))
        codewords, basis, mean, missing = (torch.empty(shape, device="cuda") for shape in shapes)
        guide = Guide(codewords, basis, mean, missing, weight=80.0)
        with NoCopies(), torch.no_grad():
            steering = guide.steer(torch.zeros(4, 16, device="cuda"))
            options: dict[str, Any] = {"beams": 4, "early_beams": 6, "scoring": "full", "score_end": False}
            found, _ = search_steps(writer, memory, placed, steering=steering, **options)
        assert found.leaves.device.type == "cuda"
