"""A search in one object: the retriever, the pictures it finds, and the models that encode queries and new pictures.

    from retriever import Retriever
    retriever = Retriever.load(folder)
    for found in retriever.search(["a dog"], k=10)[0]:
        print(found.score, found.file)

The search command and the search page are this object behind a command line and behind HTTP.
"""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from models.arithmetic import Arithmetic
from models.compute import pick_device
from models.decoding import Scoring, make_writer
from models.guide import GUIDE_NAME, read_guide
from models.voken_lm import VokenLM
from tools import runs
from tools.errors import BadInput
from tools.features import Floats
from tools.interpolation import COSINE_SCALE, interpolated

from ..beam import RankedPictures, beam_search, expand
from ..data import read_retriever
from ..index import to_device
from ..queries import read_query
from ..retrieve import needs_features, with_features
from . import remove
from .exported import (
    HUB_NAME,
    Results,
    Source,
    check_hub_name,
    fetch_folder,
    push_folder,
    read_exported,
    write_exported,
)
from .gallery import FEATURE_BLOCK, Gallery, read_gallery, refreshed
from .query_encoder import cosines, load_encoder, query_features

if TYPE_CHECKING:
    from models.clip import TextEncoder  # a search by codes alone needs no open_clip

BEAMS, RERANKED_BEAMS = 10, 50  # by default: of the order by the retriever alone, of one that looks at features too
SHARE = 0.3  # of the features, where none was chosen on val
FEATURES = "features"  # what the reranker's test calls their score
BATCH = 64  # queries that are encoded at once


Likeness = Literal["features", "vokens"]


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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from telling how it loads a model, of a pooler, say, that is not there and not used."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_runs(index: Path, retriever: Path, weights: Path | None) -> tuple[Gallery, Source]:
    """The pictures, and where the models lie, of the chain's run folders: see `Retriever.from_runs`."""
    gallery = read_gallery(index)
    trained = read_retriever(retriever, gallery)
    return gallery, Source(retriever / "model", chosen_share(weights), trained, None)


def chosen_share(tested: Path | None) -> float:
    """The share that a `reranker.test` run chose on val; `SHARE` where no finished one did."""
    if tested is None or not (tested / runs.MANIFEST).is_file():
        return SHARE
    chosen = runs.read_manifest(tested, "reranker.test").facts["weights"]
    return float(chosen.get(FEATURES, {FEATURES: SHARE})[FEATURES])


def reordered(found: RankedPictures, cosines: Floats, share: float) -> RankedPictures:
    """The same pictures by the interpolation of their scores and cosines (pictures,); equal ones keep their order."""
    others = {FEATURES: COSINE_SCALE * cosines}
    scores = interpolated(np.array(found.scores), others, {FEATURES: share})
    order = np.argsort(-scores, kind="stable")
    return RankedPictures([found.rows[place] for place in order], scores[order].tolist())


class Retriever:
    """Finds pictures for texts.

    Threads: any number may use one object. Searches take turns. `add` and `remove` wait for each other, not for
    searches, and searches see their change when they return. Another process's changes are seen after `refresh`.
    """

    def __init__(
        self,
        gallery: Gallery,
        source: Source,
        *,
        device: str | None = None,
        precision: Arithmetic = "auto",
        scoring: Scoring = "full",
    ) -> None:
        """Use `load` or `from_runs`.

        Args:
            source: where the language model lies, and what else an exported folder is made of.
            device: cpu, cuda or cuda:N; by default the GPU where there is one.
            precision: arithmetic of the forward passes; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else
                fp32.
            scoring: softmax over the whole vocabulary (published), or over the vokens of each level, which is faster.
        """
        self.source, self.precision, self.scoring = source, precision, scoring
        self.device = pick_device(device)
        guide = read_guide(source.model / GUIDE_NAME)
        self.guide = guide.to(self.device) if guide is not None and guide.weight else None
        self._turn, self._change = threading.RLock(), threading.Lock()
        self._encoder: tuple[dict[str, Any], TextEncoder] | None = None  # with what it was loaded for
        self._take(gallery)
        with quiet_loading():
            lm = VokenLM.from_pretrained(source.model).to(self.device)
        self.writer = make_writer(lm, precision)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, precision: Arithmetic = "auto") -> "Retriever":
        """Read a folder that `save_pretrained` wrote, or fetch one from the Hugging Face Hub ("owner/name").

        Raises:
            BadInput: it is not such a folder, or a part of it is missing or damaged.
        """
        place = Path(folder)
        if not place.is_dir() and HUB_NAME.fullmatch(str(folder)):
            place = fetch_folder(str(folder))
        gallery, source = read_exported(place)
        return cls(gallery, source, device=device, precision=precision)

    @classmethod
    def from_runs(
        cls,
        *,
        index: Path,
        retriever: Path,
        weights: Path | None = None,
        device: str | None = None,
        precision: Arithmetic = "auto",
        scoring: Scoring = "full",
    ) -> "Retriever":
        """Put one together from the chain's run folders.

        Args:
            index: of retriever.gallery.build.
            retriever: of retriever.train or retriever.train_stage2.
            weights: of reranker.test, which chose the features' share on val; passed over while there is no finished
                one.

        Raises:
            BadInput: a folder is not finished, or the retriever writes other vokens than the index has.
        """
        gallery, source = read_runs(index, retriever, weights)
        return cls(gallery, source, device=device, precision=precision, scoring=scoring)

    def __len__(self) -> int:
        """Pictures that can be found."""
        return len(self.gallery)

    def search(
        self,
        queries: Sequence[str],
        *,
        k: int = 10,
        beams: int | None = None,
        guided: bool = True,
        rerank: bool = True,
        share: float | None = None,
        seconds: dict[str, float] | None = None,
    ) -> list[list[Found]]:
        """The k best pictures for each query, best first; fewer where the beams find fewer.

        Args:
            beams: codes kept at each level, whose pictures are reordered; by default 50, and 10 without features, but
                at least k.
            guided: let the guide steer the beams, where training gave the retriever one.
            rerank: reorder what the beams find by the pictures' features, where the index keeps them.
            share: of the features in the final order, 0 to 1; by default what was chosen on val.
            seconds: where to add what the parts of the search took: "encode", "beams" and "rerank".

        Raises:
            BadInput: a query is empty, a number is out of range, or features are asked for and none are kept.
        """
        queries = check_queries(queries)
        check_counts(k=k, beams=beams)
        if not queries:
            return []
        with self._turn:
            share = self.share_of_features(rerank=rerank, share=share)
            width = beams or max(k, RERANKED_BEAMS if share else BEAMS)
            token_ids = self.writer.lm.tokenize(queries)
            order = np.argsort([len(ids) for ids in token_ids], kind="stable").tolist()
            answers: list[list[Found]] = [[] for _ in order]
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                ids = [token_ids[place] for place in batch]
                reads, texts = needs_features(self.writer.lm, self.guide if guided else None), None
                if reads or share:
                    with timed(seconds, "encode" if reads else "rerank"):
                        texts = query_features(self._query_encoder(), [queries[place] for place in batch])
                read = texts if reads else None
                kept = width if share else k
                found = self._beams(ids, width, keep=kept, texts=read, guided=guided, seconds=seconds)
                if share and texts is not None:
                    with timed(seconds, "rerank"):
                        found = [
                            reordered(one, cosines(text, self.gallery, one.rows), share)
                            for one, text in zip(found, texts, strict=True)
                        ]
                for place, one in zip(batch, found, strict=True):
                    answers[place] = [self._found(*pair) for pair in zip(one.rows[:k], one.scores, strict=False)]
            return answers

    def share_of_features(self, *, rerank: bool = True, share: float | None = None) -> float:
        """What the features count in the order of a `search` with these arguments; 0: they are not looked at.

        Raises:
            BadInput: the share is none, or asks for features of an index that keeps none.
        """
        if share is not None and not 0 <= share <= 1:
            raise BadInput(f"the features' share must be 0 to 1, it is {share}")
        if not rerank or share == 0:
            return 0.0
        if self.gallery.features is None:
            if share:
                raise BadInput(
                    f"{self.gallery.folder} keeps no features to re-rank by: leave their share out, or run "
                    "scripts/14_build_index.sh --overwrite and add again what was added"
                )
            return 0.0
        return self.source.share if share is None else share

    def two_tower(self, queries: Sequence[str], *, k: int = 10) -> list[list[Found]]:
        """The k pictures whose features have the greatest cosine (the score) with each query's: brute force.

        Raises:
            BadInput: a query is empty, or the index keeps no features.
        """
        queries = check_queries(queries)
        check_counts(k=k)
        with self._turn:
            self._need_features()
            texts = [text for batch in batches(queries) for text in query_features(self._query_encoder(), batch)]
            return [self._nearest(text, k) for text in texts]

    def similar(self, image: str, *, k: int = 10, by: Likeness | None = None) -> list[Found]:
        """The k pictures most similar to one of the index, without itself.

        Args:
            by: "features": the score is the cosine of their features; "vokens": the number of leading vokens that both
                have, among equals in the order of the cosines. By default the features, where the index keeps them.

        Raises:
            BadInput: no picture of the index has that id, or features are asked for and none are kept.
        """
        check_counts(k=k)
        with self._turn:
            row, features = self._row(image), self.gallery.features
            if by == "features":
                self._need_features()
            nearness = None if features is None else self._cosines(features[row].astype(np.float32))
            if nearness is not None and by != "vokens":
                scores, order = nearness, np.argsort(-nearness, kind="stable")
            else:
                scores = np.cumprod(self.gallery.codes == self.gallery.codes[row], axis=1).sum(axis=1)
                order = np.lexsort((np.zeros(len(scores)) if nearness is None else -nearness, -scores))
            found = [self._found(each, float(scores[each])) for each in order[: k + 1].tolist()]
            return [one for one in found if one.image != image][:k]

    def vokens(self, query: str, codes: Sequence[int], *, top: int = 5) -> list[Step]:
        """How likely each voken of a picture is to the language model, given a query and the vokens before it.

        Args:
            codes: of a picture of the index, as `Found` has them.
            top: alternatives at each level.

        Raises:
            BadInput: the query is empty, or no picture of the index has these codes.
        """
        [query] = check_queries([query])
        check_counts(top=top)
        with self._turn, torch.inference_mode():
            if len(codes) != len(self._levels):
                raise BadInput(f"a picture has {len(self._levels)} codes, not {len(codes)}")
            return list(self._steps(query, codes, top))

    def add(
        self,
        files: Sequence[Path],
        *,
        prefix: str = "",
        replace: bool = False,
        skip_known: bool = False,
        skip_bad: bool = False,
    ) -> list[str]:
        """Add pictures to the index, without training, and return their ids.

        Args:
            files: pictures, whose id is their file name, and folders, whose pictures' ids are the paths below them.
            prefix: put before each id.
            replace: let them take the place of pictures that have the same id or file.
            skip_known: leave out those whose id or file is in the index.
            skip_bad: leave out those that cannot be read.

        Raises:
            BadInput: a file is no picture or in the index already, another process changes the index, or the models
                that made it cannot be loaded; nothing has been added.
        """
        from . import add  # needs open_clip, as a search by codes does not

        if not files:
            raise BadInput("no picture is named: give files or folders")
        options = add.Options(
            prefix=prefix,
            replace=replace,
            skip_known=skip_known,
            skip_bad=skip_bad,
            precision="auto" if self.precision == "int8" else self.precision,
            device=str(self.device),
            workers=0,
        )
        with self._changing() as index:
            source = remove.shortened([str(file) for file in files])
            return add.add(index, [Path(file) for file in files], options, source=source).images

    def remove(self, images: Sequence[str]) -> int:
        """Remove pictures, by id or file, from the index and return how many; their files stay.

        Raises:
            BadInput: one is not in the index, they are all of it, or another process changes the index; nothing has
                been removed.
        """
        if not images:
            raise BadInput("no picture is named: give ids or files")
        with self._changing() as index:
            return remove.remove(index, images).pictures

    def refresh(self) -> bool:
        """Search what the index holds now; whether that is another content than before.

        Raises:
            BadInput: the index has been built anew of other vokens.
        """
        with self._turn:
            current = refreshed(self.gallery)
            if current is self.gallery:
                return False
            if current.codebooks_hash != self.gallery.codebooks_hash:
                raise BadInput(f"{current.folder} has vokens of another tokenizer now: load the retriever again")
            self._take(current)
            return True

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        include_pictures: bool = False,
        overwrite: bool = False,
        results: Results | None = None,
    ) -> Path:
        """Write all that a search needs into one folder: `load` reads it, wherever it is copied.

        Args:
            include_pictures: copy the picture files too; without them, the folder has their names alone.
            overwrite: replace a folder that was written before.
            results: figures for the model card, of a retriever from run folders; else it keeps those that it has.

        Raises:
            BadInput: the folder holds something, or a model has changed since the index was made.
        """
        return write_exported(
            Path(folder),
            self.gallery,
            self.source,
            results=results,
            include_pictures=include_pictures,
            overwrite=overwrite,
        )

    def push_to_hub(
        self, name: str, *, private: bool = False, include_pictures: bool = False, results: Results | None = None
    ) -> str:
        """Put the folder that `save_pretrained` writes on the Hugging Face Hub as "owner/name"; returns its address.

        Raises:
            BadInput: the name is none, the hub refuses it, or the folder cannot be written.
        """
        check_hub_name(name)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name.partition("/")[2]
            self.save_pretrained(folder, include_pictures=include_pictures, results=results)
            return push_folder(folder, name, private=private)

    def _take(self, gallery: Gallery) -> None:
        """Search these pictures from now on."""
        if self._encoder is not None and self._encoder[0] != gallery.facts["clip"]:
            self._encoder = None
        self.gallery, self._levels = gallery, to_device(gallery.index, self.device)

    @contextmanager
    def _changing(self) -> Iterator[Path]:
        """Give the index's folder to one change at a time, and search its new content afterwards."""
        with self._change:
            yield self.gallery.folder
            self.refresh()

    def _query_encoder(self) -> "TextEncoder":
        """The text tower, loaded when it is needed."""
        if self._encoder is None:
            with quiet_loading():
                encoder = load_encoder(self.gallery, self.precision, self.device)
            self._encoder = (self.gallery.facts["clip"], encoder)
        return self._encoder[1]

    def _need_features(self) -> None:
        if self.gallery.features is None:
            raise BadInput(
                f"{self.gallery.folder} keeps no features to search by: run scripts/14_build_index.sh --overwrite and "
                "add again what was added"
            )

    def _beams(
        self,
        token_ids: Sequence[Sequence[int]],
        beams: int,
        *,
        keep: int,
        texts: Floats | None,
        guided: bool,
        seconds: dict[str, float] | None,
    ) -> list[RankedPictures]:
        """What the beam search finds for a batch.

        Args:
            texts: (queries, width) text features, where a guide or a slot reads them.
        """
        with torch.inference_mode(), timed(seconds, "encode"):
            guide = self.guide if guided else None
            features = None if texts is None else torch.from_numpy(texts).to(self.device)
            memory, seen = with_features(self.writer.lm, self.writer.encode(token_ids), features, guide)
            steering = None if guide is None or seen is None else guide.steer(seen)
        try:
            with timed(seconds, "beams"):
                options: dict[str, Any] = {"beams": beams, "scoring": self.scoring, "steering": steering}
                leaves = beam_search(self.writer, memory, self._levels, **options)
                return expand(leaves, self.gallery.index, keep=keep)
        except FloatingPointError as error:
            raise BadInput(str(error)) from None

    def _cosines(self, feature: Floats) -> Floats:
        """Cosines (pictures,) of all pictures' features with one (width,)."""
        scores = np.empty(len(self.gallery), dtype=np.float32)
        for start in range(0, len(scores), FEATURE_BLOCK):
            block = slice(start, start + FEATURE_BLOCK)
            scores[block] = cosines(feature, self.gallery, block)
        return scores

    def _nearest(self, feature: Floats, k: int) -> list[Found]:
        """The k pictures with the greatest cosine with a feature (width,); equal ones by their row."""
        scores = self._cosines(feature)
        best = np.argsort(-scores, kind="stable")[:k].tolist()
        return [self._found(row, float(scores[row])) for row in best]

    def _steps(self, query: str, codes: Sequence[int], top: int) -> Iterator[Step]:
        """`vokens`, level by level: one beam that goes where it is told."""
        lm = self.writer.lm
        memory = self.writer.encode(lm.tokenize([query]))
        if lm.slot is not None:
            features = torch.from_numpy(query_features(self._query_encoder(), [query])).to(self.device)
            memory = lm.with_slot(memory, features)
        session = self.writer.begin(memory)
        states, node = session.open(), torch.zeros(1, dtype=torch.long, device=self.device)
        for number, (level, code) in enumerate(zip(self._levels, codes, strict=True)):
            first, last = int(level.first_child(node)), int(level.first_child(node + 1))
            allowed = level.codes[first:last].long()
            place = (allowed == code).nonzero().flatten()
            if not len(place):
                raise BadInput(
                    f"no picture of the index has the codes {tuple(codes)}: {code} is none at level {number}"
                )
            scores = self.writer.head.log_probabilities(states, number, self.scoring)[0, 0, allowed]
            shares = scores.softmax(dim=0)
            names = lm.space.tokens[lm.space.level_rows(number)]
            options = [
                Voken(names[each], each, share) for each, share in zip(allowed.tolist(), shares.tolist(), strict=True)
            ]
            order = torch.argsort(-scores, stable=True)[:top].tolist()
            yield Step(options[int(place)], float(scores[place]), len(options), [options[each] for each in order])
            node = first + place
            if number + 1 < len(codes):
                token = lm.level_offsets[number] + code
                states = session.advance(token.view(1, 1).to(self.device), torch.zeros_like(node).view(1, 1))

    def _row(self, image: str) -> int:
        if image not in self.gallery.rows:
            raise BadInput(f"{image!r} is not the id of a picture in {self.gallery.folder}")
        return self.gallery.rows[image]

    def _found(self, row: int, score: float) -> Found:
        picture = self.gallery.picture(row)
        codes = tuple(self.gallery.codes[row].tolist())
        return Found(picture.image, self.gallery.files_below / picture.file, score, codes)


@contextmanager
def timed(seconds: dict[str, float] | None, part: str) -> Iterator[None]:
    """Add what the block takes to a part's seconds."""
    began = time.perf_counter()
    yield
    if seconds is not None:
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began


def batches(queries: Sequence[str]) -> Iterator[Sequence[str]]:
    """Queries that are encoded at once."""
    return (queries[start : start + BATCH] for start in range(0, len(queries), BATCH))


def check_queries(queries: Sequence[str]) -> list[str]:
    """Texts on one line each, without control characters.

    Raises:
        BadInput: one is empty; or one text is given where several are expected: its letters would be the queries.
    """
    if isinstance(queries, str):
        raise BadInput("queries must be a list of texts: write [query]")
    return [read_query(query) for query in queries]


def check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise BadInput(f"{name} must be at least 1, it is {count}")
