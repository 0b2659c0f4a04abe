"""The GPU check on a CPU, with models of a few thousand weights: every section runs, no failure ends it, and it needs
few packages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_equality
from benchmarks.gpu_figures import Figure, Goal, Report, Skipped, cells
from benchmarks.gpu_models import FULL, TINY, captions, llama, prompt, t5
from benchmarks.gpu_search import best_of
from benchmarks.timing import Timing
from retriever.beam import Beams

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ABSENT = (
    "tyro", "open_clip", "wandb", "faiss", "accelerate", "peft", "timm", "sklearn", "fastapi", "uvicorn", "torchvision",
    "PIL", "openai", "matplotlib", "pyarrow", "scipy", "sentencepiece", "pandas", "resvg_py", "pytest", "hypothesis",
)  # fmt: skip
LATER = float("inf")


def report(section: str = "test", deadline: float = LATER, device: torch.device = CPU) -> tuple[Report, list[Figure]]:
    figures: list[Figure] = []
    return Report(section, device, figures.append, deadline), figures


def failures(figures: list[Figure]) -> list[str]:
    return [figure.trace for figure in figures if figure.trace]


@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name != "training-t5-large"])
def test_every_section_measures_what_it_names(name: str) -> None:
    told, figures = report(name)
    gpu.SECTIONS[name](TINY._replace(repeats=1, batches=(1,), large_pool=TINY.pool), told, graphs=True)
    assert failures(figures) == []
    assert {figure.met for figure in figures} == {None}  # a CPU meets no goal and misses none
    assert all(figure.value is None or figure.value >= 0 for figure in figures)
    wanted = {
        "search-t5": ["single query", "published", "engine, exact bf16", "/ forward passes, graphs bf16"],
        "search-llama": ["generate without a cache", "engine, voken, graphs bf16"],
        "training-t5-base": ["own loop", "in a graph", "bf16 peak", "peak memory", "drawn on cpu"],
        "training-llama": ["step", "in a graph", "computed twice"],
        "training-rqvae": ["k-means, balanced", "an epoch"],
        "equality": ["quantizer", "double-softmax", "T5's training step, bf16", "reranker, bf16", "graphs and none"],
        "rerank": ["pairs a second"],
    }
    for words in wanted.get(name, []):
        assert any(words in figure.what and figure.value is not None for figure in figures), words


def test_the_cpu_equals_itself() -> None:
    told, figures = report()
    gpu_equality.equality(TINY, told, graphs=True)
    goals = [figure for figure in figures if figure.goal and "bf16" not in figure.what]
    assert len(goals) > 10
    assert all(figure.value is not None for figure in goals)
    assert {figure.value for figure in goals if "relative" in figure.unit} == {0.0}


def test_another_answer_is_seen() -> None:
    told, figures = report(device=torch.device("cuda"))
    expected = Beams(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]))
    found = Beams(torch.tensor([[1, 2], [3, 5]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.5]]))
    gpu_equality.compare_answers(told, "x", found, expected, exact=True)
    shared, difference = figures
    assert (shared.value, shared.note) == (0.75, "1 of 2 queries in the same order")
    assert (difference.value, difference.met) == (0.5, False)


def test_another_gradient_is_seen() -> None:
    told, figures = report(device=torch.device("cuda"))
    here, there = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    gpu_equality.compare_steps(told, "x", here, there, lambda m: m(torch.ones(2)).square().sum(), gpu_equality.SAME)
    assert {figure.met for figure in figures} == {False}


def test_goals_are_judged_on_a_gpu_alone() -> None:
    most, least = Goal(1.1, least=False), Goal(150, least=True)
    assert (str(most), str(least)) == ("≤ 1.1", "≥ 150")
    assert [most.met(1.1), most.met(1.2), least.met(150), least.met(149)] == [True, False, True, False]
    told, figures = report(device=torch.device("cuda"))
    told.add("x", 2.0, "×", goal=most)
    assert cells(figures[0])["met"] == "NO"


def test_a_failure_and_a_skip_are_lines_and_what_follows_goes_on() -> None:
    told, figures = report()
    with told.attempt("first"):
        raise RuntimeError("CUDA out of memory\nand more")
    with told.attempt("second"):
        raise Skipped("peft is not installed")
    with told.attempt("third"):
        told.add("third", 1.0, "ms")
    assert [figure.note for figure in figures] == [
        "failed: RuntimeError: CUDA out of memory",
        "skipped: peft is not installed",
        "",
    ]
    assert "test_benchmarks_gpu.py" in figures[0].trace
    assert not figures[1].trace


def test_nothing_begins_after_the_deadline() -> None:
    told, figures = report(deadline=time.monotonic() - 1)
    with told.attempt("late"):
        told.need_time()
        raise AssertionError
    assert figures[0].note == "skipped: the time is over"


def test_ratios_take_the_quickest_form_of_the_engine() -> None:
    times = {"engine, voken bf16": 2.0, "engine, voken, graphs bf16": 1.0, "engine, voken fp32": 0.5}
    timings = {name: Timing(value, value, value, 1, None) for name, value in times.items()}
    assert best_of(timings, "engine, voken") == "engine, voken, graphs bf16"
    assert best_of({}, "engine, voken") is None


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (("search",), ["device", "search-t5", "search-llama"]),
        (("rerank", "two-tower"), ["device", "two-tower", "rerank"]),
        ((), list(gpu.SECTIONS)),
    ],
)
def test_sections_are_chosen_by_the_first_part_of_their_names(only: tuple[str, ...], found: list[str]) -> None:
    assert gpu.chosen(only) == found


def options(folder: Path, *only: str, minutes: float = 8.0) -> gpu.Options:
    return gpu.Options(minutes, only, folder, tiny=True, graphs=True)


class Sections:
    """Sections that fail in every way, for the processes of `results_of`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
        monkeypatch.setattr(gpu, "SECTIONS", {"device": lambda *_, **__: None, **sections})


def results(name: str, folder: Path) -> list[Any]:
    return list(gpu.results_of(name, options(folder), time.monotonic() + 600, "fork"))


def test_a_section_that_breaks_off_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(sizes: Any, told: Report, *, graphs: bool) -> None:
        told.add("found", 1.0, "ms")
        os.kill(os.getpid(), signal.SIGKILL)

    Sections(monkeypatch, dies=dies)
    found, end = results("dies", tmp_path)
    assert (found.what, found.value) == ("found", 1.0)
    assert end.note == "failed: the process ended with -9"


def test_a_section_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(sizes: Any, told: Report, *, graphs: bool) -> None:
        time.sleep(600)

    Sections(monkeypatch, hangs=hangs)
    monkeypatch.setattr(gpu, "MOST_SECONDS", 0.5)
    assert [each.note for each in results("hangs", tmp_path)] == ["stopped: it took too long"]


def test_a_section_that_raises_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(sizes: Any, told: Report, *, graphs: bool) -> None:
        raise ValueError("no such thing")

    Sections(monkeypatch, raises=raises)
    (figure,) = results("raises", tmp_path)
    assert figure.note == "failed: ValueError: no such thing"
    assert "in raises" in figure.trace


def test_late_sections_are_skipped_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.run(options(tmp_path, "rerank", minutes=0.0))
    assert [figure.note for figure in found.figures] == ["skipped: the time is over"] * 2
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [figure["section"] for figure in written["figures"]] == ["device", "rerank"]


def test_the_command_needs_few_packages_and_writes_what_it_found(tmp_path: Path) -> None:
    """And it leaves CUDA to the processes that it starts: one that has asked CUDA for anything, its devices even, can
    start none that uses it."""
    code = (
        "import sys, runpy\n"
        f"for name in {ABSENT}: sys.modules[name] = None\n"
        "import retriever.retrieve\n"
        f"sys.argv = ['gpu', '--tiny', '--only', 'rerank', 'training-llama', '--output', {str(tmp_path)!r}]\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
        "import os, torch\n"
        "broken = getattr(torch._C, '_cuda_isInBadFork', lambda: False)\n"
        "child = os.fork()\n"
        "if not child: os._exit(broken())\n"
        "sys.exit('CUDA was asked for' if os.waitpid(child, 0)[1] else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "cpu, not run on a GPU"
    assert written["failures"] == []
    assert {"torch", "transformers", "python", "cpu", "seconds", "sizes", "goals missed"} <= written.keys()
    notes = {figure["what"]: figure.get("note", "") for figure in written["figures"]}
    assert notes["LLaMA with LoRA"] == "skipped: peft is not installed"
    assert any(figure["what"] == "pairs a second" and figure["value"] > 0 for figure in written["figures"])
    assert "pairs a second" in ended.stdout


def test_models_have_the_published_sizes() -> None:
    with torch.device("meta"):
        meta = torch.device("meta")
        base, large = t5(FULL.t5_base, FULL, meta), t5(FULL.t5_large, FULL, meta)
        seven = llama(FULL.llama, FULL, meta, dtype=torch.bfloat16)
    counts = [sum(part.numel() for part in lm.parameters()) / 1e6 for lm in (base, large, seven)]
    assert [round(count, -1) for count in counts] == [220, 740, 6750]


def test_prompts_have_the_tokens_that_are_said() -> None:
    lm = llama(TINY.llama, TINY, CPU, dtype=torch.float32)
    text = captions(1, TINY)[0]
    assert len(lm.tokenize([text])[0]) == TINY.prompt + len(text.split())
    assert "{query}" in prompt(TINY)
