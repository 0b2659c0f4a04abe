"""Synthetic codes for pools larger than any data at hand: speed and size depend on them, quality is not measured."""

import numpy as np
from numpy.typing import NDArray

CLUSTERS = 4096
POPULARITY = 2.0  # exponent of the clusters' skew
SPREAD = (4.0, 2.5, 1.5, 1.0)  # how closely a cluster's pictures share the code of each level; 1 is not at all


def synthetic_codes(pictures: int, *, levels: int = 4, codebook_size: int = 1024, seed: int = 0) -> NDArray[np.int16]:
    """Codes (pictures, levels) that share prefixes as an image tokenizer's do: few first codes are common, and pictures
    of a cluster agree on early levels more than on late ones."""
    generator = np.random.default_rng(seed)
    clusters = (CLUSTERS * generator.random(pictures) ** POPULARITY).astype(np.int64)
    codes = np.empty((pictures, levels), dtype=np.int16)
    for level in range(levels):
        favourites = generator.integers(codebook_size, size=CLUSTERS)
        names = generator.permutation(codebook_size)
        drawn = (codebook_size * generator.random(pictures) ** SPREAD[min(level, len(SPREAD) - 1)]).astype(np.int64)
        codes[:, level] = names[(favourites[clusters] + drawn) % codebook_size]
    return codes
