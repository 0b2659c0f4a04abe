"""One rehearsal of a data set: stand-ins, then every step of every recipe, and what became of each."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tools.errors import BadInput
from tools.files import read_array, read_json, write_json
from tools.texts import printable

from . import settings
from .data import COLLECTIONS, Collection, in_own_process, write_collection, write_some
from .features import write_features
from .hub import once
from .models import (
    ARCHIVE,
    BLIP2,
    CLIP,
    CLIP_WEIGHTS,
    LLAMA2,
    LLAMA3,
    SEED_LLAMA,
    SEED_WORDS,
    T5_BASE,
    T5_LARGE,
    Models,
    Sizes,
)
from .settings import ROOT, check_out, link
from .stages import PSEUDO, Counts, Form, Launch, Step, plan
from .usage import Usage, run_and_watch

State = Literal["ran", "failed", "left out", "not here"]
WITH_DEEPSPEED = "accelerate launch --config_file scripts/accelerate/{}.yaml --num_processes 2 --main_process_port 0"
LAUNCHES: dict[Launch | None, dict[str, str]] = {
    None: {},
    "torchrun": {"LAUNCH": "torchrun --standalone --nproc-per-node 2"},
    "ZeRO-2": {"LAUNCH": WITH_DEEPSPEED.format("zero2"), "DS_ACCELERATOR": "cpu"},
    "ZeRO-3": {"LAUNCH": WITH_DEEPSPEED.format("zero3"), "DS_ACCELERATOR": "cpu"},
}
ALIKE = 1e-3  # of two encodings of the same pictures, at most: mean difference over mean size


class Row(NamedTuple):
    """What became of a step."""

    recipe: str
    step: str
    state: State
    seconds: float | None
    peak: float | None
    """GiB."""
    cut: str
    reason: str = ""
    """Why it failed, or was left out because of another, or why this machine cannot run it."""


@dataclass(frozen=True)
class Scale:
    """How large a rehearsal is: the full one, or the tests' own."""

    sizes: Sizes = field(default_factory=Sizes)
    counts: Counts = field(default_factory=Counts)
    collections: dict[str, Collection] = field(default_factory=lambda: dict(COLLECTIONS))
    kinds: int = 64
    """Distinct pictures."""
    more: tuple[str, ...] = ()
    """Further lines of a data set's file: what the stand-ins' sizes ask for."""
    most_seconds: float = 2400.0
    """Of a step."""


SCALES = {"flickr30k": Scale(), "mscoco": Scale(counts=Counts(most_captions=32, most_of_stage2=4))}
"""T5-large with the optimiser's states takes 12 GB, in stage 2 with its start 15: few captions fit beside that."""


class Rehearsal:
    """The folders of a rehearsal, and its steps."""

    def __init__(self, folder: Path, dataset: str, scale: Scale, *, seed: int = 0) -> None:
        if dataset not in scale.collections:
            raise BadInput(f"{dataset} cannot be rehearsed: write {' or '.join(scale.collections)}")
        self.folder, self.dataset, self.scale, self.seed = folder.resolve(), dataset, scale, seed
        self.collection = scale.collections[dataset]
        self.models = Models(self.folder / "models", scale.sizes, seed=seed)
        self.rows: list[Row] = []
        self.again = False  # steps are run that may have left something

    @property
    def results(self) -> Path:
        return self.folder / "results" / f"{self.dataset}.json"

    @property
    def total(self) -> tuple[int, int, int]:
        """Pictures of train, val and test."""
        splits = dict(self.collection.splits)
        return splits["train"] + splits.get("restval", 0), splits["val"], splits["test"]

    def root(self, form: Form) -> Path:
        """The checkout in which the steps of a form run."""
        return self.folder / form

    def data(self, form: Form) -> Path:
        """Where a user puts the data there."""
        return self.root(form) / "RQ-VAE" / "data" / self.dataset

    def output(self, form: Form, room: str, recipe: str) -> Path:
        """Where the stages of a room write."""
        return self.root(form) / room / "output" / f"{self.dataset}-{recipe}"

    def make_stand_ins(self) -> None:
        """Data and models; those that are there are not made again."""
        kinds = self.scale.kinds
        what = (self.collection, self.seed, kinds)
        once(
            self.data("whole"),
            what,
            lambda to: in_own_process(write_collection, to, self.collection, seed=self.seed, kinds=kinds),
        )
        t5 = T5_BASE if self.dataset == "flickr30k" else T5_LARGE
        self.models.make([CLIP, "openai", t5, LLAMA2, LLAMA3, SEED_LLAMA, SEED_WORDS, BLIP2, "seed"])

    def check_out(self) -> None:
        """Checkouts of the code as it is now, for all forms."""
        counts = self.scale.counts
        for form, pictures in (("whole", None), ("cut", counts.pictures), ("two", None), ("few", counts.few)):
            self._check_out(form, pictures)  # type: ignore[arg-type]

    def begin(self, recipe: str, *, first: str) -> None:
        """Folders for a recipe; what an earlier rehearsal of it left goes.

        Args:
            first: the recipe whose features and image tokens serve for all.
        """
        for form in ("whole", "cut", "two", "few"):
            for room in ("RQ-VAE", "retriever", "reranker"):
                if not (room == "RQ-VAE" and form == "two"):
                    shutil.rmtree(self.output(form, room, recipe), ignore_errors=True)
            if recipe == first and form != "two":
                shutil.rmtree(self.data(form) / "01_prepare_captions", ignore_errors=True)
        link(self.output("whole", "RQ-VAE", recipe) / "03_prepare_emb", self.folder / "features" / self.dataset)
        link(
            self.output("cut", "RQ-VAE", recipe) / "05_train_rqvae",
            self.output("whole", "RQ-VAE", recipe) / "05_train_rqvae",
        )
        if recipe != first:
            for room, name in (("RQ-VAE", "03_prepare_emb"), ("reranker", "15_tokens")):
                link(self.output("cut", room, recipe) / name, self.output("cut", room, first) / name)
        link(self.root("two") / "RQ-VAE" / "output", self.root("cut") / "RQ-VAE" / "output")
        link(self.root("two") / "RQ-VAE" / "data", self.root("cut") / "RQ-VAE" / "data")
        for room, name in (("retriever", "07_dataset"), ("retriever", "08_pseudo_queries"), ("reranker", "15_tokens")):
            link(self.output("two", room, recipe) / name, self.output("cut", room, recipe) / name)

    def run(self, recipes: Sequence[str], *, two: bool, only: str = "", resume: bool = False) -> None:
        """All steps of the recipes; what a step needs and does not get leaves it out.

        Args:
            two: on two processes too.
            only: a word that the names of the steps to run have in them; the others' output must be there.
            resume: steps that ran before are not run again.
        """
        earlier = {(row.recipe, row.step): row for row in self._earlier(needed=resume or bool(only))}
        self.rows = [row for row in earlier.values() if row.recipe not in recipes]
        self.again = resume or bool(only)
        self.check_out()
        for recipe in recipes:
            known = {step: row for (of, step), row in earlier.items() if of == recipe} if self.again else {}
            if not known:
                self.begin(recipe, first=recipes[0])
            arrays = settings.read_arrays(self.dataset, recipe)
            stages = settings.read_stages(self.dataset, recipe)
            first = recipe == recipes[0]
            steps = plan(stages, arrays, self.scale.counts, first=first, two=two and first)
            shared = {row.step for row in self.rows if row.state == "ran" and row.recipe == recipes[0]}
            for step in steps:
                row = known.get(step.name)
                if (only in step.name) if only else (row is None or row.state != "ran"):
                    ran = {row.step for row in self.rows if row.recipe == recipe and row.state == "ran"}
                    ran |= {name for name in shared if not any(name == each.name for each in steps)}
                    row = self.run_step(step, recipe, ran)
                if row is not None:
                    self.rows.append(row)
                    self.save()

    def run_step(self, step: Step, recipe: str, ran: set[str]) -> Row:
        """Run one step, or say why not."""
        missing = [name for name in step.needs if name not in ran]
        cut = self.said_cut(step)
        if missing:
            return self._told(Row(recipe, step.name, "left out", None, None, cut, f"it needs {missing[0]}"))
        if step.launch in ("ZeRO-2", "ZeRO-3") and find_spec("deepspeed") is None:
            return self._told(Row(recipe, step.name, "not here", None, None, cut, "DeepSpeed is not installed"))
        print(f"{recipe}, {step.name} ...", flush=True)
        log = self.folder / "logs" / f"{self.dataset}-{recipe}" / f"{step.name.replace(': ', '-')}.log"
        usage = self._run(step, recipe, log)
        reason = failure(usage, log) or self._difference(step, recipe) or self._alone(step)
        row = Row(
            recipe, step.name, "failed" if reason else "ran", round(usage.seconds, 1), round(usage.peak, 2), cut, reason
        )
        return self._told(row)

    def _run(self, step: Step, recipe: str, log: Path) -> Usage:
        if step.form == "whole" and step.script in ("05_train_rqvae", PSEUDO):
            self._features(recipe)
        return run_and_watch(
            self.command(step, recipe),
            folder=ROOT if step.script == "llama3" else self.root(step.form),
            environment=self.environment(step, recipe),
            log=log,
            most_seconds=self.scale.most_seconds,
        )

    def command(self, step: Step, recipe: str) -> list[str]:
        """The command line of a step."""
        if step.script == "llama3":
            dataset = self.output("cut", "retriever", recipe) / "07_dataset"
            return [sys.executable, "-m", "benchmarks.rehearsal.llama3", LLAMA3, str(dataset)]
        flags = (*step.flags, *self._ways(step, recipe), *(("--overwrite",) if self.again else ()))
        return ["bash", f"scripts/{step.script}.sh", *flags]

    def _ways(self, step: Step, recipe: str) -> Iterator[str]:
        """Flags of the steps that a note tells apart."""
        if step.form == "two" and step.note:
            yield from ("--output", str(self.output("two", "retriever", recipe) / step.note / step.script))
        if step.form != "few" or not step.note:
            return
        snapshot = self.models.snapshot(CLIP)
        flags = {
            "model by folder": ["--model", str(snapshot), "--pretrained", "None"],
            "weights by file": ["--pretrained", str(snapshot / CLIP_WEIGHTS)],
            "OpenAI's archive": ["--pretrained", str(self.models.folder / "openai" / ARCHIVE)],
        }
        yield from flags.get(step.note, [])
        if step.script == "03_prepare_emb":
            yield from ("--output", str(self._encoded(step.note, recipe)))

    def _encoded(self, note: str, recipe: str) -> Path:
        return self.output("few", "RQ-VAE", recipe) / "03_prepare_emb" / note.replace(" ", "_").replace("'", "")

    def environment(self, step: Step, recipe: str) -> dict[str, str]:
        """What a user would export; nothing is fetched, and W&B writes into the rehearsal's folder."""
        notes = self.folder / "wandb"
        notes.mkdir(parents=True, exist_ok=True)
        return {
            **settings.clean_environment(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **({"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}),
            "DATASET": self.dataset,
            "RECIPE": recipe,
            "SYSTEM": step.system,
            "HF_HOME": str(self.models.home),
            "HF_HUB_OFFLINE": "1",
            "SEED_WEIGHTS": str(self.models.seed_weights),
            "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
            "WANDB_DIR": str(notes),
            **LAUNCHES[step.launch],
        }

    def said_cut(self, step: Step) -> str:
        """What is smaller than in a real run."""
        counts = self.scale.counts
        pictures = {"whole": 0, "cut": sum(counts.pictures), "two": sum(counts.pictures), "few": sum(counts.few)}[
            step.form
        ]
        words = [f"{pictures} of {sum(self.total):,} pictures"] if pictures else []
        if step.script == "llama3":
            words = ["2 layers, a forward pass and a search of 8 captions"]
        words += [" ".join(step.flags)] if step.flags else []
        return "; ".join(words) or "nothing"

    def save(self) -> None:
        """Write what is known so far."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.results, {"dataset": self.dataset, "rows": [row._asdict() for row in self.rows]})

    def _earlier(self, *, needed: bool) -> list[Row]:
        if not self.results.is_file():
            if not needed:
                return []
            raise BadInput(f"{self.results} is not there: leave --resume and --only out")
        return [Row(**row) for row in read_json(self.results)["rows"]]

    def _told(self, row: Row) -> Row:
        peak = "" if row.peak is None else f" {row.seconds:.0f} s, {row.peak:.1f} GiB"
        print(f"    {row.state}{peak} {printable(row.reason)}", flush=True)
        return row

    def _features(self, recipe: str) -> None:
        """Features of all records, unless an earlier recipe has them."""
        encoded = self.output("cut", "RQ-VAE", recipe) / "03_prepare_emb"
        few, captions = (self.data(form) / "01_prepare_captions" for form in ("cut", "whole"))
        what = [read_json(each / "manifest.json")["checksum"] for each in (encoded, few, captions)]
        folder = self.folder / "features" / self.dataset
        once(folder, what, lambda to: write_features(to, encoded=encoded, few=few, captions=captions, seed=self.seed))

    def _alone(self, step: Step) -> str:
        """Whether a step that was started as two processes ran as one."""
        if step.launch is None:
            return ""
        manifests = self.root(step.form).glob("*/output/**/manifest.json")
        newest = read_json(max(manifests, key=lambda path: path.stat().st_mtime))
        count = newest["environment"]["processes"]
        return "" if count == 2 else f"it ran in {count} process"

    def _difference(self, step: Step, recipe: str) -> str:
        """How features differ from those of the model by its tag, where they should be alike; else nothing."""
        if step.form != "few" or step.script != "03_prepare_emb" or step.note == "model by tag":
            return ""
        for file in ("images.npy", "texts.npy"):
            tag, other = (read_array(self._encoded(note, recipe) / file) for note in ("model by tag", step.note))
            difference = float(np.abs(tag - other).mean() / np.abs(tag).mean())
            if not difference <= ALIKE:
                return f"its {file} differs from the tag's by {difference:.1%}"
        return ""

    def _check_out(self, form: Form, pictures: tuple[int, int, int] | None) -> None:
        """A form's checkout; with the captions' file and the settings of some of the pictures, where it has some."""
        expected = pictures or (self.total if form == "whole" else self.scale.counts.pictures)
        lines = [f"CAPTIONS+=(--expect {' '.join(map(str, expected))})", *self.scale.more]
        check_out(self.root(form), dataset=self.dataset, more=lines)
        if pictures is not None:
            counts = dict(zip(("train", "val", "test"), pictures, strict=True))
            path, whole = (self.data(each) / self.collection.file for each in (form, "whole"))
            in_own_process(write_some, path, self.collection, of=whole, counts=counts)
            link(self.data(form) / "images", self.data("whole") / "images")


def failure(usage: Usage, log: Path) -> str:
    """Why a command failed, in one line; nothing when it did not."""
    if usage.timed_out:
        return f"it took longer than {usage.seconds:.0f} s"
    if not usage.status:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    if usage.status == -9 or any(line.startswith("exitcode") and " -9 " in line for line in lines):
        told.append("it was killed, as when memory runs out")
    words = [line for line in lines if any(map(str.isalpha, line))]
    return f"status {usage.status}: {(told or words or ['no output'])[-1]} ({log})"


def markdown(rows: Sequence[Row]) -> str:
    """A table for a page of docs/."""
    lines = ["| recipe | step | | seconds | peak GiB | cut |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = ["–" if value is None else f"{value:,}" for value in (row.seconds, row.peak)]
        state = row.state + (f": {row.reason}" if row.reason else "")
        lines.append(f"| {row.recipe} | {row.step} | {state} | {' | '.join(numbers)} | {row.cut} |")
    return "\n".join(lines)


def facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for the screen."""
    return [{**row._asdict(), "seconds": row.seconds or 0.0, "peak": row.peak or 0.0} for row in rows]
