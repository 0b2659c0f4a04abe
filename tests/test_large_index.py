"""The tree that is built on disk: the same files as the one that is built in memory."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retriever.gallery import large_index
from retriever.gallery.large_index import write_index, write_large_index
from retriever.index import build_index, save_index

KINDS = ((2, np.int16), (300, np.int16), (1024, np.int16), (40_000, np.int32))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def both(tmp: Path, codes: NDArray[np.integer], partition: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    memory, disk = tmp / "memory", tmp / "disk"
    for folder in (memory, disk):
        folder.mkdir()
    save_index(memory, build_index(codes))
    write_large_index(disk, codes, partition=partition)
    return files(memory), files(disk)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), levels=st.integers(1, 4))
def test_the_files_are_those_of_the_tree_built_in_memory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int, kind: tuple[int, type], levels: int
) -> None:
    size, dtype = kind
    rng = np.random.default_rng(seed)
    levels = min(levels, 3) if size == 40_000 else levels  # four codes of 16 bits do not fit into a key
    codes: NDArray[np.integer] = rng.integers(size, size=(data.draw(st.integers(1, 2000)), levels)).astype(dtype)
    if data.draw(st.booleans()):  # pictures that share codes
        codes = codes[rng.integers(len(codes), size=len(codes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_index, "PREFIX_BITS", data.draw(st.sampled_from((1, 8, 16))))
        patch.setattr(large_index, "READ", data.draw(st.sampled_from((1, 64, 10_000))))
        memory, disk = both(tmp_path_factory.mktemp("trees"), codes, data.draw(st.sampled_from((1, 100, 10_000))))
    assert memory == disk


def test_offsets_grow_wider_while_they_are_written(tmp_path: Path) -> None:
    """The first nodes have one child each; a later one has so many that a byte no longer holds the offsets."""
    few = np.stack([np.arange(200), np.zeros(200)], axis=1)
    many = np.stack([np.full(1000, 200), np.arange(1000)], axis=1)
    memory, disk = both(tmp_path, np.concatenate([few, many, [[201, 0]]]).astype(np.int16), 100)
    assert memory == disk


def test_keys_that_leave_no_room_for_places_are_sorted_all_the_same(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(2**15, size=(5000, 4)).astype(np.int16)
    memory, disk = both(tmp_path, codes, 10**6)
    assert memory == disk


def test_many_pictures_are_sorted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(16, size=(500, 4)).astype(np.int16)
    asked = []
    monkeypatch.setattr(large_index, "MOST_IN_MEMORY", 499)
    monkeypatch.setattr(large_index, "write_large_index", lambda folder, codes: asked.append(len(codes)))
    write_index(tmp_path, codes)
    write_index(tmp_path, codes[1:])
    assert asked == [500]


@pytest.mark.parametrize(
    ("codes", "reason"),
    [(np.empty((0, 4)), "at least one picture"), (np.full((3, 4), 2**16), "do not fit into 63 bits")],
)
def test_codes_that_make_no_tree_are_refused(tmp_path: Path, codes: NDArray[np.int64], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_large_index(tmp_path, codes.astype(np.int32))
