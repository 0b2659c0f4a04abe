"""A search in one object: the retriever, the pictures it finds, and the models that encode queries and new pictures.

    from retriever import Retriever
    retriever = Retriever.from_pretrained(folder)
    for found in retriever.search(["a dog"], k=10)[0]:
        print(found.score, found.file)

The search command and the search page are this object behind a command line and behind HTTP.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download, snapshot_download
from numpy.typing import NDArray
from PIL import Image
from transformers.utils import logging

from models.arithmetic import Arithmetic, weights_dtype
from models.compute import pick_device
from models.decoding import Scoring, make_writer
from models.guide import GUIDE_NAME, read_guide
from models.lengths import Reader
from models.voken_lm import VokenLM
from tools import runs
from tools.command_line.place import in_checkout
from tools.errors import BadInput
from tools.features import Floats, Rows
from tools.files import read_json

from ..beam import RankedPictures, beam_search, expand
from ..data import read_retriever
from ..index import DeviceLevel, to_device
from ..retrieve import needs_features, with_features
from . import remove
from .advice import rebuild
from .answers import FEATURES, WIDEST, Found, Ranked, Selection, Step, compared, need_features, reordered
from .by_picture import Likeness, PictureEncoder, by_codes, by_feature, codes_of, read_picture
from .exported import (
    CONFIG,
    HUB_NAME,
    NOT_UPLOADED,
    REPLACED_THERE,
    Results,
    Source,
    check_config,
    check_hub_name,
    hub_errors,
    not_fetched,
    read_exported,
    write_exported,
)
from .gallery import Gallery, read_gallery, refreshed
from .overlay import overlay_to_device
from .query_encoder import load_encoder, query_features
from .query_texts import check_queries, tell_unread
from .written import written_vokens

if TYPE_CHECKING:
    from models.clip import TextEncoder  # a search by codes alone needs no open_clip

BEAMS, RERANKED_BEAMS = 10, 50  # by default: of the order by the retriever alone, of one that looks at features too
SHARE = 0.3  # of the features, where none was chosen on val
BATCH = 64  # queries that are encoded at once
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


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
    if not in_checkout():  # the pictures' files are relative to it
        raise BadInput(f"{index} is searched in the repository that made it: export it there with scripts/export.sh")
    gallery = read_gallery(index)
    trained = read_retriever(retriever, gallery)
    return gallery, Source(retriever / "model", chosen_share(weights), trained, None)


def chosen_share(tested: Path | None) -> float:
    """The share that a `reranker.test` run chose on val; `SHARE` where no finished one did."""
    if tested is None or not (tested / runs.MANIFEST).is_file():
        return SHARE
    chosen = runs.read_manifest(tested, "reranker.test").facts["weights"]
    return float(chosen.get(FEATURES, {FEATURES: SHARE})[FEATURES])


class Retriever(ModelHubMixin):
    """Finds pictures for texts.

    Threads: any number may use one object. Searches take turns. `add` and `remove` wait for each other, not for
    searches, and searches see their change when they return. Another process's changes are seen after `refresh`.
    """

    _hub_mixin_config: dict[str, Any] | None = {}  # noqa: RUF012  # None: the mixin would copy the gallery into it

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
        self.hubness = None if guide is None else guide.hubness
        self._turn, self._change = threading.RLock(), threading.Lock()
        self._encoder: tuple[dict[str, Any], TextEncoder] | None = None  # with what it was loaded for
        self._picture_encoder: PictureEncoder | None = None
        self._tree: tuple[str, list[DeviceLevel]] | None = None  # with its hash
        self._take(gallery)
        with quiet_loading():
            dtype = weights_dtype(precision, self.device)
            lm = VokenLM.from_pretrained(source.model, dtype=dtype).to(self.device)
        self.writer = make_writer(lm, precision)

    @classmethod
    def from_pretrained(  # the mixin's is decorated
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> "Retriever":
        """Read a folder that `save_pretrained` wrote, or fetch one from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name" on the hub.
            options: `device`, `precision` and `scoring`, as `Retriever` takes them, and those of the hub's library,
                which a folder has no use for: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            BadInput: it is not such a folder, a part of it is missing or damaged, or there is no way to the hub.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
            gallery, source = read_exported(Path(name))
            return cls(gallery, source, **{key: options[key] for key in options if key not in HUB_OPTIONS})
        with hub_errors(not_fetched(name), TypeError, RuntimeError, MemoryError):  # those are of loading it
            return super().from_pretrained(name, **options)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "Retriever":
        """`from_pretrained`, by its earlier name."""
        return cls.from_pretrained(folder, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any) -> "Retriever":
        """Fetch a repository of the hub whose config.json has been fetched, unless it is of another kind."""
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        with hub_errors(not_fetched(model_id)):
            if config is None:  # the mixin passes over what went wrong, which this tells
                config = read_json(Path(hf_hub_download(model_id, CONFIG, **hub)))
            check_config(config, model_id)
            folder = Path(snapshot_download(model_id, **hub))
        gallery, source = read_exported(folder)
        return cls(gallery, source, **options)

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
        min_similarity: float | None = None,
        fold: bool | float = False,
        seconds: dict[str, float] | None = None,
        unread: list[list[str]] | None = None,
    ) -> list[list[Found]]:
        """The k best pictures for each query, best first; fewer where the beams find fewer.

        Args:
            beams: codes kept at each level, whose pictures are reordered; by default 50, and 10 without features, but
                at least k. A search that folds takes more where it needs them for k results.
            guided: let the guide steer the beams, where training gave the retriever one.
            rerank: reorder what the beams find by the pictures' features, where the index keeps them.
            share: of the features in the final order, 0 to 1; by default what was chosen on val.
            min_similarity: leave out pictures whose cosine with the query is below it.
            fold: put near-duplicates into the `folded` of the best of them: those whose features have a cosine of at
                least 0.99, or of what is given.
            seconds: where to add what the parts of the search took: "encode", "beams" and "rerank".
            unread: where to put, for each query, what of it is longer than a model reads, as sentences; by default
                they are warnings.

        Raises:
            BadInput: a query is empty, a number is out of range, or features are asked for and none are kept.
        """
        texts = check_queries(queries)
        check_counts(k=k, beams=beams)
        if not texts:
            return []
        with self._turn:
            selection = Selection.of(self.gallery, k=k, min_similarity=min_similarity, fold=fold)
            share = self.share_of_features(rerank=rerank, share=share)
            width = beams or max(k, RERANKED_BEAMS if share else BEAMS)
            options: dict[str, Any] = {"guided": guided, "share": share, "seconds": seconds}
            answers = self._searched(texts, width, selection, **options)
            while width < WIDEST and (short := [place for place, (_, more) in enumerate(answers) if more]):
                width = min(2 * width, WIDEST)
                for place, answer in zip(
                    short, self._searched([texts[place] for place in short], width, selection, **options), strict=True
                ):
                    answers[place] = answer
            models: list[Reader] = [self.writer.lm]
            if self._encodes(selection, guided, share):
                models.append(self._query_encoder())
            tell_unread(queries, models, unread)
            return [shown for shown, _ in answers]

    def _encodes(self, selection: Selection, guided: bool, share: float) -> bool:
        """Whether a search passes its queries through the text tower."""
        reads = needs_features(self.writer.lm, self.guide if guided else None)
        return reads or share > 0 or selection.min_similarity is not None

    def _searched(
        self,
        queries: list[str],
        width: int,
        selection: Selection,
        *,
        guided: bool,
        share: float,
        seconds: dict[str, float] | None,
    ) -> list[tuple[list[Found], bool]]:
        """What a search with beams of one width shows for each query, and whether wider ones could show more."""
        token_ids = self.writer.lm.tokenize(queries)
        order = np.argsort([len(ids) for ids in token_ids], kind="stable").tolist()
        answers: list[tuple[list[Found], bool]] = [([], False) for _ in order]
        reads = needs_features(self.writer.lm, self.guide if guided else None)
        every = share or selection.min_similarity is not None or selection.fold is not None
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            texts = None
            if self._encodes(selection, guided, share):
                with timed(seconds, "encode" if reads else "rerank"):
                    texts = query_features(self._query_encoder(), [queries[place] for place in batch])
            found = self._beams(
                [token_ids[place] for place in batch],
                width,
                keep=width if every else selection.k,
                texts=texts if reads else None,
                guided=guided,
                seconds=seconds,
            )
            for number, (place, pictures) in enumerate(zip(batch, found, strict=True)):
                with timed(seconds if share else None, "rerank"):
                    ranked = compared(self.gallery, pictures, None if texts is None else texts[number])
                    ranked = reordered(ranked, share, self._taken_off(ranked.rows) if share else None)
                shown, more = selection.apply(self.gallery, ranked)
                answers[place] = shown, more and width <= len(pictures.rows) < len(self.gallery)
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
        if not self.gallery.keeps_features:
            if share:
                raise BadInput(
                    f"{self.gallery.folder} keeps no features to re-rank by: leave their share out, or "
                    f"{rebuild(self.gallery)}"
                )
            return 0.0
        return self.source.share if share is None else share

    def two_tower(
        self,
        queries: Sequence[str],
        *,
        k: int = 10,
        min_similarity: float | None = None,
        fold: bool | float = False,
        unread: list[list[str]] | None = None,
    ) -> list[list[Found]]:
        """The k pictures whose features have the greatest cosine (the score) with each query's: brute force.

        Args:
            min_similarity, fold, unread: as in `search`.

        Raises:
            BadInput: a query is empty, or the index keeps no features.
        """
        texts = check_queries(queries)
        with self._turn:
            selection = Selection.of(self.gallery, k=k, min_similarity=min_similarity, fold=fold)
            need_features(self.gallery)
            tell_unread(queries, [self._query_encoder()], unread)
            features = [one for batch in batches(texts) for one in query_features(self._query_encoder(), batch)]
            return [selection.apply_to_all(self.gallery, by_feature(self.gallery, feature)) for feature in features]

    def similar(
        self,
        image: str,
        *,
        k: int = 10,
        by: Likeness | None = None,
        min_similarity: float | None = None,
        fold: bool | float = False,
    ) -> list[Found]:
        """The k pictures most similar to one of the index, without itself.

        Args:
            by: "features": the score is the cosine of their features; "vokens": the number of leading vokens that both
                have, among equals in the order of the cosines. By default the features, where the index keeps them.
            min_similarity, fold: as in `search`, with the picture in the place of the query.

        Raises:
            BadInput: no picture of the index has that id, or features are asked for and none are kept.
        """
        with self._turn:
            selection = Selection.of(self.gallery, k=k, min_similarity=min_similarity, fold=fold)
            row = self._row(image)
            own = np.array([row])
            feature = self.gallery.read_features(own)[0].astype(np.float32) if self.gallery.keeps_features else None
            ranked = self._like(feature, lambda: self.gallery.read_codes(own)[0], by)
            return selection.apply_to_all(self.gallery, ranked.some(np.flatnonzero(ranked.rows != row)))

    def search_image(
        self,
        picture: str | Path | Image.Image,
        *,
        k: int = 10,
        by: Likeness | None = None,
        min_similarity: float | None = None,
        fold: bool | float = False,
    ) -> list[Found]:
        """The k pictures most similar to one that need not be in the index: a file, or a picture that Pillow opened.

        Args:
            by, min_similarity, fold: as in `similar`.

        Raises:
            BadInput: the picture cannot be read, features are asked for and none are kept, or a model that made the
                index has changed or cannot be loaded.
        """
        seen = read_picture(picture)
        with self._turn:
            selection = Selection.of(self.gallery, k=k, min_similarity=min_similarity, fold=fold)
            if by == "features":
                need_features(self.gallery)
            if self._picture_encoder is None:
                with quiet_loading():
                    self._picture_encoder = PictureEncoder(self.gallery, self.precision, self.device)
            feature = self._picture_encoder.feature(seen)
            kept = feature if self.gallery.keeps_features else None
            ranked = self._like(kept, lambda: codes_of(self.gallery, feature, self.device), by)
            return selection.apply_to_all(self.gallery, ranked)

    def vokens(
        self, query: str, codes: Sequence[int], *, top: int = 5, unread: list[list[str]] | None = None
    ) -> list[Step]:
        """How likely each voken of a picture is to the language model, given a query and the vokens before it.

        Args:
            codes: of a picture of the index, as `Found` has them.
            top: alternatives at each level.
            unread: as in `search`.

        Raises:
            BadInput: the query is empty, or no picture of the index has these codes.
        """
        [text] = check_queries([query])
        check_counts(top=top)
        lm = self.writer.lm
        with self._turn, torch.inference_mode():
            tell_unread([query], [lm, *([self._query_encoder()] if lm.slot is not None else [])], unread)
            memory = self.writer.encode(lm.tokenize([text]))
            if lm.slot is not None:
                features = torch.from_numpy(query_features(self._query_encoder(), [text])).to(self.device)
                memory = lm.with_slot(memory, features)
            return list(written_vokens(self.writer, memory, self._levels, codes, top=top, scoring=self.scoring))

    def add(
        self,
        files: Sequence[Path],
        *,
        prefix: str = "",
        replace: bool = False,
        skip_known: bool = False,
        skip_bad: bool = False,
        follow_links: bool = False,
    ) -> list[str]:
        """Add pictures to the index, without training, and return their ids.

        Args:
            files: pictures, whose id is their file name, and folders, whose pictures' ids are the paths below them.
            prefix: put before each id.
            replace: let them take the place of pictures that have the same id or file.
            skip_known: leave out those whose id or file is in the index.
            skip_bad: leave out those that cannot be read.
            follow_links: add what lies behind links that lead out of the folders, too.

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
            follow_links=follow_links,
            precision="auto" if self.precision == "int8" else self.precision,
            device=str(self.device),
            workers=0,
        )
        with self._changing() as index:
            source = remove.first_names([str(file) for file in files])
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

    def save_pretrained(  # type: ignore[override]  # the mixin's removes config.json of an earlier folder before all
        self,
        folder: str | Path,
        *,
        include_pictures: bool = False,
        overwrite: bool = False,
        results: Results | None = None,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write all that a search needs into one folder: `from_pretrained` reads it, wherever it is copied.

        Args:
            config, model_card_kwargs: for the hub's library, which calls this with what `push_to_hub` was given.
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
            **{
                "results": results,
                "include_pictures": include_pictures,
                "overwrite": overwrite,
                **(model_card_kwargs or {}),
            },
        )

    def push_to_hub(  # the mixin's is decorated
        self, repo_id: str, *, include_pictures: bool = False, results: Results | None = None, **options: Any
    ) -> str:
        """Put the folder that `save_pretrained` writes on the Hugging Face Hub; returns the commit's address.

        Args:
            repo_id: "owner/name".
            options: those of the hub's library: `private`, `token`, `branch`, `create_pr` and `commit_message`.

        Raises:
            BadInput: the name is none, the hub refuses it, or the folder cannot be written.
        """
        check_hub_name(repo_id)
        written = {"include_pictures": include_pictures, "results": results, "hub_name": repo_id}
        upload = {"ignore_patterns": NOT_UPLOADED, "delete_patterns": REPLACED_THERE}
        with hub_errors(f"the Hugging Face Hub does not take {repo_id}"):
            return str(super().push_to_hub(repo_id, model_card_kwargs=written, **{**upload, **options}))

    def _take(self, gallery: Gallery) -> None:
        """Search these pictures from now on."""
        if self._encoder is not None and self._encoder[0] != gallery.facts["clip"]:
            self._encoder = None
        if self._picture_encoder is not None and self._picture_encoder.made_for != gallery.facts["clip"]:
            self._picture_encoder = None
        if self._tree is None or self._tree[0] != gallery.tree_hash:
            self._tree = gallery.tree_hash, to_device(gallery.overlay.tree, self.device)
        self.gallery, self._levels = gallery, overlay_to_device(gallery.overlay, self._tree[1])

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

    def _like(self, feature: Floats | None, codes: Callable[[], NDArray[np.integer]], by: Likeness | None) -> Ranked:
        """All pictures by their likeness to one with a feature (width,), where features are kept, and with codes."""
        if by == "features" or (by is None and feature is not None):
            need_features(self.gallery)
            assert feature is not None, "it is known where features are kept"
            return by_feature(self.gallery, feature)
        return by_codes(self.gallery, codes(), feature)

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
                return expand(leaves, self.gallery.overlay, keep=keep)
        except FloatingPointError as error:
            raise BadInput(str(error)) from None

    def _taken_off(self, rows: Rows) -> Floats | None:
        """What hubness takes off the cosines of pictures (rows,) of the gallery."""
        if self.hubness is None:
            return None
        return self.hubness.taken_off(self.gallery.read_features(rows).astype(np.float32))

    def _row(self, image: str) -> int:
        if (row := self.gallery.row(image)) is None:
            raise BadInput(f"{image!r} is not the id of a picture in {self.gallery.folder}")
        return row


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


def check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise BadInput(f"{name} must be at least 1, it is {count}")
