"""The prefix tree's arrays by hand, at the limits of their types, and what is refused."""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retriever import index as tree
from retriever.index import (
    Level,
    Offsets,
    Repeats,
    VokenIndex,
    build_index,
    build_sorted,
    load_index,
    pack_offsets,
    save_index,
)
from tools.errors import BadInput

CODES = np.array([[2, 1], [0, 3], [2, 1], [2, 0], [0, 3]])  # prefixes 0: (0, 3); 2: (2, 0), (2, 1)
FILES = [
    "leaf_bases.npy", "leaf_deltas.npy",
    *(f"level{number}_{part}.npy" for number in (0, 1) for part in ("bases", "codes", "deltas")),
    "pictures.npy",
]  # fmt: skip


def numbers(offsets: Offsets) -> list[int]:
    return offsets.at(np.arange(len(offsets.deltas))).tolist()


def walk(index: VokenIndex) -> list[tuple[int, ...]]:
    """The codes of every leaf, in the order of the leaves."""
    found: list[tuple[int, ...]] = [()]
    for level in index.levels:
        bounds = numbers(level.offsets)
        assert len(bounds) == len(found) + 1
        assert level.widest == max(end - start for start, end in pairwise(bounds))
        found = [
            (*prefix, int(code))
            for node, prefix in enumerate(found)
            for code in level.codes[bounds[node] : bounds[node + 1]]
        ]
    return found


def test_the_arrays_by_hand() -> None:
    index = build_index(CODES)
    assert [numbers(level.offsets) for level in index.levels] == [[0, 2], [0, 1, 3]]
    assert [level.codes.tolist() for level in index.levels] == [[0, 2], [3, 0, 1]]
    assert [level.widest for level in index.levels] == [2, 2]
    assert index.pictures.tolist() == [1, 4, 3, 0, 2]
    assert isinstance(index.leaf_offsets, Offsets)
    assert numbers(index.leaf_offsets) == [0, 2, 3, 5]
    assert index.leaves == 3
    rows, owners = index.expand(np.array([2, 0, 1, 2]))
    assert rows.tolist() == [0, 2, 1, 4, 3, 0, 2]
    assert owners.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert rows.dtype == owners.dtype == np.int64


def test_without_collisions_there_is_no_map_of_leaves() -> None:
    index = build_index(CODES[[0, 1, 3]])
    assert index.leaf_offsets is None
    rows, owners = index.expand(np.array([2, 0]))
    assert (rows.tolist(), owners.tolist()) == ([0, 1], [0, 1])
    assert rows.dtype == np.int64
    assert index.map_bytes == index.pictures.nbytes == 3 * 4


FEW = np.array([[2, 1], [0, 3], [2, 1], [2, 0], [0, 4], [0, 5], [3, 0], [3, 1], [3, 2], [3, 3]])  # one code twice


def test_few_collisions_take_bytes_of_their_own_alone(tmp_path: Path) -> None:
    index = build_index(FEW)
    assert isinstance(index.leaf_offsets, Repeats)
    assert index.leaf_offsets.leaves.tolist() == [4]
    assert index.map_bytes == 10 * 4 + 4
    assert index.leaf_offsets.at(np.array([0, 4, 5, 9])).tolist() == [0, 4, 6, 10]
    rows, owners = index.expand(np.array([5, 4, 3]))
    assert (rows.tolist(), owners.tolist()) == ([6, 0, 2, 3], [0, 1, 1, 2])
    save_index(tmp_path, index)
    assert not (tmp_path / "leaf_bases.npy").exists()
    loaded = load_index(tmp_path, 2)
    assert [part.tolist() for part in loaded.expand(np.arange(9))] == [
        part.tolist() for part in index.expand(np.arange(9))
    ]


@pytest.mark.parametrize("leaves", [[9], [4, 4], []])
def test_repeats_of_other_leaves_are_refused(tmp_path: Path, leaves: list[int]) -> None:
    save_index(tmp_path, build_index(FEW))
    np.save(tmp_path / "leaf_repeats.npy", np.array(leaves, dtype=np.int32))
    with pytest.raises(BadInput, match="9 leaves, 10 pictures: build the index again"):
        load_index(tmp_path, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_both_forms_of_the_map_say_the_same(codes: list[int]) -> None:
    starts = np.flatnonzero(np.diff(np.sort(codes), prepend=-1))
    repeats = np.delete(np.cumsum(np.diff(np.sort(codes), prepend=-1) > 0) - 1, starts).astype(np.int32)
    places = np.arange(len(starts) + 1)
    offsets = pack_offsets(np.append(starts, len(codes)).astype(np.int32))
    assert Repeats(repeats).at(places).tolist() == offsets.at(places).tolist()


def test_bytes_are_those_of_the_arrays() -> None:
    index = build_index(CODES)
    assert index.levels[1].offsets.nbytes == 4 + 3  # a base, and a byte for each of three numbers
    assert index.constraint_bytes == (4 + 2) + 2 * 2 + (4 + 3) + 2 * 3
    assert index.map_bytes == 5 * 4 + 4 + 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=300))
def test_the_tree_holds_exactly_the_codes(levels: int, rows: list[list[int]]) -> None:
    codes = np.array(rows)[:, :levels]
    index = build_index(codes)
    leaves = walk(index)
    assert leaves == sorted(set(map(tuple, codes.tolist())))
    for leaf, sequence in enumerate(leaves):
        found, owners = index.expand(np.array([leaf]))
        assert found.tolist() == [row for row, own in enumerate(codes.tolist()) if tuple(own) == sequence]
        assert owners.tolist() == [0] * len(found)


def test_a_tree_of_many_blocks() -> None:
    """Several hundred nodes: offsets are looked up in blocks of 64."""
    codes = np.random.default_rng(0).integers(0, 30, size=(900, 2))
    assert walk(build_index(codes)) == sorted(set(map(tuple, codes.tolist())))


@pytest.mark.parametrize(
    ("step", "kind"),
    [(256, np.uint8), (257, np.int16), (2**15, np.int16), (2**15 + 1, np.int32)],
)
def test_offsets_take_the_smallest_type(step: int, kind: type) -> None:
    """A step of 256 lies 255 above the smallest possible."""
    packed = pack_offsets(np.array([0, step, step + 1], dtype=np.int32))
    assert packed.deltas.dtype == kind
    assert packed.bases.dtype == np.int32
    assert numbers(packed) == [0, step, step + 1]


@given(st.lists(st.sampled_from([1, 1, 1, 2, 7, 300, 40_000]), min_size=1, max_size=300))
def test_packed_offsets_are_the_numbers(steps: list[int]) -> None:
    rising = np.cumsum([0, *steps]).astype(np.int32)
    assert numbers(pack_offsets(rising)) == rising.tolist()


def test_offsets_are_relative_to_their_block_of_64() -> None:
    rising = np.arange(200, dtype=np.int32) * 3
    packed = pack_offsets(rising)
    assert packed.bases.tolist() == [0, 128, 256, 384]
    assert packed.deltas.max() == 2 * 63
    assert packed.at(np.array([[0, 63], [64, 199]])).tolist() == [[0, 189], [192, 597]]
    assert packed.at(np.array([5], dtype=np.uint8)).dtype == np.int64


@pytest.mark.parametrize(("high", "kind"), [(2**15 - 1, np.int16), (2**15, np.int32)])
def test_codes_take_the_smallest_type(high: int, kind: type) -> None:
    index = build_index(np.array([[high, 0], [0, high]]))
    assert [level.codes.dtype for level in index.levels] == [kind, kind]
    assert walk(index) == [(0, high), (high, 0)]


@pytest.mark.parametrize(("bits", "levels"), [(1, 3), (21, 3), (16, 4), (9, 7), (32, 2), (40, 3)])
def test_codes_of_any_width_are_sorted(bits: int, levels: int) -> None:
    """Up to 63 bits fit one integer; beyond them the columns are compared."""
    generator = np.random.default_rng(bits)
    codes = generator.choice([0, 1, 2 ** (bits - 1), 2**bits - 1], size=(400, levels))
    assert tree.sort_codes(codes).tolist() == sorted(range(400), key=lambda row: (codes[row].tolist(), row))


def test_equal_codes_keep_the_order_of_the_pool() -> None:
    codes = np.zeros((5000, 2), dtype=np.int64)
    codes[::7, 1] = 1
    assert build_index(codes).expand(np.array([0]))[0].tolist() == [row for row in range(5000) if row % 7]
    assert tree.sort_codes(np.zeros((100, 1), dtype=np.int64)).tolist() == list(range(100))


def test_sorted_codes_keep_their_rows() -> None:
    index = build_sorted(np.array([[0], [1], [1]]), np.array([9, 4, 6]))
    assert index.expand(np.array([1, 0]))[0].tolist() == [4, 6, 9]
    assert index.pictures.dtype == np.int32


@pytest.mark.parametrize("codes", [np.zeros((0, 4), dtype=np.int64), np.zeros(4, dtype=np.int64), np.zeros((3, 0))])
def test_what_is_no_table_of_codes_is_refused(codes: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="expected codes") as refused:
        build_index(codes)
    assert str(refused.value) == f"expected codes (pictures, levels) of at least one picture, got {codes.shape}"


def test_more_pictures_than_int32_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.iinfo(np.int32).max == tree.MOST_PICTURES
    monkeypatch.setattr(tree, "MOST_PICTURES", 4)
    assert build_index(CODES[:4]).leaves == 3
    with pytest.raises(ValueError, match=r"^5 pictures, an index holds 4 at most$"):
        build_index(CODES)


def test_an_index_is_saved_as_plain_arrays(tmp_path: Path) -> None:
    index = build_index(CODES)
    save_index(tmp_path, index)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert np.load(tmp_path / "level1_codes.npy").tolist() == [3, 0, 1]
    assert np.load(tmp_path / "pictures.npy").tolist() == [1, 4, 3, 0, 2]
    loaded = load_index(tmp_path, 2)
    assert walk(loaded) == walk(index)
    assert isinstance(loaded.leaf_offsets, Offsets)
    assert isinstance(index.leaf_offsets, Offsets)
    assert numbers(loaded.leaf_offsets) == numbers(index.leaf_offsets)
    parts = [*(part for level in loaded.levels for part in (*level.offsets, level.codes)), *loaded.leaf_offsets]
    assert all(isinstance(part.base, np.memmap) for part in [*parts, loaded.pictures])  # nothing is read into memory


def test_an_index_without_collisions_comes_back_without_a_map(tmp_path: Path) -> None:
    save_index(tmp_path, build_index(CODES[[0, 1, 3]]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if "leaf" not in name]
    loaded = load_index(tmp_path, 2)
    assert loaded.leaf_offsets is None
    assert loaded.expand(np.array([0, 1, 2]))[0].tolist() == [1, 2, 0]


def replaced(folder: Path, name: str, array: NDArray[np.int32]) -> str:
    """The message with which an index is refused when one of its arrays is another."""
    save_index(folder, build_index(CODES))
    np.save(folder / name, array)
    with pytest.raises(BadInput) as refused:
        load_index(folder, 2)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "array", "part"),
    [
        ("level0_deltas.npy", [0], "level 0"),
        ("level0_deltas.npy", [0, 2], "level 0"),
        ("level0_bases.npy", [0, 0], "level 0"),
        ("level0_codes.npy", [0, 1, 2], "level 0"),
        ("level1_codes.npy", [3, 0], "level 1"),
        ("level1_deltas.npy", [0, 0, 0, 0], "level 1"),
        ("leaf_deltas.npy", [0, 1, 1], "the leaves"),
        ("leaf_bases.npy", [0, 1], "the leaves"),
        ("pictures.npy", [1, 4, 3, 0], "the leaves"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, name: str, array: list[int], part: str) -> None:
    message = replaced(tmp_path, name, np.array(array, dtype=np.int32))
    assert message == f"{tmp_path}: the arrays of {part} do not fit its neighbours': build the index again"


def test_a_map_of_other_pictures_is_refused(tmp_path: Path) -> None:
    save_index(tmp_path, build_index(CODES[[0, 1, 3]]))
    np.save(tmp_path / "pictures.npy", np.array([0, 1], dtype=np.int32))
    with pytest.raises(BadInput) as refused:
        load_index(tmp_path, 2)
    assert str(refused.value) == f"{tmp_path}: 3 leaves, 2 pictures: build the index again"


def test_a_block_more_begins_with_the_64th_node(tmp_path: Path) -> None:
    """63 leaves have 64 offsets, one block; 64 have 65, two."""
    for leaves, blocks in ((63, 1), (64, 2), (128, 3)):
        codes = np.repeat(np.arange(leaves), 2)[:, None]
        save_index(tmp_path, build_index(codes))
        assert len(np.load(tmp_path / "leaf_bases.npy")) == blocks
        assert load_index(tmp_path, 1).leaves == leaves


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    save_index(tmp_path, build_index(CODES))
    (tmp_path / "level1_codes.npy").unlink()
    with pytest.raises(BadInput, match=r"level1_codes\.npy does not exist"):
        load_index(tmp_path, 2)


@pytest.mark.parametrize("stored", [False, True])
def test_the_device_gets_the_same_tree(tmp_path: Path, stored: bool) -> None:
    index = build_index(np.random.default_rng(0).integers(0, 30, size=(900, 3)))
    if stored:  # read-only arrays, which torch would warn of
        save_index(tmp_path, index)
        index = load_index(tmp_path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = tree.to_device(index, torch.device("cpu"))
    for level, own in zip(levels, index.levels, strict=True):
        assert level.codes.tolist() == own.codes.tolist()
        assert level.widest == own.widest
        assert stored or level.codes.data_ptr() == own.codes.ctypes.data  # in memory already: not copied
        nodes = torch.arange(len(own.offsets.deltas)).view(1, -1)
        assert level.first_child(nodes).tolist() == [numbers(own.offsets)]


def test_the_device_named_is_the_one_used() -> None:
    levels = tree.to_device(build_index(CODES), torch.device("meta"))
    assert {part.device.type for level in levels for part in (level.bases, level.deltas, level.codes)} == {"meta"}


def test_widest_counts_children() -> None:
    level = Level(pack_offsets(np.array([0, 1, 5, 7], dtype=np.int32)), np.arange(7))
    assert level.widest == 4
