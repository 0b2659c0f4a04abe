"""Forward and backward of a training as CUDA graphs, one for each shape of its inputs.

A step of T5-base starts some three thousand kernels. A GPU ends each before the CPU has started the next, so that it
waits most of the time. A graph starts all of them at once. Gradients, dropout and losses are to be those of the same
step without a graph: seeds are read at every replay, and gradients are added up in place. No GPU has run this yet; see
docs/gpu.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import Part
from .graphs import GraphMemory, record
from .weights import first_line

MOST_SHAPES = 32  # that get a graph; further ones run without

Inputs = tuple[Any, ...]  # tensors, None, and tuples of them


@dataclass(frozen=True)
class Loss:
    """A loss in two parts: what it reads of the data, and its computation on the device, which a graph can hold."""

    read: Callable[[Part], Inputs]
    """Everything that differs from batch to batch, on the model's device."""
    of: Callable[..., Tensor]
    """The mean loss of such inputs, from one call of the model. It takes nothing else that changes, waits for no result
    of the device, and copies nothing from the CPU."""

    def __call__(self, part: Part) -> Tensor:
        return self.of(*self.read(part))


class Recorded(NamedTuple):
    """The graph of one shape."""

    graph: Any
    inputs: Inputs
    share: Tensor
    """Factor of the loss; a scalar."""
    value: Tensor
    """What a replay leaves: the loss times its share."""


class GraphedStep:
    """Adds gradients of a loss to a module's parameters, by graphs where it has recorded them.

    A shape runs plainly the first time, and is recorded the second time. A parameter's `grad` must stay the same tensor
    from then on: zero it, and do not set it to None.

    Attributes:
        recorded: by shapes and types of the inputs; None where recording failed.
        failures: why shapes run without a graph, each reason once.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.memory = GraphMemory(device)
        self.seen: set[tuple[Any, ...]] = set()
        self.recorded: dict[tuple[Any, ...], Recorded | None] = {}
        self.failures: list[str] = []

    def backward(self, loss: Loss, part: Part, share: float) -> Tensor:
        """Add the gradients of `share` times the loss of a part. Returns that value without a gradient."""
        inputs = loss.read(part)
        key = tuple(shapes(inputs))
        if key in self.seen and key not in self.recorded and len(self.recorded) < MOST_SHAPES:
            self.recorded[key] = self._record(loss.of, inputs)
        self.seen.add(key)
        found = self.recorded.get(key)
        if found is None:
            value = loss.of(*inputs) * share
            value.backward()
            return value.detach()
        for own, new in zip(leaves(found.inputs), leaves(inputs), strict=True):
            own.copy_(new)
        found.share.fill_(share)
        found.graph.replay()
        return found.value.clone()

    def _record(self, of: Callable[..., Tensor], inputs: Inputs) -> Recorded | None:
        """Record a shape; gradients, buffers and random numbers are afterwards as they were."""
        own: Inputs = mapped(torch.clone, inputs)
        share = torch.ones((), device=self.device)

        def work() -> Tensor:
            value = of(*own) * share
            value.backward()
            return value.detach()

        changed = [value.grad for value in self.module.parameters() if value.grad is not None]
        changed += [*self.module.buffers()]
        kept = [value.clone() for value in changed]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                graph, value = record(work, pool=self.memory.pool, stream=self.memory.stream)
            return Recorded(graph, own, share, value)
        except RuntimeError as error:  # out of memory too: a step without a graph may have room
            self._tell(first_line(error))
            return None
        finally:
            for current, before in zip(changed, kept, strict=True):
                current.copy_(before)

    def _tell(self, failure: str) -> None:
        if failure not in self.failures:
            self.failures.append(failure)
            print(f"note: some steps run without a CUDA graph, and take longer: {failure}", flush=True)


def leaves(inputs: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif inputs is not None:
        for each in inputs:
            yield from leaves(each)


def shapes(inputs: Any) -> Iterator[Any]:
    """Shapes and types of nested tuples of tensors, in order; None for what is None."""
    if isinstance(inputs, Tensor):
        yield tuple(inputs.shape), inputs.dtype
    elif inputs is None:
        yield None
    else:
        for each in inputs:
            yield from shapes(each)


def mapped(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Nested tuples with a function of each tensor in its place."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if inputs is None:
        return None
    made = [mapped(function, each) for each in inputs]
    return type(inputs)(*made) if hasattr(inputs, "_fields") else tuple(made)
