"""Queries as the decoder reads them: encoded live, or once and for all when the encoder is frozen."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from models.compute import autocast
from models.voken_lm import Memory, Tokens, VokenLM
from tools import processes
from tools.blocks import Blocks, wait_for
from tools.errors import BadInput
from tools.files import new_array, read_array, replacing, write_array
from tools.logs import progress
from tools.texts import clean

ENCODE_BATCH = 256
GPU_MULTIPLE = 8  # tokens: what the kernels of attention and of half-precision products are fastest at
LONGEST_QUERY = 20_000  # characters: more than any model reads


def read_query(text: str) -> str:
    """What a person typed, as a caption is: on one line, without what is no text.

    Raises:
        BadInput: nothing is left of it.
    """
    if not (query := clean(text[:LONGEST_QUERY])):
        raise BadInput("an empty query finds nothing: write some words")
    return query


class Searchable(Protocol):
    """Queries that a search can read, whole or a selection."""

    lengths: NDArray[np.int64]

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory: ...


class LiveQueries:
    """Texts encoded whenever a batch is asked for, with gradients where the encoder trains.

    Attributes:
        lengths: (queries,) tokens of each text.
    """

    def __init__(self, lm: VokenLM, texts: Sequence[str]) -> None:
        self.lm = lm
        self.tokens = lm.tokenize(texts)
        self.lengths = np.array([len(ids) for ids in self.tokens])

    def batch(self, chosen: NDArray[np.int64]) -> Tokens:
        """The chosen queries as `VokenLM.forward` takes them."""
        multiple = GPU_MULTIPLE if self.lm.device.type == "cuda" else 1
        return self.lm.pad([self.tokens[index] for index in chosen], multiple=multiple)

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory:
        """Encoder states of the chosen queries, padded to the longest of them; by a writer's `encode`, or the model's
        own."""
        return (encode or self.lm.encode)([self.tokens[index] for index in chosen])


class StoredQueries:
    """Encoder states of all texts, each distinct one computed once into `<name>.npy` (tokens, width) float16. Several
    processes share the batches, and a killed run goes on.

    Attributes:
        lengths: (queries,) tokens of each text.
    """

    def __init__(self, lm: VokenLM, texts: Sequence[str], *, folder: Path, name: str, dtype: torch.dtype) -> None:
        self.device = lm.device
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        tokens = lm.tokenize(list(place))
        self.distinct_lengths = np.array([len(ids) for ids in tokens])
        self.offsets = np.concatenate([[0], np.cumsum(self.distinct_lengths)])
        self.places = np.array([place[text] for text in texts])
        self.lengths = self.distinct_lengths[self.places]
        path = folder / f"{name}.npy"
        if not processes.share(processes.is_main() and path.is_file()):  # it is complete when it is there
            self._make(lm, tokens, path, dtype)
        # copy on write: torch takes no array that it may not write to
        self.states = torch.from_numpy(np.asarray(open_memmap(path, mode="c")))
        if len(self.states) != self.offsets[-1]:
            raise BadInput(f"{path} holds the states of other texts: start again with --overwrite")

    def batch(self, chosen: NDArray[np.int64]) -> Memory:
        """The chosen queries as `VokenLM.forward` takes them."""
        return self._padded(chosen, GPU_MULTIPLE if self.device.type == "cuda" else 1)

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory:
        """Encoder states of the chosen queries, padded to the longest of them; nothing is encoded again."""
        return self._padded(chosen, 1)

    def _padded(self, chosen: NDArray[np.int64], multiple: int) -> Memory:
        lengths = torch.from_numpy(self.lengths[chosen])
        mask = torch.arange(-(-int(lengths.max()) // multiple) * multiple) < lengths[:, None]
        rows = torch.from_numpy(self.offsets[self.places[chosen]])[:, None] + torch.arange(mask.shape[1])
        states = self.states[rows.masked_fill(~mask, 0)].float() * mask[:, :, None]
        return Memory(states.to(self.device, non_blocking=True), mask.long().to(self.device, non_blocking=True))

    def _make(self, lm: VokenLM, tokens: list[list[int]], path: Path, dtype: torch.dtype) -> None:
        order = np.argsort(self.distinct_lengths, kind="stable")
        batches = [order[start : start + ENCODE_BATCH] for start in range(0, len(order), ENCODE_BATCH)]
        work = Blocks(path.with_suffix(""), len(batches))
        for number in progress(work.left, f"encoding {path.stem}"):
            write_array(work.path(number), self._encode(lm, tokens, batches[number], dtype))
        blocks = work.gather()
        if processes.is_main():
            self._merge(path, blocks, batches, width=lm.state_width)
        processes.wait()
        if processes.is_main():
            shutil.rmtree(work.folder)
        wait_for([path])

    @torch.inference_mode()
    def _encode(
        self, lm: VokenLM, tokens: list[list[int]], batch: NDArray[np.int64], dtype: torch.dtype
    ) -> NDArray[np.float16]:
        """States of a batch's texts, one behind the other, without padding."""
        with autocast(lm.device, dtype):
            memory = lm.encode([tokens[index] for index in batch])
        states = memory.states.float().cpu().numpy().astype(np.float16)
        return np.concatenate([states[row, :length] for row, length in enumerate(self.distinct_lengths[batch])])

    def _merge(self, path: Path, blocks: list[Path], batches: list[NDArray[np.int64]], *, width: int) -> None:
        """Put the states of all batches in the order of the texts."""
        with replacing(path) as temporary:
            array = new_array(temporary, dtype=np.float16, shape=(int(self.offsets[-1]), width))
            for batch, block in zip(batches, blocks, strict=True):
                ends = np.cumsum(self.distinct_lengths[batch])
                for index, states in zip(batch, np.split(read_array(block), ends[:-1]), strict=True):
                    array[self.offsets[index] : self.offsets[index + 1]] = states
            array.flush()


class SomeQueries:
    """A selection of queries, for a search.

    Attributes:
        lengths: (chosen,) tokens of each text.
    """

    def __init__(self, queries: LiveQueries | StoredQueries, chosen: NDArray[np.int64]) -> None:
        self.queries, self.chosen = queries, chosen
        self.lengths = queries.lengths[chosen]

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory:
        """Encoder states of the chosen queries of the selection."""
        return self.queries.memory(self.chosen[chosen], encode)
