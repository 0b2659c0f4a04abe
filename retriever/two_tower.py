"""The speed of two-tower search, encoding of the queries included, beside that of generation."""

import time
from typing import TYPE_CHECKING

from models.compute import pick_device, pick_dtype
from tools.features import Features, Floats

from .flat_index import flat_index

if TYPE_CHECKING:
    from models.clip import TextEncoder  # a search without a guide needs no open_clip

SPEED_QUERIES = 512
BATCH = 64


def query_encoder(features: Features, device: str | None = None) -> "TextEncoder":
    """The text tower that queries of two-tower search go through.

    Args:
        features: whose model it is.
    """
    from models.clip import TextEncoder

    place = pick_device(device)
    return TextEncoder.recorded(features.manifest.facts, place, pick_dtype("auto", place))


def encoded(encoder: "TextEncoder", texts: list[str]) -> Floats:
    """Features (texts, width) of one batch."""
    found: Floats = encoder.encode_batch(encoder.tokens(texts)).cpu().numpy()
    return found


def encoding_seconds(features: Features, texts: list[str], *, device: str | None = None) -> float:
    """What tokenising and encoding all texts takes in batches of 64, from up to 512 of them, after one of warm-up."""
    encoder = query_encoder(features, device)
    some = sorted(texts[:: max(1, len(texts) // SPEED_QUERIES)][:SPEED_QUERIES], key=len)
    encoded(encoder, some[:BATCH])
    began = time.monotonic()
    for start in range(0, len(some), BATCH):
        encoded(encoder, some[start : start + BATCH])
    return (time.monotonic() - began) * len(texts) / len(some)


def queries_per_second(features: Features, texts: list[str], pool: Floats, *, device: str | None = None) -> float:
    """Speed of tokenising, encoding and searching up to 512 queries, in batches of 64, after one batch of warm-up.

    Text tower and search run on the same device.
    """
    encoder = query_encoder(features, device)
    index = flat_index(pool, encoder.device)
    texts = sorted(texts[:: max(1, len(texts) // SPEED_QUERIES)][:SPEED_QUERIES], key=len)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    index.search(encoded(encoder, batches[0]), keep=10)
    began = time.monotonic()
    for batch in batches:
        index.search(encoded(encoder, batch), keep=10)
    return len(texts) / (time.monotonic() - began)
