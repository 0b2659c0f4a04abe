"""Queries as the decoder reads them: encoded live, or once and for all when the encoder is frozen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from models.compute import autocast
from models.voken_lm import Memory, VokenLM
from tools.files import read_json, write_json
from tools.logs import progress

ENCODE_BATCH = 256
SAVE_EVERY_BATCHES = 20


class LiveQueries:
    """Texts encoded whenever a batch is asked for, with gradients where the encoder trains.

    Attributes:
        lengths: (queries,) tokens of each text.
    """

    def __init__(self, lm: VokenLM, texts: Sequence[str]) -> None:
        self.lm = lm
        self.tokens = lm.tokenize(texts)
        self.lengths = np.array([len(ids) for ids in self.tokens])

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory:
        """Encoder states of the chosen queries, padded to the longest of them; by a writer's `encode`, or the model's
        own."""
        return (encode or self.lm.encode)([self.tokens[index] for index in chosen])


class StoredQueries:
    """Encoder states of all texts, computed once into `<name>.npy` (tokens, width) float16; a killed run goes on.

    Attributes:
        lengths: (queries,) tokens of each text.
    """

    def __init__(self, lm: VokenLM, texts: Sequence[str], *, folder: Path, name: str, dtype: torch.dtype) -> None:
        self.device = lm.device
        tokens = lm.tokenize(texts)
        self.lengths = np.array([len(ids) for ids in tokens])
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.states = self._fill(lm, tokens, folder / f"{name}.npy", folder / f"{name}.json", dtype)

    def memory(self, chosen: NDArray[np.int64], encode: Callable[..., Memory] | None = None) -> Memory:
        """Encoder states of the chosen queries, padded to the longest of them; nothing is encoded again."""
        lengths = torch.from_numpy(self.lengths[chosen])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        rows = torch.from_numpy(self.offsets[chosen])[:, None] + torch.arange(mask.shape[1])
        states = self.states[rows.masked_fill(~mask, 0)].float() * mask[:, :, None]
        return Memory(states.to(self.device), mask.long().to(self.device))

    @torch.inference_mode()
    def _fill(self, lm: VokenLM, tokens: list[list[int]], path: Path, state: Path, dtype: torch.dtype) -> Tensor:
        order = np.argsort(self.lengths, kind="stable")
        batches = [order[start : start + ENCODE_BATCH] for start in range(0, len(order), ENCODE_BATCH)]
        done = read_json(state)["batches"] if state.is_file() and path.is_file() else 0
        shape = (int(self.offsets[-1]), lm.state_width)
        array = open_memmap(path, mode="r+") if done else open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        bar = progress(batches[done:], f"encoding {path.stem}", total=len(batches), initial=done)
        for number, batch in enumerate(bar, start=done + 1):
            with autocast(lm.device, dtype):
                memory = lm.encode([tokens[index] for index in batch])
            states = memory.states.float().cpu().numpy()
            for index, row in zip(batch, states, strict=True):
                array[self.offsets[index] : self.offsets[index + 1]] = row[: self.lengths[index]]
            if number % SAVE_EVERY_BATCHES == 0 or number == len(batches):
                array.flush()
                write_json(state, {"batches": number})
        return torch.from_numpy(np.asarray(array))


def bucketed_batches(
    lengths: NDArray[np.int64], size: int, generator: np.random.Generator, *, bucket: int = 32
) -> list[NDArray[np.int64]]:
    """Shuffled batches of texts of similar length: little padding, and every text once.

    Args:
        lengths: (queries,)
        bucket: batches that are sorted by length together; larger means less padding and less shuffling.
    """
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), size * bucket):
        some = order[start : start + size * bucket]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[begin : begin + size] for begin in range(0, len(some), size)]
    generator.shuffle(batches)
    return batches
