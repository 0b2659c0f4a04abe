"""Features of a few bytes a picture: what faiss's product quantiser gives, through any life of an index."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retriever.gallery import build as build_index
from retriever.gallery.compact import CENTROIDS, Stored, stored_features, train_codec
from retriever.gallery.contents import unknown
from retriever.gallery.gallery import read_gallery
from retriever.gallery.merge import merge_all
from retriever.gallery.pictures import Picture
from retriever.gallery.publish import changing, replace_pictures
from retriever.gallery.segments import Block
from tests.chain import Chain
from tests.folders import small_index
from tools.errors import BadInput
from tools.features import Floats, normalized

WIDTH, PARTS = 16, 4


def drawn(count: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(count, 4)) @ generator.normal(size=(4, WIDTH))).astype(np.float32)


def test_codes_are_those_of_faiss() -> None:
    features = normalized(drawn(600, 0))
    codec = train_codec(features, PARTS)
    quantizer = faiss.ProductQuantizer(WIDTH, PARTS, 8)
    faiss.copy_array_to_vector(codec.centroids.ravel(), quantizer.centroids)
    codes = codec.encode(features)
    assert codes.tolist() == quantizer.compute_codes(features).tolist()
    decoded = normalized(np.asarray(quantizer.decode(codes)))  # type: ignore[call-arg, func-returns-value]
    np.testing.assert_allclose(codec.decode(codes).astype(np.float32), decoded, atol=1e-3)
    assert (decoded * features).sum(axis=1).mean() > 0.95


def test_more_bytes_are_nearer() -> None:
    features = normalized(drawn(600, 1))
    near = []
    for parts in (1, 4, 16):
        codec = train_codec(features, parts)
        near.append(float((codec.decode(codec.encode(features)).astype(np.float32) * features).sum(axis=1).mean()))
    assert near == sorted(near)
    assert near[-1] > 0.999


def block(features: Floats, first: int, stored: Stored) -> Block:
    codes = np.random.default_rng(first).integers(0, 5, size=(len(features), 3)).astype(np.int16)
    pictures = [Picture(f"{first + row}.png", f"photos/{first + row}.png") for row in range(len(features))]
    return Block(codes, pictures, stored, unknown(len(features)))


def test_an_index_keeps_them_through_changes(tmp_path: Path) -> None:
    features = drawn(400, 2)
    codec = train_codec(features[:300], PARTS)
    stored = stored_features(features, codec)
    folder = small_index(tmp_path / "index", block(features[:300], 0, stored[:300]), codec)
    removed = np.arange(0, 20)
    with changing(folder) as gallery:
        assert gallery.segments[0].codec is not None
        replace_pictures(gallery, removed=removed, added=block(features[300:], 300, stored[300:]), source="test")
    for _ in range(2):
        gallery = read_gallery(folder)
        assert gallery.stored_features().tolist() == stored[20:].tolist()
        assert gallery.read_features().tolist() == codec.decode(stored[20:]).tolist()
        assert gallery.read_features().dtype == np.float16
        merge_all(folder)
    assert len(read_gallery(folder).segments) == 1


def test_an_index_that_cannot_have_them_says_why(chain: Chain, tmp_path: Path) -> None:
    config = build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "index", compact_features=8)
    with pytest.raises(BadInput, match=f"need at least {CENTROIDS} pictures, there are 48: leave them whole"):
        build_index.main(config)
    with pytest.raises(BadInput, match=r"cannot be cut into 5 equal parts: name one of 1, 2, 4, 8, 16$"):
        train_codec(drawn(300, 3), 5)
