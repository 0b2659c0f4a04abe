"""Vokens as text: the names that the tokenizer, the language model and the files between stages share.

A code c at level l is the token `<v{l}_{c}>`, or `<v_{c}>` where one codebook serves all levels.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]


class VokenSpace(NamedTuple):
    """How many codes there are: the facts every stage takes from the run folder of the stage before."""

    levels: int
    codebook_size: int
    shared: bool

    @property
    def tokens(self) -> list[str]:
        """All voken tokens: (books * codebook_size,) in the order of `rows`."""
        books = [""] if self.shared else [str(level) for level in range(self.levels)]
        return [f"<v{book}_{code}>" for book in books for code in range(self.codebook_size)]

    def rows(self, codes: Codes) -> Codes:
        """Codes (..., levels) to positions in `tokens` (..., levels)."""
        if self.shared:
            return codes
        return codes + np.arange(self.levels) * self.codebook_size

    def level_rows(self, level: int) -> slice:
        """The positions in `tokens` that a level may use."""
        start = 0 if self.shared else level * self.codebook_size
        return slice(start, start + self.codebook_size)
