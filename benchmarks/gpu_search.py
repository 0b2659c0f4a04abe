"""Search on a GPU: this engine with and without CUDA graphs, the published way, `generate`, the bare forward passes,
and two-tower search."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.compute import Precision
from models.decoding import Writer, make_writer
from models.graphs import Replay
from models.voken_lm import Tokens, VokenLM
from retriever.beam import Beams, beam_search, expand
from retriever.graphed_search import GraphedSearch, filled
from retriever.index import DeviceLevel, VokenIndex, build_index, to_device
from tests.oracle import DictionaryTrie, dictionary_trie, generate

from .calls import engine, forward, passes, same_as_generate
from .codes import synthetic_codes
from .gpu_figures import Goal, Report, free
from .gpu_models import Sizes, captions, llama, t5, text_tower
from .rows import Setting
from .timing import Timing, interleave

PUBLISHED = "published: no cache, padded to 128, fp32"
PUBLISHED_CAUSAL = "generate without a cache, bf16"
PUBLISHED_GOAL = Goal(150, least=True)
FORWARD_GOAL = Goal(1.10, least=False)
QUERY_GOAL = Goal(8, least=False)
GOAL_BATCH = 64  # from here on the published way has something to batch
SLOW_ROUNDS = 2
GRAPHED_CAUSAL = 64  # queries of the largest batch that a LLaMA is recorded for: a larger one keeps the GPU busy
CAPTION_CONTEXT = 77  # CLIP's

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")

Calls = dict[str, Callable[[], object]]


class Bench(NamedTuple):
    """One language model and one index, ready to be measured."""

    report: Report
    sizes: Sizes
    lm: VokenLM
    tree: VokenIndex
    levels: list[DeviceLevel]
    trie: DictionaryTrie
    graphs: bool
    recorded: list[GraphedSearch | Replay]
    """What has run by graphs, or has failed to"""

    def setting(self, batch: int) -> Setting:
        texts = captions(batch, self.sizes)
        return Setting("", self.sizes.pool, self.sizes.beams, self.lm.tokenize(texts))

    def engine_calls(self, writer: Writer, precision: str, setting: Setting, *, graphs: bool) -> Calls:
        """This engine and its bare forward passes, both with and without graphs."""
        calls: Calls = {
            f"engine, voken {precision}": partial(engine, writer, self.levels, setting, scoring="voken"),
            f"engine, exact {precision}": partial(engine, writer, self.levels, setting, score_end=True),
            f"forward passes {precision}": partial(forward, writer, setting),
        }
        if not graphs:
            return calls
        search = GraphedSearch(writer, self.levels, beams=setting.beams, scoring="voken")
        calls[f"engine, voken, graphs {precision}"] = lambda: search(search.encode(setting.token_ids))
        replay = graphed_passes(writer, setting)
        calls[f"forward passes, graphs {precision}"] = lambda: replay(*filled(setting.token_ids, self.lm.padding))
        self.recorded.extend((search, replay))
        return calls

    def tell_failures(self, batch: int) -> None:
        """Report what ran without a graph, and let go of all graphs."""
        for failure in dict.fromkeys(failure for each in self.recorded for failure in each.failures):
            note = f"failed: nothing was recorded: {failure}"
            self.report.say(f"batch {batch}: graphs", note, trace=failure)
        self.recorded.clear()


def graphed_passes(writer: Writer, setting: Setting) -> Replay:
    """The bare forward passes as one graph, from token ids on the CPU."""

    def run(ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (passes(writer, writer.read(Tokens(ids, mask)), setting.beams),)

    tokens = filled(setting.token_ids, writer.lm.padding)
    return Replay(run, [part.to(writer.lm.device) for part in tokens])


def search_t5(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """T5-base."""
    bench = make_bench(t5(sizes.t5_base, sizes, report.device), sizes, report, graphs=graphs)
    writers = {precision: make_writer(bench.lm, precision) for precision in PRECISIONS}
    half = t5(sizes.t5_base, sizes, report.device, dtype=torch.bfloat16)
    with report.attempt("identical to generate"):
        setting = bench.setting(min(8, sizes.compared))
        codes = synthetic_codes(sizes.pool, codebook_size=sizes.space.codebook_size)
        found = same_as_generate(writers["fp32"], setting, bench.trie, codes, bench.levels)
        report.say("identical to generate, fp32, exact", found)
    with report.attempt("a single query, end to end"):
        single_query(bench, writers["bf16"])
    for batch in sizes.batches:
        setting = bench.setting(batch)
        timings: dict[str, Timing] = {}
        with report.attempt(f"batch {batch}"):
            calls: Calls = {}  # measured against each other
            for precision, writer in writers.items():
                calls |= bench.engine_calls(writer, precision, setting, graphs=graphs)
            timings = measure(report, batch, calls, repeats=sizes.repeats)
            bench.tell_failures(batch)
            calls.clear()  # and with them the graphs' memory
            free()
            compare_with_passes(report, batch, timings)
        hugging_face = partial(generate, token_ids=setting.token_ids, beams=setting.beams, score_end=True)
        slow: Calls = {
            "generate, cache fp32": partial(hugging_face, bench.lm, bench.trie),
            "generate, cache bf16": partial(hugging_face, half, bench.trie),
            PUBLISHED: partial(hugging_face, bench.lm, bench.trie, use_cache=False, pad_to=sizes.published_length),
        }
        measure_slow(report, batch, slow, timings)


def search_llama(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """LLaMA of 7B, in bf16."""
    lm = llama(sizes.llama, sizes, report.device, dtype=torch.bfloat16)
    bench = make_bench(lm, sizes, report, graphs=graphs)
    writer = make_writer(lm, "bf16")
    for batch in sizes.batches:
        setting = bench.setting(batch)
        timings: dict[str, Timing] = {}
        with report.attempt(f"batch {batch}"):
            calls = bench.engine_calls(writer, "bf16", setting, graphs=graphs and batch <= GRAPHED_CAUSAL)
            timings = measure(report, batch, calls, repeats=max(2, sizes.repeats // 2))
            bench.tell_failures(batch)
            calls.clear()
            compare_with_passes(report, batch, timings)
        hugging_face = partial(generate, lm, bench.trie, setting.token_ids, beams=setting.beams, score_end=True)
        slow: Calls = {}
        if batch == 1:
            slow[PUBLISHED_CAUSAL] = partial(hugging_face, use_cache=False)
        if batch <= GRAPHED_CAUSAL:
            slow["generate, cache bf16"] = hugging_face
        measure_slow(report, batch, slow, timings)


def make_bench(lm: VokenLM, sizes: Sizes, report: Report, *, graphs: bool) -> Bench:
    codes = synthetic_codes(sizes.pool, codebook_size=sizes.space.codebook_size)
    index = build_index(codes)
    trie = dictionary_trie(lm, codes.astype(np.int64), score_end=True)
    return Bench(report, sizes, lm, index, to_device(index, report.device), trie, graphs, [])


def single_query(bench: Bench, writer: Writer) -> None:
    """From a text to the rows of pictures, as a person waits for it."""
    text = captions(1, bench.sizes)
    options: dict[str, Any] = {"beams": bench.sizes.beams, "scoring": "voken"}
    graphed = GraphedSearch(writer, bench.levels, **options)

    def eager() -> object:
        with torch.inference_mode():
            memory = writer.encode(bench.lm.tokenize(text))
        return expand(beam_search(writer, memory, bench.levels, **options), bench.tree, keep=10)

    calls: Calls = {"eager": eager}
    if bench.graphs:
        calls["graphs"] = lambda: expand(graphed(graphed.encode(bench.lm.tokenize(text))), bench.tree, keep=10)
    timings = interleave(calls, repeats=3 * bench.sizes.repeats, memory=False)
    for name, timing in timings.items():
        goal = QUERY_GOAL if name == list(calls)[-1] else None
        note = spread(timing) + "".join(f"; no graph: {failure}" for failure in graphed.failures)
        bench.report.add(
            f"a single query from text to pictures, bf16, {name}", timing.median * 1e3, "ms", goal=goal, note=note
        )


def measure(report: Report, batch: int, calls: Calls, *, repeats: int, warm_up: bool = True) -> dict[str, Timing]:
    """Time calls on a batch against each other; on a GPU, find their peak memory too."""
    report.need_time()
    memory = warm_up and report.device.type == "cuda"
    timings = interleave(calls, repeats=repeats, warm_up=warm_up, memory=memory)
    for name, timing in timings.items():
        report.add(f"batch {batch}: {name}", timing.median / batch * 1e3, "ms/query", note=spread(timing, batch))
    return timings


def measure_slow(report: Report, batch: int, calls: Calls, timings: dict[str, Timing]) -> None:
    """Time other systems one after the other, each on its own, and compare the engine with them.

    Args:
        timings: of the engine on the same batch.
    """
    for name, call in calls.items():
        with report.attempt(f"batch {batch}: {name}"):
            few = batch <= GOAL_BATCH  # more take seconds a round
            own = measure(report, batch, {name: call}, repeats=SLOW_ROUNDS if few else 1, warm_up=few)
            goal = PUBLISHED_GOAL if name == PUBLISHED and batch == GOAL_BATCH else None  # larger ones begin cold
            compare(report, batch, timings | own, name, "engine, voken", goal=goal)
            compare(report, batch, timings | own, name, "engine, exact")


def spread(timing: Timing, batch: int = 1) -> str:
    """How sure a time is, and what it means."""
    peak = "" if timing.peak_mebibytes is None else f", peak {timing.peak_mebibytes:,.0f} MiB"
    return (
        f"{batch / timing.median:,.1f} queries/s, {timing.least * 1e3:.2f} to {timing.most * 1e3:.2f} ms a batch in "
        f"{timing.repeats}{peak}"
    )


def compare_with_passes(report: Report, batch: int, timings: dict[str, Timing]) -> None:
    """The engine over its bare forward passes, of each precision, with and without graphs."""
    for name in [name for name in timings if name.startswith("engine, voken")]:
        passes_name = name.replace("engine, voken", "forward passes")
        ratio = timings[name].median / timings[passes_name].median
        report.add(f"batch {batch}: {name} / {passes_name}", ratio, "×", goal=FORWARD_GOAL if "bf16" in name else None)


def compare(
    report: Report, batch: int, timings: dict[str, Timing], slow: str, fast: str, *, goal: Goal | None = None
) -> None:
    """How many times as fast the engine's quickest bf16 form is as another system, whose quickest round counts."""
    best = best_of(timings, fast)
    if best is not None:
        report.add(f"batch {batch}: {slow} / {best}", timings[slow].least / timings[best].median, "×", goal=goal)


def best_of(timings: dict[str, Timing], system: str) -> str | None:
    """The quickest bf16 form of a system."""
    forms = [name for name in timings if name.startswith(system) and name.endswith("bf16")]
    return min(forms, key=lambda name: timings[name].median, default=None)


def two_tower(sizes: Sizes, report: Report, *, graphs: bool) -> None:
    """CLIP ViT-L/14's text tower and a flat search on the same device, against T5-base in the same rounds."""
    bench = make_bench(t5(sizes.t5_base, sizes, report.device), sizes, report, graphs=graphs)
    writer = make_writer(bench.lm, "bf16")
    towers = {"bf16": torch.bfloat16, "fp32": torch.float32}
    models = {precision: text_tower(sizes, report.device, dtype) for precision, dtype in towers.items()}
    for pool in (sizes.pool, sizes.large_pool):
        features = F.normalize(torch.randn(pool, sizes.clip["projection_dim"], device=report.device))
        pools = {precision: features.to(dtype) for precision, dtype in towers.items()}
        levels = to_device(build_index(synthetic_codes(pool, codebook_size=sizes.space.codebook_size)), report.device)
        for batch in sizes.batches:
            with report.attempt(f"{pool:,} pictures, batch {batch}"):
                report.need_time()
                ids = clip_ids(batch, sizes)
                calls: Calls = {}
                for precision in towers:
                    own = tower_calls(models[precision], pools[precision], ids, bench)
                    calls |= {f"{name} {precision}": call for name, call in own.items()}
                setting = bench.setting(batch)
                search = GraphedSearch(writer, levels, beams=sizes.beams, scoring="voken")
                calls["engine, voken bf16"] = partial(engine, writer, levels, setting, scoring="voken")
                if graphs:
                    calls["engine, voken, graphs bf16"] = partial(graphed, search, setting.token_ids)
                    bench.recorded.append(search)
                timings = interleave(calls, repeats=sizes.repeats, memory=False)
                bench.tell_failures(batch)
                compare_towers(report, pool, batch, timings)


def graphed(search: GraphedSearch, token_ids: list[list[int]]) -> Beams:
    """A whole answer of the engine by graphs."""
    return search(search.encode(token_ids))


def clip_ids(batch: int, sizes: Sizes) -> Tensor:
    """Captions (batch, 77) as CLIP's tokenizer lays them out, longest last."""
    end = sizes.clip["vocab_size"] - 1
    ids = torch.zeros(batch, CAPTION_CONTEXT, dtype=torch.long)
    for row, text in enumerate(captions(batch, sizes)):
        length = len(text.split()) + 1
        ids[row, :length] = torch.arange(1, length + 1) % (end - 1) + 1
        ids[row, length] = end
    return ids


def tower_calls(model: Any, pool: Tensor, ids: Tensor, bench: Bench) -> Calls:
    """Two-tower search: texts of 77 tokens as shipped, texts cut behind the longest, and the latter as a graph."""
    device = bench.report.device

    def run(tokens: Tensor) -> tuple[Tensor]:
        features = F.normalize(model(input_ids=tokens).text_embeds)
        return ((features @ pool.T).topk(10).indices,)

    def eager(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return run(tokens.to(device))[0]

    trimmed = ids[:, : int((ids != 0).sum(dim=1).max())]
    calls: Calls = {
        "two-tower, 77 tokens": lambda: eager(ids),
        "two-tower, trimmed": lambda: eager(trimmed),
    }
    if bench.graphs:
        replay = Replay(run, [trimmed.to(device)])
        bench.recorded.append(replay)
        calls["two-tower, trimmed, graphs"] = lambda: replay(trimmed)
    return calls


def compare_towers(report: Report, pool: int, batch: int, timings: dict[str, Timing]) -> None:
    """Both searches' times, and the quickest bf16 form of the one over that of the other."""
    title = f"{pool:,} pictures, batch {batch}"
    for name, timing in timings.items():
        report.add(f"{title}: {name}", timing.median / batch * 1e3, "ms/query", note=spread(timing, batch))
    tower, own = best_of(timings, "two-tower"), best_of(timings, "engine")
    if tower is not None and own is not None:
        report.add(f"{title}: {own} / {tower}", timings[own].median / timings[tower].median, "×")
