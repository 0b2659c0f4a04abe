"""Hubness: how near a picture is to captions of every kind, which a search takes off its cosines.

In spaces of many dimensions a few pictures, hubs, are among the nearest of very many queries, whatever these ask for
(Radovanovic et al. 2010). A search that is corrected for it ranks pictures by

    cos(text, picture)  -  strength * hubness(picture)
    hubness(picture) = log(mean over captions of exp(sharpness * cos(caption, picture))) / sharpness

as the query banks of Bogolin et al. (QB-Norm, CVPR 2022) do with the captions of the train split. The centres of their
clusters stand for the captions here, so that a picture's hubness is a few hundred products, and no index stores it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tools.features import Features, Floats
from tools.recall import clearly_better
from tools.two_tower import two_tower_ranks

from .quantizer import kmeans, nearest

SHARPNESS = 20.0
LANDMARKS = 512  # centres at most; fewer captions stand for themselves
MOST_CAPTIONS, ITERATIONS = 16_384, 10  # of the k-means
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # that are tried
USUAL_STRENGTH = 0.5  # good for most data: another one has to be clearly better
BLOCK = 8192  # pictures at once


class Hubness(NamedTuple):
    """The captions of a data set, summed up, and how much of a picture's nearness to them a search takes off."""

    landmarks: Tensor
    """(landmarks, features) centres of captions' unit features"""
    shares: Tensor
    """(landmarks,) logarithm of the share of captions around each"""
    strength: float = USUAL_STRENGTH
    """0 switches the correction off."""

    def of(self, pictures: Tensor) -> Tensor:
        """Hubness (pictures,) of features (pictures, features), whose lengths do not matter."""
        products = F.normalize(pictures.float(), dim=1) @ self.landmarks.T
        return torch.logsumexp(SHARPNESS * products + self.shares, dim=1) / SHARPNESS

    def taken_off(self, pictures: Floats) -> Floats:
        """What a search takes off the cosines of pictures (pictures, features): (pictures,)."""
        if not self.strength:
            return np.zeros(len(pictures), dtype=np.float32)
        blocks = (pictures[start : start + BLOCK] for start in range(0, len(pictures), BLOCK))
        found = [self.of(torch.tensor(block, device=self.landmarks.device)) for block in blocks]
        taken: Floats = (self.strength * torch.cat(found)).cpu().numpy() if found else np.zeros(0, dtype=np.float32)
        return taken

    def to(self, device: torch.device) -> "Hubness":
        """The same on a device."""
        return self._replace(landmarks=self.landmarks.to(device), shares=self.shares.to(device))


@torch.no_grad()
def fit_hubness(features: Features, *, seed: int = 0) -> Hubness | None:
    """Sum up the train captions, and choose the strength by two-tower search on val; None without train captions."""
    rows = features.text_rows("train")
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_CAPTIONS])
    count = min(LANDMARKS, len(rows))
    if not count:
        return None
    texts = F.normalize(torch.tensor(features.texts[rows]).float(), dim=1)
    landmarks = kmeans(texts, count, iterations=ITERATIONS, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(nearest(texts, landmarks), minlength=count).clamp_min(1)
    found = Hubness(landmarks, (counts / counts.sum()).log())
    return found._replace(strength=best_strength(found, features))


def best_strength(hubness: Hubness, features: Features, *, pictures: Floats | None = None) -> float:
    """The strength with which two-tower search has the highest mean recall on val.

    The usual strength stays unless another is clearly better, and where there are no val captions.

    Args:
        pictures: (pictures, width) to search in place of the features' own.
    """
    captions, pool = features.text_rows("val"), features.captioned_rows("val")
    if not len(captions):
        return USUAL_STRENGTH
    images = features.images if pictures is None else pictures
    found = hubness._replace(strength=1.0).taken_off(images[pool])
    ranks = {
        strength: two_tower_ranks(features, captions, pool, pictures=images, taken_off=strength * found)
        for strength in STRENGTHS
    }
    chosen = USUAL_STRENGTH
    for strength in STRENGTHS:
        if clearly_better(ranks[strength], ranks[chosen]):
            chosen = strength
    return chosen
