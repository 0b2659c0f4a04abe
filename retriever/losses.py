"""The generative loss of stage 1: cross-entropy of the vokens, hard or soft."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.voken_lm import VokenLM


class Targets(NamedTuple):
    """What the model should write."""

    codes: Tensor
    """(batch, levels) the codes that are written, which the model also reads back"""
    shares: Tensor | None
    """(batch, levels, codebook_size) probability of each code, or None where only the written code counts"""


def soft_targets(latents: Tensor, codebooks: Tensor, levels: int, temperature: float) -> Targets:
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
        chosen = torch.multinomial(probabilities, 1).squeeze(1)
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
        starts = lm.level_offsets.tolist()
        size = targets.shares.shape[2]
        own = torch.stack(
            [log_probabilities[:, level, start : start + size] for level, start in enumerate(starts)], dim=1
        )
        losses = -(targets.shares * own).sum(dim=2)
    if end:
        losses = torch.cat([losses, -log_probabilities[:, levels, lm.end].unsqueeze(1)], dim=1)
    return losses.mean()
