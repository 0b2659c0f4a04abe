"""Random weights in the files in which model hubs deliver them: fast to write, sane in size, no two rows alike."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]
Scale = Callable[[str, Sequence[int]], float]
BLOCK = 1_000_003  # numbers that are drawn; a prime, so that no row of a matrix is another's


def fan_in(name: str, shape: Sequence[int]) -> float:
    """Standard deviation that lets a layer's outputs be as large as its inputs."""
    return float(np.prod(shape[1:])) ** -0.5


class RandomWeights:
    """Tensors that follow from a seed and their name: pieces of one block of normal numbers."""

    def __init__(self, seed: int, *, scale: Scale = fan_in) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block, self.scale = torch.randn(BLOCK, generator=generator), scale
        self.random = np.random.default_rng(seed)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One tensor: norms are about one, biases about zero, the rest as `scale` says."""
        count = int(np.prod(shape))
        start = int(self.random.integers(BLOCK))
        if len(shape) < 2:
            values = self._piece(start, count) * 0.01
            return (values + (1.0 if name.endswith("weight") else 0.0)).reshape(tuple(shape)).to(dtype)
        scaled = (self.block * self.scale(name, shape)).to(dtype)
        result = torch.empty(count, dtype=dtype)
        written = 0
        while written < count:
            piece = scaled[start : start + count - written]
            result[written : written + len(piece)] = piece
            written, start = written + len(piece), 0
        return result.reshape(tuple(shape))

    def state(self, shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of these names and shapes."""
        return {name: self.tensor(name, shape, dtype) for name, shape in shapes.items()}

    def _piece(self, start: int, count: int) -> Tensor:
        places = (start + torch.arange(count)) % BLOCK
        return self.block[places]


def model_shapes(make: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, those that share memory once, by their first name; none is allocated."""
    with torch.device("meta"):
        model = make()
    model.tie_weights() if hasattr(model, "tie_weights") else None
    shapes, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            shapes[name] = tuple(value.shape)
    return shapes


def write_sharded(
    folder: Path, shapes: Shapes, weights: RandomWeights, dtype: torch.dtype, *, shards: int, pickled: bool = False
) -> None:
    """Weights as a hub has them: one file, or several with an index; safetensors, or torch's `.bin`."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = list(_parts(shapes, shards))
    placed: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.{ending}"
        state = weights.state({name: shapes[name] for name in names}, dtype)
        if pickled:
            torch.save(state, folder / file)
        else:
            save_file(state, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    if shards > 1:
        size = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2))


def write_archive(path: Path, weights: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Weights as the parameters of a TorchScript archive, with numbers beside them.

    Args:
        weights: by dotted names.
    """
    root = nn.Module()
    for name, value in weights.items():
        *path_to, leaf = name.split(".")
        module, following = root, [*path_to[1:], leaf]
        for part, next_part in zip(path_to, following, strict=False):
            if part not in module._modules:
                module.add_module(part, nn.ModuleList() if next_part.isdigit() else nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    for name, number in numbers.items():
        root.register_buffer(name, torch.tensor(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is no longer recommended
        torch.jit.save(torch.jit.script(root), str(path))


def _parts(shapes: Shapes, shards: int) -> Iterator[list[str]]:
    """Names in their order, in so many runs of about the same size."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    part: list[str] = []
    done, given = 0, 0
    for name, shape in shapes.items():
        part.append(name)
        done += int(np.prod(shape))
        if done * shards >= total * (given + 1) and given + 1 < shards:
            yield part
            part, given = [], given + 1
    yield part
