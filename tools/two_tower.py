"""Two-tower search as every table measures it: over the whole pool, so that each picture has a rank.

A retriever ranks the pictures of a list alone: its mean reciprocal rank counts a picture outside of it as 0.
"""

import numpy as np

from .features import Features, Floats, Rows, normalized
from .recall import Report, search_recall


def two_tower_recall(features: Features, captions: Rows, pool: Rows, *, pictures: Floats | None = None) -> Report:
    """Figures of brute-force search by cosine; equal scores go to the lower row.

    Args:
        captions: (queries,) rows of the features' texts, each of a picture in the pool.
        pool: (pool,) rows of the pictures that may be found, in rising order.
        pictures: (pictures, width) to search in place of the features' own: what their codes decode to, for example.
    """
    images = features.images if pictures is None else pictures
    places = np.searchsorted(pool, features.owners[captions])
    return search_recall(normalized(features.texts[captions]), normalized(images[pool]), places)
