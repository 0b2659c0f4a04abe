"""Two-tower search as every table measures it: over the whole pool, so that each picture has a rank.

A retriever ranks the pictures of a list alone: its mean reciprocal rank counts a picture outside of it as 0.
"""

import numpy as np

from .features import Features, Floats, Rows, normalized
from .recall import Ranks, Report, report, search_ranks


def two_tower_ranks(
    features: Features, captions: Rows, pool: Rows, *, pictures: Floats | None = None, taken_off: Floats | None = None
) -> Ranks:
    """Rank of each caption's picture in brute-force search by cosine; equal scores go to the lower row.

    Args:
        captions: (queries,) rows of the features' texts, each of a picture in the pool.
        pool: (pool,) rows of the pictures that may be found, in rising order.
        pictures: (pictures, width) to search in place of the features' own: what their codes decode to, for example.
        taken_off: (pool,) of the cosines with each picture (models/hubness.py).
    """
    images = features.images if pictures is None else pictures
    places = np.searchsorted(pool, features.owners[captions])
    queries, found = normalized(features.texts[captions]), normalized(images[pool])
    if taken_off is not None:
        queries = np.concatenate([queries, np.ones((len(queries), 1), dtype=queries.dtype)], axis=1)
        found = np.concatenate([found, -taken_off[:, None]], axis=1)
    return search_ranks(queries, found, places)


def two_tower_recall(
    features: Features, captions: Rows, pool: Rows, *, pictures: Floats | None = None, taken_off: Floats | None = None
) -> Report:
    """Figures of brute-force search; arguments as in `two_tower_ranks`."""
    return report(two_tower_ranks(features, captions, pool, pictures=pictures, taken_off=taken_off))
