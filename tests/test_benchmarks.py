"""The benchmark: its arithmetic by hand, and one run of it all on models of a few thousand weights."""

import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import calls, shapes, timing, two_tower
from benchmarks import search as bench
from benchmarks.codes import synthetic_codes
from benchmarks.crossover import TwoTower, crossover, crossover_table, draw
from models.voken_lm import VokenLM
from tests.tiny import tiny_llama, tiny_t5
from tools.errors import BadInput
from tools.files import read_json
from tools.vokens import VokenSpace

SPACE = VokenSpace(4, 32, shared=True)
RATIOS = {
    "exact_vs_published", "exact_vs_generate", "voken_vs_published", "voken_vs_generate", "voken_bf16_vs_published",
    "engine_over_forward", "million_over_thousand", "llama_vs_no_cache", "llama_vs_generate",
    "shallow_2_layers_over_encoder_fp32", "voken_bf16_vs_generate_bf16",
}  # fmt: skip


def test_exact_search_is_overtaken_where_the_lines_cross() -> None:
    system = TwoTower("x, flat", 1, encode=0.1, search={1000: 0.001, 10_000: 0.01}, exact=True)
    assert crossover(0.05, system) == "any"
    assert crossover(0.2, system) == "100,000"  # 0.1 s more, at 1 µs a picture
    assert crossover(0.1 + 0.0123456, system) == "12,000"
    assert crossover(0.1 + 0.0055, system) == "5,500"
    assert crossover(0.1 + 0.0005, system) == "at most 1,000"


def test_between_two_sizes_the_line_is_read_not_the_origin() -> None:
    system = TwoTower("x, flat", 1, encode=0.1, search={1000: 0.05, 1_000_000: 0.1}, exact=True)
    assert crossover(0.14, system) == "at most 1,000"
    assert crossover(0.175, system) == "500,000"


def test_an_index_is_overtaken_only_where_it_was_measured() -> None:
    system = TwoTower("x, HNSW", 1, encode=0.1, search={1000: 0.001, 10_000: 0.002, 100_000: 0.02}, exact=False)
    assert crossover(0.11, system) == "100,000"
    assert crossover(0.5, system) == "none up to 100,000"
    dip = system._replace(search={1000: 0.02, 10_000: 0.002, 100_000: 0.02})
    assert crossover(0.11, dip) == "100,000"


def test_only_systems_of_a_pair_and_of_one_batch_are_compared() -> None:
    systems = [TwoTower("fp32, flat", batch, encode=0.1, search={1000: 0.001}, exact=True) for batch in (1, 8)] + [
        TwoTower("bf16, flat", 1, encode=0.1, search={1000: 0.001}, exact=True)
    ]
    rows = crossover_table({("engine fp32", 1): 0.2, ("other fp32", 1): 0.2}, systems, [("engine", "fp32")])
    assert [(row["protocol"], row["generation"], row["two-tower"]) for row in rows] == [
        ("one query at a time", "engine fp32", "fp32, flat")
    ]


def test_rounds_are_interleaved() -> None:
    called: list[str] = []
    timings = timing.interleave(
        {name: lambda name=name: called.append(name) for name in "ab"},  # type: ignore[misc]
        repeats=3,
        warm_up=False,
        memory=False,
    )
    assert called == ["a", "b"] * 3
    assert timings["a"].repeats == 3
    assert timings["a"].least <= timings["a"].median <= timings["a"].most


@pytest.mark.skipif(not timing.PEAK_RESET.exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_what_is_held_for_a_moment() -> None:
    peak = timing.peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8)[0])
    assert peak is not None
    assert 60 < peak < 90


def test_synthetic_codes_share_prefixes_and_are_the_same_every_time() -> None:
    codes = synthetic_codes(20_000)
    assert np.array_equal(codes, synthetic_codes(20_000))
    assert (int(codes.min()), int(codes.max())) == (0, 1023)
    pairs = len(np.unique(codes[:, :2], axis=0))
    independent = len(np.unique(np.random.default_rng(0).integers(1024, size=(20_000, 2)), axis=0))
    assert pairs < independent


def test_trimmed_text_gives_the_same_features() -> None:
    clip = shapes.text_tower("fp32", torch.device("cpu"))
    tokens = shapes.clip_tokens(shapes.captions(2))
    tuned = shapes.text_tower("fp32", torch.device("cpu"), tuned=True)
    whole = shapes.TextTower(clip, trimmed=False).encode(tokens)
    assert torch.allclose(whole, shapes.TextTower(tuned, trimmed=True).encode(tokens), atol=1e-4)


def test_indices_find_what_exact_search_finds() -> None:
    queries = two_tower.clustered_vectors(8, seed=3)
    indices = two_tower.build_indices(500, queries, threads=1)
    vectors = two_tower.clustered_vectors(500, seed=1)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert np.array_equal(indices["flat through BLAS"].search(queries), exact)
    assert np.array_equal(indices["flat as shipped"].search(queries), exact)
    assert indices["HNSW"].recall > 0.8


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    systems = [TwoTower("x, flat", 1, encode=0.1, search={1000: 0.001, 10_000: 0.01}, exact=True)]
    draw(tmp_path / "deep" / "x.png", {("engine", 1): 0.2}, systems, title="x")
    assert (tmp_path / "deep" / "x.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, and small models in place of those of real size."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_models(folder, monkeypatch)
        yield folder


@pytest.fixture(scope="module")
def quick(small: Path) -> tuple[Path, str]:
    """The output of the quick run, and what it printed."""
    with redirect_stdout(StringIO()) as said:
        bench.main(bench.Config(quick=True, output=small / "results", repeats=1, most_pictures=1000, sample=small))
    return small / "results", said.getvalue()


def replace_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def t5(dtype: torch.dtype = torch.float32) -> VokenLM:
        lm = tiny_t5(folder / "t5", SPACE)
        lm.model.to(dtype)
        return lm

    def decoder(layers: int) -> VokenLM:
        from transformers import BertConfig

        monkeypatch.setattr(shapes, "SPACE", SPACE)
        small_bert = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        monkeypatch.setattr(shapes, "BertConfig", lambda **_: small_bert)
        return shapes.encoder_decoder(layers, width=32)

    monkeypatch.setattr(bench, "t5_base", t5)
    monkeypatch.setattr(bench, "llama", lambda: tiny_llama(folder / "llama", SPACE))
    monkeypatch.setattr(bench, "encoder_decoder", decoder)
    monkeypatch.setattr(bench, "captions", lambda count, seed=0: [[4, 5, 1]] * count)
    monkeypatch.setattr(bench, "prompts", lambda count, length, seed=0: [[4, 5, 6, 7]] * count)
    for module in (bench, calls):
        monkeypatch.setattr(module, "synthetic_codes", lambda n: synthetic_codes(n, codebook_size=SPACE.codebook_size))
    monkeypatch.setattr(bench, "POOL", 300)
    monkeypatch.setattr(bench, "POOLS", (100, 200))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_the_quick_run_writes_every_ratio(quick: tuple[Path, str]) -> None:
    output, said = quick
    written: dict[str, Any] = read_json(output / "search.json")
    assert set(written["ratios"]) >= RATIOS
    assert all(value > 0 for value in written["ratios"].values())
    assert written["identical_to_generate"].startswith("8 of 8")
    assert written["identical_to_generate_llama"].startswith("8 of 8")
    published, exact = (
        next(
            row["seconds"] for row in written["rows"] if row["section"].startswith(section) and row["system"] == system
        )
        for section, system in (
            ("T5-base, published", bench.PUBLISHED[0]),
            ("T5-base, published", "engine, exact"),
        )
    )
    assert written["ratios"]["exact_vs_published"] == pytest.approx(published / exact, rel=1e-3)
    assert sorted(path.name for path in output.iterdir()) == ["search.json", "search.txt"]
    assert "exact_vs_published" in said


def test_one_part_is_measured_again_and_the_others_stay(quick: tuple[Path, str], tmp_path: Path) -> None:
    output = tmp_path / "results"
    shutil.copytree(quick[0], output)
    options: dict[str, Any] = {"output": output, "repeats": 1, "most_pictures": 1000, "sample": tmp_path}
    before = read_json(output / "search.json")
    bench.main(bench.Config(only=("pools",), **options))
    after = read_json(output / "search.json")
    assert {row["section"] for row in after["rows"]} == {row["section"] for row in before["rows"]}
    assert len(after["commands"]) == 2
    assert after["index"] == before["index"]
    kept = [row for row in before["rows"] if row["section"] != "T5-base by pool"]
    assert [row for row in after["rows"] if row["section"] != "T5-base by pool"] == kept
    written = (output / "search.json").read_text()
    (output / "search.json").write_text(written.replace(f'"torch": "{after["torch"]}"', '"torch": "1.0"'))
    with pytest.raises(BadInput, match="of another torch"):
        bench.main(bench.Config(only=("pools",), **options))


def test_contradictions_are_refused() -> None:
    with pytest.raises(BadInput, match="--quick and --only contradict"):
        bench.Config(quick=True, only=("grid",))


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadInput, match="--repeats must be at least 1"):
        bench.Config(repeats=0)


def test_shapes_are_those_of_the_published_models() -> None:
    with torch.device("meta"):
        lm = shapes.t5_base()
    assert sum(value.numel() for value in lm.model.parameters()) == pytest.approx(220e6, rel=0.02)
    assert SimpleNamespace(**lm.model.config.to_dict()).num_decoder_layers == 12
