"""The tokenizer report: its recall by hand, and raw recall that is measured once."""

from typing import Any

import numpy as np
import pytest

from models.rqvae import RqVae
from tests.chain import Chain
from tools import tokenizer_report
from tools.features import normalized, read_features
from tools.recall import CUTOFFS
from tools.tokenizer_report import make_report
from tools.two_tower import two_tower_recall


def test_recall_before_and_after_quantising_by_hand(chain: Chain) -> None:
    features, model = read_features(chain.features), RqVae.from_pretrained(chain.rqvae)
    report = make_report(model, features, split="val")
    texts, rows = features.text_rows("val"), features.image_rows("val").tolist()
    decoded = model.reconstruct(model.codes(model.quantizer.codebooks.new_tensor(features.images))).detach().numpy()
    for found, pictures in ((report.raw_recall, features.images), (report.quantized_recall, decoded)):
        scores = normalized(features.texts[texts]) @ normalized(pictures[rows]).T
        lists = [sorted(range(len(rows)), key=lambda row: (-line[row], row)) for line in scores.tolist()]
        ranks = [
            ranked.index(rows.index(owner))
            for ranked, owner in zip(lists, features.owners[texts].tolist(), strict=True)
        ]
        assert found == pytest.approx({str(cutoff): np.mean([r < cutoff for r in ranks]) for cutoff in CUTOFFS})


def test_raw_recall_is_not_measured_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    features, model = read_features(chain.features), RqVae.from_pretrained(chain.rqvae)
    first = make_report(model, features, split="val")
    searched: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        searched.append(options)
        return two_tower_recall(*args, **options)

    monkeypatch.setattr(tokenizer_report, "two_tower_recall", counted)
    assert make_report(model, features, split="val", raw=first.raw_recall) == first
    assert len(searched) == 1
    assert make_report(model, features, split="val", raw={"1": 0.25, "5": 0.5, "10": 1.0}).raw_recall["1"] == 0.25
