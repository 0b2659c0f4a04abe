"""FSDP2: a model whose weights, gradients and optimiser lie in parts in the processes (Zhao et al. 2023).

A copy of the model is shared and trained. The model itself stays an ordinary module, which holds no weights until it is
to be searched with or saved:

    sharded = shard(module)
    with whole(module, sharded):
        module.save_pretrained(folder)
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from tools import processes
from tools.errors import BadInput

ASKS = "ACCELERATE_USE_FSDP"
REFUSED = {  # variables of `accelerate launch`: what to do without them
    "FSDP_OFFLOAD_PARAMS": "train on more GPUs",
    "FSDP_ACTIVATION_CHECKPOINTING": "give the command `gradient_checkpointing`",
}

NOT_IN_PARTS = ("adafactor",)  # optimisers that sum over the rows of a weight, which torch does not do in parts


def is_asked_for() -> bool:
    """Whether `accelerate launch` was told to share a model by FSDP, and there are processes to share it.

    Raises:
        BadInput: it was told of version 1, or of a setting that the training would not follow.
    """
    if processes.count() == 1 or not _is_on(ASKS):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput(
            "accelerate launch was told to share the model by FSDP version 1, which is not supported: write "
            "`fsdp_version: 2` below `fsdp_config` in its configuration (docs/scale.md)"
        )
    for name, advice in REFUSED.items():
        if _is_on(name):
            raise BadInput(f"{name.lower()} of accelerate's configuration is not supported: leave it out and {advice}")
    return True


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that cannot work on parts of weights.

    Raises:
        BadInput: it is one of them.
    """
    if name.lower() in NOT_IN_PARTS:
        raise BadInput(
            f"FSDP does not train with `optimizer` {name}, which needs whole weights: take adamw, or another one"
        )


@contextlib.contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """Inside it accelerate is told of processes, but not of FSDP, which it knows on GPUs alone."""
    told = os.environ.pop(ASKS, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[ASKS] = told


def shard(module: nn.Module) -> nn.Module:
    """A copy of a module with a part of the main process's weights, and its own code, in every process.

    Each layer is made whole while it computes; all else, such as embeddings and head, during the whole pass. All that
    is called from outside must therefore run within the copy's `forward`, and each layer once in it.

    Args:
        module: on the training device; it is left without weights.
    """
    weights = list(module.parameters())
    for value in weights:
        torch.distributed.broadcast(value.data, src=0)
    copied = copy.deepcopy(module, {id(value): value for value in weights})
    mesh = init_device_mesh(weights[0].device.type, (processes.count(),))
    keep = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    for layer in dict.fromkeys(layers_of(copied)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(copied, mesh=mesh)
    _empty(module)
    return copied


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of a module that have weights: a transformer's layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from layers_of(child)


@contextlib.contextmanager
def whole(module: nn.Module, sharded: nn.Module) -> Iterator[None]:
    """Inside it a module has all weights of its sharded copy, in every process."""
    parts = dict(sharded.named_parameters())
    for name, value in module.named_parameters():
        part = parts[name].detach()
        value.data = part.full_tensor() if isinstance(part, DTensor) else part
    try:
        yield
    finally:
        _empty(module)


def gathered(tree: Any) -> Any:
    """A tree whose sharded tensors are whole on the CPU in the main process, and None in the others; in all of them."""

    def gather(part: Any) -> Tensor | None:
        every = part.full_tensor()
        return every.cpu() if processes.is_main() else None

    return tree_map_only(DTensor, gather, tree)


def parted(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as a parameter is; all of it where that one is whole."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def parted_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a whole optimiser, cut as the parameters of this one are."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]

    def cut(value: Any, like: Tensor) -> Any:
        return parted(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    each = {
        number: {name: cut(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": each}


def _empty(module: nn.Module) -> None:
    """Free a module's weights; their types and devices stay."""
    for value in module.parameters():
        value.data = value.data.new_empty(0)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")
