"""A retriever as a model that MTEB evaluates: its search interface (`mteb.SearchProtocol`) over any text-to-image task.

    import mteb
    results = mteb.evaluate(MtebRetriever(Retriever.from_pretrained(folder)), mteb.get_task("Flickr30kT2IRetrieval"))

The pictures of a task are encoded and tokenized by the retriever's own models, as pictures that are added to an index
are, and searched by its beam search. Pictures that the index of the retriever has keep their vokens: those are what it
may have been trained on. Nothing is written, and the index stays as it is.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tools import runs
from tools.errors import BadInput
from tools.features import Floats, Rows, normalized
from tools.logs import progress
from tools.texts import clean, plural
from tools.trec import falling

from ..beam import RankedPictures
from ..queries import LiveQueries
from ..retrieve import needs_features, search_queries
from .add import code
from .answers import Ranked, reordered
from .api import BATCH, BEAMS, RERANKED_BEAMS, Retriever, check_counts
from .by_picture import PictureEncoder, read_picture
from .compact import BLOCK as FEATURE_BLOCK
from .compact import HalfFloats
from .gallery import Gallery
from .query_encoder import query_features

SAME = 0.999  # cosine above which a picture of a task is taken for one of the index
BLOCK = 1024  # pictures of a task that are compared with the index at once
CATEGORY = "t2i"
Lists = dict[str, dict[str, float]]
"""For each query's id the pictures found and their scores, best first."""


class Pool(NamedTuple):
    """The pictures of a task."""

    images: list[str]
    codes: NDArray[np.int64]
    """(pictures, levels)"""
    features: HalfFloats
    """(pictures, width), normalised"""
    known: int
    """How many of them the retriever's index has."""


class Searched(NamedTuple):
    """One search of a task."""

    setting: str
    lists: Lists


class MtebRetriever:
    """Searches the pictures of a task for its queries.

    Attributes:
        searched: for each subset and split of the last task what was found.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        name: str = "avg/retriever",
        beams: int | None = None,
        keep: int | None = None,
        guided: bool = True,
        rerank: bool = True,
        share: float | None = None,
    ) -> None:
        """
        Args:
            name: in the results, "owner/name".
            beams: codes kept at each level; by default 50, and 10 without features, as `Retriever.search` has them.
            keep: pictures that a list has at most; by default as many as beams.
            guided, rerank, share: as in `Retriever.search`.

        Raises:
            BadInput: a number is out of range, the name is none, or features are asked for and none are kept.
        """
        check_counts(beams=beams, keep=keep)
        if len([part for part in name.split("/") if part]) != 2:
            raise BadInput(f"{name!r} is no name of a model for MTEB: write owner/name")
        self.retriever, self.name = retriever, name
        self.searched: dict[tuple[str, str], Searched] = {}
        self.share = retriever.share_of_features(rerank=rerank, share=share)
        self.beams = beams or (RERANKED_BEAMS if self.share else BEAMS)
        self.keep = keep or self.beams
        self.guide = retriever.guide if guided else None
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The pictures of the task that was indexed last."""
        if self._pool is None:
            raise BadInput("no task's pictures are indexed: call index before search, as mteb.evaluate does")
        return self._pool

    @property
    def setting(self) -> str:
        """Whether the retriever was trained on pictures of the task: transductive, or inductive.

        A retriever that was trained on pseudo queries is transductive where its index has a picture of the task.
        """
        source = self.retriever.source
        trained = source.card if source.trained is None else source.trained.facts
        setting = str((trained or {}).get("setting", "inductive"))
        return setting if self.pool.known or not self.retriever.gallery.keeps_features else "inductive"

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB writes beside its figures. Its cache of results goes by the revision: it tells model and search."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty(
            {
                "name": self.name,
                "revision": self.revision,
                "modalities": ["text", "image"],
                "framework": ["PyTorch"],
                "experiment_kwargs": self.options,
            }
        )

    @property
    def options(self) -> dict[str, Any]:
        """How it searches."""
        return {"beams": self.beams, "keep": self.keep, "guided": self.guide is not None, "features_share": self.share}

    @property
    def revision(self) -> str:
        """Hash of the models and of how they search."""
        gallery = self.retriever.gallery
        parts = [
            runs.fingerprint(self.retriever.source.model), gallery.codebooks_hash, gallery.facts["clip"]["content"],
            self.options, str(self.retriever.precision), self.retriever.scoring,
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def index(self, corpus: Any, *, task_metadata: Any, encode_kwargs: Any = None, **_: Any) -> None:
        """Encode and tokenize the pictures of a task.

        Args:
            corpus: a `datasets.Dataset` with the columns id and image.
            encode_kwargs: batch_size: pictures that are encoded at once.

        Raises:
            BadInput: the task does not ask with texts for pictures, an id stands there twice, or a picture cannot be
                read.
        """
        check_task(task_metadata, corpus)
        images = [str(image) for image in corpus["id"]]
        if repeated := [image for image, count in Counter(images).items() if count > 1]:
            count = plural(len(repeated), "such id")
            raise BadInput(f"{task_metadata.name}: several pictures have the id {repeated[0]!r} ({count})")
        features = self._encoded(corpus, images, int((encode_kwargs or {}).get("batch_size", BATCH)))
        self._pool = pool_of(self.retriever.gallery, images, features, self.retriever.device)
        print(
            f"{task_metadata.name}: {len(images):,} pictures, {self.pool.known:,} of them in the retriever's own "
            f"index; {self.setting}"
        )

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Any = None,
        **_: Any,
    ) -> Lists:
        """Search the pictures for every query.

        Args:
            queries: a `datasets.Dataset` with the columns id and text.
            top_k: pictures of a list at most; there are never more than `keep`.
            top_ranked: of tasks that give pictures to reorder, which this model does not.

        Returns:
            A list for each query; the scores fall strictly, as MTEB orders equal ones by their ids.

        Raises:
            BadInput: the task gives pictures to reorder, or a query is empty.
        """
        if top_ranked is not None:
            raise BadInput(
                f"{task_metadata.name} gives pictures to reorder, and this model searches: choose another task"
            )
        if "instruction" in queries.column_names:
            print(f"{task_metadata.name}: the instructions of the queries are not read")
        names, texts = [str(name) for name in queries["id"]], list(queries["text"])
        for name, text in zip(names, texts, strict=True):
            if not isinstance(text, str) or not clean(text):
                raise BadInput(f"{task_metadata.name}: query {name} has no text to search with")
        keep = min(top_k, self.keep)
        pool = self.pool
        lists = {
            name: {
                pool.images[row]: score
                for row, score in zip(ranked.rows[:keep].tolist(), falling(ranked.scores[:keep]).tolist(), strict=True)
            }
            for name, ranked in zip(names, self._ranked([clean(text) for text in texts]), strict=True)
        }
        self.searched[hf_subset, hf_split] = Searched(self.setting, lists)
        return lists

    def _ranked(self, texts: list[str]) -> Iterator[Ranked]:
        """What the beams find for each text, in the final order."""
        writer, pool = self.retriever.writer, self.pool
        reads = needs_features(writer.lm, self.guide)
        seen = self._text_features(texts) if reads or self.share else None
        found = search_queries(
            writer, LiveQueries(writer.lm, texts), pool.codes, np.arange(len(pool.images)), beams=self.beams,
            keep=self.beams, batch_size=BATCH, scoring=self.retriever.scoring, guide=self.guide,
            features=seen if reads else None, quiet=True,
        )  # fmt: skip
        for place, pictures in enumerate(found):
            yield self._reordered(pictures, None if seen is None else seen[place])

    def _reordered(self, pictures: RankedPictures, text: Floats | None) -> Ranked:
        rows = np.array(pictures.rows, dtype=np.int64)
        scores, features = np.array(pictures.scores, dtype=np.float64), self.pool.features[rows].astype(np.float32)
        hubness = self.retriever.hubness
        nearness = None if text is None else features @ text
        return reordered(Ranked(rows, scores, nearness), self.share, hubness and hubness.taken_off(features))

    def _text_features(self, texts: Sequence[str]) -> Floats:
        """Features (texts, width), normalised."""
        encoder = self.retriever._query_encoder()
        with torch.inference_mode():
            blocks = [query_features(encoder, texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return np.concatenate(blocks)

    def _encoded(self, corpus: Any, images: list[str], batch_size: int) -> Floats:
        """Features (pictures, width) of a task's pictures, not normalised."""
        from models.clip import encode_images

        tower = PictureEncoder(self.retriever.gallery, self.retriever.precision, self.retriever.device)
        blocks = []
        for start in progress(range(0, len(images), batch_size), "encoding"):
            pixels = [tower.clip.preprocess(picture) for picture in read_pictures(corpus, images, start, batch_size)]
            with torch.inference_mode():
                blocks.append(encode_images(tower.clip, torch.stack(pixels)).cpu().numpy())
        return np.concatenate(blocks)


def check_task(task_metadata: Any, corpus: Any) -> None:
    """Refuse tasks that do not ask with texts for pictures."""
    if task_metadata.category not in (None, CATEGORY) or "image" not in corpus.column_names:
        raise BadInput(
            f"{task_metadata.name} is a task of category {task_metadata.category}, and a retriever finds pictures for "
            f"texts: choose one of category {CATEGORY} (mteb.get_tasks(categories=['{CATEGORY}']))"
        )
    if not len(corpus):
        raise BadInput(f"{task_metadata.name} has no pictures to search")


def read_pictures(corpus: Any, images: list[str], start: int, count: int) -> Iterator[Any]:
    """Some pictures of a task, as a person sees them."""
    try:
        pictures = corpus[start : start + count]["image"]
    except Exception as error:  # the data set decodes its pictures, and Pillow raises many kinds
        raise BadInput(f"one of the pictures {images[start]} and following cannot be read ({error})") from None
    for image, picture in zip(images[start : start + count], pictures, strict=True):
        if picture is None:
            raise BadInput(f"picture {image} of the task is missing")
        try:
            yield read_picture(picture)
        except BadInput as error:
            raise BadInput(f"picture {image} of the task: {error}") from None


def pool_of(gallery: Gallery, images: list[str], features: Floats, device: torch.device) -> Pool:
    """A task's pictures with their codes: those of the gallery keep theirs, and their features.

    Args:
        features: (pictures, width), not normalised.
    """
    halves = normalized(features).astype(np.float16)
    rows = known_rows(gallery, images, halves)
    known, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    there = gallery.read_codes(rows[known])
    codes = np.empty((len(images), there.shape[1]), dtype=np.int64)
    codes[known] = there
    if len(new):
        codes[new] = code(gallery, features[new], lambda prefixes: there, device)
    if gallery.keeps_features:
        halves[known] = gallery.read_features(rows[known])
    return Pool(images, codes, halves, len(known))


def same(feature: HalfFloats, other: HalfFloats) -> bool:
    """Whether two features (width,) of length 1 are one picture's."""
    return bool(feature.astype(np.float32) @ other.astype(np.float32) > SAME)


def known_rows(gallery: Gallery, images: list[str], features: HalfFloats) -> Rows:
    """Row (pictures,) of each picture in the gallery, and -1 for those that it has not, or whose row another one has.

    A picture is known by its feature, of several that are nearer than `SAME` by its id, else by the nearest.

    Args:
        features: (pictures, width), normalised.
    """
    rows = np.full(len(images), -1, dtype=np.int64)
    if not gallery.keeps_features:
        return rows
    by_image = {picture.image: row for row, picture in gallery.with_images(images).items()}
    best = np.full(len(images), SAME, dtype=np.float32)
    for place, image in enumerate(images):
        own = by_image.get(image, -1)
        if own >= 0 and same(gallery.read_features(np.array([own]))[0], features[place]):
            rows[place], best[place] = own, np.inf
    for some in (slice(start, start + BLOCK) for start in range(0, len(images), BLOCK)):
        for start in range(0, len(gallery), FEATURE_BLOCK):
            kept = gallery.read_features(gallery.rows[start : start + FEATURE_BLOCK]).astype(np.float32)
            nearness = features[some].astype(np.float32) @ kept.T
            nearest, greatest = nearness.argmax(axis=1), nearness.max(axis=1)
            nearer = greatest > best[some]
            rows[some] = np.where(nearer, gallery.rows[start + nearest], rows[some])
            best[some] = np.where(nearer, greatest, best[some])
    taken: set[int] = set()
    for place in np.argsort(-best, kind="stable").tolist():
        if rows[place] in taken:
            rows[place] = -1
        taken.add(int(rows[place]))
    return rows
