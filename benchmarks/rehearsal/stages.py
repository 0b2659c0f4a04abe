"""Which scripts a rehearsal runs, on what, and what of each is cut: counts alone.

Forms of the data, each with folders of its own:
  whole  all records, on which everything runs that takes no model: 01, 05 to 07 and 14, with made-up features
  cut    the first pictures of each split, on which everything else runs, with the whole form's tokenizer
  two    the cut form's trainings and searches on two processes
  few    four pictures, for other ways to name the two-tower model, and for two processes
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Form = Literal["whole", "cut", "two", "few"]
Launch = Literal["torchrun", "ZeRO-2", "ZeRO-3"]
Settings = Mapping[str, Sequence[str]]
WHOLE_TOO = ("01_prepare_captions", "06_generate_codes", "07_prepare_retriever_dataset", "14_build_index")
WHOLE_ALONE = ("05_train_rqvae",)
PSEUDO = "08_generate_pseudo_query"
# Pseudo queries of all records for a tokenizer that is trained on them: few, and by no model, which would take hours.
NEAREST = ("--source", "nearest", "--captioner", "None", "--splits", "val", "--per-picture", "1")
SHARED = ("01_prepare_captions", "03_prepare_emb", "15_convert_voken_to_seed")  # the same in every recipe
LLAMA = "11_finetune_retriever_llama@llama", "12_retrieve@llama", "13_test_retriever@llama"
ON_TWO = (
    "09_train_retriever_t5@retriever+pseudo",
    "10_train_retriever_t5_stage2@retriever+stage2",
    "11_finetune_retriever_llama@llama",
    "16_prepare_reranker_dataset@retriever+stage2",
    "17_finetune_reranker_llama@retriever+stage2",
    "18_test_reranker_llama@retriever+stage2",
)
ON_ZERO: tuple[tuple[str, Launch], ...] = (
    ("09_train_retriever_t5@retriever+pseudo", "ZeRO-2"),
    ("11_finetune_retriever_llama@llama", "ZeRO-2"),
    ("11_finetune_retriever_llama@llama", "ZeRO-3"),
)
TRAINED_WITH = {
    "09_train_retriever_t5": "TRAIN_RETRIEVER",
    "10_train_retriever_t5_stage2": "TRAIN_STAGE2",
    "11_finetune_retriever_llama": "FINETUNE_LLAMA",
    "17_finetune_reranker_llama": "TRAIN_RERANKER",
}
TRAINED_BY = {
    "retriever": "09_train_retriever_t5",
    "retriever+pseudo": "09_train_retriever_t5",
    "retriever+stage2": "10_train_retriever_t5_stage2",
    "llama": "11_finetune_retriever_llama",
}


@dataclass(frozen=True)
class Counts:
    """How much of everything is done."""

    pictures: tuple[int, int, int] = (26, 4, 4)
    """Of train, val and test, in the cut form."""
    few: tuple[int, int, int] = (2, 1, 1)
    """The same in the form of few."""
    steps: int = 1
    """Steps of the optimiser in each training."""
    most_captions: int = 128
    """Of a retriever's training, so that it fits into 20 GB."""
    most_of_stage2: int = 32
    """The same in stage 2, which writes eleven sequences for each."""
    validate_queries: int = 8
    rerank: int = 8
    """Pictures of each list that are re-ranked."""


class Step(NamedTuple):
    """One command of a rehearsal."""

    script: str
    """Name in scripts/, without its ending; or a module of this package."""
    form: Form
    system: str = "retriever"
    flags: tuple[str, ...] = ()
    """What is added to the dataset's own flags."""
    needs: tuple[str, ...] = ()
    """Names of the steps that must have run."""
    launch: Launch | None = None
    """How two processes are started; None: it is one."""
    note: str = ""
    """Tells steps of one script and form apart."""

    @property
    def name(self) -> str:
        words = (
            self.script,
            f"@{self.system}" if self.system != "retriever" else "",
            f" ({self.note})" * bool(self.note),
        )
        return f"{self.form}: {''.join(words)}"

    @property
    def number(self) -> str:
        return self.script[:2]


def plan(stages: Sequence[str], settings: Settings, counts: Counts, *, first: bool, two: bool) -> list[Step]:
    """All steps of one recipe, in their order.

    Args:
        stages: of the dataset's file, as quickstart.sh runs them.
        settings: its arrays of flags.
        first: it is the first recipe of the dataset; the others take over what is the same in all.
        two: on two processes too.
    """
    steps = []
    early = position(stages, PSEUDO) < position(stages, "05_train_rqvae")
    for stage in with_llama(stages):
        script, _, system = stage.partition("@")
        if first or script not in SHARED:
            forms = forms_of(script, early=early)
            steps += [make(script, form, system or "retriever", settings, counts, early=early) for form in forms]
    if first:
        steps += list(of_few())
    steps.append(Step("llama3", "cut", needs=("cut: 07_prepare_retriever_dataset",)))
    if two:
        steps += [on_two(stage, settings, counts) for stage in ON_TWO]
        steps += [on_zero(on_two(stage, settings, counts), launch) for stage, launch in ON_ZERO]
    return steps


def with_llama(stages: Sequence[str]) -> list[str]:
    """The stages with LLaMA's behind the other retrievers'."""
    place = max(number for number, stage in enumerate(stages) if stage.startswith("13_")) + 1
    return [*stages[:place], *LLAMA, *stages[place:]]


def position(stages: Sequence[str], script: str) -> int:
    """Where a script comes first among the stages; behind them where it is none."""
    return next((place for place, stage in enumerate(stages) if stage.partition("@")[0] == script), len(stages))


def forms_of(script: str, *, early: bool = False) -> tuple[Form, ...]:
    """Forms that a script runs in.

    Args:
        early: the tokenizer is trained on pseudo queries, which are there before it.
    """
    if script in WHOLE_ALONE:
        return ("whole",)
    return ("whole", "cut") if script in WHOLE_TOO or (early and script == PSEUDO) else ("cut",)


def make(script: str, form: Form, system: str, settings: Settings, counts: Counts, *, early: bool = False) -> Step:
    """A step with its cuts and what it needs."""
    flags = NEAREST if script == PSEUDO and form == "whole" else cuts(script, settings, counts)
    return Step(script, form, system, flags, tuple(needs(script, form, system, early=early)))


def of_few() -> Iterator[Step]:
    """Other ways to the same features, and pictures shared by two processes."""
    yield Step("01_prepare_captions", "few")
    ready = ("few: 01_prepare_captions",)
    yield Step("03_prepare_emb", "few", needs=ready, note="model by tag")
    yield Step("03_prepare_emb", "few", needs=ready, note="model by folder")
    yield Step("03_prepare_emb", "few", needs=ready, note="weights by file")
    yield Step("03_prepare_emb", "few", needs=ready, note="OpenAI's archive")
    yield Step("03_prepare_emb", "few", needs=ready, launch="torchrun", note="two processes")
    yield Step("15_convert_voken_to_seed", "few", needs=ready, launch="torchrun", note="two processes")


def on_two(stage: str, settings: Settings, counts: Counts) -> Step:
    """A step of the cut form on two processes."""
    script, _, system = stage.partition("@")
    step = make(script, "two", system, settings, counts)
    inputs = ("cut: 07_prepare_retriever_dataset", "cut: 08_generate_pseudo_query", "cut: 15_convert_voken_to_seed")
    there = [name for name in step.needs if name.removeprefix("two: ") in ON_TWO or "@" in name]
    number = 2 if step.number < "17" else 3
    return step._replace(needs=(*there, *inputs[:number]), launch="torchrun")


def on_zero(step: Step, launch: Launch) -> Step:
    """The same step with DeepSpeed, which computes in fp32 on a CPU."""
    return step._replace(launch=launch, note=launch, flags=(*step.flags, "--precision", "fp32"))


def needs(script: str, form: Form, system: str, *, early: bool = False) -> Iterator[str]:
    """Names of the steps whose output a step reads."""
    number = script[:2]
    if form == "whole" and (number == "05" or script == PSEUDO):  # on features that are made of those of the cut form
        yield from ("whole: 01_prepare_captions", "cut: 03_prepare_emb")
        yield from (f"whole: {PSEUDO}",) if early and number == "05" else ()
        return
    trained = Step(TRAINED_BY.get(system, ""), form, system).name
    read: dict[str, tuple[str, ...]] = {
        "03": ("01_prepare_captions",),
        "06": ("05_train_rqvae",) if form == "whole" else ("03_prepare_emb",),
        "07": ("06_generate_codes",),
        "08": ("03_prepare_emb" if early else "07_prepare_retriever_dataset",),
        "09": ("07_prepare_retriever_dataset",),
        "10": ("09_train_retriever_t5@retriever+pseudo",),
        "11": ("07_prepare_retriever_dataset",),
        "13": (f"12_retrieve@{system}".removesuffix("@retriever"),),
        "14": ("07_prepare_retriever_dataset",),
        "15": ("01_prepare_captions",),
        "17": (f"16_prepare_reranker_dataset@{system}", "15_convert_voken_to_seed"),
        "18": (f"17_finetune_reranker_llama@{system}",),
        "19": ("07_prepare_retriever_dataset",),
    }
    yield from (f"{form}: {name}" for name in read.get(number, ()))
    if number == "06" and form == "cut":
        yield "whole: 05_train_rqvae"
    if number in ("12", "16"):
        yield trained
    if system.endswith("+pseudo") and number == "09":
        yield f"{form}: 08_generate_pseudo_query"


def cuts(script: str, settings: Settings, counts: Counts) -> tuple[str, ...]:
    """Flags that make a stage short; what they say is a count of pictures, queries, steps or rounds."""
    if script == "05_train_rqvae":
        return rqvae_cuts(settings["TRAIN_RQVAE"])
    if script in TRAINED_WITH:
        captions = counts.steps * batch_of(settings[TRAINED_WITH[script]])
        most = counts.most_of_stage2 if script == "10_train_retriever_t5_stage2" else counts.most_captions
        validated = counts.validate_queries
        if script == "17_finetune_reranker_llama":
            validated //= 2
        return (
            *("--epochs", "1", "--queries-per-epoch", str(min(captions, most))),
            *("--validate-queries", str(validated)),
        )
    other: dict[str, tuple[str, ...]] = {
        "16_prepare_reranker_dataset": ("--train-per-picture", "1"),
        "18_test_reranker_llama": ("--top-k", str(counts.rerank)),
        "19_report": (
            *("--queries", "4", "--beams", "10"),
            *("--speed-queries", "4", "--speed-rounds", "1", "--largest-pool", "1000"),
        ),
    }
    return other.get(script, ())


def rqvae_cuts(flags: Sequence[str]) -> tuple[str, ...]:
    """Cuts of the tokenizer's training: two epochs, with a revival of codes between them; of rows that are captions, of
    which there are five times as many as pictures, one."""
    epochs = "1" if value_of(flags, "--pairs", "picture") == "caption" else "2"
    revival = () if value_of(flags, "--revive-every", "10") == "0" else ("--revive-every", "1")
    return ("--epochs", epochs, "--validate-every", epochs, "--kmeans-iterations", "3", *revival)


def batch_of(flags: Sequence[str]) -> int:
    """Captions or groups of a step of the optimiser."""
    return int(value_of(flags, "--batch-size", "1")) * int(value_of(flags, "--accumulate", "1"))


def value_of(flags: Sequence[str], name: str, default: str) -> str:
    """The last value of a flag in a list of them."""
    places = [place for place, flag in enumerate(flags) if flag == name]
    return flags[places[-1] + 1] if places else default
