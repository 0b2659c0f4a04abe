"""The search with CUDA graphs: one call starts a whole batch's encoder, another its whole beam search.

    search = GraphedSearch(writer, levels, beams=10)
    memory = search.encode(writer.lm.tokenize(texts))   # in place of writer.encode
    found = search(memory)                              # in place of beam_search

Graphs have fixed shapes. So queries are filled up to a power of two and texts to a multiple of 8 tokens; the first
batch of a shape takes the time of its recording. Fillings are masked or cut off again: results stay the same, to the
rounding that other shapes bring.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.decoding import Scoring, Writer
from models.graphs import GraphMemory, Replay
from models.guide import Guide
from models.voken_lm import Memory, Tokens

from .beam import Beams, refuse_broken, search_steps
from .index import DeviceLevel

TOKENS = 8  # texts are as long as a multiple of this
MOST_SHAPES = 32  # graphs that are kept of each kind


class GraphedSearch:
    """`Writer.encode` and `beam_search` of one index, by graphs. It serves one thread at a time.

    Attributes:
        encoders, searches: what was recorded, by the shape of its input; the least recently used go.
        failures: why shapes run without a graph, each reason once; it is said on standard error too.
    """

    def __init__(
        self,
        writer: Writer,
        levels: list[DeviceLevel],
        *,
        beams: int,
        early_beams: int | None = None,
        scoring: Scoring = "full",
        score_end: bool = False,
        guide: Guide | None = None,
    ) -> None:
        """
        Args:
            levels, beams, early_beams, scoring, score_end: as in `beam_search`.
            guide: on the writer's device, where one steers the search.
        """
        self.guide = guide
        self.writer, self.levels = writer, levels
        self.options: dict[str, Any] = {
            "beams": beams,
            "early_beams": early_beams,
            "scoring": scoring,
            "score_end": score_end,
        }
        self.encoders: OrderedDict[tuple[int, ...], Replay] = OrderedDict()
        self.searches: OrderedDict[tuple[int, ...], Replay] = OrderedDict()
        self.memory = GraphMemory(writer.lm.device)
        self.failures: list[str] = []

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[Sequence[int]]) -> Memory:
        """What the decoder reads, of texts as `VokenLM.tokenize` gives them; some of it may be filling."""
        tokens = filled(token_ids, self.writer.lm.padding)
        replay = self._replay(self.encoders, self._encode, tokens)
        states, mask = replay(*tokens)
        return Memory(states[: len(token_ids)], mask[: len(token_ids)])

    @torch.inference_mode()
    def __call__(self, memory: Memory, texts: Tensor | None = None) -> Beams:
        """The best leaves of the index for each query.

        Args:
            memory: what `encode`, or the writer's, gives.
            texts: (queries, features) for the guide, where there is one.

        Raises:
            ValueError, FloatingPointError: as `beam_search`.
        """
        queries = len(memory.mask)
        whole: tuple[Tensor, ...] = fill(memory)
        if self.guide is not None:
            assert texts is not None, "a guide reads the queries' text features"
            more = texts[:1].expand(len(whole[1]) - queries, -1)
            whole = (torch.cat([texts, more]), *whole)
        leaves, scores, broken = self._replay(self.searches, self._search, whole)(*whole)
        refuse_broken(broken)
        return Beams(leaves[:queries], scores[:queries])

    def _encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        memory = self.writer.read(Tokens(ids, mask))
        return memory.states, memory.mask

    def _search(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *texts, states, mask = inputs
        steering = None if self.guide is None else self.guide.steer(texts[0])
        memory = Memory(states, mask)
        found, broken = search_steps(self.writer, memory, self.levels, steering=steering, **self.options)
        return *found, broken

    def _replay(
        self,
        recorded: OrderedDict[tuple[int, ...], Replay],
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
    ) -> Replay:
        """The recording for inputs of this shape, whose last is the mask; made where there is none yet."""
        shape = tuple(inputs[-1].shape)
        if shape not in recorded:
            if len(recorded) >= MOST_SHAPES:
                recorded.popitem(last=False)
            *rest, mask = (part.to(self.writer.lm.device) for part in inputs)
            mask = mask.clone()
            mask[:, -1] = 0  # libraries that skip a mask without padding see some: while recording they never skip it
            recorded[shape] = Replay(function, [*rest, mask], pool=self.memory.pool, stream=self.memory.stream)
            for failure in recorded[shape].failures:
                if failure not in self.failures:
                    self.failures.append(failure)
                    print(f"note: --graphs: some searches run without a CUDA graph: {failure}", file=sys.stderr)
        recorded.move_to_end(shape)
        return recorded[shape]


def shape_of(queries: int, length: int) -> tuple[int, int]:
    """The smallest shape of a graph in which so many texts of this length have room.

    >>> shape_of(5, 17)
    (8, 24)
    """
    return 1 << (queries - 1).bit_length(), -(-length // TOKENS) * TOKENS


def filled(token_ids: Sequence[Sequence[int]], padding: int) -> Tokens:
    """Texts as a padded batch of a graph's shape, on the CPU; the first text fills up the queries."""
    queries, length = shape_of(len(token_ids), max(map(len, token_ids)))
    every = [*token_ids, *[token_ids[0]] * (queries - len(token_ids))]
    lengths = torch.tensor([len(ids) for ids in every])
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.full(mask.shape, padding)
    ids[mask] = torch.tensor([token for own in every for token in own])
    return Tokens(ids, mask.long())


def fill(memory: Memory) -> Memory:
    """A memory with masked positions and copies of its first query, up to a graph's shape."""
    queries, length = shape_of(*memory.mask.shape)
    states = F.pad(memory.states, (0, 0, 0, length - memory.states.shape[1]))
    mask = F.pad(memory.mask, (0, length - memory.mask.shape[1]))
    missing = queries - len(mask)
    if not missing:
        return Memory(states, mask)
    return Memory(*(torch.cat([part, part[:1].expand(missing, *part.shape[1:])]) for part in (states, mask)))
