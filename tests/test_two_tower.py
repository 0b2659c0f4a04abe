"""Two-tower search: on the CPU and on a GPU the same lists, ties included, and one function that measures it."""

import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch

from retriever import flat_index
from retriever.flat_index import FaissIndex, TorchIndex
from tests.chain import Chain
from tests.test_architecture import ROOT
from tools.features import Floats, normalized, read_features
from tools.recall import search_ranks
from tools.two_tower import two_tower_recall


def vectors(count: int, seed: int, *, distinct: int) -> Floats:
    """Vectors of width 6 of which many are the same; their cosines are exact."""
    generator = np.random.default_rng(seed)
    some = np.eye(6, dtype=np.float32)[generator.integers(6, size=distinct)] * generator.choice([-1, 1], (distinct, 1))
    return some[generator.integers(distinct, size=count)].astype(np.float32)


def by_hand(queries: Floats, pool: Floats, keep: int) -> list[list[int]]:
    scores = normalized(queries) @ normalized(pool).T
    return [sorted(range(len(pool)), key=lambda row: (-line[row], row))[:keep] for line in scores.tolist()]


@pytest.mark.parametrize("keep", [1, 3, 10, 40, 100])
def test_equal_scores_go_to_the_lower_row_on_either_device(keep: int) -> None:
    queries, pool = vectors(20, 1, distinct=9), vectors(40, 2, distinct=7)
    expected = by_hand(queries, pool, keep)
    for index in (FaissIndex(pool), TorchIndex(pool, "cpu")):
        found = index.search(queries, keep=keep)
        assert found.rows.tolist() == expected
        scores = np.take_along_axis(normalized(queries) @ normalized(pool).T, found.rows, axis=1)
        assert found.scores.tolist() == scores.tolist()


def test_both_find_the_nearest_of_random_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_index, "SCORES_AT_ONCE", 7 * 300)  # seven queries a block
    generator = np.random.default_rng(3)
    queries = generator.normal(size=(25, 16)).astype(np.float32)
    pool = generator.normal(size=(300, 16)).astype(np.float32)
    lists = [index.search(queries, keep=300) for index in (FaissIndex(pool), TorchIndex(pool, "cpu"))]
    assert lists[0].rows.tolist() == lists[1].rows.tolist()
    assert np.allclose(lists[0].scores, lists[1].scores, atol=1e-6)
    targets = generator.integers(300, size=25)
    ranks = (lists[1].rows == targets[:, None]).argmax(axis=1) + 1
    assert ranks.tolist() == search_ranks(normalized(queries), normalized(pool), targets).tolist()
    for index in (FaissIndex(pool), TorchIndex(pool, "cpu")):
        empty = index.search(queries[:0], keep=3)
        assert empty.rows.shape == empty.scores.shape == (0, 3)


def test_scores_of_every_sign_and_zero_are_in_order() -> None:
    scores = torch.tensor([[-0.0, 1.0, -1.5, 0.0, -1e-30, 1e-30, 3e38, -3e38, 1.0]])
    columns, found = flat_index.best_first(scores, 9)
    assert columns.tolist() == [[6, 1, 8, 5, 0, 3, 4, 2, 7]]
    assert found.tolist() == [[scores[0, column].item() for column in columns[0]]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_what_the_cpu_finds() -> None:
    queries, pool = vectors(50, 1, distinct=40), vectors(500, 2, distinct=60)
    index = flat_index.flat_index(pool, torch.device("cuda"))
    assert isinstance(index, TorchIndex)
    assert index.search(queries, keep=20).rows.tolist() == by_hand(queries, pool, 20)


def test_a_cpu_searches_with_faiss_and_leaves_its_globals_alone() -> None:
    faiss.cvar.distance_compute_blas_threshold = 20
    try:
        index = flat_index.flat_index(vectors(5, 1, distinct=5), torch.device("cpu"))
        assert isinstance(index, FaissIndex)
        index.search(vectors(2, 1, distinct=2), keep=2)
        with pytest.raises(AssertionError):  # of faiss: another width
            index.search(np.zeros((1, 3), dtype=np.float32), keep=2)
        assert faiss.cvar.distance_compute_blas_threshold == 20
    finally:
        faiss.cvar.distance_compute_blas_threshold = 128000


def test_a_gpu_needs_no_faiss() -> None:
    code = (
        "import sys\n"
        "for name in ('open_clip', 'faiss'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from retriever.flat_index import TorchIndex\n"
        "one = np.eye(3, dtype=np.float32)\n"
        "print(TorchIndex(one, 'cpu').search(one, keep=1).rows.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[[0], [1], [2]]\n"


def test_recall_over_the_whole_pool_by_hand(chain: Chain) -> None:
    features = read_features(chain.features)
    captions, pool = features.text_rows("test")[::2], features.image_rows("test")
    figures = two_tower_recall(features, captions, pool)
    lists = by_hand(features.texts[captions], features.images[pool], len(pool))
    ranks = np.array([lists[at].index(pool.tolist().index(features.owners[c])) + 1 for at, c in enumerate(captions)])
    assert figures.queries == len(captions) == 12
    assert figures.mrr == pytest.approx(np.mean(1 / ranks))
    assert figures.median_rank == np.median(ranks)
    other = np.roll(np.array(features.images), 1, axis=0)
    moved = two_tower_recall(features, captions, pool, pictures=other)
    assert moved != figures
