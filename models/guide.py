"""The guide of a beam search: what a two-tower model says of vokens, added to what the language model says.

A residual code is additive. The sum of its codewords, through the tokenizer's linear path, is the picture's feature as
far as the code knows it. So the cosine of a query's text feature with a picture can be followed down the levels of a
beam search, and no picture's feature is stored. The score of a picture is

    sum over levels of log p(code | codes before it, query)  +  weight * cos(text feature, linear path of the codes)

A prefix has the cosine of what its codes add up to, with the length that whole codes have on average. A weight of 0 is
the published search; a very large one is a beam search of the quantised two-tower model.

Where the guide knows hubness (models/hubness.py), that of the same sum is taken off each cosine. There all codes count
as equally long, so that exponentials of a sum are products of those of its codewords.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tools.errors import BadInput
from tools.files import replacing

from .hubness import SHARPNESS, Hubness
from .rqvae import RqVae
from .voken_lm import Memory
from .weights import ANEW

GUIDE_NAME = "guide.safetensors"
WEIGHT, HEAD, HUBNESS = "weight", "head.", "hubness."
SCALARS = f"{HUBNESS}scalars"


class Guide(NamedTuple):
    """The codewords of a tokenizer as a two-tower model sees them, and their weight in a search."""

    codewords: Tensor
    """(levels, codebook_size, width) in an orthonormal basis of what the linear path can reach"""
    basis: Tensor
    """(width, features) that basis"""
    mean: Tensor
    """(features,) what the linear path adds to every picture"""
    missing: Tensor
    """(levels,) squared length that the codes behind each level add on average; 0 at the last"""
    weight: float = 0.0
    """Of the cosine in a score; 0 switches the guide off."""
    head: nn.Sequential | None = None
    """From a language model's pooled encoder states to text features, in place of a second text encoder."""
    length: float = 0.0
    """Of what whole codes add up to, on average."""
    hubness: Hubness | None = None
    """What is taken off the cosines; its own strength is that for whole features."""
    strength: float = 0.0
    """How much of it is taken off the cosines of codes; `corrected` sets both."""
    nearness: Tensor | None = None
    """(levels, codebook_size, landmarks) exponentials of the codewords' products with the landmarks."""

    def read(self, memory: Memory) -> Tensor:
        """Text features (queries, features) that the head sees in encoder states."""
        assert self.head is not None, "without a head the text encoder gives the features"
        features: Tensor = self.head(pooled(memory))
        return features

    def steer(self, texts: Tensor) -> "Steering":
        """Follow a search for queries with text features (queries, features), whose lengths do not matter."""
        return Steering(self, F.normalize(texts.float(), dim=1))

    def corrected(self, hubness: Hubness, strength: float) -> "Guide":
        """The same with so much of the hubness taken off."""
        nearness = None
        if strength:
            products = self.codewords @ (hubness.landmarks @ self.basis.T).T
            nearness = (products * (SHARPNESS / self.length)).exp()
        return self._replace(hubness=hubness, strength=strength, nearness=nearness)

    def decode(self, codes: Tensor) -> Tensor:
        """What codes (pictures, levels) add up to: (pictures, features), on the linear path."""
        words = torch.stack([self.codewords[level][codes[:, level]] for level in range(codes.shape[1])])
        return words.sum(dim=0) @ self.basis + self.mean

    def to(self, device: torch.device) -> "Guide":
        """The same on a device."""
        codewords, basis, mean, missing = (part.to(device) for part in self.tensors)
        head = None if self.head is None else self.head.to(device)
        hubness = None if self.hubness is None else self.hubness.to(device)
        nearness = None if self.nearness is None else self.nearness.to(device)
        return Guide(codewords, basis, mean, missing, self.weight, head, self.length, hubness, self.strength, nearness)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that comes from the tokenizer."""
        return self.codewords, self.basis, self.mean, self.missing

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata holds the weight: of several entries the order would be random."""
        tensors = dict(zip(self._fields, self.tensors, strict=False))
        if self.head is not None:
            tensors |= {f"{HEAD}{name}": part for name, part in self.head.state_dict().items()}
        if self.hubness is not None:
            tensors |= {f"{HUBNESS}landmarks": self.hubness.landmarks, f"{HUBNESS}shares": self.hubness.shares}
            scalars = (self.length, self.strength, self.hubness.strength)
            tensors[SCALARS] = torch.tensor(scalars, dtype=torch.float64)
        tensors = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={WEIGHT: repr(self.weight)})


def read_guide(path: Path) -> Guide | None:
    """Read what `Guide.save` wrote; None where there is no file.

    Raises:
        BadInput: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            codewords, basis, mean, missing = (file.get_tensor(name) for name in Guide._fields[:4])
            names = list(file.keys())
            state = {name.removeprefix(HEAD): file.get_tensor(name) for name in names if name.startswith(HEAD)}
            guide = Guide(codewords, basis, mean, missing, float(file.metadata()[WEIGHT]))
            if SCALARS in names:  # files of earlier versions know no hubness
                landmarks, shares = (file.get_tensor(f"{HUBNESS}{name}") for name in Hubness._fields[:2])
                length, strength, of_features = file.get_tensor(SCALARS).tolist()
                guide = guide._replace(length=length).corrected(Hubness(landmarks, shares, of_features), strength)
        if not state:
            return guide
        head = text_head(len(state["0.weight"]), len(mean))
        head.load_state_dict(state)
        return guide._replace(head=head.eval())
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise BadInput(f"{path} is not a guide's file: {ANEW}") from None


@torch.no_grad()
def guide_of(model: RqVae, codes: Tensor) -> Guide | None:
    """The guide of a tokenizer; None where it has no linear path (`skip`), as the published one.

    Args:
        codes: (pictures, levels) of the train split, from which the lengths of prefixes are known.
    """
    if not model.config.skip:
        return None
    levels = range(model.config.levels)
    basis, coordinates = torch.linalg.qr(model.skip_out.weight)  # (features, width), (width, width)
    codewords = torch.stack([model.quantizer.codebook(level) @ coordinates.T for level in levels])
    sums = (model.mean @ basis).expand(len(codes), -1)
    squares = []
    for level in levels:
        sums = sums + codewords[level][codes[:, level]]
        squares.append((sums * sums).sum(dim=1).mean())
    lengths = torch.stack(squares)
    missing = (lengths[-1] - lengths).clamp_min(0)
    return Guide(codewords, basis.T, model.mean.clone(), missing, length=float(lengths[-1].sqrt()))


def text_head(width: int, features: int) -> nn.Sequential:
    """An untrained head, from pooled states (queries, width) to text features (queries, features)."""
    hidden = 2 * max(width, features)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, features))


def pooled(memory: Memory) -> Tensor:
    """The mean of each query's states (queries, width) float32, without the padding."""
    mask = memory.mask.unsqueeze(2).float()
    return (memory.states.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def fit_text_head(
    states: Tensor, texts: Tensor, *, seed: int, steps: int = 600, batch_size: int = 1024
) -> nn.Sequential:
    """Train a head to give the direction of the text features of captions.

    Args:
        states: (captions, width) pooled states.
        texts: (captions, features) of the two-tower model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = text_head(states.shape[1], texts.shape[1]).to(states.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(states), (min(batch_size, len(states)),), generator=generator).to(states.device)
        loss = (1 - F.cosine_similarity(head(states[chosen]), texts[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return head.eval()


class Steering:
    """A batch of queries on its way down the levels, beside a beam search.

    Attributes:
        texts: (queries, width) text features in the guide's basis.
        sums: (queries, beams, width) what the codes of each beam add up to.
        dots, squares: (queries, beams) its product with the query's feature, and its squared length.
        near: (queries, beams, landmarks) exponentials of its products with the captions' landmarks.
        reached: (queries, beams) its weighted cosine, after hubness was taken off.
    """

    def __init__(self, guide: Guide, texts: Tensor) -> None:
        self.guide = guide
        self.texts = texts @ guide.basis.T
        self.sums = (guide.basis @ guide.mean).expand(len(texts), 1, -1)
        self.dots = (texts @ guide.mean).unsqueeze(1)
        self.squares = (guide.mean @ guide.mean).expand(len(texts), 1)
        self.reached = torch.zeros_like(self.dots)
        if guide.hubness is not None and guide.nearness is not None:
            landmarks, shares = guide.hubness.landmarks, guide.hubness.shares
            start = (landmarks @ guide.mean * (SHARPNESS / guide.length) + shares).exp()
            self.near = start.expand(len(texts), 1, -1)

    def gains(self, level: int) -> Tensor:
        """What each code adds to the score of each beam: (queries, beams, codebook_size) float32."""
        words = self.guide.codewords[level]
        dots = self.dots.unsqueeze(2) + (self.texts @ words.T).unsqueeze(1)
        squares = self.squares.unsqueeze(2) + 2 * self.sums @ words.T + (words * words).sum(dim=1)
        cosines = dots * (squares + self.guide.missing[level]).clamp_min(1e-12).rsqrt()
        if self.guide.hubness is not None and self.guide.nearness is not None:
            hubness = (self.near @ self.guide.nearness[level].T).log() / SHARPNESS
            cosines = cosines - self.guide.strength * hubness
        reached = self.guide.weight * cosines
        self.behind = (dots, squares, reached)
        return reached - self.reached.unsqueeze(2)

    def advance(self, level: int, codes: Tensor, parents: Tensor) -> None:
        """Go on with codes (queries, beams) behind the beams `parents` (queries, beams)."""
        places = parents * self.guide.codewords.shape[1] + codes
        self.dots, self.squares, self.reached = (part.flatten(1).gather(1, places) for part in self.behind)
        self.sums = of_parents(self.sums, parents) + self.guide.codewords[level][codes]
        if self.guide.nearness is not None:
            self.near = of_parents(self.near, parents) * self.guide.nearness[level][codes]


def of_parents(vectors: Tensor, parents: Tensor) -> Tensor:
    """Vectors (queries, beams, width) of the beams `parents` (queries, beams)."""
    return vectors.gather(1, parents.unsqueeze(2).expand(-1, -1, vectors.shape[2]))
