"""Training steps on a GPU: their time beside that of their forward and backward in a CUDA graph, and their memory."""

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import scorer as scorers
from models import voken_lm
from models.compute import autocast, make_optimizer, seed_everything
from models.graphed_step import Loss
from models.graphs import record
from models.norms import fuse_norms
from models.rqvae import RqVae, RqVaeConfig
from models.voken_lm import VokenLM
from retriever.losses import Targets, generative_loss, soft_targets

from .gpu_figures import GIB, Goal, Report, Skipped, free
from .gpu_models import Sizes, captions, image_tokens, llama, scorer, t5
from .timing import Timing, interleave, peak_memory

STEP_GOAL = Goal(1.3, least=False)
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, as published
TIMED_SECONDS = 2.0  # of steps alone, more or less
MEMORY_NOTE = {True: "weights, optimiser and all", False: "beyond what was held before it"}
LOOP_STEP = "step of the training's own loop"
LOOP_STEP_GRAPHS = f"{LOOP_STEP}, --graphs"
LOOP_BATCHES = 4  # batches of a round through the training's own loop
CAPTIONS_EACH = 5  # of a picture
LLAMA_LORA = voken_lm.Lora(8, 16.0, 0.1, ("q_proj", "v_proj"))
ModuleT = TypeVar("ModuleT", bound=nn.Module)
RERANKER_LORA = scorers.Lora(16, 32.0, 0.05, scorers.LORA_TARGETS, scorers.TRAINED_WHOLE)


@dataclass
class Work:
    """One micro-batch of a training, its inputs on the device.

    Attributes:
        tokens: of texts, pictures and vokens that a step reads and writes, without padding.
        graphed: the training has `--graphs`, which is measured too.
        checkpointed: switches activation checkpointing on, where a recipe may want it.
    """

    module: nn.Module
    loss: Callable[[], Tensor]
    examples: int
    tokens: int
    graphed: bool = False
    checkpointed: Callable[[], None] | None = None


def train_t5_base(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """T5-base, 128 captions a step; and what drawing a batch's soft targets takes."""
    with report.attempt("soft targets"):
        draw_targets(sizes, report)
    with report.attempt("T5-base"):
        measure(t5_work(sizes.t5_base, sizes, report.device), report, graphs=graphs)


def train_t5_compiled(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """T5-base's step, compiled: which takes longer than all else here."""
    with report.attempt("T5-base, compiled"):
        measure_compiled(t5_work(sizes.t5_base, sizes, report.device), report)


def train_t5_large(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """T5-large, 128 captions a step."""
    with report.attempt("T5-large"):
        measure(t5_work(sizes.t5_large, sizes, report.device), report, graphs=graphs)


def train_llama(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """LLaMA-2-7B with LoRA, 16 captions a step."""
    with report.attempt("LLaMA with LoRA"):
        work = llama_work(sizes, report.device)
        measure(work, report, graphs=graphs)
        measure_checkpointed(work, report)


def train_reranker(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """SEED-LLaMA's shape with LoRA, 8 queries with 8 pictures each."""
    queries, each = sizes.groups
    measured: list[int] = []
    while queries and not measured:  # fewer queries where all together need too much memory
        with report.attempt(f"reranker with LoRA, {queries} × {each}"):
            measure(reranker_work(sizes, report.device, queries), report, graphs=graphs)
            measured.append(queries)
        queries = queries // 2 if report.device.type == "cuda" else 0


def t5_work(shape: dict[str, int], sizes: Sizes, device: torch.device) -> Work:
    """Stage 1 of a T5 with soft labels."""
    lm = as_trained(t5(shape, sizes, device, dropout=0.2)).train()
    return written_work(lm, sizes, sizes.t5_batch, soft=True)


def llama_work(sizes: Sizes, device: torch.device) -> Work:
    """A LLaMA in bf16 whose adapters, embeddings and head are trained in float32."""
    need_peft()
    lm = as_trained(llama(sizes.llama, sizes, device, dtype=torch.bfloat16))
    adapted = voken_lm._adapt("LLaMA", lm.model, LLAMA_LORA)
    lm._adapted = (adapted,)
    in_float32(lm)
    work = written_work(lm.train(), sizes, sizes.llama_batch, soft=True)
    work.checkpointed = lambda: lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    return work


def reranker_work(sizes: Sizes, device: torch.device, queries: int) -> Work:
    """Queries with one right picture and several wrong ones."""
    need_peft()
    model = as_trained(scorer(sizes.llama, sizes, device, dtype=torch.bfloat16))
    model._adapted = (scorers._adapt("LLaMA", model.model, RERANKER_LORA),)
    model.head.float()
    in_float32(model.train())
    each = sizes.groups[1]
    texts = model.query_ids(captions(queries, sizes))
    of_query = torch.arange(queries).repeat_interleave(each)
    pairs = model.pairs(image_tokens(queries * each, sizes), texts, torch.arange(queries * each), of_query)

    def loss() -> Tensor:
        with autocast(device, torch.bfloat16):
            scores = model(pairs)
        return -scores.view(queries, each).log_softmax(dim=1)[:, 0].mean()

    tokens = pairs.pictures.numel() + each * sum(map(len, texts))
    return Work(model, loss, queries, tokens)


def written_work(lm: VokenLM, sizes: Sizes, batch: int, *, soft: bool) -> Work:
    """Stage 1's loss on one batch of captions."""
    generator = torch.Generator().manual_seed(0)
    space = sizes.space
    token_ids = lm.tokenize(captions(batch, sizes))
    tokens = lm.pad(token_ids)
    codes = torch.randint(space.codebook_size, (batch, space.levels), generator=generator).to(lm.device)
    shares = torch.randn(batch, space.levels, space.codebook_size, generator=generator).softmax(dim=-1).to(lm.device)
    targets = Targets(codes, shares if soft else None)

    def loss() -> Tensor:
        with autocast(lm.device, torch.bfloat16):
            logits = lm(tokens, targets.codes)
        return generative_loss(logits, targets, lm, temperature=0.5, end=True)

    return Work(lm, loss, batch, sum(map(len, token_ids)) + batch * (space.levels + 1), graphed=True)


def as_trained(module: ModuleT) -> ModuleT:
    """A model as the training loop has it on its device."""
    if next(module.parameters()).is_cuda:
        fuse_norms(module)
    return module


def in_float32(module: nn.Module) -> None:
    """Keep what is trained in float32, as the project's builders do."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def need_peft() -> None:
    if find_spec("peft") is None:
        raise Skipped("peft is not installed")


def measure(work: Work, report: Report, *, graphs: bool) -> None:
    """A training's step beside its parts, each in turn."""
    report.need_time()
    seed_everything(0)
    flops = count_flops(work)
    step = Step(work)
    calls: dict[str, Callable[[], object]] = {"step": step, "forward and backward": step.backward}
    repeats = rounds(step, device=report.device)
    memory = memory_of(step, report.device)  # before anything else has an optimiser of its own
    with report.attempt("the training's own loop"):
        calls[LOOP_STEP] = loop_steps(work, report.device)
    if graphs and work.graphed:
        with report.attempt("the training's own loop, --graphs"):
            calls[LOOP_STEP_GRAPHS] = loop_steps(work, report.device, graphs=True)
    timings = interleave(calls, repeats=repeats, memory=False)
    seconds = {
        name: timing.median / (LOOP_BATCHES if name.startswith(LOOP_STEP) else 1) for name, timing in timings.items()
    }
    for name, timing in timings.items():
        report.add(name, seconds[name] * 1e3, "ms", note=deviation(timing))
    tell(work, report, seconds, flops)
    report.add("peak memory of a step", memory, "GiB", note=MEMORY_NOTE[report.device.type == "cuda"])
    if report.device.type == "cuda":
        with report.attempt("kernels"):
            report.add("kernels of a step", count_kernels(step), "")
    if graphs:  # last, and alone: its memory is its own
        with report.attempt("forward and backward in a graph"):
            measure_graph(step, report, best_step(seconds), repeats)


def measure_graph(step: "Step", report: Report, whole: float, repeats: int) -> None:
    """Forward and backward as one graph, and a step's seconds over its own."""
    report.need_time()
    free()
    timing = interleave({"": graphed_backward(step)}, repeats=repeats, memory=False)[""]
    report.add("forward and backward in a graph", timing.median * 1e3, "ms", note=deviation(timing))
    report.add("step / forward and backward in a graph", whole / timing.median, "×", goal=STEP_GOAL)


def measure_compiled(work: Work, report: Report) -> None:
    """The same step compiled, as `--compile` has it; a CPU compiles with a backend that only traces."""
    with report.attempt("step, compiled"):
        report.need_time()
        backend = "inductor" if report.device.type == "cuda" else "eager"
        work.module.compile(backend=backend, dynamic=True)
        step = Step(work)
        report.add("first step, compiled", timed(step), "s", note=f"by {backend}")
        timing = interleave({"": step}, repeats=3, memory=False)[""]
        report.add("step, compiled", timing.median * 1e3, "ms", note=deviation(timing))
    with report.attempt("the training's own loop, compiled"):
        timing = interleave({"": loop_steps(work, report.device, graphs=True)}, repeats=3, memory=False)[""]
        report.add(f"{LOOP_STEP_GRAPHS}, compiled", timing.median / LOOP_BATCHES * 1e3, "ms", note=deviation(timing))


def best_step(seconds: dict[str, float]) -> float:
    """Seconds of a step as the trainings run it, by graphs where they can; or, where that is not to be had, as it is
    written out here."""
    return seconds.get(LOOP_STEP_GRAPHS, seconds.get(LOOP_STEP, seconds["step"]))


def rounds(step: "Step", device: torch.device) -> int:
    """How often a step is timed: long ones less often; on a CPU, which is there to try the code, twice."""
    if device.type == "cpu":
        return 2
    step()
    began = time.perf_counter()
    step()
    synchronize()
    return int(np.clip(TIMED_SECONDS / (time.perf_counter() - began), 3, 20))


def tell(work: Work, report: Report, seconds: dict[str, float], flops: int) -> None:
    """What follows from the times."""
    whole = best_step(seconds)
    note = f"without padding; {work.tokens} a step"
    report.add("tokens a second", work.tokens / whole, "tokens/s", note=note)
    report.add("examples a second", work.examples / whole, "examples/s", note=f"{work.examples} a step")
    peak, source = peak_of(report.device)
    note = f"{flops / 1e12:.3f} TFLOP a step; {source}"
    report.add("share of the card's bf16 peak", flops / whole / peak, "share", note=note)


class Step:
    """One step of the optimiser, written out: forward, backward, clipping, AdamW."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.trained = [parameter for parameter in work.module.parameters() if parameter.requires_grad]
        fused = self.trained[0].is_cuda  # as the trainings have it
        self.optimizer = make_optimizer("adamw", work.module, lr=1e-5, weight_decay=0.01, fused=fused)

    def backward(self) -> Tensor:
        """Loss and gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.work.loss()
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


def graphed_backward(step: Step) -> Callable[[], object]:
    """Loss and gradients as one graph; on a CPU, the same without."""
    if not torch.cuda.is_available():
        return step.backward
    torch.use_deterministic_algorithms(False)  # the best case
    try:
        graph, _ = record(step.backward)
    finally:
        seed_everything(0)
    return graph.replay


def loop_steps(work: Work, device: torch.device, *, graphs: bool = False) -> Callable[[], None]:
    """Several steps as the trainings take them, on the same batch."""
    if find_spec("accelerate") is None:
        raise Skipped("accelerate is not installed")
    from models.options import LargeModelOptions, TrainingOptions
    from models.stepper import Stepper
    from models.training import Checkpoint

    config = TrainingOptions(epochs=1000, batch_size=work.examples, lr=1e-5, weight_decay=0.01, warmup=0.1)
    stepper = Stepper(
        work.module,
        config,
        steps=1000 * LOOP_BATCHES,
        decay="linear",
        large=LargeModelOptions(precision="bf16", max_grad_norm=1.0),
        graphs=graphs,
    )
    run: Any = SimpleNamespace(folder=None, resume_folder=None)
    checkpoint = Checkpoint(run, stepper, epochs=1000, points=1000 * LOOP_BATCHES)
    checkpoint.save_if_due = lambda: None  # type: ignore[method-assign]
    tracker: Any = SimpleNamespace(log=lambda *_, **__: None)
    batches = [np.arange(work.examples)] * LOOP_BATCHES
    loss = Loss(lambda _: (), work.loss)

    def epoch() -> None:
        work.module.train()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            for some in checkpoint.steps(batches, seed=0):
                checkpoint.record(stepper.step(loss, some), tracker)
        checkpoint.epoch_ends()

    epoch()  # what fails in it fails here, not among the others; and what is recorded is recorded
    if stepper.graphed is not None and stepper.graphed.failures:
        raise RuntimeError(f"nothing was recorded: {stepper.graphed.failures[0]}")
    return epoch


def measure_checkpointed(work: Work, report: Report) -> None:
    """The same step with its activations computed twice."""
    if work.checkpointed is None:
        return
    with report.attempt("step, activations computed twice"):
        report.need_time()
        work.checkpointed()
        step = Step(work)
        timing = interleave({"": step}, repeats=3, memory=False)[""]
        report.add("step, activations computed twice", timing.median * 1e3, "ms", note=deviation(timing))
        report.add("peak memory of it", memory_of(step, report.device), "GiB")


def train_rqvae(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """The image tokenizer at Flickr30k's size: its start, a step, an epoch of one row per caption."""
    device = report.device
    seed_everything(0)
    shape = RqVaeConfig(
        features=sizes.features,
        width=sizes.features,
        hidden=(sizes.features * 4 // 3, sizes.features * 2 // 3),
        levels=sizes.space.levels,
        codebook_size=sizes.space.codebook_size,
    )
    model = RqVae(shape).to(device)
    images = torch.randn(sizes.pictures, sizes.features, device=device)
    texts = torch.randn(sizes.pictures * CAPTIONS_EACH, sizes.features, device=device)
    for name, balance in (("k-means, plain", 0.0), ("k-means, balanced", 0.05)):
        with report.attempt(name):
            report.need_time()
            iterations = sizes.kmeans_iterations
            start = partial(model.start_from, images, iterations=iterations, seed=0, balance=balance)
            seconds = timed(start)
            report.add(f"{name}, {iterations} iterations", seconds, "s")
    batch = min(sizes.rqvae_batch, sizes.pictures)
    with report.attempt("step"):
        work = Work(model.train(), lambda: model(images[:batch], texts[:batch]).total(1.0), batch, batch)
        measure(work, report, graphs=graphs)
    with report.attempt("epoch"):
        report.need_time()
        time_epoch(model, images, texts, batch, report)


def time_epoch(model: RqVae, images: Tensor, texts: Tensor, batch: int, report: Report) -> None:
    """All captions once, each with its picture, in batches drawn on the CPU."""
    rows = np.random.default_rng(0).permutation(len(texts))
    parts = [torch.from_numpy(part) for part in np.array_split(rows, max(1, len(rows) // batch))]
    work = Work(model, lambda: images.sum(), batch, batch)
    step = Step(work)

    def loss(part: Tensor) -> Tensor:
        return model(images[part // CAPTIONS_EACH], texts[part]).total(1.0)

    def epoch() -> None:
        for part in parts:
            work.loss = partial(loss, part)
            step()

    timing = interleave({"": epoch}, repeats=3, memory=False)[""]
    note = f"{len(parts)} steps; {deviation(timing)}"
    report.add(f"an epoch of {len(texts):,} rows, one a caption", timing.median, "s", note=note)


def draw_targets(sizes: Sizes, report: Report) -> None:
    """Soft labels and drawn codes of one batch, on the CPU and on the device."""
    width, space = sizes.features, sizes.space
    latents, books = torch.randn(sizes.t5_batch, width), torch.randn(space.levels, space.codebook_size, width)
    calls: dict[str, Callable[[], object]] = {}
    for place in dict.fromkeys((torch.device("cpu"), report.device)):
        own = (latents.to(place), books.to(place))
        generator = torch.Generator(place).manual_seed(0)
        calls[place.type] = partial(soft_targets, *own, space.levels, float(width), generator)
    for name, timing in interleave(calls, repeats=5, memory=False).items():
        report.add(f"soft targets of a batch, drawn on {name}", timing.median * 1e3, "ms", note=deviation(timing))


def count_flops(work: Work) -> int:
    """Floating-point operations of the matrix products of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        work.loss().backward()
    work.module.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def count_kernels(step: Step) -> int:
    """Kernels and copies that a step starts on the GPU."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)


def memory_of(step: Step, device: torch.device) -> float:
    """GiB that a step holds at most; on a CPU, beyond what was held before it."""
    if device.type != "cuda":
        return (peak_memory(step) or 0.0) / 1024
    free()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def peak_of(device: torch.device) -> tuple[float, str]:
    """Operations a second of the device's bf16 matrix products, and where the number is from."""
    if device.type == "cuda":
        for name, peak in PEAKS.items():
            if name.lower() in torch.cuda.get_device_name().lower():
                return peak, f"{name}'s published peak, {peak / 1e12:.0f} TFLOP/s"
    peak = measured_peak(device, 8192 if device.type == "cuda" else 512)
    return peak, f"of a matrix product measured here, {peak / 1e12:.3f} TFLOP/s"


def measured_peak(device: torch.device, side: int) -> float:
    """Operations a second of a product of two square bf16 matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = interleave({"": lambda: left @ right}, repeats=10, memory=False)[""]
    return 2 * side**3 / timing.median


def deviation(timing: Timing) -> str:
    return f"{timing.least * 1e3:.2f} to {timing.most * 1e3:.2f} ms in {timing.repeats}"


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call on the clock."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
