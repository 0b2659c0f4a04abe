"""Queries per second and memory of constrained search: the published way, `generate` with a cache, this engine, the
bare forward passes, and two-tower search with and without an approximate index.

In:  nothing; where the emoji sample's retriever is trained (`bash scripts/quickstart.sh`), that too.
Out: `benchmarks/results/search.json`, every row and the ratios; `search.txt`, the same as tables; `search.png`.
Command: python -m benchmarks.search [--quick | --only two-tower sample]
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from models.arithmetic import Arithmetic
from models.compute import pick_device
from models.decoding import Writer, make_writer
from models.guide import Guide, guide_of
from models.hubness import LANDMARKS, USUAL_STRENGTH, Hubness
from models.rqvae import RqVae, RqVaeConfig
from retriever.index import DeviceLevel, build_index, to_device
from tests.oracle import dictionary_trie, generate
from tools import runs
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import read_json, replacing, write_json
from tools.logs import table

from .calls import constraint, encode_only, engine, forward, index_figures, same_as_generate
from .codes import synthetic_codes
from .crossover import crossover_table, draw
from .rows import Row, Setting, cells, say
from .sample import sample_figures
from .shapes import captions, encoder_decoder, llama, prompts, t5_base
from .timing import interleave, machine

POOL, BATCH, BEAMS = 30_000, 8, 10
PUBLISHED = ("published: no cache, padded to 128", "fp32")
PUBLISHED_LENGTH, PUBLISHED_ROUNDS = 128, 3
PROMPT_TOKENS = 60
POOLS, BATCHES = (1000, 10_000, 100_000, 1_000_000), (1, 8, 64)
GRID = "T5-base by batch and beams"
DRAWN = ("published", "generate, cache fp32", "engine, exact fp32", "engine, voken fp32", "engine, voken bf16")
PAIRS = (
    ("published", "fp32, 77 tokens"),
    ("engine, exact fp32", "fp32, 77 tokens"),
    ("engine, exact fp32", "fp32, trimmed"),
    ("engine, voken fp32", "fp32"),
    ("engine, voken bf16", "bf16"),
)  # generation and two-tower search of the same precision
HEAVY = 800  # beams of all queries together, above which only these are measured, once
HEAVY_CALLS = (("engine, voken", "fp32"), ("engine, exact", "fp32"), ("engine, voken", "bf16"))
SHALLOW_BATCH = 32
FEATURES = 768  # of CLIP ViT-L

Part = Literal["headline", "guided", "pools", "causal", "shallow", "index", "grid", "two-tower", "sample"]
QUICK: tuple[Part, ...] = ("headline", "guided", "pools", "causal", "shallow", "index")


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    quick: bool = False
    """Only the rows behind the ratios: under ten minutes on two cores; the whole takes about an hour."""
    only: tuple[Part, ...] = ()
    """Only these parts; what the output folder has of the others stays."""
    output: Path = Path("benchmarks/results")
    """Folder of the three files."""
    sample: Path = Path("retriever/output/emoji")
    """Where the sample's dataset and retriever lie; without them those rows are left out."""
    repeats: int = 7
    """Rounds of the fast calls; slow ones get fewer."""
    most_pictures: int = 10_000_000
    """Largest pool of the tables that go through sizes."""

    def __post_init__(self) -> None:
        if self.quick and self.only:
            raise BadInput("--quick and --only contradict each other: give one")
        if self.repeats < 1 or self.most_pictures < 1000:
            raise BadInput("--repeats must be at least 1 and --most-pictures at least 1000")


class Bench:
    """The measurements in order, and the rows so far."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device()
        self.rows: list[Row] = []
        self.ratios: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.earlier: list[Row] = []
        if config.only:
            self.take_over(config.output / "search.json")
        self.t5 = t5_base().to(self.device)
        self.writers: dict[str, Writer] = {}

    def take_over(self, path: Path) -> None:
        """Keep an earlier run's figures; those that are measured again take their place.

        Raises:
            BadInput: there are none, or they are of another machine or version of torch.
        """
        earlier = read_json(path)
        for name, now in (("machine", machine()), ("torch", torch.__version__)):
            if earlier.pop(name) != now:
                raise BadInput(f"{path} is of another {name}, it is {now} now: measure all parts, or name an --output")
        self.earlier = [Row(**row) for row in earlier.pop("rows")]
        self.ratios, self.facts = earlier.pop("ratios"), earlier

    def all_rows(self) -> list[Row]:
        """The rows of this run, behind those of an earlier one in other sections."""
        again = {row.section for row in self.rows}
        return [row for row in self.earlier if row.section not in again] + self.rows

    def writer(self, arithmetic: Arithmetic) -> Writer:
        """The T5-base writer of an arithmetic, made once."""
        if arithmetic not in self.writers:
            self.writers[arithmetic] = make_writer(self.t5, arithmetic)
        return self.writers[arithmetic]

    def levels(self, pool: int) -> tuple[NDArray[np.int16], list[DeviceLevel]]:
        codes = synthetic_codes(pool)
        return codes, to_device(build_index(codes), self.device)

    def measure(
        self,
        setting: Setting,
        calls: dict[tuple[str, str], Callable[[], object]],
        *,
        repeats: int,
        warm_up: bool = True,
    ) -> dict[tuple[str, str], float]:
        """Time calls, named (system, precision), against each other; the medians."""
        timings = interleave(calls, repeats=repeats, warm_up=warm_up)
        self.rows += [setting.row(system, kind, timing) for (system, kind), timing in timings.items()]
        say(setting.section, self.rows[-len(calls) :])
        return {name: timing.median for name, timing in timings.items()}

    def headline(self) -> None:
        """T5-base, 30k pictures, 8 captions, 10 beams: the published way, `generate`, and this engine."""
        codes, levels = self.levels(POOL)
        setting = Setting("T5-base", POOL, BEAMS, captions(BATCH))
        trie = dictionary_trie(self.t5, codes.astype(np.int64), score_end=True)
        hugging_face = partial(generate, token_ids=setting.token_ids, beams=BEAMS, score_end=True)
        half = t5_base(torch.bfloat16).to(self.device)
        calls: dict[tuple[str, str], Callable[[], object]] = {
            ("generate, cache", "fp32"): lambda: hugging_face(self.t5, trie),
            ("generate, cache", "bf16"): lambda: hugging_face(half, trie),
        }
        calls |= self.engine_calls(setting, levels)
        medians = self.measure(setting, calls, repeats=self.config.repeats)
        close = {name: call for name, call in calls.items() if name[0] in ("engine, voken", "forward passes")}
        near = self.measure(
            setting._replace(section="T5-base, engine and its passes"), close, repeats=2 * self.config.repeats
        )
        slow: dict[tuple[str, str], Callable[[], object]] = {
            PUBLISHED: lambda: hugging_face(self.t5, trie, use_cache=False, pad_to=PUBLISHED_LENGTH),
            **{name: call for name, call in calls.items() if name[0] in ("engine, exact", "engine, voken")},
        }
        published = self.measure(
            setting._replace(section="T5-base, published"), slow, repeats=PUBLISHED_ROUNDS, warm_up=False
        )
        fp32, bf16 = ("engine, voken", "fp32"), ("engine, voken", "bf16")
        exact = ("engine, exact", "fp32")
        self.ratios |= {
            "exact_vs_published": published[PUBLISHED] / published[exact],
            "exact_vs_generate": medians["generate, cache", "fp32"] / medians[exact],
            "voken_vs_published": published[PUBLISHED] / published[fp32],
            "voken_vs_generate": medians["generate, cache", "fp32"] / medians[fp32],
            "voken_bf16_vs_published": published[PUBLISHED] / published[bf16],
            "voken_bf16_vs_generate_bf16": medians["generate, cache", "bf16"] / medians[bf16],
            "engine_over_forward": near[fp32] / near["forward passes", "fp32"],
            "engine_over_forward_bf16": near[bf16] / near["forward passes", "bf16"],
            "constraint_share": medians["index and top-k alone", "fp32"] / medians[fp32],
            "constraint_share_bf16": medians["index and top-k alone", "fp32"] / medians[bf16],
        }
        if ("engine, voken", "int8") in published:
            self.ratios["voken_int8_vs_published"] = published[PUBLISHED] / published["engine, voken", "int8"]
        self.facts["identical_to_generate"] = same_as_generate(
            self.writer("fp32"), setting._replace(token_ids=captions(BATCH, seed=7)), trie, codes, levels
        )

    def engine_calls(self, setting: Setting, levels: list[DeviceLevel]) -> dict[tuple[str, str], Callable[[], object]]:
        """This engine in its scorings and precisions, the forward passes, and the constraint alone."""
        size, device = len(setting.token_ids), self.device
        scores = torch.randn(size, setting.beams, self.t5.space.codebook_size, device=device).log_softmax(dim=-1)
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        kinds: tuple[Arithmetic, ...] = ("fp32", "bf16", "int8") if device.type == "cpu" else ("fp32", "bf16")
        for kind in kinds:
            writer = self.writer(kind)
            calls["engine, voken", kind] = partial(engine, writer, levels, setting, scoring="voken")
            if kind != "int8":
                calls["engine, exact", kind] = partial(engine, writer, levels, setting, score_end=True)
                calls["engine, full", kind] = partial(engine, writer, levels, setting)
                calls["forward passes", kind] = partial(forward, writer, setting)
        calls["index and top-k alone", "fp32"] = partial(constraint, levels, scores, setting.beams)
        return calls

    def guided(self) -> None:
        """The headline's search without a guide and with it, hubness included; the query's text feature is there in
        both."""
        _, levels = self.levels(POOL)
        setting = Setting("T5-base, guided", POOL, BEAMS, captions(BATCH))
        levels_of, size = self.t5.space.levels, self.t5.space.codebook_size
        shape = RqVaeConfig(FEATURES, self.t5.state_width, levels=levels_of, codebook_size=size)
        guide = guide_of(RqVae(shape).eval(), torch.randint(0, size, (1000, levels_of)))
        assert guide is not None, "the tokenizer has a linear path"
        landmarks = F.normalize(torch.randn(LANDMARKS, FEATURES), dim=1)
        hubness = Hubness(landmarks, torch.full((LANDMARKS,), -math.log(LANDMARKS)))
        steers = guide._replace(weight=40.0).corrected(hubness, USUAL_STRENGTH).to(self.device)
        texts = torch.randn(BATCH, FEATURES, device=self.device)
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for kind in ("fp32", "bf16"):
            plain = partial(engine, self.writer(kind), levels, setting)
            calls["engine, full", kind] = plain
            calls["engine, full, guided", kind] = partial(_guided, plain, steers, texts)
        medians = self.measure(setting, calls, repeats=2 * self.config.repeats)
        for kind in ("fp32", "bf16"):
            ratio = medians["engine, full, guided", kind] / medians["engine, full", kind]
            self.ratios[f"guided_over_unguided_{kind}"] = ratio

    def pools(self) -> None:
        """The same search in pools of many sizes."""
        sizes = (POOLS[0], POOLS[-1]) if self.config.quick else POOLS
        calls = {}
        setting = Setting("T5-base by pool", 0, BEAMS, captions(BATCH))
        settings = {size: setting._replace(pool=size) for size in sizes}
        for size in sizes:
            _, levels = self.levels(size)
            for kind in ("fp32", "bf16"):
                writer = self.writer(kind)
                calls[size, kind] = partial(engine, writer, levels, settings[size], scoring="voken")
        timings = interleave(calls, repeats=self.config.repeats + 4)
        for size, kind in calls:
            self.rows.append(settings[size].row("engine, voken", kind, timings[size, kind]))
        say(setting.section, self.rows[-len(calls) :])
        first, last = (timings[size, "fp32"].median for size in (sizes[0], sizes[-1]))
        self.ratios["million_over_thousand"] = last / first

    def grid(self) -> None:
        """T5-base at other batches and beams, 100,000 pictures; `generate` and the published way where bearable."""
        codes, levels = self.levels(100_000)
        trie = dictionary_trie(self.t5, codes.astype(np.int64), score_end=True)
        for beams in (10, 100):
            for batch in BATCHES:
                setting = Setting(GRID, 100_000, beams, captions(batch))
                calls = self.engine_calls(setting, levels)
                heavy = batch * beams
                if heavy > HEAVY:
                    calls = {name: calls[name] for name in HEAVY_CALLS}
                light = heavy <= 100
                self.measure(setting, calls, repeats=3 if light else 1, warm_up=light)
                hugging_face = partial(
                    generate, self.t5, trie, token_ids=setting.token_ids, beams=beams, score_end=True
                )
                slow: dict[tuple[str, str], Callable[[], object]] = {}
                if heavy <= HEAVY:
                    slow["generate, cache", "fp32"] = hugging_face
                if heavy <= 100:
                    slow[PUBLISHED] = partial(hugging_face, use_cache=False, pad_to=PUBLISHED_LENGTH)
                if slow:
                    self.measure(setting, slow, repeats=1, warm_up=False)

    def causal(self) -> None:
        """LLaMA's shape behind a prompt of 60 tokens, one query at a time as published, and eight."""
        lm = llama().to(self.device)
        codes, levels = self.levels(POOL)
        trie = dictionary_trie(lm, codes.astype(np.int64), score_end=True)
        writer = make_writer(lm)
        setting = Setting("LLaMA shape", POOL, BEAMS, prompts(1, PROMPT_TOKENS))
        hugging_face = partial(generate, lm, trie, token_ids=setting.token_ids, beams=BEAMS, score_end=True)
        calls: dict[tuple[str, str], Callable[[], object]] = {
            ("generate, no cache", "fp32"): partial(hugging_face, use_cache=False),
            ("generate, cache", "fp32"): hugging_face,
            ("engine, exact", "fp32"): partial(engine, writer, levels, setting, score_end=True),
            ("engine, voken", "fp32"): partial(engine, writer, levels, setting, scoring="voken"),
        }
        medians = self.measure(setting, calls, repeats=3)
        exact = medians["engine, exact", "fp32"]
        self.ratios["llama_vs_no_cache"] = medians["generate, no cache", "fp32"] / exact
        self.ratios["llama_vs_generate"] = medians["generate, cache", "fp32"] / exact
        self.facts["identical_to_generate_llama"] = same_as_generate(
            writer, setting._replace(token_ids=captions(BATCH, seed=7)), trie, codes, levels
        )
        many = Setting("LLaMA shape", POOL, BEAMS, prompts(BATCH, PROMPT_TOKENS))
        half = make_writer(lm, "bf16")
        self.measure(
            many,
            {
                ("engine, voken", "fp32"): partial(engine, writer, levels, many, scoring="voken"),
                ("engine, voken", "bf16"): partial(engine, half, levels, many, scoring="voken"),
            },
            repeats=3,
        )

    def shallow(self) -> None:
        """A text encoder of BERT-base's size with a decoder of 2 layers and of 12, against the encoder alone."""
        _, levels = self.levels(POOL)
        setting = Setting("shallow decoder", POOL, BEAMS, captions(SHALLOW_BATCH))
        for kind in ("fp32", "bf16"):
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            for layers in (2, 12):
                writer = make_writer(encoder_decoder(layers).to(self.device), kind)
                calls["text encoder alone", kind] = partial(encode_only, writer, setting)
                calls[f"engine, voken, {layers} layers", kind] = partial(
                    engine, writer, levels, setting, scoring="voken"
                )
            medians = self.measure(setting, calls, repeats=self.config.repeats)
            for layers in (2, 12):
                whole = medians[f"engine, voken, {layers} layers", kind]
                self.ratios[f"shallow_{layers}_layers_over_encoder_{kind}"] = (
                    whole / medians["text encoder alone", kind]
                )

    def two_tower(self) -> None:
        """CLIP's text tower and faiss at every pool size, and from which size generation is faster."""
        from .two_tower import build_indices, clustered_vectors, encoder_timings, two_tower_systems

        pools = [size for size in POOLS if size <= self.config.most_pictures]
        encoders = encoder_timings(self.device, list(BATCHES), repeats=self.config.repeats)
        queries = clustered_vectors(max(BATCHES), seed=2)
        searches: dict[tuple[str, int], dict[int, float]] = {}
        figures = []
        for pool in pools:
            for name, index in build_indices(pool, queries, threads=os.cpu_count() or 1).items():
                figures.append({"index": name, "pool": f"{pool:,}", **index.figures()})
                for batch in BATCHES:
                    timing = interleave({"": partial(index.search, queries[:batch])}, repeats=5, memory=False)[""]
                    searches.setdefault((name, batch), {})[pool] = timing.median / batch
        systems = two_tower_systems({key: timing.median / key[1] for key, timing in encoders.items()}, searches)
        generation = {
            (f"{row.system} {row.precision}", row.batch): row.seconds / row.batch
            for row in self.all_rows()
            if row.section == GRID and row.beams == BEAMS and row.system.startswith(("published", "generate", "engine"))
        }
        self.facts["two_tower_indices"] = figures
        self.facts["two_tower"] = [system.line() for system in systems]
        self.facts["crossovers"] = crossover_table(generation, systems, PAIRS)
        drawn = {name: value for name, value in generation.items() if name[0].startswith(DRAWN)}
        title = f"{machine()}; T5-base shape, 10 beams; CLIP ViT-L/14's text tower, 768 dimensions"
        draw(self.config.output / "search.png", drawn, systems, title=title)
        print("\ntwo-tower\n" + table(figures) + "\n\n" + table(self.facts["crossovers"]), flush=True)

    def sample(self) -> None:
        """The sample's trained retriever: recall by scoring and precision, speed against `generate`."""
        found = sample_figures(self.config.sample, self.device)
        self.facts["sample"], self.facts["sample_speed"] = found.recall, found.speed
        print("\nsample\n" + table(found.recall) + "\n\n" + table(found.speed), flush=True)

    def index_sizes(self) -> None:
        """Bytes a picture, and seconds to sort, build, save and load, for pools up to ten million."""
        sizes = [size for size in (*POOLS, 10_000_000) if size <= self.config.most_pictures]
        self.facts["index"] = [index_figures(size, self.config.output / "index") for size in sizes]
        print("\nindex\n" + table(self.facts["index"]), flush=True)

    def write(self) -> None:
        """Write what is known so far; whole files at every moment."""
        folder = self.config.output
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "search.json",
            {
                **self.facts,
                "commands": [*self.facts.get("commands", []), " ".join(["python -m benchmarks.search", *sys.argv[1:]])],
                "machine": machine(),
                "torch": torch.__version__,
                "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
                "rows": [row._asdict() for row in self.all_rows()],
            },
        )
        with replacing(folder / "search.txt") as temporary:
            temporary.write_text(self.text())

    def text(self) -> str:
        """All sections as tables for people."""
        parts = [f"{machine()}; torch {torch.__version__}; random weights"]
        rows = self.all_rows()
        for section in dict.fromkeys(row.section for row in rows):
            parts.append(f"{section}\n" + table([cells(row) for row in rows if row.section == section]))
        for name in ("index", "two_tower_indices", "two_tower", "crossovers", "sample", "sample_speed"):
            if self.facts.get(name):
                parts.append(f"{name.replace('_', ' ')}\n" + table(self.facts[name]))
        ratios = [{"ratio": name, "value": round(value, 3)} for name, value in self.ratios.items()]
        return "\n\n".join([*parts, table(ratios)]) + "\n"


def _guided(plain: Callable[..., object], guide: Guide, texts: torch.Tensor) -> object:
    """A search with a guide that starts anew, as each does."""
    with torch.inference_mode():
        return plain(steering=guide.steer(texts))


STEPS: dict[Part, Callable[[Bench], None]] = {
    "headline": Bench.headline,
    "guided": Bench.guided,
    "pools": Bench.pools,
    "causal": Bench.causal,
    "shallow": Bench.shallow,
    "index": Bench.index_sizes,
    "grid": Bench.grid,
    "two-tower": Bench.two_tower,
    "sample": Bench.sample,
}


def parts_of(config: Config) -> tuple[Part, ...]:
    """The parts to measure, in their order; the sample's only where it is trained, or asked for."""
    if config.quick:
        return QUICK
    trained = (config.sample / "09_train" / "retriever" / runs.MANIFEST).is_file()
    wanted = config.only or tuple(part for part in get_args(Part) if part != "sample" or trained)
    return tuple(part for part in get_args(Part) if part in wanted)


def main(config: Config) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    bench = Bench(config)
    for part in parts_of(config):
        STEPS[part](bench)
        bench.write()
    print("\n" + bench.text().rsplit("\n\n", 1)[-1])


if __name__ == "__main__":
    run_command(main, Config)
