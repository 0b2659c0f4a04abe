"""Ranked lists, as the retriever hands them to the reranker: a line per query, pictures by their row in captions.jsonl.

    {"query": "a red car", "caption": 17, "picture": 3, "ranked": [12, 3, 40], "scores": [-1.2, -1.5, -4.0]}

`caption` is the query's row in the features' texts.npy, `picture` the row of the picture it asks for.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .command_line.command_names import again
from .errors import BadInput
from .files import read_json_lines, write_json_lines
from .recall import NOT_FOUND, Ranks

NO_PICTURE = -1  # fills the end of a short list
COMMAND = "retriever.rank_splits"


class RankedLists(NamedTuple):
    """The lists of one split over one pool."""

    texts: list[str]
    captions: NDArray[np.int64]
    """(queries,) rows of texts.npy"""
    pictures: NDArray[np.int64]
    """(queries,) row of the picture that each asks for"""
    rows: NDArray[np.int64]
    """(queries, longest) pictures as they were ranked, `NO_PICTURE` behind the end of a list"""
    scores: NDArray[np.float32]
    """(queries, longest), -inf there"""

    @property
    def present(self) -> NDArray[np.bool_]:
        """(queries, longest) where there is a picture."""
        return self.rows != NO_PICTURE

    def some(self, chosen: NDArray[np.int64]) -> "RankedLists":
        """A selection of queries, by place."""
        arrays = (self.captions[chosen], self.pictures[chosen], self.rows[chosen], self.scores[chosen])
        return RankedLists([self.texts[place] for place in chosen], *arrays)

    def first(self, count: int) -> "RankedLists":
        """The best `count` of each list."""
        return self._replace(rows=self.rows[:, :count], scores=self.scores[:, :count])


def write_lists(path: Path, lists: RankedLists) -> None:
    """Write a file of ranked lists, atomically."""
    lengths = lists.present.sum(axis=1)
    write_json_lines(
        path,
        (
            {
                "query": text,
                "caption": int(lists.captions[place]),
                "picture": int(lists.pictures[place]),
                "ranked": lists.rows[place, : lengths[place]].tolist(),
                "scores": [round(score, 4) for score in lists.scores[place, : lengths[place]].tolist()],
            }
            for place, text in enumerate(lists.texts)
        ),
    )


def read_lists(path: Path) -> RankedLists:
    """Read what `write_lists` wrote.

    Raises:
        BadInput: the file has no lists, or a line is not one; the message has the line.
    """
    texts, captions, pictures = [], array("q"), array("q")
    rows, scores = Packed("q"), Packed("f")
    for number, line in read_json_lines(path):
        if missing := [key for key in ("query", "caption", "picture", "ranked", "scores") if key not in line]:
            raise BadInput(f"{path}, line {number}: no {missing[0]!r} in it: {again(COMMAND)}")
        if len(line["ranked"]) != len(line["scores"]):
            raise BadInput(
                f"{path}, line {number}: {len(line['ranked'])} pictures, {len(line['scores'])} scores: {again(COMMAND)}"
            )
        texts.append(line["query"])
        captions.append(line["caption"])
        pictures.append(line["picture"])
        rows.append(line["ranked"])
        scores.append(line["scores"])
    if not texts:
        raise BadInput(f"{path} has no ranked lists: {again(COMMAND)}")
    return RankedLists(
        texts,
        np.array(captions, dtype=np.int64),
        np.array(pictures, dtype=np.int64),
        rows.padded(NO_PICTURE, np.int64),
        scores.padded(-np.inf, np.float32),
    )


class Packed:
    """Lists of numbers behind one another, each number in a few bytes; as Python's objects they take 32."""

    def __init__(self, kind: Literal["q", "f"]) -> None:
        """
        Args:
            kind: of the numbers, int64 or float32, as the `array` module has it.
        """
        self.numbers, self.lengths = array(kind), array("q")

    def append(self, numbers: Sequence[float]) -> None:
        self.numbers.extend(numbers)  # type: ignore[arg-type]
        self.lengths.append(len(numbers))

    def padded(self, fill: float, dtype: type) -> NDArray[Any]:
        """The lists as an array (lists, longest), short ones filled up."""
        lengths = np.array(self.lengths, dtype=np.int64)
        found: NDArray[Any] = np.full((len(lengths), lengths.max(initial=0)), fill, dtype=dtype)
        found[np.arange(found.shape[1]) < lengths[:, None]] = np.array(self.numbers)
        return found


def reordered_ranks(lists: RankedLists, scores: NDArray[np.floating]) -> Ranks:
    """Rank from 1 of each query's picture when its list is sorted by other scores; equal scores keep their order.

    Args:
        scores: (queries, longest), the higher the better.
    """
    hits = lists.rows == lists.pictures[:, None]
    own = np.where(hits, scores, -np.inf).max(axis=1, initial=-np.inf)[:, None]
    earlier = hits.cumsum(axis=1) == 0  # in the list than the picture
    ahead = lists.present & ((scores > own) | ((scores == own) & earlier))
    ranks: Ranks = np.where(hits.any(axis=1), ahead.sum(axis=1) + 1, NOT_FOUND)
    return ranks
