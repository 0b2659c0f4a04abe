"""Whether a GPU computes what the CPU does: the search, the quantizer, the losses, the reranker, in fp32 and bf16."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from models.arithmetic import Arithmetic
from models.batches import Batch, Part
from models.compute import DTYPES, autocast
from models.decoding import make_writer
from models.graphed_step import Inputs, Loss
from models.norms import fuse_norms
from models.rqvae import RqVae, RqVaeConfig
from models.voken_lm import Tokens, VokenLM
from retriever.beam import Beams, beam_search
from retriever.graphed_search import GraphedSearch
from retriever.index import VokenIndex, build_index, to_device
from retriever.losses import Discriminative, Rivals, Targets, discriminative_loss, generative_loss, soft_targets

from .codes import synthetic_codes
from .gpu_figures import Goal, Report, Skipped
from .gpu_models import Sizes, captions, image_tokens, scorer, t5

CPU = torch.device("cpu")
SAME = Goal(1e-3, least=False)  # of scores, and of relative errors, in float32
NEAR = Goal(0.05, least=False)  # of relative errors in bf16
SHARED = Goal(0.8, least=True)  # of bf16's answers, those that float32 gives too; weights are random
EQUAL_CODES = Goal(0.999, least=True)  # of pictures
START_SPREAD = 0.5  # of embeddings: random models tell pictures apart
GRAPHED_BATCH, GRAPHED_STEPS = 16, 8
ROWS = 32  # of what the losses are computed on


def equality(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """All of it; without a GPU the CPU is compared with itself."""
    if report.device.type == "cpu":
        report.say("device", "no GPU: the CPU is compared with itself")
    checks: dict[str, Callable[[], None]] = {
        "search": lambda: search(sizes, report, graphs=graphs),
        "quantizer": lambda: quantizer(sizes, report),
        "losses": lambda: losses(sizes, report),
        "training step": lambda: training_step(sizes, report),
        "training by graphs": lambda: training_by_graphs(sizes, report),
        "reranker": lambda: reranker(sizes, report),
    }
    for what, check in checks.items():
        with report.attempt(what):
            report.need_time()
            check()


def search(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """T5-base's answers to the same queries, on the CPU in float32 and on the device in both precisions."""
    lm = t5(sizes.t5_base, sizes, CPU)
    there = copy.deepcopy(lm).to(report.device)
    index = build_index(synthetic_codes(sizes.pool, codebook_size=sizes.space.codebook_size))
    token_ids = lm.tokenize(captions(sizes.compared, sizes, seed=7))
    scorings: tuple[dict[str, Any], ...] = ({"scoring": "full", "score_end": True}, {"scoring": "voken"})
    for options in scorings:
        options = {**options, "beams": sizes.beams}
        expected = answer(lm, "fp32", index, token_ids, options)
        precisions: tuple[Arithmetic, ...] = ("fp32", "bf16")
        for precision in precisions:
            found = answer(there, precision, index, token_ids, options)
            title = f"search, {options['scoring']}, {precision}"
            compare_answers(report, f"{title}, GPU and CPU", found, expected, exact=precision == "fp32")
            if graphs:
                failures: list[str] = []
                again = answer(there, precision, index, token_ids, options, failures=failures)
                if failures:
                    report.say(f"{title}, graphs", f"failed: nothing was recorded: {failures[0]}", trace=failures[0])
                compare_answers(report, f"{title}, graphs and none", again, found, exact=precision == "fp32")


def answer(
    lm: VokenLM,
    precision: Arithmetic,
    index: VokenIndex,
    token_ids: list[list[int]],
    options: dict[str, Any],
    *,
    failures: list[str] | None = None,
) -> Beams:
    """What a model finds, on the CPU.

    Args:
        failures: search by graphs, and put here why there is none.
    """
    writer, levels = make_writer(lm, precision), to_device(index, lm.device)
    if failures is not None:
        search = GraphedSearch(writer, levels, **options)
        found = search(search.encode(token_ids))
        failures += search.failures
    else:
        with torch.inference_mode():
            memory = writer.encode(token_ids)
        found = beam_search(writer, memory, levels, **options)
    return Beams(found.leaves.cpu(), found.scores.cpu())


def compare_answers(report: Report, title: str, found: Beams, expected: Beams, *, exact: bool) -> None:
    """Two searches: places that both found, and the scores place by place, which near ties do not change."""
    same = (found.leaves == expected.leaves).all(dim=1)
    both = [
        len({*own} & {*other}) / len(own)
        for own, other in zip(found.leaves.tolist(), expected.leaves.tolist(), strict=True)
    ]
    note = f"{int(same.sum())} of {len(same)} queries in the same order"
    report.add(f"{title}: answers in both", sum(both) / len(both), "share", goal=None if exact else SHARED, note=note)
    difference = (found.scores - expected.scores).abs().max().item()
    report.add(f"{title}: largest difference of a score", difference, "nats", goal=SAME if exact else None)


def quantizer(sizes: Sizes, report: Report) -> None:
    """Codes of random features, and a training step of the tokenizer without dropout."""
    torch.manual_seed(0)
    space = sizes.space
    shape = RqVaeConfig(
        features=sizes.features,
        width=sizes.features,
        hidden=(sizes.features, sizes.features // 2),
        levels=space.levels,
        codebook_size=space.codebook_size,
        dropout=0.0,
    )
    model = RqVae(shape)
    features = torch.randn(2 * space.codebook_size, sizes.features)
    there = copy.deepcopy(model).to(report.device)
    codes, others = model.eval().codes(features), there.eval().codes(features.to(report.device)).cpu()
    share = (codes == others).all(dim=1).float().mean().item()
    report.add("quantizer: pictures with the same codes, fp32", share, "share", goal=EQUAL_CODES)

    def loss(module: RqVae) -> Tensor:
        place = module.mean.device
        return module.train()(features.to(place), features.flip(0).to(place)).total(1.0)

    compare_steps(report, "quantizer, fp32", model, there, loss, SAME)


def losses(sizes: Sizes, report: Report) -> None:
    """Stage 1's losses and stage 2's on the same numbers, with their gradients; the soft labels."""
    generator = torch.Generator().manual_seed(0)
    space = sizes.space
    lm = t5(sizes.t5_base, sizes, CPU)
    width, levels = sizes.features, space.levels
    latents, books = torch.randn(ROWS, width, generator=generator), torch.randn(1, space.codebook_size, width)
    here, there = (
        soft_targets(latents.to(place), books.to(place), 1, float(width), None).shares for place in (CPU, report.device)
    )
    assert here is not None
    assert there is not None
    report.add("soft labels, fp32", relative(there.cpu(), here), "relative error", goal=SAME)
    logits = torch.randn(ROWS, levels + 1, sizes.words + len(space.tokens), generator=generator)
    codes = torch.randint(space.codebook_size, (ROWS, levels), generator=generator)
    shares = torch.randn(ROWS, levels, space.codebook_size, generator=generator).softmax(dim=-1)
    for name, given in (("hard", None), ("soft", shares)):

        def loss(values: Tensor, given: Tensor | None = given) -> Tensor:
            place = values.device
            targets = Targets(codes.to(place), None if given is None else given.to(place))
            return generative_loss(values, targets, lm, temperature=0.5, end=True)

        compare_gradients(report, f"generative loss, {name}", logits, loss)
    positive, negatives = -torch.rand(ROWS, levels, generator=generator), -torch.rand(ROWS, 9, levels)
    present, parted = torch.rand(ROWS, 9, generator=generator) > 0.2, torch.rand(ROWS, 9, levels) > 0.3
    drawn = torch.randint(9, (ROWS,), generator=generator)
    for form in get_args(Discriminative):

        def compared(values: Tensor, form: Discriminative = form) -> Tensor:
            rest = (part.to(values.device) for part in (negatives, present, parted, drawn))
            return discriminative_loss(Rivals(values, *rest), form, temperature=0.5, margin=1.0)

        compare_gradients(report, f"discriminative loss, {form}", positive, compared)


def training_step(sizes: Sizes, report: Report) -> None:
    """T5-base's loss on a few captions and the norm of its gradient, without dropout."""
    lm = t5(sizes.t5_base, sizes, CPU).train()
    texts = lm.tokenize(captions(8, sizes))
    codes = torch.from_numpy(np.random.default_rng(0).integers(sizes.space.codebook_size, size=(8, sizes.space.levels)))

    def loss(model: VokenLM, dtype: torch.dtype) -> Tensor:
        own = codes.to(model.device)
        with autocast(model.device, dtype):
            logits = model(model.pad(texts), own)
        return generative_loss(logits, Targets(own, None), model, temperature=0.5, end=True)

    for precision, goal in (("fp32", SAME), ("bf16", NEAR)):
        there = copy.deepcopy(lm).to(report.device)
        fuse_norms(there)  # as the trainings have it on a GPU
        compute = partial(loss, dtype=DTYPES[precision])
        compare_steps(
            report,
            f"T5's training step, {precision}",
            lm,
            there,
            compute,
            goal,
            precise=partial(loss, dtype=torch.float32),
        )


def training_by_graphs(sizes: Sizes, report: Report) -> None:
    """Losses of the same steps of T5-base with dropout and AdamW, by CUDA graphs and without, in two shapes."""
    if find_spec("accelerate") is None:
        raise Skipped("accelerate is not installed")
    from models.options import LargeModelOptions, TrainingOptions
    from models.stepper import Stepper

    space = sizes.space
    start = t5(sizes.t5_base, sizes, report.device, dropout=0.2).train()
    token_ids = start.tokenize(captions(2 * GRAPHED_BATCH, sizes))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(space.codebook_size, (len(token_ids), space.levels), generator=generator)
    shares = torch.randn(*codes.shape, space.codebook_size, generator=generator).softmax(dim=-1)
    options = TrainingOptions(epochs=1, batch_size=GRAPHED_BATCH, lr=1e-3, weight_decay=0.01, warmup=0.0)
    large = LargeModelOptions(precision="fp32", max_grad_norm=1.0)
    found: list[Tensor] = []
    for graphs in (False, True):
        lm = copy.deepcopy(start)
        stepper = Stepper(lm, options, steps=GRAPHED_STEPS, decay="linear", large=large, graphs=graphs)

        def read(part: Part, lm: VokenLM = lm) -> Inputs:
            own = torch.from_numpy(part.rows)
            targets = Targets(codes[own].to(lm.device), shares[own].to(lm.device))
            return lm.pad([token_ids[row] for row in part.rows], multiple=8), targets

        def loss_of(texts: Tokens, targets: Targets, lm: VokenLM = lm) -> Tensor:
            return generative_loss(lm(texts, targets.codes), targets, lm, temperature=0.5, end=True)

        rows = np.split(np.arange(len(token_ids)), 2)
        steps = [Batch(rows[step % 2], 0, 0, step) for step in range(GRAPHED_STEPS)]
        found.append(torch.stack([stepper.step(Loss(read, loss_of), [batch]).cpu() for batch in steps]))
        if stepper.graphed is not None:
            for failure in stepper.graphed.failures:
                report.say("training by graphs", f"failed: nothing was recorded: {failure}", trace=failure)
            report.add("training by graphs: shapes that have one", len(stepper.graphed.recorded), "")
    worst = float(((found[1] - found[0]) / found[0]).abs().max())
    note = f"{found[0][0]:.3f} at first, {found[0][-1]:.3f} after {GRAPHED_STEPS} steps"
    report.add("training by graphs, fp32: losses", worst, "relative error", goal=SAME, note=note)


def reranker(sizes: Sizes, report: Report) -> None:
    """Scores of the same pairs by a LLaMA with random weights, around the mean of their lists."""
    model = scorer(sizes.equality, sizes, CPU, dtype=torch.float32, spread=START_SPREAD)
    there = copy.deepcopy(model).to(report.device)
    tokens, texts = image_tokens(sizes.candidates, sizes), captions(4, sizes)
    of_picture, of_query = torch.arange(sizes.candidates).repeat(4), torch.arange(4).repeat_interleave(sizes.candidates)

    def scores(module: Any, dtype: torch.dtype) -> Tensor:
        pairs = module.pairs(tokens, module.query_ids(texts), of_picture, of_query)
        with torch.inference_mode(), autocast(module.device, dtype):
            found = module(pairs).float().cpu().view(4, -1)
        return found - found.mean(dim=1, keepdim=True)

    expected = scores(model, torch.float32)
    for precision, goal in (("fp32", SAME), ("bf16", NEAR)):
        found = scores(there, DTYPES[precision])
        note = f"they vary by {expected.std(dim=1).mean():.3f}"
        report.add(
            f"reranker, {precision}: scores within a list",
            relative(found, expected),
            "relative error",
            goal=goal,
            note=note,
        )


def compare_gradients(report: Report, title: str, values: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """A loss and its gradient with respect to `values`, here and there."""
    found = []
    for place in (CPU, report.device):
        own = values.detach().to(place).requires_grad_()
        value = loss(own)
        (gradient,) = torch.autograd.grad(value, own)
        found.append((value.detach().cpu(), gradient.cpu()))
    (value, gradient), (other, other_gradient) = found
    worst = max(relative(other, value), relative(other_gradient, gradient))
    report.add(f"{title}, fp32: loss and gradient", worst, "relative error", goal=SAME)


def compare_steps(
    report: Report,
    title: str,
    here: nn.Module,
    there: nn.Module,
    loss: Callable[[Any], Tensor],
    goal: Goal,
    *,
    precise: Callable[[Any], Tensor] | None = None,
) -> None:
    """A model's loss and gradients on the CPU and on the device.

    Args:
        precise: the loss on the CPU, where it is computed more exactly there.
    """
    values = []
    for module, compute in ((here, precise or loss), (there, loss)):
        module.zero_grad()
        value = compute(module)
        value.backward()
        gradients = [part.grad.flatten().float().cpu() for part in module.parameters() if part.grad is not None]
        values.append((value.detach().float().cpu(), torch.cat(gradients)))
    (value, gradient), (other, other_gradient) = values
    report.add(f"{title}: loss", relative(other, value), "relative error", goal=goal)
    norm = relative(other_gradient.norm(), gradient.norm())
    report.add(f"{title}: norm of the gradient", norm, "relative error", goal=goal)
    whole = relative(other_gradient, gradient)
    report.add(f"{title}: gradient", whole, "relative error", goal=goal if goal is SAME else None)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
