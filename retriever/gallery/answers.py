"""What a search answers with, and which of the pictures that it ranked it shows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.errors import BadInput
from tools.features import Floats, Rows, normalized
from tools.files import is_file
from tools.interpolation import COSINE_SCALE, interpolated
from tools.pictures import small_copy, why_unreadable

from ..beam import RankedPictures
from .advice import rebuild
from .gallery import Gallery
from .query_encoder import cosines

FOLD = 0.99  # cosine from which pictures are near-duplicates (docs/search.md has the measurement)
ROUNDING = 1e-6  # so that equal pictures are near-duplicates at 1, too
FIRST_FOLDED = 50  # pictures that are looked at first where all are ranked
FEATURES = "features"  # what the reranker's test calls their score
WIDEST = 1000  # beams of a search that needs more pictures than those it folded


class Found(NamedTuple):
    """One picture of an answer."""

    image: str
    """Its id."""
    file: Path
    """Where it lies; of an exported folder without its pictures, where it would."""
    score: float
    """The higher the better; comparable within one answer."""
    codes: tuple[int, ...]
    """(levels,) what its vokens say"""
    similarity: float | None = None
    """Cosine of its feature with the query's; None where the index keeps no features, or the search encoded none"""
    folded: tuple["Found", ...] = ()
    """Its near-duplicates among the pictures found, best first, where the search folds them"""

    @property
    def gone(self) -> bool:
        """Whether its file is not there any more, or in a folder that cannot be entered."""
        return not is_file(self.file)

    def thumbnail(self, side: int) -> Image.Image:
        """The picture as a person sees it, drawn small: its longer side has at most `side` pixels.

        Raises:
            BadInput: its file is gone or damaged.
        """
        try:
            return small_copy(self.file, side)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise BadInput(f"{self.image}: {why_unreadable(error)}") from None


class Voken(NamedTuple):
    """A voken that may be written at one step."""

    token: str
    """As the tokenizer has it, for example <v0_17>."""
    code: int
    probability: float
    """Among those that pictures of the index have behind the same vokens: over all of them, it sums to 1."""


class Step(NamedTuple):
    """One voken of a picture, as the language model sees it."""

    written: Voken
    log_probability: float
    """Under the softmax that scores a search; summed over the levels it is the retriever's score of the picture."""
    allowed: int
    """How many vokens pictures of the index have here."""
    alternatives: list[Voken]
    """The most probable of them, best first; the one that was written is among them where it is."""


class Ranked(NamedTuple):
    """Pictures in their order."""

    rows: Rows
    """(pictures,) of the gallery"""
    scores: NDArray[np.floating]
    """(pictures,)"""
    similarities: Floats | None
    """(pictures,) cosines with the query's feature, where they are known"""

    def some(self, places: "Rows | slice") -> "Ranked":
        similarities = None if self.similarities is None else self.similarities[places]
        return Ranked(self.rows[places], self.scores[places], similarities)


class Selection(NamedTuple):
    """Which of the ranked pictures are shown."""

    k: int
    """At most."""
    min_similarity: float | None = None
    """Cosine with the query below which none is shown."""
    fold: float | None = None
    """Cosine from which a picture is folded under a better one."""

    @classmethod
    def of(cls, gallery: Gallery, *, k: int, min_similarity: float | None, fold: bool | float) -> "Selection":
        """
        Args:
            fold: True stands for `FOLD`.

        Raises:
            BadInput: a number is out of range, or a cut-off is given and the index keeps no features.
        """
        at = FOLD if fold is True else None if fold is False else float(fold)
        for name, value in (("min_similarity", min_similarity), ("fold", at)):
            if value is not None and not -1 <= value <= 1:
                raise BadInput(f"{name} is a cosine, -1 to 1, not {value}")
        if k < 1:
            raise BadInput(f"k must be at least 1, it is {k}")
        if min_similarity is not None:
            need_features(gallery)
        return cls(k, min_similarity, at)

    def apply(self, gallery: Gallery, ranked: Ranked) -> tuple[list[Found], bool]:
        """The pictures to show, and whether a longer ranking could show more in the place of those it folds."""
        count = len(ranked.rows)
        if self.min_similarity is not None and ranked.similarities is not None:
            ranked = ranked.some(np.flatnonzero(ranked.similarities >= self.min_similarity))
        if self.fold is None:
            return [found(gallery, ranked, place) for place in range(min(self.k, len(ranked.rows)))], False
        groups = folded(gallery, ranked.rows, self.fold, most=self.k)
        shown = [
            found(gallery, ranked, best)._replace(folded=tuple(found(gallery, ranked, other) for other in others))
            for best, *others in groups
        ]
        return shown, len(shown) < self.k and len(ranked.rows) == count and len(shown) < count

    def apply_to_all(self, gallery: Gallery, ranked: Ranked) -> list[Found]:
        """The same of a ranking of all pictures, looking no further down than it needs to."""
        if self.min_similarity is not None and ranked.similarities is not None:
            ranked = ranked.some(np.flatnonzero(ranked.similarities >= self.min_similarity))
        most = self.k if self.fold is None else max(self.k, FIRST_FOLDED)
        while True:
            shown, more = self.apply(gallery, ranked.some(slice(most)))
            if not more or most >= len(ranked.rows):
                return shown
            most *= 2


def folded(gallery: Gallery, rows: Rows, at: float, *, most: int) -> list[list[int]]:
    """Places of ranked rows in groups of near-duplicates, the best first in each; the first groups, `most` of them.

    Near-duplicates are those whose features have a cosine of at least `at` with the best one's. Where no features are
    kept, they have its codes: all of them, or all but the last where that was chosen anew to tell equal codes apart.
    """
    if gallery.keeps_features:
        features = normalized(gallery.read_features(rows).astype(np.float32))  # again, as halves they were rounded
    else:
        codes = gallery.read_codes(rows)
        codes = codes[:, : max(1, codes.shape[1] - bool(gallery.facts["resolve_collisions"]))]
    left = np.arange(len(rows))
    groups: list[list[int]] = []
    while len(left) and len(groups) < most:
        best = left[0]
        if gallery.keeps_features:
            near = features[left] @ features[best] >= at - ROUNDING
        else:
            near = (codes[left] == codes[best]).all(axis=1)
        near[0] = True  # whatever the threshold
        groups.append(left[near].tolist())
        left = left[~near]
    return groups


def found(gallery: Gallery, ranked: Ranked, place: int) -> Found:
    """One picture of a ranking."""
    row = int(ranked.rows[place])
    similarity = None if ranked.similarities is None else float(ranked.similarities[place])
    image, file = gallery.picture(row)
    return Found(image, gallery.files_below / file, float(ranked.scores[place]), gallery.code(row), similarity)


def need_features(gallery: Gallery) -> None:
    """Refuse an index that keeps no features where they are asked for."""
    if not gallery.keeps_features:
        raise BadInput(f"{gallery.folder} keeps no features to search by: {rebuild(gallery)}")


def compared(gallery: Gallery, pictures: RankedPictures, text: Floats | None) -> Ranked:
    """What the beams found, in their order, with its cosines with a query's feature (width,), where they are known."""
    rows, scores = np.array(pictures.rows, dtype=np.int64), np.array(pictures.scores, dtype=np.float64)
    if text is None or not gallery.keeps_features:
        return Ranked(rows, scores, None)
    return Ranked(rows, scores, cosines(text, gallery, rows))


def reordered(ranked: Ranked, share: float, taken_off: Floats | None = None) -> Ranked:
    """The same pictures by the interpolation of their scores and cosines; equal ones keep their order.

    Args:
        share: of the cosines; 0: the order stays.
        taken_off: (pictures,) of the cosines (models/hubness.py).
    """
    if not share:
        return ranked
    assert ranked.similarities is not None, "an index without features is not re-ranked"
    nearness = ranked.similarities if taken_off is None else ranked.similarities - taken_off
    scores = interpolated(ranked.scores, {FEATURES: COSINE_SCALE * nearness}, {FEATURES: share})
    return ranked._replace(scores=scores).some(np.argsort(-scores, kind="stable"))
