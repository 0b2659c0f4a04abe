"""Disturb every stage of the chain many times, and write down what came of it.

In:  the emoji sample's data folder, of which some dozen pictures are taken; without it pictures are drawn.
Out: `docs/reliability.json`: every fault with its stage, moment and outcome, the counts, and the undisturbed chain.
Command: python -m tests.faults --faults 240 --seed 0 --data RQ-VAE/data/emoji
"""

import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import read_json_lines, write_json, write_json_lines

from .faults import CLEAR, FAILED, FAULTS, NOT_APPLICABLE, SAME, strike
from .harness import Chain, modules
from .scripts import killed_scripts
from .stages import BY_NAME, STAGES, Stage
from .zygote import zygote

ALONE = ("03", "09", "14+")  # stages that are also killed as `python -m`
ALONE_KIND, SCRIPT_KIND, SCRIPTS = "killed, python -m", "script killed", "scripts"
SCRIPTS_KILLED = 2
LETTERS = {SAME: "s", CLEAR: "c", FAILED: "f", NOT_APPLICABLE: "n"}


@dataclass(frozen=True)
class Config:
    """How many faults, drawn from which seed, over which pictures."""

    faults: int = 240
    """Faults through the zygote; so many that each kind strikes each stage need 152."""
    seed: int = 0
    """Seed of order and moments."""
    data: Path = Path("RQ-VAE/data/emoji")
    """Data folder of the emoji sample; where it is not finished, pictures are drawn."""
    output: Path = Path("docs/reliability.json")
    """File to write."""
    alone: bool = True
    """Also kill some stages started as `python -m`, and some scripts."""
    only: str | None = None
    """Name of a fault: no other kind."""

    @property
    def partial(self) -> Path:
        """The rows so far, until all are done."""
        return self.output.with_name(f".{self.output.name}.partial")

    def __post_init__(self) -> None:
        if self.faults < 1:
            raise BadInput("--faults must be at least 1")
        if self.only is not None and self.only not in FAULTS:
            raise BadInput(f"--only {self.only!r} is not a fault: choose of {', '.join(FAULTS)}")


def plan(count: int, seed: int, stages: tuple[Stage, ...], only: str | None = None) -> list[tuple[str, Stage]]:
    """Pairs of a fault and a stage: all of them in random order, again and again, until there are enough."""
    draw = random.Random(seed)
    every = [(name, stage) for name in FAULTS if only in (None, name) for stage in stages]
    pairs: list[tuple[str, Stage]] = []
    while len(pairs) < count:
        pairs += draw.sample(every, len(every))
    return pairs[:count]


def disturb(chain: Chain, config: Config) -> list[dict[str, Any]]:
    """Do all faults, print each, and keep its row in `config.partial`, from which a run that was killed goes on."""
    pairs = plan(config.faults, config.seed, STAGES, config.only)
    if config.alone:
        pairs += [(ALONE_KIND, BY_NAME[name]) for name in ALONE]
    rows = [row for _, row in read_json_lines(config.partial)] if config.partial.is_file() else []
    if [(row["fault"], row["stage"]) for row in rows] != [(name, stage.name) for name, stage in pairs[: len(rows)]]:
        raise BadInput(f"{config.partial} was left by a run of other --faults or another --seed: remove it")
    for number, (name, stage) in enumerate(pairs[len(rows) :], start=len(rows)):
        began = time.monotonic()
        outcome = strike(chain, name, stage, random.Random(f"{config.seed} {number} {name} {stage.name}"))
        rows.append({"number": number, "stage": stage.name, "module": stage.module, "fault": name, **outcome._asdict()})
        print(
            f"{number + 1}/{len(pairs)}  {stage.name:4} {name:20} {outcome.outcome:10} {outcome.moment}  "
            f"{outcome.told or outcome.wrong}  ({time.monotonic() - began:.1f} s)",
            flush=True,
        )
        write_json_lines(config.partial, rows)
    return rows


def counted(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row a stage with the outcomes of each fault by their letters: "3s 1c" is 3 same, 1 clear line. Last: all."""
    kinds = [kind for kind in (*FAULTS, ALONE_KIND, SCRIPT_KIND) if any(row["fault"] == kind for row in rows)]
    stages = [stage for stage in (*(stage.name for stage in STAGES), SCRIPTS) if any(r["stage"] == stage for r in rows)]

    def cell(kind: str, chosen: list[str]) -> str:
        found = Counter(row["outcome"] for row in rows if row["fault"] == kind and row["stage"] in chosen)
        return " ".join(f"{found[outcome]}{letter}" for outcome, letter in LETTERS.items() if found[outcome]) or "-"

    groups = {**{stage: [stage] for stage in stages}, "all": stages}
    felt = Counter(row["fault"] for row in rows if row["felt"])
    lines = [{"stage": name, **{kind: cell(kind, chosen) for kind in kinds}} for name, chosen in groups.items()]
    return [*lines, {"stage": "felt", **{kind: str(felt[kind]) for kind in kinds}}]


def as_markdown(report: dict[str, Any]) -> str:
    """The counts of `reliability.json` as they stand in docs/reliability.md."""
    lines = counted(report["faults"])
    every = report["outcomes"]
    told = ", ".join(f"{every[outcome]} {outcome}" for outcome in LETTERS if outcome in every)
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{len(report['faults'])} faults: {told}.\n\n{table}\n"


def main(config: Config) -> None:
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    with zygote(modules([*STAGES, BY_NAME["search"]])) as mother:
        chain = Chain(folder, mother, STAGES)
        chain.make(config.data)
        print(f"undisturbed: {len(STAGES)} stages over {chain.pictures}, {time.monotonic() - began:.0f} s", flush=True)
        rows = disturb(chain, config)
    if config.alone:
        for outcome in killed_scripts(folder / "scripts", random.Random(config.seed), SCRIPTS_KILLED):
            where = {"stage": SCRIPTS, "module": "scripts/quickstart.sh", "fault": SCRIPT_KIND}
            rows.append({"number": len(rows), **where, **outcome._asdict()})
            print(f"quickstart.sh: {outcome}", flush=True)
    outcomes = Counter(row["outcome"] for row in rows)
    undisturbed = {
        name: {"seconds": round(known.seconds, 2), "changes": known.changes, "bytes": known.total}
        for name, known in chain.known.items()
    }
    report = {
        "command": f"python -m tests.faults --faults {config.faults} --seed {config.seed}",
        "pictures": chain.pictures,
        "machine": f"{platform.machine()}, one thread, no GPU",
        "outcomes": dict(outcomes),
        "undisturbed": undisturbed,
        "faults": rows,
    }
    write_json(config.output, report)
    config.partial.unlink()
    print(as_markdown(report))
    if outcomes[FAILED]:
        raise BadInput(f"{outcomes[FAILED]} faults failed: see {config.output} and {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main, Config)
