"""Rows of all systems: merged in place, two-tower first, as text and as Markdown."""

from pathlib import Path
from typing import Any

import pytest

from tools import results
from tools.errors import BadInput
from tools.files import read_json


def row(system: str, pool: str, first: float, level: str = "image") -> dict[str, Any]:
    return {
        "system": system, "dataset": "toy", "split": "val", "pool": pool, "pool_size": 1234, "level": level,
        "setting": "inductive", "recall": {"1": first, "5": 0.5, "10": 0.6}, "mrr": 0.43215, "median_rank": None,
        "queries_per_second": None,
    }  # fmt: skip


def test_rows_replace_their_own_and_new_ones_go_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    results.merge_summary(path, [row("retriever", "val", 0.1), row("two-tower", "val", 0.2)])
    results.merge_summary(path, [row("retriever", "val", 0.3), row("retriever", "all", 0.4)])
    merged = [(each["system"], each["pool"], each["recall"]["1"]) for each in read_json(path)]
    assert merged == [("retriever", "val", 0.3), ("two-tower", "val", 0.2), ("retriever", "all", 0.4)]


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "summary.json"
    results.merge_summary(path, [row("retriever", "val", 0.1), row("retriever", "val", 0.1, "code")])
    results.merge_summary(path, [row("two-tower", "val", 0.2)])
    results.main(results.Config(summary=path, levels=("image",), markdown=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| system", "| ---", "| two-tower", "| retriever"]
    assert lines[2] == "| two-tower | image | val | val (1,234) | inductive | 20.0% | 50.0% | 60.0% | 0.432 | – | – |"
    results.main(results.Config(summary=path))
    assert len(capsys.readouterr().out.splitlines()) == 4
    path.write_text("[]")
    with pytest.raises(BadInput, match=r"summary\.json has no rows of --levels image code"):
        results.main(results.Config(summary=path))
