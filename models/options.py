"""Options of commands that run or train a model, written once: a configuration derives from those it takes."""

from dataclasses import dataclass
from typing import Literal, Protocol

from tools.errors import BadInput

from .compute import Precision, check_optimizer

Compile = Literal["never", "gpu", "always"]


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a command computes."""

    device: str | None = None
    """cpu, cuda or cuda:N; by default the GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(DeviceOptions):
    """Where a command computes, and in which arithmetic."""

    precision: Precision = "auto"
    """Arithmetic of the forward passes; auto: bf16 or fp16 on a GPU and on CPUs with bf16 units, else fp32."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(DeviceOptions):
    """What every training has."""

    epochs: int
    """Passes over what is trained on."""
    batch_size: int
    """Examples per batch, of all processes together."""
    optimizer: str = "adamw"
    """Name of an optimiser of torch.optim."""
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of the matrices."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises."""
    steps: int | None = None
    """Steps of the optimiser at least: where the examples are few, each epoch passes over them several times."""
    seed: int = 0
    """Seed of weights, batches, and all else that is drawn."""

    def __post_init__(self) -> None:
        """Refuse numbers that no training can use, before any work.

        Raises:
            BadInput: one of them is out of its range.
        """
        check_optimizer(self.optimizer)
        if self.batch_size < 1 or (self.steps is not None and self.steps < 1):
            raise BadInput("`batch_size` and `steps` must be at least 1")
        if not 0 < self.lr < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise BadInput("`lr` must be above 0, `weight_decay` at least 0, and both finite")
        if not 0 <= self.warmup <= 1:
            raise BadInput(f"`warmup` is a share of the steps, 0 to 1, not {self.warmup}")
        if self.seed < 0:
            raise BadInput("`seed` must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """When a training is validated."""

    validate_every: int = 1
    """Epochs between validations."""
    patience: int | None = None
    """Stop after so many validations in a row that were not the best; by default never."""

    def __post_init__(self) -> None:
        if self.validate_every < 1 or (self.patience is not None and self.patience < 1):
            raise BadInput("`validate_every` and `patience` must be at least 1")


class Scheduled(Protocol):
    """The options that the length of an epoch follows from."""

    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...


def examples_of_epoch(
    options: Scheduled, *, count: int, accumulate: int = 1, examples: int | None = None
) -> int | None:
    """Examples of an epoch: those that are asked for, or more where the epochs would have too few steps in all.

    Args:
        count: examples that there are.
        accumulate: batches per step.
        examples: that are asked for.

    Returns:
        None: all that there are, each once.
    """
    if options.steps is None or options.epochs == 0:
        return examples
    of_step = min(options.batch_size, count) * accumulate
    wanted = -(-options.steps // options.epochs)
    return examples if (examples or count) > (wanted - 1) * of_step else wanted * of_step


@dataclass(frozen=True, kw_only=True)
class LargeModelOptions(PrecisionOptions):
    """Further options for training a large model."""

    precision: Precision = "auto"
    """Arithmetic of the forward passes; weights that are trained are kept in fp32. auto: bf16 or fp16 on a GPU and on
    CPUs with bf16 units, else fp32."""
    accumulate: int = 1
    """Batches per step of the optimiser."""
    at_once: int | None = None
    """Most examples per forward pass in one process; by default its whole part. Lower it to save memory: the step stays
    the same."""
    max_grad_norm: float = float("inf")
    """Gradients with a larger norm are scaled down to it."""
    compile: Compile = "never"
    """Compile the model (torch.compile), which takes minutes once, and starts a third of the kernels from then on; gpu:
    where there is a GPU with Triton and a C compiler; always: on a CPU too, with a C++ compiler."""

    def __post_init__(self) -> None:
        """Refuse numbers that no training can use.

        Raises:
            BadInput: one of them is out of its range.
        """
        if self.accumulate < 1 or (self.at_once is not None and self.at_once < 1):
            raise BadInput("`accumulate` and `at_once` must be at least 1")
        if not self.max_grad_norm > 0:
            raise BadInput("`max_grad_norm` must be above 0")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """How much of a large language model is trained, and what of it is kept."""

    lora_rank: int
    """Rank of low-rank adapters."""
    lora_alpha: float
    """Adapters are scaled by this over the rank."""
    lora_dropout: float
    """Dropout before the adapters."""
    lora_targets: tuple[str, ...]
    """Projections that get adapters (q_proj v_proj ...)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    load_in_4bit: bool = False
    """Keep the frozen weights beside the adapters in 4 bits (QLoRA): a quarter of their memory. Takes bitsandbytes."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_rank > 0 and self.lora_alpha <= 0):
            raise BadInput("`lora_rank` must be at least 0 and `lora_alpha` above 0")
        if self.load_in_4bit and not self.lora_rank:
            raise BadInput("`load_in_4bit` is for `lora_rank` above 0: weights in 4 bits cannot be trained themselves")
        if not 0 <= self.lora_dropout < 1:
            raise BadInput("`lora_dropout` must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class NegativeOptions:
    """The wrong pictures that a right one is compared with."""

    negatives: int
    """Wrong pictures per caption."""
    spare_same_words: bool = True
    """Do not use a picture as a negative if one of its train captions has the same words; published: it is used."""

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise BadInput("`negatives` must be at least 1")
