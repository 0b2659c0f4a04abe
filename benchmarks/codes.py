"""Synthetic codes for pools larger than any data at hand: speed and size depend on them, quality is not measured."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

CLUSTERS = 4096
POPULARITY = 2.0  # exponent of the clusters' skew
SPREAD = (4.0, 2.5, 1.5, 1.0)  # how closely a cluster's pictures share the code of each level; 1 is not at all


def synthetic_codes(pictures: int, *, levels: int = 4, codebook_size: int = 1024, seed: int = 0) -> NDArray[np.int16]:
    """Codes (pictures, levels) that share prefixes as an image tokenizer's do: few first codes are common, and pictures
    of a cluster agree on early levels more than on late ones."""
    generator = np.random.default_rng(seed)
    clusters = drawn_clusters(generator, pictures)
    codes = np.empty((pictures, levels), dtype=np.int16)
    for level in range(levels):
        favourites = generator.integers(codebook_size, size=CLUSTERS)
        names = generator.permutation(codebook_size)
        codes[:, level] = drawn_codes(generator, favourites[clusters], names, level)
    return codes


def synthetic_blocks(
    pictures: int, *, block: int = 1 << 22, levels: int = 4, codebook_size: int = 1024, seed: int = 0
) -> Iterator[NDArray[np.int16]]:
    """Codes of the same kind, in blocks (at most `block`, levels): they share clusters, and are never all held."""
    generator = np.random.default_rng(seed)
    favourites = generator.integers(codebook_size, size=(levels, CLUSTERS))
    names = [generator.permutation(codebook_size) for _ in range(levels)]
    for number, start in enumerate(range(0, pictures, block)):
        own = np.random.default_rng((seed, number))
        clusters = drawn_clusters(own, min(block, pictures - start))
        columns = [drawn_codes(own, favourites[level][clusters], names[level], level) for level in range(levels)]
        yield np.stack(columns, axis=1).astype(np.int16)


def drawn_clusters(generator: np.random.Generator, pictures: int) -> NDArray[np.int64]:
    return (CLUSTERS * generator.random(pictures) ** POPULARITY).astype(np.int64)


def drawn_codes(
    generator: np.random.Generator, favourites: NDArray[np.int64], names: NDArray[np.int64], level: int
) -> NDArray[np.int64]:
    """One level's codes (pictures,), each near its cluster's favourite (pictures,)."""
    size = len(names)
    drawn = (size * generator.random(len(favourites)) ** SPREAD[min(level, len(SPREAD) - 1)]).astype(np.int64)
    return names[(favourites + drawn) % size]
