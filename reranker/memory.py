"""How many pictures and pairs a batch of scoring may hold, so that all it needs beside the weights stays in a bound."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.live_bytes import peak_bytes
from models.opened_pictures import OpenedPictures
from models.scorer import Scorer
from tools.errors import BadInput

GIB = 1 << 30
NUMBERS = 32  # bytes of a batch's pair for its places and its score
WORKING_SHARE = 1 / 4  # of the memory, for batches, where not everything fits


class Costs(NamedTuple):
    """Bytes that scoring takes beside the weights, measured on small forward passes of the model itself."""

    picture: int
    """Keys and values of one picture"""
    reading: int
    """Of one picture while it is read, beside those"""
    lengths: tuple[int, int]
    """Tokens of the shortest and of the longest query"""
    pairs: tuple[int, int]
    """Of a pair with one of these queries, while it is scored"""

    def pair(self, length: int) -> int:
        """Bytes of a pair with a query of `length` tokens. They grow with the length linearly, and in some
        implementations of attention faster: the line between both ends is never too low."""
        return int(np.ceil(np.interp(length, self.lengths, self.pairs)))


class Plan(NamedTuple):
    """What a batch may hold."""

    room: int
    """Pictures that are kept"""
    working: int
    """Bytes for the forward passes"""


def costs_of(scorer: Scorer, tokens: NDArray[np.integer], queries: list[list[int]]) -> Costs:
    """Measure what one picture and one pair need. In compat mode no pictures are kept.

    Args:
        tokens: (pictures, length) image tokens.
        queries: token ids of all queries.
    """
    ordered = sorted(queries, key=len)
    ends = [ordered[0], ordered[-1]]
    first = torch.zeros(1, dtype=torch.long)
    opened = OpenedPictures(scorer, tokens)
    layers = [] if scorer.compat is not None else opened.read([0], [0], 1)

    def close(query: list[int]) -> object:
        pairs = scorer.pairs(tokens[:1], [query], first, first)
        return scorer.close(layers, pairs.of_picture, pairs) if layers else scorer(pairs)

    close(ends[0])  # what is cast to another arithmetic and kept, is so now
    pairs = peak_bytes(lambda: close(ends[0])), peak_bytes(lambda: close(ends[1]))
    picture = sum(part.element_size() * part.numel() for layer in layers for part in layer)
    reading = peak_bytes(lambda: opened.read([0], [0], 1, layers)) if layers else 0
    return Costs(picture, reading, (len(ends[0]), len(ends[1])), pairs)


def plan(costs: Costs, memory: float, *, pairs: int, pictures: int) -> Plan:
    """Divide the memory: all pictures are kept if the batches leave room for them, else as many as there is room for.

    Args:
        memory: GiB.
        pairs: of a batch.
        pictures: that occur in the lists.

    Raises:
        BadInput: not even one pair fits.
    """
    total = int(memory * GIB) - NUMBERS * pairs
    largest = max(costs.pair(costs.lengths[1]), costs.reading)
    wanted = largest * pairs
    working = max(largest, min(wanted, int(total * WORKING_SHARE)))
    if wanted + costs.picture * pictures <= total:
        working = total - costs.picture * pictures
    room = min(pictures, (total - working) // costs.picture) if costs.picture else pictures
    if working > total or room < 1:
        least = (largest + costs.picture + NUMBERS * pairs) / GIB
        raise BadInput(f"--memory {memory:g}: one picture with one query takes {_rounded_up(least)} GiB: give more")
    return Plan(room, total - costs.picture * room)


def _rounded_up(gib: float) -> str:
    """Two digits that are not less than the number."""
    step = 10.0 ** (np.floor(np.log10(gib)) - 1)
    return f"{np.ceil(gib / step) * step:.2g}"
