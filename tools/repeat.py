"""Repeat a finished run: print the command that does, or execute it and compare what it gives.

In:  any finished run folder; its inputs must still have the content they had.
Out: nothing; with --execute a second run folder, and "identical" or what differs. Times are not compared. Exits 0 when
     identical, 1 when not.
Command: python -m tools.repeat RUN [--execute] [--output DIR]
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from . import environment, runs
from .command_line.commands import run_command
from .errors import BadInput
from .files import read_json

EXIT_DIFFERENT = 1
TABLE, SPEED = "table.txt", "queries/s"  # the one output with times in it, and their column
TEXTS = (".json", ".jsonl", ".txt")  # endings of outputs that may name their own folder
TIMES = ("seconds", "per_second")  # endings of the names of figures that are times


@dataclass(frozen=True)
class Config:
    """Which run is repeated, and where."""

    run: tyro.conf.Positional[Path]
    """Finished run folder."""
    execute: bool = False
    """Run the command, then compare every output and every figure."""
    output: Path | None = None
    """Folder of the repetition; by default that of the run with "-repeat" behind its name."""


def read_run(folder: Path) -> runs.Manifest:
    """Read the manifest of a finished run of any command.

    Raises:
        BadInput: there is none.
    """
    if not (folder / runs.MANIFEST).is_file():
        raise BadInput(f"{folder} is not a finished run, it has no {runs.MANIFEST}: name a run folder")
    return runs.read_manifest(folder, read_json(folder / runs.MANIFEST)["command"])


def check_inputs(manifest: runs.Manifest) -> None:
    """Refuse to repeat a run on other inputs.

    Raises:
        BadInput: an input is gone, or no longer has the content that the run read.
    """
    for name, recorded in manifest.inputs.items():
        path = Path(recorded["path"])
        found = runs.fingerprint(path, recorded["by"]) if path.exists() else None
        if found != recorded["fingerprint"]:
            state = "is gone" if found is None else "has changed"
            raise BadInput(f"input {name} ({path}) {state} since {manifest.folder} was made: put it back as it was")


def repeated_arguments(manifest: runs.Manifest, output: Path) -> list[str]:
    """The run's arguments with another output folder; files that it writes elsewhere go beside that.

    Raises:
        BadInput: the run was not started from a command line.
    """
    arguments = [argument for argument in manifest.arguments if argument != "--overwrite"]
    if not _replace(arguments, "--output", output):
        raise BadInput(f"{manifest.folder} was not made by a command line with --output: it cannot be repeated")
    _replace(arguments, "--summary", output.with_name(f"{output.name}.summary.json"))
    return arguments


def repeated_command(manifest: runs.Manifest, output: Path) -> list[str]:
    """The command line of the repetition, with as many processes as the run had."""
    made_with = manifest.environment
    launch = ["python"]
    if made_with.get("processes", 1) > 1:
        launcher = made_with["variables"].get("LAUNCH", f"accelerate launch --num_processes {made_with['processes']}")
        launch = shlex.split(launcher)
    return [*launch, "-m", manifest.command, *repeated_arguments(manifest, output)]


def variables(manifest: runs.Manifest) -> dict[str, str]:
    """Environment variables that the repetition needs: those of the run, and its number of threads."""
    found = {name: value for name, value in manifest.environment.get("variables", {}).items() if name != "LAUNCH"}
    threads = manifest.environment.get("machine", {}).get("threads")
    return found if threads is None else {"OMP_NUM_THREADS": str(threads), **found}


def warnings(manifest: runs.Manifest) -> Iterator[str]:
    """What is no longer as it was, and may change the result."""
    commit, source = runs.current_commit(), runs.source_of(manifest.command)
    if commit != manifest.commit:
        yield f"made at commit {manifest.commit}, this checkout is {commit}"
    if source != manifest.source:
        yield f"the files beside {manifest.command} are not those it was made with"
    if not manifest.environment:
        yield "the manifest is of an earlier version, which did not record packages and machine"
        return
    now = environment.describe()
    before = {"python": manifest.environment["python"], **manifest.environment["packages"]}
    after = {"python": now["python"], **environment.versions(manifest.environment["packages"])}
    for name, version in before.items():
        if after.get(name) != version:
            yield f"made with {name} {version}, here it is {after.get(name, 'not installed')}"
    processor, here = manifest.environment["machine"]["processor"], now["machine"]["processor"]
    if processor != here:
        yield f"made on {processor}, this is {here}"


def differences(first: runs.Manifest, second: runs.Manifest) -> Iterator[str]:
    """What two runs of one command gave differently: outputs by content, facts and metrics by value.

    Times do not count, nor where a run's own folder lies.
    """
    for name in sorted(first.outputs.keys() | second.outputs.keys()):
        if name not in second.outputs:
            yield f"output {name} is missing"
        elif name not in first.outputs:
            yield f"output {name} is new"
        elif first.outputs[name] != second.outputs[name] and not _same_text(first, second, name):
            yield f"output {name} differs"
    for kind in ("facts", "metrics"):
        before, after = (_figures(manifest, kind) for manifest in (first, second))
        for name in sorted(before.keys() | after.keys()):
            if repr(before.get(name)) != repr(after.get(name)):  # of figures too that are no numbers
                yield f"{kind} {name}: was {before.get(name)}, now {after.get(name)}"


def _replace(arguments: list[str], option: str, value: Path) -> bool:
    """Give an option of a command line another value in place. Returns whether it is there."""
    for place, argument in enumerate(arguments):
        if argument == option and place + 1 < len(arguments):
            arguments[place + 1] = str(value)
            return True
        if argument.startswith(f"{option}="):
            arguments[place] = f"{option}={value}"
            return True
    return False


def _option(arguments: list[str], option: str) -> str | None:
    for argument, following in pairwise([*arguments, ""]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _figures(manifest: runs.Manifest, kind: str) -> dict[str, Any]:
    """Facts or metrics by name, without times; the run's own folder in them stands as "."."""
    found: dict[str, Any] = {}
    own = _own_folder(manifest)

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}" if name else str(key), inner)
        elif not name.endswith(TIMES):
            inside = isinstance(value, str) and f"{value}/".startswith(f"{own}/")
            found[name] = f".{value[len(own) :]}" if inside else value

    collect("", getattr(manifest, kind))
    return found


def _same_text(first: runs.Manifest, second: runs.Manifest, name: str) -> bool:
    """Whether two text files are equal but for the run's own folder in them and the speeds of a table."""
    if Path(name).suffix not in TEXTS:
        return False
    texts = [
        (manifest.folder / name).read_text(encoding="utf-8").replace(_own_folder(manifest), ".")
        for manifest in (first, second)
    ]
    if Path(name).name == TABLE:
        texts = [_without_speeds(text) for text in texts]
    return texts[0] == texts[1]


def _without_speeds(text: str) -> str:
    """A table without its last column, where that is the speed."""
    lines = text.splitlines()
    if not lines or not lines[0].endswith(SPEED):
        return text
    return "\n".join(line.rstrip().rpartition(" ")[0].rstrip() for line in lines)


def _own_folder(manifest: runs.Manifest) -> str:
    """The run's folder as its command line has it."""
    return _option(manifest.arguments, "--output") or str(manifest.folder)


def execute(manifest: runs.Manifest, output: Path) -> None:
    """Run the command again and compare.

    Ends the process with the command's own status when it fails, and with 1 when something differs.

    Raises:
        BadInput: the output folder is in use.
    """
    if output.exists():
        raise BadInput(f"{output} is there already: name another --output, or remove it")
    command = repeated_command(manifest, output)
    if command[0] == "python":
        command[0] = sys.executable
    done = subprocess.run(command, env={**os.environ, **variables(manifest)})
    if done.returncode:
        sys.exit(done.returncode)
    found = list(differences(manifest, read_run(output)))
    print("\n".join(found) or f"identical: {len(manifest.outputs)} outputs, facts and metrics of {manifest.folder}")
    if found:
        sys.exit(EXIT_DIFFERENT)


def main(config: Config) -> None:
    manifest = read_run(config.run)
    output = config.output or config.run.with_name(f"{config.run.name}-repeat")
    check_inputs(manifest)
    command = repeated_command(manifest, output)
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables(manifest).items()]
    print(f"# commit {manifest.commit}")
    print(" ".join([*settings, shlex.join(command)]), flush=True)
    for warning in warnings(manifest):
        print(f"warning: {warning}", file=sys.stderr)
    if config.execute:
        execute(manifest, output)


if __name__ == "__main__":
    run_command(main, Config)
