"""How a gallery keeps its pictures' features: as halves, or as product-quantised codes of a few bytes a picture.

Product quantisation (Jégou et al., 2011) cuts a feature into parts and keeps, for each, the number of the nearest of
256 centroids. The centroids are trained once, when the index is built, and stay: `centroids.npy` lies in the segment
that has the tree.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.errors import BadInput
from tools.features import Floats, normalized

CENTROIDS = 256  # of each part: one byte names one
SEED = 1234
BLOCK = 65_536  # rows of features that are in memory at once, and that centroids are trained on

HalfFloats = NDArray[np.float16]
Stored = NDArray[Any]
"""(pictures, width) float16, or (pictures, parts) uint8 of a `Codec`"""


class Codec(NamedTuple):
    """A product quantiser."""

    centroids: Floats
    """(parts, CENTROIDS, width / parts)"""

    def encode(self, features: Floats) -> NDArray[np.uint8]:
        """Codes (pictures, parts) of features (pictures, width) below BLOCK, of length 1."""
        parts = features.reshape(len(features), len(self.centroids), -1)
        codes = np.empty(parts.shape[:2], dtype=np.uint8)
        for number, centroids in enumerate(self.centroids):
            products = parts[:, number] @ centroids.T
            codes[:, number] = ((centroids**2).sum(axis=1) - 2 * products).argmin(axis=1)
        return codes

    def decode(self, codes: NDArray[np.uint8]) -> HalfFloats:
        """Features (pictures, width) of length 1 that codes (pictures, parts) stand for."""
        found = self.centroids[np.arange(len(self.centroids)), codes].reshape(len(codes), -1)
        return normalized(found).astype(np.float16)


def train_codec(features: Floats, parts: int) -> Codec:
    """The product quantiser of features (pictures, width), by faiss's k-means.

    Raises:
        BadInput: there are fewer pictures than centroids, or the width cannot be cut into so many parts.
    """
    import faiss  # elsewhere nothing of the gallery needs it

    pictures, width = features.shape
    if pictures < CENTROIDS:
        raise BadInput(f"compact features need at least {CENTROIDS} pictures, there are {pictures}: leave them whole")
    if parts < 1 or width % parts:
        fits = [number for number in range(1, width + 1) if width % number == 0]
        numbers = ", ".join(map(str, fits))
        raise BadInput(f"features of {width} numbers cannot be cut into {parts} equal parts: name one of {numbers}")
    quantizer = faiss.ProductQuantizer(width, parts, CENTROIDS.bit_length() - 1)
    quantizer.cp.seed, quantizer.cp.min_points_per_centroid = SEED, 1
    rows = np.random.default_rng(SEED).permutation(pictures)[:BLOCK]
    quantizer.train(normalized(features[np.sort(rows)]))
    return Codec(faiss.vector_to_array(quantizer.centroids).reshape(parts, CENTROIDS, width // parts).copy())


def stored_features(features: Floats, codec: Codec | None) -> Stored:
    """Features (pictures, width) as a gallery keeps them: divided by their L2 norm, as halves or as codes."""
    blocks = [normalized(features[start : start + BLOCK]) for start in range(0, max(1, len(features)), BLOCK)]
    return np.concatenate([block.astype(np.float16) if codec is None else codec.encode(block) for block in blocks])
