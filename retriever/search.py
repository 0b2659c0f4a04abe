"""Search pictures with words: load the trained retriever once, answer each query, draw the answers.

In:  a `retriever.train` folder, a `retriever.build_index` folder, and queries on the command line, or one a line on
     standard input.
Out: ranked pictures on standard output, and a contact sheet of the last answer.
Command: python -m retriever.search --retriever DIR --index DIR "outlined drawing of a turtle"

Where the index keeps the pictures' features, a wider search finds the pictures and an interpolation orders them: of the
retriever's scores and the cosines between the pictures' features and the query's (tools/interpolation.py).
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro

from models.arithmetic import Arithmetic
from models.compute import pick_device, pick_dtype
from models.decoding import Scoring, make_writer
from models.voken_lm import VokenLM
from tools import runs
from tools.commands import run_command
from tools.errors import BadInput
from tools.features import Floats, normalized
from tools.interpolation import COSINE_SCALE, interpolated

from .beam import RankedPictures, beam_search, expand
from .contact_sheet import SheetRow, draw_sheet
from .data import read_retriever
from .gallery import Gallery, model_content, read_gallery, refreshed
from .index import to_device

if TYPE_CHECKING:
    from models.clip import Clip  # elsewhere where queries are encoded: a search by codes alone needs no open_clip

BEAMS, RERANKED_BEAMS = 10, 50  # by default: of the order by the retriever alone, of one that looks at features too
SHARE = 0.3  # of the features, where none was chosen on val
FEATURES = "features"  # what the reranker's test calls their score


@dataclass(frozen=True)
class Config:
    """What is searched, and with what words."""

    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts to search for; none: read from standard input, one a line."""
    index: Path
    """Run folder of retriever.build_index: the pictures that can be found."""
    retriever: Path
    """Run folder of retriever.train."""
    sheet: Path
    """PNG to draw the answers to."""
    beams: int | None = None
    """Codes kept at each level, whose pictures are re-ranked; by default 50, and 10 without re-ranking."""
    keep: int = 10
    """Pictures shown for each query."""
    rerank: bool = True
    """Reorder the pictures found by their features and the retriever's scores, where the index keeps features."""
    rerank_weight: float | None = None
    """Share of the features in the final order, 0 (none of it, as --no-rerank) to 1; by default what was chosen on val
    (--weights), else 0.3."""
    weights: Path | None = None
    """Run folder of reranker.test, which chose the share on val; passed over while there is no finished one."""
    scoring: Scoring = "full"
    """Softmax over the whole vocabulary (published), or over the vokens of each level, which is faster."""
    precision: Arithmetic = "auto"
    """Arithmetic of the forward passes; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""

    def __post_init__(self) -> None:
        if (self.beams is not None and self.beams < 1) or self.keep < 1:
            raise BadInput("--beams and --keep must be at least 1")
        if self.rerank_weight is not None and not 0 <= self.rerank_weight <= 1:
            raise BadInput(f"--rerank-weight is a share, 0 to 1, not {self.rerank_weight}")
        if self.rerank_weight and not self.rerank:
            raise BadInput("--no-rerank and --rerank-weight contradict each other: give one")


def share_of_features(config: Config, gallery: Gallery) -> float:
    """What the features count in the final order; 0 without re-ranking.

    Raises:
        BadInput: a share is asked for, and the index keeps no features.
    """
    if not config.rerank:
        return 0.0
    if gallery.features is None:
        if config.rerank_weight:
            raise BadInput(
                f"{gallery.folder} keeps no features to re-rank by: leave --rerank-weight out, or run "
                "scripts/14_build_index.sh --overwrite and add again what was added"
            )
        return 0.0
    return chosen_share(config.weights) if config.rerank_weight is None else config.rerank_weight


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


class QueryEncoder:
    """The text tower of the model that made a gallery's features."""

    def __init__(self, gallery: Gallery, precision: Arithmetic, device: torch.device) -> None:
        self.made_by: dict[str, Any] = gallery.facts["clip"]
        self.device = device
        self.clip = self._load(gallery)
        del self.clip.model.visual  # the greater half of the model, and no picture is encoded here
        dtype = pick_dtype("auto" if precision == "int8" else precision, device)
        self.clip.model.text.to(device=device, dtype=dtype)

    def _load(self, gallery: Gallery) -> "Clip":
        name, pretrained = self.made_by["model"], self.made_by["pretrained"]
        advice = "search with --no-rerank, or run scripts/14_build_index.sh --overwrite and add again what was added"
        if model_content(name, pretrained) != self.made_by["content"]:
            raise BadInput(f"{name} is not the model that made the features of {gallery.folder} any more: {advice}")
        try:
            from models.clip import load_clip

            return load_clip(name, pretrained)
        except (BadInput, ImportError) as error:
            raise BadInput(
                f"the model of the features of {gallery.folder} cannot be loaded ({error}): {advice}"
            ) from None

    @torch.inference_mode()
    def cosines(self, query: str, gallery: Gallery, rows: list[int]) -> Floats:
        """Cosines (rows,) between a query and pictures of a gallery that keeps features."""
        from models.clip import encode_tokens, trim_padding

        assert gallery.features is not None, "only features that are kept can be compared"
        tokens = trim_padding(self.clip, self.clip.tokenizer([query])).to(self.device)
        text = normalized(encode_tokens(self.clip, tokens).cpu().numpy())[0]
        result: Floats = gallery.features[rows].astype(np.float32) @ text
        return result


class Search:
    """The retriever and the current pictures, loaded."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.encoder: QueryEncoder | None = None
        gallery = read_gallery(config.index)
        read_retriever(config.retriever, gallery)
        self._take(gallery)
        self.writer = make_writer(VokenLM.from_pretrained(config.retriever / "model").to(self.device), config.precision)

    def _take(self, gallery: Gallery) -> None:
        """Search these pictures from now on."""
        self.share = share_of_features(self.config, gallery)
        if self.share and (self.encoder is None or self.encoder.made_by != gallery.facts["clip"]):
            self.encoder = QueryEncoder(gallery, self.config.precision, self.device)
        self.gallery, self.levels = gallery, to_device(gallery.index, self.device)

    def find(self, query: str) -> RankedPictures:
        """Pictures of the index as it is now, best first."""
        if (current := refreshed(self.gallery)) is not self.gallery:
            self._take(current)
        beams = self.config.beams or (RERANKED_BEAMS if self.share else BEAMS)
        with torch.inference_mode():
            memory = self.writer.encode(self.writer.lm.tokenize([query]))
        try:
            leaves = beam_search(self.writer, memory, self.levels, beams=beams, scoring=self.config.scoring)
        except FloatingPointError as error:
            raise BadInput(str(error)) from None
        found = expand(leaves, self.gallery.index, keep=beams if self.share else self.config.keep)[0]
        if not self.share:
            return found
        assert self.encoder is not None, "a share was taken without an encoder"
        return reordered(found, self.encoder.cosines(query, self.gallery, found.rows), self.share)

    @property
    def how(self) -> str:
        """What is said of the order behind an answer's time."""
        return f", re-ranked by features (share {self.share:.2f})" if self.share else ""


def typed_queries() -> Iterable[str]:
    """Lines of standard input until it ends, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("search for: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def main(config: Config) -> None:
    if any(not query.strip() for query in config.queries):
        raise BadInput("an empty query finds nothing: write some words")
    search = Search(config)
    sheet: list[SheetRow] = []
    for query in config.queries or typed_queries():
        began = time.monotonic()
        found = search.find(query)
        print(f'"{query}", {len(search.gallery):,} pictures, {time.monotonic() - began:.2f} s{search.how}')
        files = [Path(search.gallery.picture(row).file) for row in found.rows[: config.keep]]
        for rank, (file, score) in enumerate(zip(files, found.scores, strict=False), start=1):
            print(f"{rank:4d}  {score:8.3f}  {file}")
        answer = SheetRow(query, files, None)
        sheet = [*sheet, answer] if config.queries else [answer]
    if sheet:
        config.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(config.sheet, sheet, title=f"{len(search.gallery):,} pictures", columns=config.keep)
        print(f"drawn: {config.sheet}")


if __name__ == "__main__":
    run_command(main, Config)
