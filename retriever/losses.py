"""The losses: stage 1's cross-entropy of the vokens, hard or soft, and stage 2's comparisons of whole sequences."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.voken_lm import VokenLM


class Targets(NamedTuple):
    """What the model should write."""

    codes: Tensor
    """(batch, levels) the codes that are written, which the model also reads back"""
    shares: Tensor | None
    """(batch, levels, codebook_size) probability of each code, or None where only the written code counts"""


def soft_targets(
    latents: Tensor, codebooks: Tensor, levels: int, temperature: float, generator: torch.Generator | None = None
) -> Targets:
    """Codes drawn in proportion to exp(-distance² / temperature), level by level, and those probabilities.

    Soft labels and stochastic sampling of Lee et al. 2022 (RQ-VAE), section 3.2.3: near codes are near misses, and a
    picture's codes vary between epochs the way unseen pictures' codes would.

    Args:
        latents: (batch, width) what the codes quantise.
        codebooks: (levels or 1, codebook_size, width).
        temperature: in units of a latent's mean squared norm.
    """
    residual = latents
    codes, shares = [], []
    for level in range(levels):
        book = codebooks[level % len(codebooks)]
        distances = (book * book).sum(dim=1) - 2 * residual @ book.T
        probabilities = (-distances / temperature).softmax(dim=1)
        waits = torch.empty_like(probabilities).exponential_(generator=generator)
        chosen = (probabilities / waits).argmax(dim=1)  # as torch.multinomial draws, which would wait for the GPU
        residual = residual - book[chosen]
        codes.append(chosen)
        shares.append(probabilities)
    return Targets(torch.stack(codes, dim=1), torch.stack(shares, dim=1))


def generative_loss(logits: Tensor, targets: Targets, lm: VokenLM, *, temperature: float, end: bool) -> Tensor:
    """Mean cross-entropy over the positions of softmax(logits / temperature), full vocabulary.

    Args:
        logits: (batch, levels + 1, vocabulary) from `VokenLM.forward`.
        end: the end token counts as a position.
    """
    log_probabilities = (logits.float() / temperature).log_softmax(dim=-1)
    levels = targets.codes.shape[1]
    if targets.shares is None:
        ids = lm.token_ids(targets.codes).unsqueeze(2)
        losses = -log_probabilities[:, :levels].gather(2, ids).squeeze(2)
    else:
        size = targets.shares.shape[2]
        own = torch.stack(
            [log_probabilities[:, level, start : start + size] for level, start in enumerate(lm.level_starts)], dim=1
        )
        losses = -(targets.shares * own).sum(dim=2)
    if end:
        losses = torch.cat([losses, -log_probabilities[:, levels, lm.end].unsqueeze(1)], dim=1)
    return losses.mean()


def written_log_probabilities(logits: Tensor, codes: Tensor, lm: VokenLM, *, end: bool) -> Tensor:
    """Log-probability of each code that is written, full vocabulary: (batch, levels), or levels + 1 with the end token.

    Args:
        logits: (batch, levels + 1, vocabulary) from `VokenLM.forward`.
        codes: (batch, levels).
    """
    ids = lm.token_ids(codes)
    if end:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], lm.end)], dim=1)
    chosen = logits[:, : ids.shape[1]]
    written = chosen.gather(2, ids.unsqueeze(2)).squeeze(2).float()
    return written - chosen.float().logsumexp(dim=2)


Discriminative = Literal["list-wise", "double-softmax", "margin", "prefix-margin"]


class Rivals(NamedTuple):
    """Each query's right sequence against those that the search confuses with it."""

    positive: Tensor
    """(batch, positions) log-probabilities"""
    negatives: Tensor
    """(batch, negatives, positions)"""
    present: Tensor
    """(batch, negatives) bool; a search can find fewer than were asked for"""
    parted: Tensor
    """(batch, negatives, positions) bool; whether a negative has parted from the positive by then"""
    drawn: Tensor
    """(batch,) the negative that the margin forms compare"""


def discriminative_loss(rivals: Rivals, form: Discriminative, *, temperature: float, margin: float) -> Tensor:
    """Mean loss of stage 2 over the queries; 0 for those without a negative.

    With s the sum of a sequence's log-probabilities divided by `temperature`:
    list-wise: -log softmax([s+, s-...])_0; double-softmax, as published: the cross-entropy of the softmax *of that
    softmax*, which stays between log(1 + n/e) and log(e + n) for n negatives and gives weak gradients;
    margin: relu(s- - s+ + margin) for one negative; prefix-margin: its mean over the prefixes of the two sequences
    from where they part.
    """
    counted = rivals.present.any(dim=1)
    if form in ("list-wise", "double-softmax"):
        scores = torch.cat([rivals.positive.unsqueeze(1), rivals.negatives], dim=1).sum(dim=2) / temperature
        scores = scores.masked_fill(~torch.cat([counted.unsqueeze(1), rivals.present], dim=1), -torch.inf)
        scores = scores.masked_fill(~counted.unsqueeze(1), 0.0)
        if form == "double-softmax":
            present = torch.cat([counted.unsqueeze(1), rivals.present], dim=1)
            scores = scores.softmax(dim=1).masked_fill(~present & counted.unsqueeze(1), -torch.inf)
        losses = -scores.log_softmax(dim=1)[:, 0]
    else:
        rows = torch.arange(len(counted), device=counted.device)
        ahead = (rivals.negatives[rows, rivals.drawn] - rivals.positive) / temperature
        if form == "margin":
            losses = (ahead.sum(dim=1) + margin).relu()
        else:
            apart = rivals.parted[rows, rivals.drawn]
            each = ((ahead * apart).cumsum(dim=1) + margin).relu() * apart
            losses = each.sum(dim=1) / apart.sum(dim=1).clamp_min(1)
    return (losses * counted).mean()
