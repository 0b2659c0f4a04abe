"""The tokenizer report: how much of the codebooks is used, what collides, and what quantising costs in recall.

A loss can look fine while all pictures share one code; these figures tell.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .captions import Split
from .features import Features, Floats
from .logs import table
from .recall import CUTOFFS
from .two_tower import two_tower_recall


class CodeUse(NamedTuple):
    """Use of one level's codebook."""

    level: int
    used: float
    """Share of the codes that some picture has."""
    perplexity: float
    """exp of the entropy of the codes: the number of codes that evenly used would say as much."""


class TokenizerReport(NamedTuple):
    """Figures over all pictures, and recall on one split."""

    pictures: int
    levels: list[CodeUse]
    colliding: int
    """Pictures that share their codes with another."""
    largest_group: int
    """Most pictures with the same codes."""
    reconstruction_error: float
    """Mean squared error of the decoded features, as prepared by the tokenizer."""
    split: str
    raw_recall: dict[str, float]
    """Two-tower recall of the split's captions over its pictures, from the raw features."""
    quantized_recall: dict[str, float]
    """The same with the pictures' features decoded from their codes."""

    def figures(self) -> dict[str, float]:
        """Flat name -> number, for logs and manifests."""
        values = {
            "collisions": self.colliding / self.pictures,
            "largest_group": float(self.largest_group),
            "reconstruction_error": self.reconstruction_error,
        }
        for use in self.levels:
            values |= {f"level{use.level}/used": use.used, f"level{use.level}/perplexity": use.perplexity}
        for name, recall in (("raw", self.raw_recall), ("quantized", self.quantized_recall)):
            values |= {f"{self.split}/{name}_R@{cutoff}": value for cutoff, value in recall.items()}
        return {name: round(value, 5) for name, value in values.items()}

    def text(self) -> str:
        """The report as a person reads it."""
        lines = [f"tokenizer report, {self.pictures:,} pictures"]
        lines.append(
            table(
                [
                    {"level": str(u.level), "codes used": f"{u.used:.1%}", "perplexity": u.perplexity}
                    for u in self.levels
                ]
            )
        )
        lines.append(
            f"collisions: {self.colliding} pictures ({self.colliding / self.pictures:.2%}), "
            f"largest group {self.largest_group}; reconstruction error {self.reconstruction_error:.4f}"
        )
        if self.raw_recall:
            rows: list[dict[str, Any]] = [
                {"two-tower": name, **{f"R@{cutoff}": f"{recall[str(cutoff)]:.1%}" for cutoff in CUTOFFS}}
                for name, recall in (("raw features", self.raw_recall), ("quantised", self.quantized_recall))
            ]
            lines += [f"recall on {self.split}, brute force:", table(rows)]
        return "\n".join(lines)


def code_use(codes: NDArray[np.integer], codebook_size: int) -> list[CodeUse]:
    """Use of each level's codebook by codes (pictures, levels)."""
    result = []
    for level in range(codes.shape[1]):
        counts = np.bincount(codes[:, level], minlength=codebook_size)
        shares = counts[counts > 0] / counts.sum()
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        result.append(CodeUse(level, float((counts > 0).mean()), round(perplexity, 1)))
    return result


def collision_groups(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """(pictures,) how many pictures have the codes of each, itself included."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    groups: NDArray[np.int64] = counts[inverse.reshape(-1)]
    return groups


@torch.no_grad()
def make_report(
    model: Any,
    features: Features,
    *,
    split: Split,
    codes: Tensor | None = None,
    raw: dict[str, float] | None = None,
) -> TokenizerReport:
    """Tokenize every picture and measure; leaves the model in the mode it was in.

    Args:
        model: a `models.rqvae.RqVae`.
        split: whose captions and pictures the recall is measured on.
        codes: (pictures, levels) that the pictures have; by default the nearest ones.
        raw: `raw_recall` of an earlier report on the same features and split. No tokenizer changes it, so that it need
            not be measured again.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    images = torch.from_numpy(np.array(features.images)).to(device)
    codes = model.codes(images) if codes is None else codes.to(device)
    decoded = model.reconstruct(codes)
    error = float(((decoded - model.prepare(images)) ** 2).mean())
    model.train(was_training)
    groups = collision_groups(codes.cpu().numpy())
    measured = _recall(features, features.images, split) if raw is None else raw
    return TokenizerReport(
        pictures=len(images),
        levels=code_use(codes.cpu().numpy(), model.config.codebook_size),
        colliding=int((groups > 1).sum()),
        largest_group=int(groups.max()),
        reconstruction_error=error,
        split=split,
        raw_recall=measured,
        quantized_recall=_recall(features, decoded.cpu().numpy(), split),
    )


def _recall(features: Features, pictures: Floats, split: Split) -> dict[str, float]:
    """Two-tower recall of a split's captions over its pictures, of all pictures' features (pictures, width)."""
    texts = features.text_rows(split)
    if not len(texts):
        return {}
    return two_tower_recall(features, texts, features.image_rows(split), pictures=pictures).recall()
