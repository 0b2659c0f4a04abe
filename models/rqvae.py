"""The image tokenizer: an autoencoder over CLIP features whose code is residual-quantised and aligned with captions.

Lee et al. 2022 (RQ-VAE) is the scheme; the second loss, semantic alignment with the caption's feature, is the
published addition of AVG (SIGIR 2025).
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tools.errors import BadInput
from tools.features import Floats, Rows
from tools.files import read_json, replacing, write_json
from tools.vokens import Codes

from .batches import rows_of_all
from .quantizer import QuantizerConfig, ResidualQuantizer
from .weights import ANEW, load_weights

Alignment = Literal["none", "mse", "l1", "contrastive"]
AlignAt = Literal["before", "after"]
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
BLOCK = 8192


@dataclass(frozen=True)
class RqVaeConfig:
    """Shape of the autoencoder and its losses."""

    features: int
    """Width of the input features."""
    width: int = 768
    """Width of the latent and of the codebooks (e_dim)."""
    hidden: tuple[int, ...] = (1024, 512)
    """Hidden widths of the encoder; the decoder mirrors them."""
    levels: int = 4
    codebook_size: int = 1024
    shared: bool = False
    dropout: float = 0.25
    batch_norm: bool = True
    normalize: bool = True
    """Quantise directions: features are scaled to the norm sqrt(features), i.e. unit variance."""
    skip: bool = True
    """A linear path beside the MLPs, started from the principal components, so that training starts from residual
    k-means on the features themselves; without it the autoencoder is the published one."""
    alignment: Alignment = "mse"
    align_at: AlignAt = "after"
    """Caption features are aligned with the decoder's output ("after") or the encoder's ("before")."""
    alignment_weight: float = 1.0
    sinkhorn_temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.align_at == "before" and self.alignment != "none" and self.width != self.features:
            raise BadInput(
                f"`align_at` before compares latents with captions: `width` {self.width} must equal the features' "
                f"width {self.features}"
            )


class Losses(NamedTuple):
    """The parts of the objective, scalars."""

    reconstruction: Tensor
    alignment: Tensor
    quantization: Tensor

    def total(self, alignment_weight: float) -> Tensor:
        return self.reconstruction + alignment_weight * self.alignment + self.quantization


class RqVae(nn.Module):
    """Features (batch, features) to codes (batch, levels) and back."""

    mean: Tensor

    def __init__(self, config: RqVaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.features, *config.hidden, config.width]
        self.encoder = _mlp(widths, config)
        self.decoder = _mlp(widths[::-1], config)
        self.register_buffer("mean", torch.zeros(config.features))
        if config.skip:
            self.skip_in = nn.Linear(config.features, config.width, bias=False)
            self.skip_out = nn.Linear(config.width, config.features, bias=False)
        self.quantizer = ResidualQuantizer(
            QuantizerConfig(
                width=config.width,
                levels=config.levels,
                codebook_size=config.codebook_size,
                shared=config.shared,
                sinkhorn_temperature=config.sinkhorn_temperature,
            )
        )

    def prepare(self, features: Tensor) -> Tensor:
        """Scale features (batch, features) as configured."""
        if not self.config.normalize:
            return features
        return F.normalize(features, dim=-1) * features.shape[-1] ** 0.5

    def encode(self, prepared: Tensor) -> Tensor:
        """Prepared features to latents (batch, width)."""
        centred = prepared - self.mean
        latents: Tensor = self.encoder(centred)
        return latents + self.skip_in(centred) if self.config.skip else latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, width) to prepared features (batch, features)."""
        output: Tensor = self.decoder(latents)
        return (output + self.skip_out(latents) if self.config.skip else output) + self.mean

    def forward(self, features: Tensor, captions: Tensor) -> Losses:
        """The objective on pictures (batch, features) and a caption of each (batch, features)."""
        prepared, text = self.prepare(features), self.prepare(captions)
        latents = self.encode(prepared)
        quantized = self.quantizer(latents)
        output = self.decode(quantized.vectors)
        aligned = output if self.config.align_at == "after" else latents
        return Losses(
            F.mse_loss(output, prepared), alignment_loss(self.config.alignment, aligned, text), quantized.loss
        )

    @torch.no_grad()
    def latents(self, features: Tensor) -> Tensor:
        """Latents (pictures, width) of features (pictures, features), block by block; call in eval mode."""
        return torch.cat([self.encode(self.prepare(block)) for block in features.split(BLOCK)])

    @torch.no_grad()
    def codes(self, features: Tensor) -> Tensor:
        """Nearest codes (pictures, levels) of features (pictures, features), block by block; call in eval mode."""
        return torch.cat([self.quantizer.encode(self.encode(self.prepare(block))) for block in features.split(BLOCK)])

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes (pictures, levels) to prepared features (pictures, features); call in eval mode."""
        return torch.cat([self.decode(self.quantizer.decode(block)) for block in codes.split(BLOCK)])

    @torch.no_grad()
    def start_from(
        self, features: Tensor, *, iterations: int, seed: int, balance: float = 0.0, as_in_training: bool = False
    ) -> None:
        """Start from data: centre and principal components for the skip path, residual k-means for the codebooks.

        Args:
            features: (pictures, features), the whole train split or a large sample of it.
            iterations: of k-means.
            balance: temperature of balanced k-means; 0 for the plain one.
            as_in_training: the features are one batch, and k-means sees its latents as a training step would, with
                dropout and the statistics of the batch. In eval mode an untrained encoder gives much shorter ones.
        """
        generator = torch.Generator().manual_seed(seed)
        prepared = self.prepare(features)
        if self.config.skip:
            self.mean.copy_(prepared.mean(dim=0))
            basis = _principal_components(prepared - self.mean, self.config.width)
            self.skip_in.weight.copy_(basis)
            self.skip_out.weight.copy_(basis.T)
        was_training = self.training
        if as_in_training:
            latents = copy.deepcopy(self).train().encode(prepared)  # a copy: batch norm counts what it has seen
        else:
            self.eval()
            latents = torch.cat([self.encode(block) for block in prepared.split(BLOCK)])
            self.train(was_training)
        self.quantizer.start_from(latents, iterations=iterations, generator=generator, balance=balance)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS_NAME) as temporary:
            save_file({key: value.contiguous().cpu() for key, value in self.state_dict().items()}, temporary)
        write_json(folder / CONFIG_NAME, dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "RqVae":
        """Read what `save_pretrained` wrote; the model is in eval mode.

        Raises:
            BadInput: a file is missing or damaged, or the two do not belong together.
        """
        values: dict[str, Any] = read_json(folder / CONFIG_NAME)
        try:
            config = RqVaeConfig(**{**values, "hidden": tuple(values["hidden"])})
        except (KeyError, TypeError):
            raise BadInput(f"{folder / CONFIG_NAME} is not an RQ-VAE's: {ANEW}") from None
        model = cls(config)
        load_weights(model, folder / WEIGHTS_NAME)
        return model.eval()


def alignment_loss(kind: Alignment, output: Tensor, captions: Tensor) -> Tensor:
    """Distance of outputs (batch, features) to caption features (batch, features).

    "contrastive" is InfoNCE over the batch of all processes, on L2-normalised vectors at temperature 1.
    """
    if kind == "mse":
        return F.mse_loss(output, captions)
    if kind == "l1":
        return F.l1_loss(output, captions)
    if kind == "contrastive":
        every, start = rows_of_all(F.normalize(captions, dim=1))
        logits = F.normalize(output, dim=1) @ every.T
        return F.cross_entropy(logits, start + torch.arange(len(logits), device=logits.device))
    return output.new_zeros(())


class Tokens(NamedTuple):
    """What tokenizing pictures gives."""

    codes: Codes
    """(pictures, levels)"""
    latents: Floats
    """(pictures, width) what the codes quantise"""


def tokenize(
    model: RqVae,
    features: Floats,
    *,
    groups: Sequence[Rows] | None,
    taken: Callable[[Codes], NDArray[np.integer]] | None = None,
) -> Tokens:
    """Codes and latents of pictures, by a model in eval mode.

    Args:
        features: (pictures, features)
        groups, taken: as in `resolve_collisions`; without groups collisions stay.
    """
    placed = torch.from_numpy(np.array(features)).to(next(model.parameters()).device)
    latents, codes = model.latents(placed).cpu().numpy(), model.codes(placed).cpu().numpy()
    if groups is not None:
        codes = resolve_collisions(codes, latents, model, groups, taken=taken)
    return Tokens(codes, latents)


def resolve_collisions(
    codes: Codes,
    latents: Floats,
    model: RqVae,
    groups: Sequence[Rows],
    *,
    taken: Callable[[Codes], NDArray[np.integer]] | None = None,
) -> Codes:
    """Codes (pictures, levels) in which colliding pictures differ at the last level, where free codes allow.

    Among equal codes the picture nearest to them keeps them; each other one, in that order, takes the nearest last code
    that is free behind the same prefix. With more pictures behind a prefix than codes, collisions stay.

    Args:
        groups: rows, in the order in which they choose; the codes of a group do not depend on the groups after it.
            Train pictures come first: what is trained on must not depend on the pictures of val and test.
        taken: gives the codes (others, levels) that pictures besides these have already, behind prefixes (any number,
            levels - 1); they are not free.
    """
    codes = codes.copy()
    last = model.quantizer.codebook(codes.shape[1] - 1).detach().cpu().numpy()
    placed = torch.from_numpy(codes).to(model.mean.device)
    behind = model.quantizer.decode(placed).detach().cpu().numpy() - last[codes[:, -1]]
    residuals = latents - behind
    own = ((residuals - last[codes[:, -1]]) ** 2).sum(axis=1)
    prefixes = codes[:, :-1]
    used_behind = _last_codes(codes[:0] if taken is None else taken(prefixes), prefixes=prefixes)
    for rows in groups:
        movers = []
        for row in rows[np.argsort(own[rows], kind="stable")]:
            used = used_behind[codes[row, :-1].tobytes()]
            if int(codes[row, -1]) in used:
                movers.append(row)
            used.add(int(codes[row, -1]))
        for row in movers:
            used = used_behind[codes[row, :-1].tobytes()]
            nearest_first = np.argsort(((residuals[row] - last) ** 2).sum(axis=1), kind="stable")
            codes[row, -1] = next((int(code) for code in nearest_first if int(code) not in used), codes[row, -1])
            used.add(int(codes[row, -1]))
    return codes


def _last_codes(taken: NDArray[np.integer], *, prefixes: Codes) -> dict[bytes, set[int]]:
    """The last codes of `taken` (others, levels) behind each of the prefixes (pictures, levels - 1)."""
    behind: dict[bytes, set[int]] = {prefix.tobytes(): set() for prefix in prefixes}
    for level in range(prefixes.shape[1]):  # of a large collection, few are left
        taken = taken[np.isin(taken[:, level], prefixes[:, level])]
    for row in taken.astype(np.int64):
        if (used := behind.get(row[:-1].tobytes())) is not None:
            used.add(int(row[-1]))
    return behind


def _mlp(widths: list[int], config: RqVaeConfig) -> nn.Sequential:
    """Linear layers with dropout before and, but for the last, batch norm and ReLU behind; zero at the start of a
    skip path's side."""
    layers: list[nn.Module] = []
    for number, (width_in, width_out) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        linear = nn.Linear(width_in, width_out, bias=last or not config.batch_norm)
        layers += [nn.Dropout(config.dropout), linear]
        if last and config.skip:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        if not last:
            layers += [nn.BatchNorm1d(width_out), nn.ReLU()] if config.batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers)


def _principal_components(centred: Tensor, count: int) -> Tensor:
    """Orthonormal rows (count, features), largest variance first; zero rows past the features' own width."""
    covariance = centred.T.double() @ centred.double() / len(centred)
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(1).T.to(centred.dtype)
    if count <= len(basis):
        return basis[:count]
    return F.pad(basis, (0, 0, 0, count - len(basis)))
