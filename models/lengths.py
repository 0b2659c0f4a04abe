"""Texts that are longer than a model reads: found before they are cut, and told in one line.

A model reads a text up to a number of tokens. The models that read captions and queries (text tower, language model,
reranker) say here which texts they cut; how far they read one is found by trying its beginnings.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from tools import processes
from tools.texts import shortened

FIRST_TRIED = 16  # words or characters


class Reader(Protocol):
    """A model that reads texts up to a number of tokens."""

    reader: str
    """What people call it, for example "the text tower"."""

    @property
    def most_tokens(self) -> int:
        """Tokens of a text that it reads at most."""

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """Whether it cuts each of the texts."""


def unread(model: Reader, text: str) -> str | None:
    """The part of a text that a model does not read, "words 58 and on" for example; None where it reads all of it.

    The first of these words may be read in part. A text whose first word is too long is counted in characters.
    """
    if not model.overlong([text])[0]:
        return None
    words = text.split()
    whole = _most(len(words), lambda count: not model.overlong([" ".join(words[:count])])[0])
    if whole:
        return f"words {whole + 1} and on"
    return f"characters {_most(len(text), lambda count: not model.overlong([text[:count]])[0]) + 1} and on"


def tell_overlong(model: Reader, texts: Sequence[str], what: str = "captions") -> None:
    """Print one line about the texts that a model cuts, where there are any; the main process does."""
    if not processes.is_main():
        return
    distinct = list(dict.fromkeys(texts))
    cut = {text for text, long in zip(distinct, model.overlong(distinct), strict=True) if long}
    if cut:
        first = next(text for text in distinct if text in cut)
        print(
            f"{sum(text in cut for text in texts):,} of {len(texts):,} {what} are longer than {model.reader} reads "
            f'({model.most_tokens} tokens); of the first, "{shortened(first)}", {unread(model, first)} are not read',
            flush=True,
        )


def _most(longest: int, fits: Callable[[int], bool]) -> int:
    """The greatest number below `longest` that fits; 0 where 1 does not. Numbers far above it are not tried."""
    fitting, too_many = 0, min(FIRST_TRIED, longest)
    while too_many < longest and fits(too_many):
        fitting, too_many = too_many, min(2 * too_many, longest)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting
