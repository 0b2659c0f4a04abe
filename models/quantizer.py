"""Residual vector quantisation: a vector becomes one code per level, each level coding what the last one left over.

Codebooks start from residual k-means and stay in use: dead codes are put back on data, and both the start and training
may balance the assignment with Sinkhorn iterations (Cuturi 2013). Lee et al. 2022 (RQ-VAE), section 3.1, is the source
of the scheme.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import rows_of_all

COMMITMENT = 0.25  # weight of the commitment term, van den Oord et al. 2017, section 3.2
SINKHORN_ITERATIONS = 10
SMALLEST_SUM = 1e-25  # of a plan's row or column: entries that fp32 rounds to nothing are far below
UNBALANCED_ITERATIONS = 5  # of k-means, before the balanced ones: they only spread the centres
BLOCK = 8192


@dataclass(frozen=True)
class QuantizerConfig:
    """Shape and behaviour of the codebooks."""

    width: int
    """Width of the vectors."""
    levels: int = 4
    codebook_size: int = 1024
    shared: bool = False
    """One codebook reused at every level (as published), or one per level."""
    sinkhorn_temperature: float = 0.0
    """Above 0: balanced assignment during training, softer for larger values."""


class Quantized(NamedTuple):
    """What quantising gives."""

    vectors: Tensor
    """(batch, width) sum of the chosen codebook rows, with a straight-through gradient."""
    codes: Tensor
    """(batch, levels) int64."""
    loss: Tensor
    """Codebook and commitment loss, averaged over levels."""


class ResidualQuantizer(nn.Module):
    """Codebooks (levels or 1, codebook_size, width) and the greedy residual assignment."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        books = 1 if config.shared else config.levels
        self.codebooks = nn.Parameter(torch.randn(books, config.codebook_size, config.width) / config.width**0.5)

    def codebook(self, level: int) -> Tensor:
        """(codebook_size, width) of one level."""
        return self.codebooks[0 if self.config.shared else level]

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantise (batch, width); straight-through gradient and losses of section 3 of the RQ-VAE paper."""
        residual = vectors
        total = torch.zeros_like(vectors)
        loss = vectors.new_zeros(())
        codes = []
        for level in range(self.config.levels):
            book = self.codebook(level)
            chosen = self._assign(residual.detach(), book.detach())
            entry = book[chosen]
            loss = loss + F.mse_loss(entry, residual.detach()) + COMMITMENT * F.mse_loss(residual, entry.detach())
            total = total + entry
            residual = residual - entry.detach()
            codes.append(chosen)
        through = vectors + (total - vectors).detach()
        return Quantized(through, torch.stack(codes, dim=1), loss / self.config.levels)

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Plain nearest codes (batch, levels) of (batch, width), as used when codes are generated."""
        residual = vectors
        codes = []
        for level in range(self.config.levels):
            book = self.codebook(level)
            chosen = nearest(residual, book)
            residual = residual - book[chosen]
            codes.append(chosen)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (batch, levels) to the sum of their codebook rows (batch, width)."""
        return torch.stack([self.codebook(level)[codes[:, level]] for level in range(self.config.levels)]).sum(dim=0)

    @torch.no_grad()
    def start_from(self, vectors: Tensor, *, iterations: int, generator: torch.Generator, balance: float = 0.0) -> None:
        """Set the codebooks by residual k-means over `vectors` (rows, width).

        A shared codebook is fitted on the residuals of all levels, which are found one after the other.

        Args:
            balance: as in `kmeans`.
        """

        def fit(residual: Tensor) -> Tensor:
            size = self.config.codebook_size
            return kmeans(residual, size, iterations=iterations, generator=generator, balance=balance)

        if len(vectors) < self.config.codebook_size:
            raise ValueError(f"{len(vectors)} vectors cannot start {self.config.codebook_size} codes")
        residual = vectors
        pooled = []
        for level in range(self.config.levels):
            book = fit(residual)
            pooled.append(residual)
            residual = residual - book[nearest(residual, book)]
            if not self.config.shared:
                self.codebooks[level] = book
        if self.config.shared:
            self.codebooks[0] = fit(torch.cat(pooled))

    @torch.no_grad()
    def revive(self, vectors: Tensor, *, least: int, generator: torch.Generator) -> int:
        """Put codes that fewer than `least` of `vectors` (rows, width) use onto random residuals. Returns how many."""
        residual = vectors
        revived = 0
        usage = torch.zeros(self.codebooks.shape[:2], dtype=torch.long, device=vectors.device)
        residuals = []
        for level in range(self.config.levels):
            book = self.codebook(level)
            chosen = nearest(residual, book)
            usage[0 if self.config.shared else level] += torch.bincount(chosen, minlength=len(book))
            residuals.append(residual)
            residual = residual - book[chosen]
        for book_number in range(len(self.codebooks)):
            dead = (usage[book_number] < least).nonzero().squeeze(1)
            source = torch.cat(residuals) if self.config.shared else residuals[book_number]
            picked = torch.randperm(len(source), generator=generator)[: len(dead)].to(source.device)
            self.codebooks[book_number, dead[: len(picked)]] = source[picked]
            revived += len(picked)
        return revived

    def _assign(self, vectors: Tensor, book: Tensor) -> Tensor:
        if not self.training or self.config.sinkhorn_temperature <= 0:
            return nearest(vectors, book)
        every, start = rows_of_all(vectors)  # the balance is that of the whole batch
        plan = balanced_plan(every, book, self.config.sinkhorn_temperature)
        return plan[start : start + len(vectors)].argmax(dim=1)


def squared_distances(vectors: Tensor, book: Tensor) -> Tensor:
    """(rows, width) against (codes, width): (rows, codes), up to a constant per row."""
    return (book * book).sum(dim=1) - 2 * vectors @ book.T


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """Row of the nearest code for each vector; the lowest row among equals."""
    return torch.cat([squared_distances(block, book).argmin(dim=1) for block in vectors.split(BLOCK)])


def balanced_plan(vectors: Tensor, book: Tensor, temperature: float) -> Tensor:
    """Logarithm of a soft assignment (rows, codes) that gives every code the same share of the vectors.

    Args:
        temperature: in units of the distances' standard deviation; smaller is harder.
    """
    distances = squared_distances(vectors, book) + (vectors * vectors).sum(dim=1, keepdim=True)
    spread = distances.std()
    spread = spread.where(spread > 0, torch.inf)  # where all are equal, no code is nearer
    return sinkhorn(-distances / (spread * temperature), SINKHORN_ITERATIONS)


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Logarithm of the transport plan (rows, codes) whose rows and columns are equally full.

    After the first iteration the plan is scaled as it is: two products of a matrix and a vector for each iteration, in
    place of two exponentials of the whole matrix. Where that leaves the range of its numbers, logarithms go on.
    """
    log_plan = scores
    for iteration in range(iterations):
        log_plan = _filled(_filled(log_plan, dim=0), dim=1)
        if iteration == 0 and (scales := _scales(log_plan.exp(), iterations - 1)) is not None:
            return log_plan + scales
    return log_plan


def _filled(log_plan: Tensor, dim: int) -> Tensor:
    """The plan with equal sums along a dimension, of 1 in all."""
    return log_plan - log_plan.logsumexp(dim=dim, keepdim=True) - math.log(log_plan.shape[1 - dim])


def _scales(plan: Tensor, iterations: int) -> Tensor | None:
    """Logarithms (rows, codes) of what iterations multiply a plan by; None where its sums become too small to trust."""
    rows, columns = plan.new_ones(len(plan)), plan.new_ones(plan.shape[1])
    least = plan.new_tensor(torch.inf)
    for _ in range(iterations):
        of_columns = rows @ plan
        columns = 1 / (plan.shape[1] * of_columns)
        of_rows = plan @ columns
        rows = 1 / (plan.shape[0] * of_rows)
        least = torch.minimum(least, torch.minimum(of_columns.min(), of_rows.min()))
    return None if least < SMALLEST_SUM else rows.log().unsqueeze(1) + columns.log()


def kmeans(
    vectors: Tensor, clusters: int, *, iterations: int, generator: torch.Generator, balance: float = 0.0
) -> Tensor:
    """Lloyd's algorithm from random distinct rows: centres (clusters, width); empty clusters move to random rows.

    Residuals of high dimension make plain k-means keep one vector for many a code and half of the vectors for one,
    which says nothing of unseen pictures; balanced clusters hold the same number of vectors.

    Args:
        balance: above 0, most iterations average by `balanced_plan` at this temperature.
    """
    start = torch.randperm(len(vectors), generator=generator)[:clusters].to(vectors.device)
    centres = vectors[start].clone()
    for iteration in range(iterations):
        if balance > 0 and iteration >= UNBALANCED_ITERATIONS:
            shares = balanced_plan(vectors, centres, balance).softmax(dim=0)
            centres = shares.T @ vectors
            continue
        chosen = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        counts = torch.bincount(chosen, minlength=clusters)
        empty = (counts == 0).nonzero().squeeze(1)
        centres = sums / counts.clamp_min(1).unsqueeze(1)
        refill = torch.randint(len(vectors), (len(empty),), generator=generator).to(vectors.device)
        centres[empty] = vectors[refill]
    return centres
