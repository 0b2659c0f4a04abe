"""Work of fixed shapes as a CUDA graph: recorded once, then started by one call in place of many.

In small batches a GPU waits for the CPU, which starts every kernel by itself. A graph starts all of them at once. It
repeats what was recorded, on the same memory. So shapes are fixed, and what is recorded must not wait for the device,
copy from the CPU's memory, or choose by what a tensor holds.

On a CPU, and where recording fails, the same work runs from the same buffers without a graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .weights import first_line

ResultT = TypeVar("ResultT")

WARM_UPS = 3  # runs before the recording, in which libraries choose their kernels and take their memory


def record(
    work: Callable[[], ResultT], *, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, ResultT]:
    """Record the kernels of `work` on the current GPU.

    Args:
        work: is called several times; its last result is what every replay fills anew.
        pool: memory that several graphs share (`torch.cuda.graph_pool_handle`); only one of them may run at a time, and
            its results must be copied before the next one runs.
        stream: that the work is recorded on; graphs that share memory must share it too.

    Raises:
        RuntimeError: the work does something that no graph can hold.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # which is left again, too, where the recording breaks off
        for _ in range(WARM_UPS):
            work()
        stream.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


class GraphMemory:
    """Memory and stream that the graphs of one device share; see `record`. Without a GPU there are none.

    Attributes:
        pool: a handle of the memory, or None.
        stream: None, or what all of them are recorded on.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = torch.cuda.Stream(device) if on_gpu else None


class Replay:
    """A function of tensors for inputs of one shape, without gradients.

    Attributes:
        failures: why nothing was recorded on a GPU; empty where it was.
    """

    @torch.inference_mode()
    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        *,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """
        Args:
            function: takes the inputs one by one.
            inputs: examples of what it takes. Shapes, types and device are those of every call.
            pool, stream: see `record`.

        Raises:
            torch.OutOfMemoryError: there is no memory for the recording.
        """
        self.function = function
        self.inputs = [each.clone() for each in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failures: list[str] = []
        if self.inputs[0].is_cuda:
            try:
                self.graph, self.outputs = record(lambda: function(*self.inputs), pool=pool, stream=stream)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failures.append(first_line(error))

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives for other inputs, which may lie on the CPU."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        if self.graph is None:
            outputs = self.function(*self.inputs)
        else:
            self.graph.replay()
            outputs = self.outputs
        return tuple(part.clone() for part in outputs)  # some may be the inputs themselves
