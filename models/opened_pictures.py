"""Keys and values of pictures' prompts: read once, kept while there is room, and copied one layer at a time.

Queries stand behind them in the model's cache. So the cache of a batch would hold a copy of every layer for every pair;
the layers here make that copy when the model comes to a layer, and let it go behind it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicLayer

if TYPE_CHECKING:
    from .scorer import Scorer

KeysAndValues = tuple[Tensor, Tensor]


class _Kept(DynamicLayer):
    """A layer that kept keys and values (pictures, heads, opening, width) stand before, and that keeps nothing new."""

    def __init__(self, kept: KeysAndValues, places: Tensor) -> None:
        super().__init__()
        self.keys, self.values = kept
        self.places = places
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """Keys and values (pairs, heads, opening + length, width) from those of the queries."""
        both = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([kept[self.places], own], dim=-2) for kept, own in both)
        return keys, values


class _Keeping(DynamicLayer):
    """A layer that writes the keys and values of pictures to their places among those that are kept."""

    def __init__(self, places: Sequence[int], room: int, kept: KeysAndValues | None = None) -> None:
        super().__init__()
        self.places, self.room, self.kept = list(places), room, kept

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """What was given, as nothing stands before a picture."""
        given = (key_states, value_states)
        if self.kept is None:
            self.kept = _empty(key_states, self.room), _empty(value_states, self.room)
        for kept, own in zip(self.kept, given, strict=True):
            kept[self.places] = own
        return given


def _empty(like: Tensor, room: int) -> Tensor:
    return like.new_empty(room, *like.shape[1:])


def behind_pictures(layers: Sequence[KeysAndValues], places: Tensor) -> Cache:
    """The cache of queries that each stand behind a picture: `places` (pairs,) says which."""
    return Cache(layers=[_Kept(layer, places) for layer in layers])


class OpenedPictures:
    """Keys and values of pictures' prompts, computed once and kept while there is room; the least recently used go.

    Attributes:
        room: pictures that are kept at most; to be set before the first are.
        at_once: pictures that are read in one forward pass, at most.
        layers: kept keys and values (room, heads, opening, width) of each layer; empty before the first.
    """

    def __init__(
        self, scorer: "Scorer", tokens: NDArray[np.integer], *, room: int = 0, at_once: int | None = None
    ) -> None:
        """
        Args:
            tokens: (pictures, images.length) image tokens of all pictures.
        """
        self.scorer, self.tokens, self.room, self.at_once = scorer, tokens, room, at_once
        self.place: OrderedDict[int, int] = OrderedDict()
        self.layers: list[KeysAndValues] = []

    @torch.inference_mode()
    def places(self, pictures: NDArray[np.int64]) -> Tensor:
        """Where in `layers` the pictures (pairs,) lie, by row of `tokens`; those that are missing are read first.

        Of distinct pictures there must not be more than `room`.
        """
        wanted = dict.fromkeys(pictures.tolist())
        for picture in wanted.keys() & self.place.keys():
            self.place.move_to_end(picture)
        if missing := [picture for picture in wanted if picture not in self.place]:
            self._open(missing)
        return torch.tensor([self.place[picture] for picture in pictures.tolist()], device=self.scorer.device)

    def _open(self, missing: list[int]) -> None:
        free = [self.place.popitem(last=False)[1] for _ in range(len(self.place) + len(missing) - self.room)]
        free += list(range(len(self.place) + len(free), len(self.place) + len(missing)))
        step = self.at_once or len(missing)
        for start in range(0, len(missing), step):
            part = slice(start, start + step)
            self.layers = self.read(missing[part], free[part], self.room, self.layers)
        self.place.update(zip(missing, free, strict=True))

    def read(
        self, pictures: Sequence[int], places: Sequence[int], room: int, kept: Sequence[KeysAndValues] = ()
    ) -> list[KeysAndValues]:
        """Keys and values (room, heads, opening, width) of each layer, those of pictures written to their places.

        Args:
            kept: the layers to write to; new ones by default.
        """
        if kept:
            cache = Cache(layers=[_Keeping(places, room, layer) for layer in kept])
        else:
            cache = Cache(layer_class_to_replicate=partial(_Keeping, places, room))
        self.scorer.read_pictures(self.scorer.picture_ids(self.tokens[list(pictures)]).to(self.scorer.device), cache)
        return [layer.kept for layer in cache.layers]
