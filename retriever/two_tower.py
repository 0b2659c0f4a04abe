"""The text tower of two-tower search, and the speed of the whole search beside generation."""

import time

import torch

from models.clip import encode_tokens, load_recorded, trim_padding
from models.compute import autocast, pick_device, pick_dtype
from tools.features import Features, Floats

from .flat_index import flat_index

SPEED_QUERIES = 512
BATCH = 64


class QueryTower:
    """The text tower that queries of two-tower search go through, with its tokenizer, on a device.

    Args:
        features: whose model it is.
    """

    def __init__(self, features: Features, device: str | None = None) -> None:
        self.clip = load_recorded(features.manifest.facts)
        self.device = pick_device(device)
        self.dtype = pick_dtype("auto", self.device)
        self.clip.model.text.to(self.device)

    def encode(self, texts: list[str]) -> Floats:
        """Features (texts, width) of one batch."""
        with torch.inference_mode(), autocast(self.device, self.dtype):
            tokens = trim_padding(self.clip, self.clip.tokenizer(texts)).to(self.device)
            found: Floats = encode_tokens(self.clip, tokens).cpu().numpy()
        return found


def queries_per_second(features: Features, texts: list[str], pool: Floats, *, device: str | None = None) -> float:
    """Speed of tokenising, encoding and searching up to 512 queries, in batches of 64, after one batch of warm-up.

    Text tower and search run on the same device.
    """
    tower = QueryTower(features, device)
    index = flat_index(pool, tower.device)
    texts = sorted(texts[:: max(1, len(texts) // SPEED_QUERIES)][:SPEED_QUERIES], key=len)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    index.search(tower.encode(batches[0]), keep=10)
    began = time.monotonic()
    for batch in batches:
        index.search(tower.encode(batch), keep=10)
    return len(texts) / (time.monotonic() - began)
