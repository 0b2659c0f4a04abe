"""Rows over the first captions of each picture, beside those over all: as papers report COCO's test split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reranker import test as rerank_test
from retriever import rank_splits, retrieve
from retriever import test as final
from tests.chain import Chain
from tools import runs
from tools.captions import first_captions
from tools.errors import BadInput
from tools.features import normalized, read_features
from tools.files import read_json, read_json_lines
from tools.recall import CUTOFFS
from tools.results import scalars

FIRST = "test, first 2 captions"


def by_key(summary: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["system"], row["split"], row["level"]): row for row in read_json(summary)}


def two_tower_by_hand(chain: Chain, kept: set[int]) -> dict[str, float]:
    """Recall of those of each test picture's captions whose number is in `kept`."""
    features = read_features(chain.features)
    rows, ranks = features.image_rows("test"), []
    images = normalized(features.images[rows])
    for number, caption in enumerate(features.text_rows("test")):
        if number % 3 in kept:  # three captions a picture
            scores = images @ normalized(features.texts[caption][None])[0]
            ranks.append(
                np.argsort(-scores, kind="stable").tolist().index(rows.tolist().index(features.owners[caption]))
            )
    return {str(cutoff): round(float(np.mean([rank < cutoff for rank in ranks])), 5) for cutoff in CUTOFFS}


def test_first_captions_of_pictures_in_any_order() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(5, size=40)
    seen: dict[int, int] = {}
    expected = []
    for place, picture in enumerate(pictures.tolist()):
        seen[picture] = seen.get(picture, 0) + 1
        if seen[picture] <= 3:
            expected.append(place)
    assert first_captions(pictures, 3).tolist() == expected
    assert first_captions(pictures, 99).tolist() == list(range(40))


def test_rows_of_a_retriever(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    found = tmp_path / "found"
    retrieve.main(
        retrieve.Config(
            dataset=chain.dataset, retriever=retriever, output=found, precision="fp32", device="cpu", beams=3
        )
    )
    settings: dict[str, Any] = {"predictions": found, "name": "toy", "device": "cpu", "rqvae": chain.rqvae}
    alone = final.Config(output=tmp_path / "alone", summary=tmp_path / "alone.json", **settings)
    both = final.Config(output=tmp_path / "both", summary=tmp_path / "both.json", captions_per_picture=2, **settings)
    final.main(alone)
    final.main(both)
    rows, before = by_key(both.summary), by_key(alone.summary)
    for key, row in before.items():  # the rows over all captions stay what they are
        assert {**row, "queries_per_second": None} == {**rows[key], "queries_per_second": None}
    assert rows["two-tower", FIRST, "image"]["recall"] == two_tower_by_hand(chain, {0, 1})
    assert rows["two-tower", "test", "image"]["recall"] == two_tower_by_hand(chain, {0, 1, 2})
    lines = [line for _, line in read_json_lines(found / "test.jsonl")]
    hits = [line["image"] in line["ranked"][:1] for number, line in enumerate(lines) if number % 3 < 2]
    assert rows["retriever", FIRST, "image"]["recall"]["1"] == pytest.approx(np.mean(hits), abs=1e-5)
    firsts = [row for (_, split, _), row in rows.items() if split == FIRST]
    assert len(firsts) == 5
    assert {(row["queries"], row["captions_per_picture"], row["pool"], row["pool_size"]) for row in firsts} == {
        (16, 2, "test", 8)
    }
    assert FIRST in (both.output / "table.txt").read_text()
    named = scalars(list(rows.values()), main="retriever")
    assert named["test-first-2-captions/R@1"] == rows["retriever", FIRST, "image"]["recall"]["1"]
    metrics = [runs.read_manifest(each.output, "retriever.test").metrics for each in (alone, both)]
    assert metrics[0] == metrics[1]


def test_rows_of_a_reranker(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    rank_splits.main(
        rank_splits.Config(
            dataset=chain.dataset, retriever=retriever, output=lists, beams=8, train_per_picture=0, precision="fp32",
            device="cpu",
        )
    )  # fmt: skip
    config = rerank_test.Config(
        lists=lists, output=tmp_path / "test", summary=tmp_path / "s.json", name="toy", device="cpu",
        captions_per_picture=2,
    )  # fmt: skip
    rerank_test.main(config)
    rows = by_key(config.summary)
    assert list(rows) == [("retriever+features", split, "image") for split in ("test", FIRST)]
    assert [row["queries"] for row in rows.values()] == [24, 16]
    assert len({str(row["weights"]) for row in rows.values()}) == 1
    metrics = runs.read_manifest(config.output, "reranker.test").metrics
    assert metrics[f"two-tower/{FIRST}-test/R@1"] == two_tower_by_hand(chain, {0, 1})["1"]
    assert metrics["two-tower/test-test/R@1"] == two_tower_by_hand(chain, {0, 1, 2})["1"]


@pytest.mark.parametrize("config", [final.Config, rerank_test.Config])
def test_no_captions_are_refused(config: Any, tmp_path: Path) -> None:
    paths = {"output": tmp_path, "summary": tmp_path, "predictions": tmp_path, "lists": tmp_path}
    wanted = {name: path for name, path in paths.items() if name in config.__dataclass_fields__}
    with pytest.raises(BadInput, match="`captions_per_picture` must be at least 1"):
        config(name="toy", captions_per_picture=0, **wanted)
