"""Two-tower features of texts that were written for pictures, by the model that made the pictures' features."""

from collections.abc import Iterator, Sequence

import numpy as np

from models.clip import encode_texts, load_recorded
from models.compute import Precision, pick_device, pick_dtype
from tools.features import Floats
from tools.runs import Manifest

from .candidates import Candidates


class TextTower:
    """The text tower that made the features."""

    def __init__(self, features: Manifest, *, precision: Precision, device: str | None) -> None:
        self.clip = load_recorded(features.facts)
        self.device = pick_device(device)
        self.clip.model.text.to(device=self.device, dtype=pick_dtype(precision, self.device))

    def candidates(self, written: Sequence[list[str]]) -> Iterator[Candidates]:
        """For each list of texts their features."""
        found = self._encode([text for texts in written for text in texts])
        ends = np.cumsum([len(texts) for texts in written])
        for texts, end in zip(written, ends, strict=True):
            yield Candidates(texts, found[end - len(texts) : end])

    def _encode(self, texts: list[str]) -> Floats:
        """Features (texts, width), computed in batches of similar length."""
        if not texts:
            return np.zeros((0, 0), np.float32)
        return encode_texts(self.clip, texts, self.device).cpu().numpy()
