"""A step of the optimiser: gradient accumulation, loss scaling, clipping, several processes, DeepSpeed and FSDP2.

stepper = Stepper(model, config, steps=100, decay="cosine", large=config)
for batches in checkpoint.steps(...):
    loss = stepper.step(loss_of, batches)
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from tools import processes
from tools.errors import BadInput

from . import sharding
from .batches import Batch, Part, part_of
from .compute import make_optimizer, pick_dtype, warmup_share
from .four_bits import holds_four_bits
from .graphed_step import GraphedStep, Loss
from .norms import fuse_norms
from .options import LargeModelOptions, TrainingOptions

Decay = Literal["none", "linear", "cosine"]

COMPILER = "inductor"  # of torch.compile
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Stepper:
    """A model with its optimiser, as the processes of this command share them.

    Args:
        module: the model, on its training device. Only parameters with `requires_grad` are trained.
        steps: of the whole training.
        decay: how the learning rate falls after the warmup.
        seeded: reseed torch before each batch, so that dropout does not depend on earlier batches.
        large: by default fp32, one batch per step, and no clipping.
        graphs: on a GPU, run a `Loss` by CUDA graphs, where one process trains the whole model.

    Attributes:
        module: the model as it was built: to evaluate, to write, to look into.
        trainee: what holds the weights that are trained: `module`, or with FSDP its copy in parts.
        model: `trainee` wrapped for several processes. Call this one in the loss.
        device, dtype: where the model lies, and the arithmetic of its forward passes.
        deepspeed: DeepSpeed trains it, and may keep its weights in parts; see `whole_weights`.
        fsdp: FSDP2 keeps its weights in parts, and each layer may run once in a forward pass.
        graphed: runs forward and backward by graphs; None where each kernel is started by itself.

    Raises:
        BadInput: the way in which `accelerate launch` shares the model is not one that this training supports.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingOptions,
        *,
        steps: int,
        decay: Decay,
        seeded: bool = True,
        large: LargeModelOptions | None = None,
        graphs: bool = False,
    ) -> None:
        large = large or LargeModelOptions(precision="fp32")
        self.module, self.seeded, self.large = module, seeded, large
        self.device = next(module.parameters()).device
        self.dtype = pick_dtype(large.precision, self.device)
        self.fsdp = sharding.is_asked_for()
        self.accelerator = make_accelerator(module, self.device)
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if sharer := "DeepSpeed" if self.deepspeed else "FSDP" if self.fsdp else None:
            check_sharing(sharer, module, self.dtype)
        if self.fsdp:
            sharding.check_optimizer(config.optimizer)
        if self.device.type == "cuda":
            fuse_norms(module)
        compile_module(module, large, self.device, shared_by=sharer)
        self.trainee: Any = sharding.shard(module) if self.fsdp else module
        optimizer = make_optimizer(
            config.optimizer,
            self.trainee,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" and not self.deepspeed,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_share(step, steps=steps, warmup=config.warmup, decay=decay)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.deepspeed:
            self._tell_deepspeed(config.batch_size)
        self.model: Any
        self.optimizer: Any
        if self.fsdp:
            self.model, self.optimizer = self.trainee, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.graphed = GraphedStep(module, self.device) if graphs and self._can_record() else None

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, loss: Callable[[Part], Tensor], batches: Sequence[Batch]) -> Tensor:
        """One step of the optimiser, on the gradients of `accumulate` batches, or of what an epoch has left.

        Each batch counts 1 / `accumulate`, so that the shorter last group of an epoch makes a smaller step.

        Args:
            loss: the mean loss over a part of a batch, from one call of `model`.

        Returns:
            mean loss over the batches and this process's part of them; a scalar on the model's device.
        """
        if self.fsdp and self.model.training != self.module.training:
            self.model.train(self.module.training)
        losses = []
        for batch in batches:
            if self.seeded:
                torch.manual_seed(batch.stream(1 + processes.number()))
            losses.append(self._backward(loss, part_of(batch), last=batch is batches[-1]))
        if not self.deepspeed:  # DeepSpeed steps by itself after the last backward pass
            raw = self.optimizer.optimizer  # the scaler looks inside it
            if self.large.max_grad_norm < float("inf"):
                self.scaler.unscale_(raw)
                nn.utils.clip_grad_norm_(self.trainee.parameters(), self.large.max_grad_norm)
            self.scaler.step(raw)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=self.graphed is None)
        self.schedule.step()
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes, in every process."""
        means: Tensor = self.accelerator.reduce(values, "mean")
        return means

    @property
    def in_parts(self) -> bool:
        """Whether every process has a part of the state, so that saving takes all of them."""
        return self.deepspeed or self.fsdp

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; with FSDP this process's parts of them."""
        return {name: value for name, value in self.trainee.named_parameters() if value.requires_grad}

    def align(self) -> None:
        """Give every process the main one's weights, after they were written to."""
        if processes.count() > 1:
            for value in self.trained().values():
                torch.distributed.broadcast(value.data, src=0)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside it every process has all weights, which ZeRO-3 and FSDP keep in parts, and may copy the model."""
        if self.fsdp:
            with sharding.whole(self.module, self.model):
                yield
        elif self._zero_stage == 3:
            import deepspeed

            with deepspeed.zero.unwrap_model_for_generation(self.model):  # its hooks, too, are off for the time
                yield
        else:
            yield

    @property
    def layout(self) -> str:
        """How the state is saved. DeepSpeed's files fit only the same ZeRO stage and number of processes; FSDP's is
        that of a whole model."""
        if not self.deepspeed:
            return "without DeepSpeed"
        return f"with DeepSpeed's ZeRO-{self._zero_stage} on {processes.count()} processes"

    def state(self, shards: Path) -> dict[str, Any]:
        """What a resumed training needs: weights that are trained, buffers, optimiser, schedule and scaler.

        Args:
            shards: folder for what DeepSpeed writes, in all processes; not written without it.
        """
        state = {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(), "layout": self.layout}
        if self.deepspeed:
            self.model.save_checkpoint(shards, exclude_frozen_parameters=True)
            processes.wait()
            return {**state, "shards": shards.name}
        every = dict(self.trainee.named_parameters(remove_duplicate=False))
        left_out = every.keys() - self.trained().keys()  # what is frozen, and further names of tied weights
        beside = tuple(f"{name}." for name in left_out)  # scales of weights in 4 bits
        weights = {
            name: value
            for name, value in self.trainee.state_dict().items()
            if name not in left_out and not name.startswith(beside)
        }
        return sharding.gathered({**state, "model": weights, "optimizer": self.optimizer.state_dict()})

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from what `state` gave.

        Args:
            folder: where its shards lie, if it has any.
        """
        if self.deepspeed:
            options = {"load_module_strict": False, "load_lr_scheduler_states": False}
            self.model.load_checkpoint(folder / state["shards"], **options)
        else:
            held = self.trainee.state_dict()
            parts = {name: sharding.parted(value, held.get(name, value)) for name, value in state["model"].items()}
            self.trainee.load_state_dict(parts, strict=False)
            self.optimizer.load_state_dict(sharding.parted_optimizer(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _backward(self, loss: Callable[[Part], Tensor], part: Part, *, last: bool) -> Tensor:
        """Add a part's gradients; behind the last part, processes share them. Returns its share of the loss."""
        pieces = part.pieces(self.large.at_once)
        losses = []
        for number, piece in enumerate(pieces):
            if self.graphed is not None and isinstance(loss, Loss):
                share = piece.weight / self.large.accumulate
                losses.append(self.graphed.backward(loss, piece, share) * self.large.accumulate)
                continue
            with self._gradients(complete=last and number + 1 == len(pieces)):
                value = loss(piece) * piece.weight
                self.accelerator.backward(self.scaler.scale(value / self.large.accumulate))
            losses.append(value.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _gradients(self, *, complete: bool) -> contextlib.AbstractContextManager[Any]:
        """Inside it a backward pass adds to this process's gradients; behind the `complete` one they are all shared."""
        self.accelerator.sync_gradients = complete
        if self.fsdp:
            self.model.set_requires_gradient_sync(complete)
        shared = complete or self.fsdp
        return contextlib.nullcontext() if shared else self.accelerator.no_sync(self.model)

    def _can_record(self) -> bool:
        """Whether nothing of a step is known that no graph holds; says what it is otherwise."""
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in self.module.modules())
        obstacles = {
            "there is no GPU": self.device.type != "cuda",
            "several processes train": processes.count() > 1,
            "DeepSpeed trains": self.deepspeed,
            "fp16 scales the losses": self.scaler.is_enabled(),
            "activations are computed twice": checkpointed,
            "weights have 4 bits": holds_four_bits(self.module),
        }
        found = [reason for reason, holds in obstacles.items() if holds]
        if found and processes.is_main():
            print(f"note: `graphs` records nothing: {', '.join(found)}", flush=True)
        return not found

    @property
    def _zero_stage(self) -> int:
        """What DeepSpeed keeps in parts: 0 nothing, 2 optimiser and gradients, 3 weights too."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.deepspeed else 0

    def _tell_deepspeed(self, batch_size: int) -> None:
        """Write into DeepSpeed's configuration what it must know of the training."""
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = max(1, batch_size // processes.count())
        settings["gradient_accumulation_steps"] = 1  # losses come divided; `sync_gradients` says when to step
        norm = self.large.max_grad_norm
        settings["gradient_clipping"] = norm if norm < float("inf") else 0.0
        if self.dtype != torch.float32:  # DeepSpeed switches off any autocast but its own
            exact: dict[str, Any] = {"lower_precision_safe_modules": []}  # gradients and weights travel as they are
            settings["torch_autocast"] = {"enabled": True, "dtype": str(self.dtype), **exact}


def make_accelerator(module: nn.Module, device: torch.device) -> Accelerator:
    """What shares a model between processes, as `accelerate launch` was told, but for FSDP.

    Raises:
        BadInput: the way is not one that the stepper knows.
    """
    buffers = any(isinstance(part, BATCH_NORM) for part in module.modules())  # others are the same everywhere
    no_second_copy = DistributedDataParallelKwargs(broadcast_buffers=buffers, gradient_as_bucket_view=True)
    with sharding.unknown_to_accelerate():
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[no_second_copy])
    check_launch(accelerator.distributed_type)
    return accelerator


def check_sharing(sharer: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Refuse what cannot be trained in parts.

    Args:
        sharer: what shares the model, as users know it.

    Raises:
        BadInput: the arithmetic is fp16, or some weights have 4 bits.
    """
    if dtype == torch.float16:  # DeepSpeed's clipping takes the scaled gradients for the true ones
        raise BadInput(f"{sharer} does not train with `precision` fp16: write bf16 or fp32")
    if holds_four_bits(module):
        raise BadInput(
            f"{sharer} does not share weights of `load_in_4bit`: leave it out, or train whole copies "
            "(accelerate launch --multi_gpu)"
        )


def compile_module(
    module: nn.Module, options: LargeModelOptions, device: torch.device, *, shared_by: str | None
) -> None:
    """Compile a model in place where that is asked for.

    Args:
        shared_by: what keeps the model in parts, as users know it; such a model is not compiled.

    Raises:
        BadInput: `compile` is "always" and the model is kept in parts.
    """
    if options.compile == "always" and shared_by:
        raise BadInput(f"`compile` is for whole models, {shared_by} shares this one: leave one of the two out")
    if options.compile == "always" or (options.compile == "gpu" and not shared_by and gpu_compiles(device)):
        module.compile(backend=COMPILER, dynamic=True)


def gpu_compiles(device: torch.device) -> bool:
    """Whether a device is a GPU that torch.compile can write kernels for: with Triton, and a C compiler for Triton."""
    if device.type != "cuda":
        return False
    lacking = [
        what
        for what, there in (
            ("Triton", find_spec("triton") is not None),
            ("a C compiler", any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))),
        )
        if not there
    ]
    if lacking and processes.is_main():
        print(f"note: the model is not compiled, which takes {' and '.join(lacking)}: a step takes longer", flush=True)
    return not lacking


def check_launch(kind: DistributedType) -> None:
    """Refuse ways of sharing a model that the stepper would take for whole copies, and save in parts.

    Raises:
        BadInput: `accelerate launch` shares it by Megatron or another way that is not known here.
    """
    if kind not in SUPPORTED:
        raise BadInput(
            f"accelerate launch was told to share the model by {kind.value}, which is not supported: write "
            "--multi_gpu for whole copies, or use FSDP2 or DeepSpeed's ZeRO-3 for weights in parts (docs/scale.md)"
        )
