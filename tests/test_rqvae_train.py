"""The tokenizer's training: what a batch is, what k-means starts from, and pseudo queries; ours and published."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.rqvae import RqVae, RqVaeConfig
from retriever import prepare
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.setting import setting_of_codes
from tests.chain import RQVAE, Chain
from tests.tiny import generate_codes, rqvae_train
from tools.errors import BadInput
from tools.features import read_features
from tools.files import read_json_lines
from tools.runs import read_manifest

CPU = torch.device("cpu")


def config_of(chain: Chain, output: Path, **options: Any) -> Any:
    return rqvae_train.Config(features=chain.features, output=output, **{**RQVAE, **options})


@pytest.mark.parametrize(("pairs", "size", "batches"), [
    ("picture", 16, [16, 16]), ("picture", 10, [11, 11, 10]),  # none smaller than asked
    ("caption", 16, [16] * 6), ("caption", 40, [40, 40, 16]), ("caption", 19, [19] * 4 + [20]),  # as a loader cuts them
])  # fmt: skip
def test_an_epoch_is_the_pictures_or_their_captions(
    pairs: str, size: int, batches: list[int], chain: Chain, tmp_path: Path
) -> None:
    features = read_features(chain.features)
    config = config_of(chain, tmp_path / "run", pairs=pairs, batch_size=size)
    data = rqvae_train.TrainData(features, config, CPU)
    images, texts = zip(*map(data.pairs, data.batches(3)), strict=True)
    assert [len(batch) for batch in images] == [len(batch) for batch in texts] == batches
    assert len(data.batches(0)) == len(batches)
    owners = features.text_rows("train")
    seen = {
        (int((features.images == image.numpy()).all(axis=1).argmax()), text.numpy().tobytes())
        for image, text in zip(torch.cat(images), torch.cat(texts), strict=True)
    }
    right = {(int(features.owners[row]), features.texts[row].tobytes()) for row in owners}
    assert seen <= right
    assert len(seen) == sum(batches)
    assert pairs == "picture" or seen == right


def test_without_shuffling_captions_come_in_their_order(chain: Chain, tmp_path: Path) -> None:
    features = read_features(chain.features)
    config = config_of(chain, tmp_path / "run", pairs="caption", shuffle=False)
    data = rqvae_train.TrainData(features, config, CPU)
    for epoch in (0, 5):
        texts = torch.cat([data.pairs(batch)[1] for batch in data.batches(epoch)])
        assert np.array_equal(texts.numpy(), features.texts[features.text_rows("train")])


def test_kmeans_of_the_first_batch_starts_from_latents_in_training() -> None:
    """An untrained encoder's latents are longer there than in eval mode, and the codebooks of the first level too."""
    torch.manual_seed(0)
    model = RqVae(
        RqVaeConfig(features=12, width=8, hidden=(16,), levels=2, codebook_size=6, normalize=False, skip=False)
    )
    batch = 0.05 * torch.randn(64, 12)
    before = {name: value.clone() for name, value in model.state_dict().items() if "quantizer" not in name}
    model.start_from(batch, iterations=5, seed=0)
    in_eval = model.quantizer.codebooks[0].norm(dim=1).mean().item()
    model.start_from(batch, iterations=5, seed=0, as_in_training=True)
    in_training = model.quantizer.codebooks[0].norm(dim=1).mean().item()
    latents = model.train().encode(batch).norm(dim=1).mean().item()
    assert in_eval < 0.5 * in_training
    assert in_training == pytest.approx(latents, rel=0.3)
    model.load_state_dict({**model.state_dict(), **before})
    model.start_from(batch, iterations=5, seed=0, as_in_training=True)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name  # batch norm has not counted the look


def test_a_first_batch_that_is_too_small_for_kmeans_is_one_line(chain: Chain, tmp_path: Path) -> None:
    config = config_of(chain, tmp_path / "run", kmeans_first_batch=True, batch_size=6)
    with pytest.raises(BadInput, match="--codebook-size 8 needs as many pairs in the first batch, there are 7"):
        rqvae_train.main(config)


def test_pseudo_queries_of_the_features_train_the_tokenizer(chain: Chain, tmp_path: Path) -> None:
    """The published data: pairs of pool pictures and pseudo queries too, which makes all that follows transductive."""
    pseudo = generate_pseudo_query.Config(
        features=chain.features, source="nearest", per_picture=2, output=tmp_path / "pseudo"
    )
    generate_pseudo_query.main(pseudo)
    of_codes = dataclasses.replace(pseudo, features=None, dataset=chain.dataset, output=tmp_path / "of_codes")
    generate_pseudo_query.main(of_codes)
    lines = [line for _, line in read_json_lines(pseudo.output / "pseudo.jsonl")]
    assert lines == [line for _, line in read_json_lines(of_codes.output / "pseudo.jsonl")]

    config = config_of(chain, tmp_path / "rqvae", pairs="caption", pseudo_queries=pseudo.output, epochs=2)
    features = read_features(chain.features)
    data = rqvae_train.TrainData(features, config, CPU)
    images, texts = (torch.cat(parts) for parts in zip(*map(data.pairs, data.batches(0)), strict=True))
    train = len(features.text_rows("train"))
    assert len(images) == len(texts) == train + len(lines)
    row_of = {record.image: row for row, record in enumerate(features.records)}
    pictures = {features.images[row_of[line["image"]]].tobytes() for line in lines}
    assert pictures <= {image.numpy().tobytes() for image in images}
    assert len(data.images) == len({image.numpy().tobytes() for image in data.images})  # no picture counts twice
    close = [np.linalg.norm(features.texts - text.numpy(), axis=1).min() for text in data.texts[-len(lines) :]]
    assert max(close) < 1e-3  # the nearest source's texts are captions, whose features are known

    rqvae_train.main(config)
    generate_codes.main(
        generate_codes.Config(features=chain.features, rqvae=config.output, output=tmp_path / "codes", device="cpu")
    )
    prepare.main(prepare.Config(codes=tmp_path / "codes", output=tmp_path / "dataset"))
    assert read_manifest(tmp_path / "dataset", "retriever.prepare").facts["setting"] == "transductive"
    assert read_manifest(chain.dataset, "retriever.prepare").facts["setting"] == "inductive"
    codes = read_manifest(tmp_path / "codes", "RQ-VAE.generate_codes")
    elsewhere = dataclasses.replace(codes, facts={**codes.facts, "captions_fingerprint": "of other pictures"})
    assert setting_of_codes(elsewhere, [lines[0]["image"]]) == "transductive"
    assert setting_of_codes(elsewhere, ["x.jpg"]) == "inductive"


def test_pseudo_queries_need_pairs_and_one_source(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--pseudo-queries are pairs of their own: add --pairs caption"):
        config_of(chain, tmp_path / "run", pseudo_queries=tmp_path)
    with pytest.raises(BadInput, match="give --dataset, or --features in its place"):
        generate_pseudo_query.Config(source="nearest", output=tmp_path / "pseudo")
