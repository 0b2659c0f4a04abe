"""Stage 18 on a GPU: how many pairs of a query and a picture a 7B reranker scores a second, and in how much memory."""

import numpy as np
import torch

from models.scorer import Scorer
from reranker.rerank import score_lists
from tools.ranked import RankedLists

from .gpu_figures import GIB, Goal, Report
from .gpu_models import Sizes, captions, image_tokens, scorer
from .gpu_training import synchronize, timed

MEMORY, PAIRS = 16.0, 1024  # the flags of stage 18


def rerank(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """Lists over one pool, whose pictures several queries share."""
    with report.attempt("stage 18"):
        report.need_time()
        model = scorer(sizes.llama, sizes, report.device, dtype=torch.bfloat16)
        score(model, sizes, report)


def score(model: Scorer, sizes: Sizes, report: Report) -> None:
    generator = np.random.default_rng(0)
    tokens = image_tokens(sizes.rerank_pool, sizes)
    rows = np.stack([generator.permutation(sizes.rerank_pool)[: sizes.candidates] for _ in range(sizes.rerank_queries)])
    numbers = np.arange(len(rows))
    texts = captions(len(rows), sizes)
    lists = RankedLists(texts, numbers, rows[:, 0], rows, np.zeros(rows.shape, dtype=np.float32))
    options = {"dtype": torch.bfloat16, "pairs": PAIRS, "memory": MEMORY, "quiet": True}
    score_lists(model, tokens, lists.some(numbers[:1]), **options)  # type: ignore[arg-type]
    held = reset_peak()
    seconds = timed(lambda: score_lists(model, tokens, lists, **options))  # type: ignore[arg-type]
    note = f"{len(rows)} queries, {sizes.candidates} pictures each of {sizes.rerank_pool:,}, --pairs {PAIRS}"
    report.add("pairs a second", rows.size / seconds, "pairs/s", note=note)
    note = f"ten times those of {len(rows)}: more queries share the reading of pictures"
    report.add("seconds of 1,000 queries, at most", 1000 * seconds / len(rows), "s", note=note)
    if held is not None:
        peak = (torch.cuda.max_memory_allocated() - held) / GIB
        goal = Goal(MEMORY, least=False)
        report.add("peak memory beyond the weights", peak, "GiB", goal=goal, note=f"--memory {MEMORY:g}")
        report.add("weights", held / GIB, "GiB")


def reset_peak() -> int | None:
    """Bytes that are held on the GPU, from which the peak is counted; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
