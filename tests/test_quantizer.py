"""The quantizer against the same in plain loops: codes, losses, k-means, Sinkhorn, dead codes."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import quantizer as module
from models.quantizer import (
    QuantizerConfig,
    ResidualQuantizer,
    balanced_plan,
    kmeans,
    nearest,
    sinkhorn,
    squared_distances,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(
    *, width: int = 4, levels: int = 3, size: int = 5, shared: bool = False, temperature: float = 0.0
) -> ResidualQuantizer:
    torch.manual_seed(1)
    return ResidualQuantizer(QuantizerConfig(width, levels, size, shared, temperature))


def distances(vector: Tensor, book: Tensor) -> list[float]:
    return [float(((vector - entry) ** 2).sum()) for entry in book]


def naive_codes(vector: Tensor, books: list[Tensor]) -> list[int]:
    codes = []
    for book in books:
        found = distances(vector, book)
        codes.append(found.index(min(found)))
        vector = vector - book[codes[-1]]
    return codes


def books_of(model: ResidualQuantizer) -> list[Tensor]:
    return [model.codebook(level).detach() for level in range(model.config.levels)]


def test_the_shape_that_is_left_open_is_the_published_one() -> None:
    assert QuantizerConfig(width=8) == QuantizerConfig(8, 4, 1024, shared=False, sinkhorn_temperature=0.0)
    assert (module.COMMITMENT, module.SINKHORN_ITERATIONS, module.UNBALANCED_ITERATIONS) == (0.25, 10, 5)


@pytest.mark.parametrize(("shared", "books"), [(False, 3), (True, 1)])
def test_codebooks_start_random_with_rows_of_norm_one(shared: bool, books: int) -> None:
    model = quantizer(width=64, size=200, shared=shared)
    assert model.codebooks.shape == (books, 200, 64)
    assert model.codebooks.requires_grad
    norms = model.codebooks.detach().square().sum(dim=2)
    assert norms.mean().item() == pytest.approx(1.0, abs=0.05)
    assert all(torch.equal(model.codebook(level), model.codebooks[0 if shared else level]) for level in range(3))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_codes_vectors_and_losses_equal_those_of_loops(shared: bool, training: bool) -> None:
    model = quantizer(shared=shared).train(training)
    vectors, books = random(20, 4), books_of(model)
    expected = [naive_codes(vector, books) for vector in vectors]
    found = model(vectors)
    assert found.codes.tolist() == expected == model.encode(vectors).tolist()
    assert found.codes.dtype == torch.long
    total = torch.stack([sum((book[code] for book, code in zip(books, codes, strict=True)), torch.zeros(4))
                         for codes in expected])  # fmt: skip
    assert torch.allclose(found.vectors, total, atol=1e-6)
    assert torch.allclose(model.decode(found.codes), total, atol=1e-6)
    loss = 0.0
    for vector, codes in zip(vectors, expected, strict=True):
        for book, code in zip(books, codes, strict=True):
            vector = vector - book[code]
            loss += 1.25 * float((vector**2).mean())
    assert found.loss.item() == pytest.approx(loss / 20 / 3, rel=1e-5)


def test_gradients_by_hand() -> None:
    """The vectors get the commitment's gradient and, through the quantised ones, a straight one; codebooks theirs."""
    model = quantizer(width=2, levels=2, size=2)
    with torch.no_grad():
        model.codebooks.copy_(torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[1.0, 0.0], [0.0, 9.0]]]))
    vectors = torch.tensor([[2.0, 1.0]], requires_grad=True)
    found = model(vectors)
    assert found.codes.tolist() == [[0, 0]]
    found.loss.backward()
    # level 0 leaves (2, 1), level 1 leaves (1, 1); each mean over width 2, and over 2 levels
    assert vectors.grad is not None
    assert vectors.grad.tolist() == [[0.25 * (2 + 1) / 2, 0.25 * (1 + 1) / 2]]
    assert model.codebooks.grad is not None
    assert model.codebooks.grad.tolist() == [[[-1.0, -0.5], [0.0, 0.0]], [[-0.5, -0.5], [0.0, 0.0]]]
    vectors.grad = None
    (model(vectors).vectors * torch.tensor([3.0, 7.0])).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.tolist() == [[3.0, 7.0]]


def test_encoding_keeps_no_gradients() -> None:
    assert not quantizer().encode(random(3, 4).requires_grad_()).requires_grad


def test_distances_are_right_up_to_a_constant_a_row() -> None:
    vectors, book = random(6, 4), random(3, 4, seed=1)
    shifts = squared_distances(vectors, book) - torch.tensor([distances(vector, book) for vector in vectors])
    assert torch.allclose(shifts, shifts[:, :1].expand(-1, 3), atol=1e-5)


def test_nearest_in_blocks_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, book = random(50, 4), random(7, 4, seed=1)
    whole = nearest(vectors, book)
    assert whole.tolist() == [naive_codes(vector, [book])[0] for vector in vectors]
    monkeypatch.setattr(module, "BLOCK", 8)
    assert torch.equal(nearest(vectors, book), whole)


def test_equal_distances_go_to_the_lower_code() -> None:
    assert nearest(torch.zeros(1, 2), torch.ones(3, 2)).tolist() == [0]


def naive_sinkhorn(scores: Tensor, iterations: int) -> NDArray[np.float64]:
    """Columns, then rows, scaled to their share, without logarithms."""
    plan = np.exp(scores.double().numpy())
    for _ in range(iterations):
        plan /= plan.sum(axis=0, keepdims=True) * plan.shape[1]
        plan /= plan.sum(axis=1, keepdims=True) * plan.shape[0]
    return plan


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn_equals_scaling_by_hand(iterations: int) -> None:
    scores = random(12, 4)
    assert np.allclose(sinkhorn(scores, iterations).exp().numpy(), naive_sinkhorn(scores, iterations), atol=1e-6)


@pytest.mark.parametrize("range_of_scores", [1.0, 10.0, 60.0])  # the last one is outside what fp32 can multiply
def test_sinkhorn_equals_scaling_by_hand_over_wide_ranges(range_of_scores: float) -> None:
    scores = range_of_scores * random(40, 8)
    found, wanted = sinkhorn(scores, 10), naive_sinkhorn(scores, 10)
    assert np.allclose(found.exp().numpy(), wanted, atol=1e-5)
    assert np.isfinite(found.numpy()).all()


def test_sinkhorn_goes_on_in_logarithms_where_sums_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = 10 * random(40, 8)
    scaled = sinkhorn(scores, 10)
    monkeypatch.setattr(module, "SMALLEST_SUM", math.inf)
    assert torch.allclose(sinkhorn(scores, 10), scaled, atol=1e-3)


def test_sinkhorn_fills_rows_and_columns_equally() -> None:
    plan = sinkhorn(random(12, 4), 100).exp()
    assert torch.allclose(plan.sum(dim=1), torch.full((12,), 1 / 12), atol=1e-6)
    assert torch.allclose(plan.sum(dim=0), torch.full((4,), 1 / 4), atol=1e-4)


def naive_plan(vectors: Tensor, book: Tensor, temperature: float) -> NDArray[np.float64]:
    found = torch.tensor([distances(vector, book) for vector in vectors])
    spread = math.sqrt(float(((found - found.mean()) ** 2).sum()) / (found.numel() - 1))
    return naive_sinkhorn(-found / (spread * temperature), 10)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_balanced_plan_is_sinkhorn_on_distances_in_units_of_their_spread(temperature: float) -> None:
    vectors, book = random(15, 4), random(3, 4, seed=1)
    plan = balanced_plan(vectors, book, temperature).exp().numpy()
    assert np.allclose(plan, naive_plan(vectors, book, temperature), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_balanced_plan_knows_no_units(scale: float) -> None:
    vectors, book = random(15, 4), random(3, 4, seed=1)
    assert torch.allclose(
        balanced_plan(scale * vectors, scale * book, 0.2), balanced_plan(vectors, book, 0.2), atol=1e-3
    )


def test_a_balanced_plan_of_equal_distances_is_even() -> None:
    for rows, codes in ((6, 3), (1, 2)):
        plan = balanced_plan(torch.ones(rows, 2), torch.zeros(codes, 2), 0.5)
        assert torch.allclose(plan.exp(), torch.full((rows, codes), 1 / (rows * codes)))


def test_training_balances_and_evaluation_does_not() -> None:
    model = quantizer(width=2, levels=1, size=4, temperature=0.05)
    with torch.no_grad():
        model.codebooks.copy_(torch.tensor([[[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]]]))
    vectors = 0.1 * random(40, 2)  # all next to code 0
    plan = naive_plan(vectors, books_of(model)[0], 0.05)
    assert model(vectors).codes[:, 0].tolist() == plan.argmax(axis=1).tolist()
    assert len(model(vectors).codes.unique()) == 4
    assert model.encode(vectors).unique().tolist() == [0]
    assert model.eval()(vectors).codes.unique().tolist() == [0]


def naive_kmeans(vectors: Tensor, clusters: int, iterations: int, draws: torch.Generator, balance: float) -> Tensor:
    centres = [vectors[row].clone() for row in torch.randperm(len(vectors), generator=draws)[:clusters].tolist()]
    for iteration in range(iterations):
        if balance > 0 and iteration >= 5:
            plan = naive_plan(vectors, torch.stack(centres), balance)
            shares = torch.from_numpy(plan / plan.sum(axis=0)).float()
            centres = [(shares[:, [cluster]] * vectors).sum(dim=0) for cluster in range(clusters)]
            continue
        members: list[list[Tensor]] = [[] for _ in range(clusters)]
        for vector in vectors:
            found = distances(vector, torch.stack(centres))
            members[found.index(min(found))].append(vector)
        empty = [cluster for cluster in range(clusters) if not members[cluster]]
        refill = torch.randint(len(vectors), (len(empty),), generator=draws).tolist()
        centres = [torch.stack(own).mean(dim=0) if own else torch.zeros(vectors.shape[1]) for own in members]
        for cluster, row in zip(empty, refill, strict=True):
            centres[cluster] = vectors[row]
    return torch.stack(centres)


@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("iterations", [0, 1, 5, 8])
def test_kmeans_equals_loops(iterations: int, balance: float) -> None:
    vectors = random(40, 3)
    found = kmeans(vectors, 6, iterations=iterations, generator=generator(), balance=balance)
    assert torch.allclose(found, naive_kmeans(vectors, 6, iterations, generator(), balance), atol=1e-4)


def test_kmeans_is_not_balanced_unless_told() -> None:
    vectors = random(40, 3)
    plain = kmeans(vectors, 6, iterations=8, generator=generator())
    assert torch.equal(plain, kmeans(vectors, 6, iterations=8, generator=generator(), balance=0.0))
    assert not torch.allclose(plain, kmeans(vectors, 6, iterations=8, generator=generator(), balance=0.5), atol=1e-2)


def test_empty_clusters_move_to_rows() -> None:
    """Each row is there five times: several centres start on one point, and only the first of them keeps it."""
    vectors = torch.arange(8.0).repeat(5).unsqueeze(1)
    for seed in range(3):
        found = kmeans(vectors, 12, iterations=1, generator=generator(seed))
        assert torch.equal(found, naive_kmeans(vectors, 12, 1, generator(seed), 0.0))
        assert len(found.unique()) < 12
    alone = kmeans(torch.zeros(9, 2), 5, iterations=3, generator=generator())
    assert torch.equal(alone, torch.zeros(5, 2))


def test_as_many_clusters_as_rows_are_the_rows() -> None:
    vectors = torch.arange(8.0).unsqueeze(1)
    found = kmeans(vectors, 8, iterations=2, generator=generator())
    assert torch.equal(found.sort(dim=0).values, vectors)


def test_kmeans_leaves_the_vectors_alone() -> None:
    vectors = random(30, 3)
    kept = vectors.clone()
    kmeans(vectors, 4, iterations=3, generator=generator())[0] = 99.0
    assert torch.equal(vectors, kept)


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_a_start_is_kmeans_of_what_each_level_leaves(balance: float) -> None:
    model, vectors, draws = quantizer(), random(60, 4), generator()
    model.start_from(vectors, iterations=7, generator=generator(), balance=balance)
    residual = vectors
    for level in range(3):
        book = kmeans(residual, 5, iterations=7, generator=draws, balance=balance)
        assert torch.equal(model.codebook(level), book)
        residual = residual - book[nearest(residual, book)]
    assert model.codebooks.requires_grad


def test_a_start_is_not_balanced_unless_told() -> None:
    plain, told = quantizer(), quantizer()
    plain.start_from(random(60, 4), iterations=8, generator=generator())
    told.start_from(random(60, 4), iterations=8, generator=generator(), balance=0.0)
    assert torch.equal(plain.codebooks, told.codebooks)


def test_a_shared_codebook_starts_from_the_residuals_of_all_levels() -> None:
    model, vectors, draws = quantizer(shared=True), random(60, 4), generator()
    model.start_from(vectors, iterations=4, generator=generator())
    residual, pooled = vectors, []
    for _ in range(3):
        book = kmeans(residual, 5, iterations=4, generator=draws)
        pooled.append(residual)
        residual = residual - book[nearest(residual, book)]
    assert torch.equal(model.codebooks[0], kmeans(torch.cat(pooled), 5, iterations=4, generator=draws))


def test_as_many_vectors_as_codes_start_them() -> None:
    quantizer().start_from(random(5, 4), iterations=1, generator=generator())
    with pytest.raises(ValueError, match=r"^4 vectors cannot start 5 codes$"):
        quantizer().start_from(random(4, 4), iterations=1, generator=generator())


@pytest.mark.parametrize("least", [1, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_codes_in_little_use_are_put_on_residuals(least: int, shared: bool) -> None:
    model, vectors, draws = quantizer(shared=shared, size=6), random(25, 4), generator(3)
    before, codes = model.codebooks.detach().clone(), model.encode(vectors)
    residuals = [vectors]
    for level in range(3):
        residuals.append(residuals[-1] - before[0 if shared else level][codes[:, level]])
    used = torch.stack([torch.bincount(codes[:, level], minlength=6) for level in range(3)])
    revived = model.revive(vectors, least=least, generator=generator(3))
    expected = 0
    for book in range(1 if shared else 3):
        counts = used.sum(dim=0) if shared else used[book]
        dead = [code for code in range(6) if counts[code] < least]
        source = torch.cat(residuals[:3]) if shared else residuals[book]
        picked = torch.randperm(len(source), generator=draws)[: len(dead)]
        for code in range(6):
            own = source[picked[dead.index(code)]] if code in dead else before[book, code]
            assert torch.equal(model.codebooks[book, code], own)
        expected += len(dead)
    assert revived == expected
    assert least != 4 or 0 < expected < before.shape[0] * 6  # some are dead and some are not


def test_fewer_vectors_than_dead_codes_revive_as_many() -> None:
    model = quantizer(size=8, levels=1)
    with torch.no_grad():
        model.codebooks[:, 1:] = 1e4
    assert model.revive(random(3, 4), least=1, generator=generator()) == 3
    assert (model.codebooks[0, 4:] == 1e4).all()
    assert (model.codebooks[0, 1:4] != 1e4).all()
    assert quantizer(levels=1).revive(random(50, 4), least=0, generator=generator()) == 0
