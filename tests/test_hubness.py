"""Hubness: the formula, what a correction does to a hub, and the same correction in every search that has it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.guide import GUIDE_NAME, read_guide
from models.hubness import LANDMARKS, SHARPNESS, USUAL_STRENGTH, Hubness, best_strength, fit_hubness
from tests.chain import Chain
from tests.test_beam import SIZE, Table, search
from tests.test_guide import FEATURES, cosines, guide, tokenizer
from tools.features import normalized
from tools.two_tower import two_tower_ranks


def some_features(*, pictures: int = 200, width: int = 32, seed: int = 0) -> Any:
    """Two captions around each picture, the second half of the pictures val, whose first lies where all captions are
    near: a hub."""
    generator = np.random.default_rng(seed)
    common = np.eye(width)[0] * 6
    images = (generator.normal(size=(pictures, width)) + common).astype(np.float32)
    owners = np.repeat(np.arange(pictures), 2)
    texts = (images[owners] + 1.5 * generator.normal(size=(len(owners), width))).astype(np.float32)
    splits = np.array(["train"] * (pictures // 2) + ["val"] * (pictures - pictures // 2))
    images[pictures // 2] = common
    rows = {split: np.flatnonzero(splits == split) for split in ("train", "val")}
    return SimpleNamespace(
        images=images, texts=texts, owners=owners,
        text_rows=lambda split: np.flatnonzero(splits[owners] == split), captioned_rows=lambda split: rows[split],
    )  # fmt: skip


def test_hubness_is_the_soft_maximum_of_cosines() -> None:
    torch.manual_seed(0)
    landmarks, pictures = F.normalize(torch.randn(5, 4), dim=1), torch.randn(7, 4)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    found = Hubness(landmarks, shares.log(), 0.5)
    for picture, value in zip(pictures, found.of(pictures), strict=True):
        near = [float(share) * np.exp(SHARPNESS * float(F.cosine_similarity(picture, mark, dim=0)))
                for mark, share in zip(landmarks, shares, strict=True)]  # fmt: skip
        assert float(value) == pytest.approx(np.log(sum(near)) / SHARPNESS, abs=1e-5)
    assert found.taken_off(pictures.numpy()) == pytest.approx(0.5 * found.of(pictures).numpy(), abs=1e-6)
    assert not found._replace(strength=0.0).taken_off(pictures.numpy()).any()


def test_a_hub_is_found_less_and_the_others_more() -> None:
    features = some_features()
    found = fit_hubness(features)
    assert found is not None
    assert found.strength > 0
    captions, pool = features.text_rows("val"), features.captioned_rows("val")
    taken_off = found.taken_off(features.images[pool])
    assert taken_off.argmax() == 0
    others = captions[features.owners[captions] != pool[0]]
    before = two_tower_ranks(features, others, pool)
    after = two_tower_ranks(features, others, pool, taken_off=taken_off)
    assert (before > 1).sum() > (after > 1).sum()
    nearness = normalized(features.texts[others]) @ normalized(features.images[pool]).T - taken_off
    own = nearness[np.arange(len(others)), features.owners[others] - pool[0]][:, None]
    assert after.tolist() == ((nearness > own).sum(axis=1) + 1).tolist()


def test_the_usual_strength_stays_unless_another_is_clearly_better() -> None:
    features = some_features()
    half_of_val = F.normalize(torch.tensor(features.images[100:150]), dim=1)  # nothing is worse to take off
    misled = Hubness(half_of_val, torch.full((50,), 0.02).log())
    assert best_strength(misled, features) == 0.0
    even = Hubness(torch.zeros(2, 32), torch.full((2,), 0.5).log())
    assert best_strength(even._replace(strength=1.0), features) == USUAL_STRENGTH
    features.text_rows = lambda split: np.array([], dtype=np.int64)
    assert best_strength(even, features) == USUAL_STRENGTH
    assert fit_hubness(features) is None


@pytest.mark.parametrize("pictures", [60, 800])
def test_few_captions_stand_for_themselves_and_many_are_summed_up(pictures: int) -> None:
    features = some_features(pictures=pictures)
    texts = torch.from_numpy(normalized(features.texts[features.text_rows("train")]))
    found = fit_hubness(features)
    assert found is not None
    assert len(found.landmarks) == min(pictures, LANDMARKS)
    assert float(found.shares.exp().sum()) == pytest.approx(1, abs=1e-5)
    every = torch.logsumexp(SHARPNESS * torch.from_numpy(normalized(features.images)) @ texts.T, dim=1)
    exact = (every - np.log(len(texts))) / SHARPNESS
    both = torch.stack([found.of(torch.from_numpy(features.images)), exact])
    assert float(torch.corrcoef(both)[0, 1]) > (0.9999 if pictures == 60 else 0.9)  # a constant changes no order


@pytest.mark.parametrize("shared", [False, True])
def test_a_guide_takes_off_the_hubness_of_whole_codes(shared: bool) -> None:
    model = tokenizer(shared=shared)
    rows = [(a, b, c) for a in range(SIZE) for b in range(SIZE) for c in range(SIZE)]
    hubness = Hubness(F.normalize(torch.randn(5, FEATURES), dim=1), torch.full((5,), 0.2).log(), 0.9)
    plain, texts = guide(model, 7.0), torch.randn(3, FEATURES)
    steered = search(Table(), rows, 3, beams=len(rows), steering=plain.corrected(hubness, 0.5).steer(texts))
    alone = search(Table(), rows, 3, beams=len(rows))
    vectors = (model.quantizer.decode(torch.tensor(rows)) @ model.skip_out.weight.T + model.mean) / plain.length
    taken_off = torch.logsumexp(SHARPNESS * vectors @ hubness.landmarks.T + hubness.shares, dim=1) / SHARPNESS
    expected = 7.0 * (cosines(model, texts, np.array(rows)) - 0.5 * taken_off)
    scores, own = (torch.empty(3, len(rows)).scatter_(1, each.leaves, each.scores) for each in (steered, alone))
    assert torch.allclose(scores - own, expected, atol=1e-4)
    off = search(Table(), rows, 3, beams=len(rows), steering=plain.corrected(hubness, 0.0).steer(texts))
    same = search(Table(), rows, 3, beams=len(rows), steering=plain.steer(texts))
    assert torch.equal(off.leaves, same.leaves)
    assert torch.equal(off.scores, same.scores)


def test_a_guide_is_read_with_its_hubness(tmp_path: Path) -> None:
    hubness = Hubness(torch.randn(5, FEATURES), torch.full((5,), 0.2).log(), 0.75)
    made = guide(tokenizer(), 2.5).corrected(hubness, 0.25)
    assert made.nearness is not None
    made.save(tmp_path / GUIDE_NAME)
    found = read_guide(tmp_path / GUIDE_NAME)
    assert found is not None
    assert found.hubness is not None
    assert found.nearness is not None
    assert (found.strength, found.hubness.strength) == (0.25, 0.75)
    assert found.length == made.length > 0
    assert torch.equal(found.hubness.landmarks, hubness.landmarks)
    assert torch.allclose(found.nearness, made.nearness)


def test_codes_are_decoded_along_the_linear_path() -> None:
    model = tokenizer()
    codes = torch.tensor([(0, 1, 2), (3, 3, 3)])
    expected = model.quantizer.decode(codes) @ model.skip_out.weight.T + model.mean
    assert torch.allclose(guide(model, 1.0).decode(codes), expected, atol=1e-5)


def test_the_chains_guide_has_it(chain: Chain) -> None:
    found = read_guide(chain.dataset / GUIDE_NAME)
    assert found is not None
    assert found.hubness is not None
    assert found.hubness.landmarks.shape[1] == len(found.mean)
