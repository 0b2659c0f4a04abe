"""Changes that lie over an index: a search finds what it would find in one that was built anew, to the bit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retriever.beam import beam_search, expand
from retriever.gallery.overlay import NONE, find_children, lay_over, overlay_to_device
from retriever.index import build_index, to_device
from tests.test_beam import CPU, SIZE, Table

LEVELS = 3
codes_of = st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * LEVELS), min_size=1, max_size=60)


def lists(
    levels: Any, leaves: Any, *, beams: int, grain: float, score_end: bool
) -> list[tuple[list[int], list[float]]]:
    memory, writer = SimpleNamespace(states=torch.zeros(3, 1)), Table(grain)
    found = beam_search(writer, memory, levels, beams=beams, score_end=score_end)  # type: ignore[arg-type]
    return [tuple(each) for each in expand(found, leaves, keep=beams)]  # type: ignore[misc]


@settings(max_examples=200, deadline=None)
@given(
    old=codes_of, new=st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * LEVELS), max_size=20), data=st.data(),
    beams=st.sampled_from((1, 3, 10, 125)), grain=st.sampled_from((1 / 1024, 1.0)), score_end=st.booleans(),
)  # fmt: skip
def test_lists_are_those_of_an_index_built_anew(
    old: list[tuple[int, ...]],
    new: list[tuple[int, ...]],
    data: st.DataObject,
    beams: int,
    grain: float,
    score_end: bool,
) -> None:
    gone = np.array(sorted(data.draw(st.sets(st.integers(0, len(old) - 1)))), dtype=np.int64)
    before, added = np.array(old, dtype=np.int16), np.array(new, dtype=np.int16).reshape(-1, LEVELS)
    stay = np.setdiff1d(np.arange(len(old) + len(new)), gone)
    if not len(stay):
        return
    index = build_index(before)
    overlay = lay_over(index, gone=(before[gone], gone), come=(added, np.arange(len(old), len(old) + len(new))))
    live = overlay_to_device(overlay, to_device(index, CPU))
    anew = build_index(np.concatenate([before, added])[stay])
    options: dict[str, Any] = {"beams": beams, "grain": grain, "score_end": score_end}
    expected = [(stay[rows].tolist(), scores) for rows, scores in lists(to_device(anew, CPU), anew, **options)]
    assert lists(live, overlay, **options) == expected


def test_without_changes_the_tree_itself_is_searched() -> None:
    index = build_index(np.array([[0, 1], [2, 1]]))
    none = (np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.int64))
    tree = to_device(index, CPU)
    assert overlay_to_device(lay_over(index, gone=none, come=none), tree) is tree


@pytest.mark.parametrize("size", [3, 200])
def test_children_are_found_by_their_codes(size: int) -> None:
    codes = np.random.default_rng(size).integers(size, size=(500, 2)).astype(np.int16)
    index = build_index(codes)
    firsts, level = index.levels[0].codes.astype(np.int64), index.levels[1]
    nodes, wanted = (each.ravel() for each in np.meshgrid(np.arange(len(firsts)), np.arange(size), indexing="ij"))
    found = find_children(level, np.append(nodes, NONE), np.append(wanted, 0))
    pairs: set[tuple[int, int]] = set(map(tuple, codes.tolist()))
    assert found[-1] == NONE
    for node, code, place in zip(nodes.tolist(), wanted.tolist(), found[:-1].tolist(), strict=True):
        assert (place != NONE) == ((int(firsts[node]), code) in pairs)
        assert place == NONE or level.codes[place] == code


def bytes_of(arrays: list[NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays)


def test_a_change_costs_what_it_touches() -> None:
    """Not what the index holds: the changed nodes list their children, a codebook's at most."""
    codes = np.random.default_rng(0).integers(64, size=(50_000, 4)).astype(np.int16)
    index = build_index(codes)
    gone = np.array([7])
    overlay = lay_over(index, gone=(codes[gone], gone), come=(codes[:1], np.array([50_000])))
    assert bytes_of([part for edges in overlay.levels for part in edges[:3]]) < 2 * 4 * 64 * 24
