"""The reranking benchmark: its systems agree, and one run of it all on a model of a few thousand weights."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from benchmarks import rerank as bench
from benchmarks.timing import Timing
from tools.files import read_json

TINY = bench.Shape("tiny", 2, 16, 2, 24, pool=60, queries=5, compared=3, rounds=1)
KINDS: tuple[bench.Kind, ...] = get_args(bench.Kind)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary, and the threads as they are."""
    monkeypatch.setattr(bench, "TEXT_VOCABULARY", 100)
    monkeypatch.setattr(bench, "SHAPES", (TINY, TINY._replace(name="other")))
    monkeypatch.setattr(bench, "QUICK", (TINY,))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_all_systems_give_the_same_scores_and_order(small: None, kind: bench.Kind) -> None:
    scorer, case = bench.make_scorer(TINY), bench.make_case(kind, TINY)
    expected = bench.METHODS[bench.BASELINE](scorer, case.tokens, case.lists)
    assert expected.std(axis=1).min() > 1e-3
    for method in bench.METHODS.values():
        scores = method(scorer, case.tokens, case.lists)
        assert np.allclose(scores, expected, atol=1e-5)
        assert np.array_equal(bench.order(scores), bench.order(expected))


def test_prompts_fit_the_padded_length(small: None) -> None:
    scorer, case = bench.make_scorer(TINY), bench.make_case("one pool", TINY)
    lengths = [len(ids) for ids in scorer.query_ids(case.lists.texts)]
    closing = len(scorer.query_ids([""])[0])
    assert (min(lengths) - closing, max(lengths) - closing) == bench.QUERY_TOKENS
    assert scorer.picture_ids(case.tokens).shape[1] + max(lengths) <= bench.PADDED_LENGTH


def test_pictures_are_shared_in_one_pool_alone() -> None:
    shared, own = (bench.make_case(kind, TINY) for kind in KINDS)
    assert len(np.unique(own.lists.rows)) == own.lists.rows.size == TINY.compared * bench.CANDIDATES
    assert len(np.unique(shared.lists.rows)) <= TINY.pool < shared.lists.rows.size
    assert all(len(np.unique(row)) == bench.CANDIDATES for row in shared.lists.rows)


def test_a_system_that_orders_otherwise_is_seen(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = bench.METHODS[bench.SHARED[0]]
    monkeypatch.setitem(bench.METHODS, bench.SHARED[0], lambda *parts, **options: -wrong(*parts, **options))
    rows = bench.measure(TINY, bench.make_scorer(TINY), bench.make_case("one pool", TINY))
    found = {(row.system, row.precision): row for row in rows}
    assert found[bench.SHARED[0], "fp32"].same_order == "0 of 3"
    assert found[bench.SHARED[0], "fp32"].score_difference > 1e-2
    assert found[bench.SHARED[1], "fp32"].same_order == "3 of 3"


def test_ratios_compare_what_was_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case, scores = bench.make_case("own pictures", TINY), np.zeros((3, 2), dtype=np.float32)
    names: list[tuple[bench.System, str]] = [(bench.BASELINE, "fp32"), (bench.SHARED[1], "fp32")]
    names.append((bench.SHARED[1], "bf16"))
    timings = [Timing(seconds, seconds, seconds, 1, None) for seconds in (6.0, 1.5, 1.0)]
    rows = [
        bench.row_of(TINY, case, name, timing, 3, scores, scores) for name, timing in zip(names, timings, strict=True)
    ]
    expected = {"tiny, own pictures, fp32: pictures shared, 100 pairs / one by one, padded": 4.0}
    assert bench.ratios_of(rows) == pytest.approx(expected)
    assert [row.queries_per_second for row in rows] == [0.5, 2.0, 3.0]


def test_a_run_writes_every_row_and_ratio(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(bench.Config(output=tmp_path / "results"))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["rerank.json"]
    written: dict[str, Any] = read_json(tmp_path / "results" / "rerank.json")
    assert written["machine"]
    assert written["command"].startswith("python -m benchmarks.rerank")
    keys = [(row["shape"], row["lists"], row["system"], row["precision"]) for row in written["rows"]]
    assert keys == [
        (shape, kind, *name) for shape in ("tiny", "other") for kind in KINDS for name in bench.systems_of(kind)
    ]
    assert all(row["same_order"] == "3 of 3" for row in written["rows"] if row["precision"] == "fp32")
    seconds = {key: row["seconds"] / row["queries"] for key, row in zip(keys, written["rows"], strict=True)}
    ratio = written["ratios"]["tiny, one pool, fp32: pictures shared, 100 pairs / one by one, padded"]
    slow, fast = (seconds["tiny", "one pool", system, "fp32"] for system in (bench.BASELINE, bench.SHARED[1]))
    assert ratio == pytest.approx(slow / fast, rel=1e-2)
    assert len(written["ratios"]) == 2 * (2 * 3 + 1 + 2 * 3)
    assert "times one by one" in capsys.readouterr().out


def test_the_quick_run_measures_one_shape(small: None, tmp_path: Path) -> None:
    bench.main(bench.Config(quick=True, output=tmp_path))
    assert {row["shape"] for row in read_json(tmp_path / "rerank.json")["rows"]} == {"tiny"}
