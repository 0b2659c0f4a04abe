"""The report: one page with everything that has been run for a dataset, and its figures as PNGs.

In:  a `retriever.prepare` folder; whatever finished run folders there are beside it; the dataset's `summary.json`.
Out: `<output>/report.html`, which needs nothing but itself; `<output>/*.png`, its figures, and `*-dark.png`, the same
     for dark pages; `<output>/measures.json`, what was measured for it; `<output>/table.txt`. W&B gets the same figures
     and tables under `report/`.
Command: python -m retriever.report --dataset DIR --runs DIR ... --summary FILE --name emoji --output DIR

What has not been run is left out, and the report says so. It is made again when anything that it shows has changed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from models.compute import machine, pick_device
from models.decoding import make_writer
from models.guide import GUIDE_NAME, read_guide
from models.voken_lm import VokenLM
from tools import runs
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import Features, Rows, read_features
from tools.files import read_json, replacing, write_json
from tools.logs import Tracker
from tools.report_page import Html, Page, Part, Section, Thumbnails, escape, joined, paragraph
from tools.results import printable, read_rows

from ..data import TRAINED_BY, Queries, RetrieverData, read_data, read_retriever
from ..retrieve import ArithmeticOptions
from ..two_tower import query_encoder
from .examples import choose, explain, read_found, reordered_ranks
from .gallery import gallery_part
from .measures import (
    Figure,
    Searching,
    Speed,
    System,
    drawn,
    growing_pools,
    recall_by_beams,
    recall_by_pool,
    recall_by_weight,
    speed_by_pool,
    speed_sizes,
    two_tower_figure,
)
from .sections import (
    TRAININGS,
    Styles,
    beams_part,
    codes_part,
    curves_part,
    guide_part,
    pools_part,
    recall_part,
    runs_part,
    speed_part,
    tokenizer_part,
)

COMMAND = "retriever.report"
STAGES = ("[0-9][0-9]_*", "[0-9][0-9]_*/*")  # where run folders lie: a stage's own, or one a system
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ArithmeticOptions):
    """What is shown, and how much is measured for it."""

    dataset: Path
    """Run folder of retriever.prepare."""
    summary: Path
    """JSON file of the dataset's results; without it there is no table."""
    name: str
    """Name of the dataset."""
    runs: tuple[Path, ...] = ()
    """Folders whose finished run folders (NN_stage, NN_stage/SYSTEM) are shown."""
    systems: tuple[str, ...] = ()
    """Retrievers that are searched with, in this order; the gallery is of the last. By default all that are trained."""
    queries: int = 500
    """Captions of val that recall is measured on, at most."""
    beams: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    """Beam widths that recall is measured at."""
    speed_queries: int = 128
    """Captions of val that speed is measured on, at most; 0: it is not measured."""
    speed_rounds: int = 3
    """How often each system answers them."""
    largest_pool: int = 100_000
    """Speed is measured up to pools of this size; made-up pictures fill them up."""
    examples: int = 3
    """Best, typical and worst queries, so many of each."""
    paths: int = 4
    """Pictures whose codes are shown from coarse to fine."""
    seed: int = 0
    """Which queries and pictures are drawn."""
    overwrite: bool = False
    """Make the report again though nothing has changed."""

    def __post_init__(self) -> None:
        if min(self.queries, self.speed_rounds, self.examples, self.paths, *self.beams, 1) < 1 or not self.beams:
            raise BadInput("--queries, --beams, --speed-rounds, --examples and --paths must be at least 1")
        if min(self.speed_queries, self.largest_pool, self.seed) < 0:
            raise BadInput("--speed-queries, --largest-pool and --seed must be at least 0")


class Finished(NamedTuple):
    """The finished runs of a dataset, in the order of their folders."""

    manifests: list[runs.Manifest]
    damaged: list[str]
    """What is wrong with those that are not shown."""

    def of(self, *commands: str) -> list[runs.Manifest]:
        """Those that a command left."""
        return [manifest for manifest in self.manifests if manifest.command in commands]

    def one(self, command: str, name: str) -> runs.Manifest | None:
        """The run of a command in a folder of that name."""
        return next((each for each in self.of(command) if each.folder.name == name), None)


def find_runs(roots: tuple[Path, ...]) -> Finished:
    """Every finished run folder in `roots`, but reports."""
    found, damaged = [], []
    for root in roots:
        folders = {path.parent for stage in STAGES for path in root.glob(f"{stage}/{runs.MANIFEST}")}
        for folder in sorted(folders):
            try:
                command = str(read_json(folder / runs.MANIFEST)["command"])
                if command != COMMAND:
                    found.append(runs.read_manifest(folder, command))
            except (BadInput, KeyError, TypeError) as error:
                damaged.append(str(error) if isinstance(error, BadInput) else f"{folder} has a damaged manifest.json")
    return Finished(found, damaged)


def begin(config: Config, inputs: dict[str, Path]) -> runs.Run | None:
    """The run folder; an earlier report of other results or settings goes without being asked for.

    Nothing is lost with it: all that it shows is made of the runs that are still there.
    """
    before = [path for name in (runs.MANIFEST, runs.STARTED) if (path := config.output / name).is_file()]
    if before and not config.overwrite and read_json(before[0]).get("command") == COMMAND:
        try:
            return runs.begin(COMMAND, config, inputs=inputs)
        except BadInput:
            config = dataclasses.replace(config, overwrite=True)
    return runs.begin(COMMAND, config, inputs=inputs)


class Report:
    """The parts of one report, made one after the other."""

    def __init__(self, config: Config, data: RetrieverData, finished: Finished, summary: list[dict[str, Any]]) -> None:
        self.config, self.data, self.finished, self.summary = config, data, finished, summary
        self.folder = config.output
        self.device = pick_device(config.device)
        self.thumbnails = Thumbnails()
        self.absent: list[str] = list(finished.damaged)
        trained = {each.folder.name: each for each in finished.of(*TRAINED_BY)}
        self.trained = {name: trained[name] for name in config.systems or trained if name in trained}
        self.absent += [f"{name}: no such retriever is trained" for name in config.systems if name not in trained]
        self.styles = Styles([*(row["system"] for row in summary), *trained])
        self.systems: list[System] = []
        self.queries = Queries([], data.rows("all")[:0], data.rows("all")[:0])
        self.features: Features | None = None
        self.beams: list[Figure] = []
        self.weights: list[Figure] = []
        self.pools: list[Figure] = []
        self.speeds: list[Speed] = []

    def parts(self) -> Iterator[Part]:
        """All parts, in the order of the page."""
        config, folder = self.config, self.folder
        coded = self.data.manifest.inputs["codes"]["fingerprint"]
        codes = [each for each in self.finished.of("RQ-VAE.generate_codes") if each.fingerprint == coded]
        yield recall_part(self.summary, folder, self.styles, config.name)
        yield tokenizer_part(self.data, codes[0] if codes else None, folder)
        yield codes_part(self.data, folder, self.thumbnails, count=config.paths, seed=config.seed)
        yield curves_part(self.finished.of(*TRAININGS), folder)
        yield from self.measured()
        yield self.gallery()
        yield runs_part(self.finished.manifests)

    def measured(self) -> Iterator[Part]:
        """Recall by beams and by pool, and speed."""
        self.prepare()
        if not self.systems or not self.queries.texts:
            return
        yield self.by_beams()
        yield self.by_weight()
        yield self.by_pool()
        if self.config.speed_queries:
            yield self.speed()

    def by_beams(self) -> Part:
        """Recall over val's own pictures by beam width."""
        data, widths = self.data, self.config.beams
        level = self.two_tower([data.rows("val")], [self.queries])
        self.beams = []
        for system in self.systems:
            print(f"{system.name}: recall at {len(widths)} beam widths ...", flush=True)
            self.beams += recall_by_beams(system, data, self.queries, widths)
        return beams_part(self.beams, level[0] if level else None, self.folder, self.styles)

    def by_weight(self) -> Part:
        """Recall over val's own pictures by the guide's weight."""
        self.weights, changes = [], []
        for system in [each for each in self.systems if each.guide is not None]:
            print(f"{system.name}: recall with the guide ...", flush=True)
            figures, changed = recall_by_weight(system, self.data, self.queries)
            self.weights += figures
            changes += [] if changed is None else [changed]
        return guide_part(self.weights, changes, self.folder, self.styles)

    def by_pool(self) -> Part:
        """Recall over pools of growing size."""
        config, data = self.config, self.data
        pools = growing_pools(data, seed=config.seed)
        val = data.queries("val")
        asked = [drawn(val, pool, most=config.queries, seed=config.seed) for pool in pools]
        self.pools = self.two_tower(pools, asked)
        for system in self.systems:
            print(f"{system.name}: recall over {len(pools)} pools ...", flush=True)
            self.pools += recall_by_pool(system, data, pools, asked)
        return pools_part(self.pools, self.systems[-1].searching.beams, self.folder, self.styles)

    def two_tower(self, pools: list[Rows], asked: list[Queries]) -> list[Figure]:
        """Brute-force search of the same queries over the same pools; nothing where there are no features."""
        features = self.features
        if features is None:
            return []
        found = self.attempt(
            "two-tower", lambda: [two_tower_figure(features, *each) for each in zip(pools, asked, strict=True)]
        )
        return found or []

    def speed(self) -> Part:
        """Speed of the last system beside two-tower search."""
        config, system, features = self.config, self.systems[-1], self.features
        texts = self.queries.texts[: config.speed_queries]
        sizes = speed_sizes(len(self.data.codes), largest=config.largest_pool)
        print(f"{system.name}: speed over {len(sizes)} pools ...", flush=True)
        images = encoder = None
        if features is not None:
            encoder = self.attempt("speed of two-tower search", lambda: query_encoder(features, config.device))
            images = features.images
        self.speeds = speed_by_pool(
            system, encoder, self.data, images, texts, sizes=sizes, rounds=config.speed_rounds, seed=config.seed
        )
        return speed_part(self.speeds, len(texts), config.speed_rounds, machine(), self.folder, self.styles)

    def prepare(self) -> None:
        """Load what is searched with and what is asked."""
        config, data = self.config, self.data
        val = data.queries("val")
        self.queries = drawn(val, data.rows("val"), most=config.queries, seed=config.seed)
        if not self.trained:
            self.absent.append("recall and speed by beams and pool, and the gallery: no retriever is trained here")
        elif not val.texts:
            self.absent.append(f"recall and speed by beams and pool: {data.folder} has no val captions")
        for name, manifest in self.trained.items():
            system = self.attempt(name, partial(self.load, name, manifest))
            self.systems += [] if system is None else [system]
        self.features = self.attempt("two-tower", lambda: read_features(Path(data.manifest.facts["features"])))

    def load(self, name: str, manifest: runs.Manifest) -> System:
        """A trained retriever.

        Raises:
            BadInput: it writes another tokenizer's vokens, or cannot be loaded.
        """
        read_retriever(manifest.folder, self.data)
        lm = VokenLM.from_pretrained(manifest.folder / "model").to(self.device)
        guide = read_guide(manifest.folder / "model" / GUIDE_NAME)
        guide = None if guide is None else guide.to(self.device)
        return System(name, make_writer(lm, self.config.precision), self.searching(manifest), guide)

    def searching(self, manifest: runs.Manifest) -> Searching:
        """How a retriever was searched with when it was tested, else when it was validated."""
        tested = self.finished.one("retriever.retrieve", manifest.folder.name)
        config = manifest.config if tested is None else tested.config
        return Searching(config["beams"], config.get("scoring", "full"), config["score_end"])

    def attempt(self, what: str, make: Callable[[], ResultT]) -> ResultT | None:
        """What `make` gives; None, and said, where something for it is not there."""
        try:
            return make()
        except (BadInput, ImportError) as error:
            self.absent.append(f"{what}: {error}")
            return None

    def gallery(self) -> Part:
        """Queries of the last system that was tested."""
        data = self.data
        for system in reversed(self.systems):
            found = self.finished.one("retriever.retrieve", system.name)
            again = f"run SYSTEM={system.name} bash scripts/12_retrieve.sh --overwrite"
            if found is None:
                self.absent.append(f"queries of {system.name}: no finished scripts/12_retrieve.sh of it")
            elif found.inputs["retriever"]["fingerprint"] != self.trained[system.name].fingerprint:
                self.absent.append(f"queries of {system.name}: it was trained again since; {again}")
            elif found.inputs["dataset"]["fingerprint"] != data.manifest.fingerprint:
                self.absent.append(f"queries of {system.name}: the dataset has changed; {again}")
            else:
                return self.gallery_of(system, found)
        return Part()

    def gallery_of(self, system: System, found: runs.Manifest) -> Part:
        """Best, typical and worst queries of a finished search over its first pool."""
        config, data = self.config, self.data
        pool = str(found.config["pools"][0])
        lists = read_found(found, data, pool)
        examples = choose(lists, config.examples)
        reordered: dict[str, list[int]] = {}
        tested = self.finished.one("reranker.test", system.name)
        if tested is None:
            self.absent.append(
                f"ranks after reordering: no finished scripts/18_test_reranker_llama.sh of {system.name}"
            )
        else:
            for path in sorted(tested.folder.glob(f"{found.config['split']}-{pool}.*.jsonl")):
                ranks = reordered_ranks(path, lists)
                if ranks is not None:
                    reordered[f"+{path.name.split('.')[1]}"] = [int(ranks[example.number]) for example in examples]
        return gallery_part(
            explain(system.writer, examples, data, data.rows(pool), system.searching.scoring), data, self.thumbnails,
            self.folder, system=system.name, split=found.config["split"], pool=pool, keep=found.config["keep"],
            reordered=reordered,
        )  # fmt: skip

    def measures(self) -> dict[str, Any]:
        """Every number that was measured for the report."""
        return {
            "machine": machine(),
            "recall_by_beams": [beam.row("beams") for beam in self.beams],
            "recall_by_weight": [weight.row("weight") for weight in self.weights],
            "recall_by_pool": [pool.row("pool") for pool in self.pools],
            "speed_by_pool": [speed.row() for speed in self.speeds],
        }


def build_page(config: Config, data: RetrieverData, parts: list[Part], absent: list[str]) -> Page:
    """The page, with what is not in it at its end."""
    pictures = ", ".join(f"{len(data.rows(split)):,} {split}" for split in ("train", "val", "test"))
    lead = paragraph(
        f"{len(data.codes):,} pictures ({pictures}). Written by retriever.report from the finished runs listed at the "
        f"end, commit {runs.current_commit()[:12]}, on {machine()}."
    )
    page = Page(f"{config.name}: text-to-image retrieval as generation", lead=lead)
    for part in parts:
        if part.section is not None:
            page.add(part.section)
    if absent:
        items = joined(Html(f"<li>{escape(each)}</li>") for each in absent)
        page.add(Section("absent", "Not in this report", [Html(f"<ul>{items}</ul>")]))
    return page


def track(config: Config, run: runs.Run, parts: list[Part], page: Path) -> None:
    """The same to Weights & Biases, under names that stay: every panel of the group "report"."""
    tracker = Tracker(run.folder, job="report", config=run.started["config"])
    for part in parts:
        for name, path in part.images.items():
            tracker.image(f"report/{name}", path)
        for name, rows in part.tables.items():
            tracker.table(f"report/{name}", rows)
        for row in part.tables.get("recall", []):
            tracker.summary({f"report/{row['system']}/{row['split']}-{row['pool']}/R@1": row["R@1"]})
    tracker.page("report/page", page)
    tracker.finish()


def main(config: Config) -> None:
    data = read_data(config.dataset)
    if not data.images:
        raise BadInput(f"{config.dataset} has no pictures: there is nothing to report")
    finished = find_runs(config.runs)
    inputs = {"dataset": config.dataset, **{str(manifest.folder): manifest.folder for manifest in finished.manifests}}
    if config.summary.is_file():
        inputs["summary"] = config.summary
    summary = read_rows(config.summary) if config.summary.is_file() else []
    report = Report(config, data, finished, summary)
    run = begin(config, inputs)
    page_file = config.output / "report.html"
    if run is None:
        print(f"report: {page_file}")
        return
    parts = list(report.parts())
    absent = report.absent + [each for part in parts for each in part.absent]
    build_page(config, data, parts, absent).write(page_file)
    write_json(run.folder / "measures.json", report.measures())
    rows = [row for row in summary if row["level"] == "image"]
    text = (printable(rows) + "\n\n" if rows else "") + f"report: {page_file}\n"
    with replacing(run.folder / "table.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    track(config, run, parts, page_file)
    sections = [part.section.name for part in parts if part.section is not None]
    run.finish(facts={"dataset": str(config.dataset), "sections": sections, "absent": absent})
    print("".join(f"not in the report: {each}\n" for each in absent) + text, end="")
