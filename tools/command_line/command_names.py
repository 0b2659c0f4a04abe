"""Names of commands: what they were called earlier, and which script runs each of them.

The scripts themselves say which command they run, in their last line. So no list of them is kept here.
"""

import re
from functools import cache
from pathlib import Path

from .place import variables_of

ROOT = Path(__file__).parents[2]
EARLIER = {  # names that manifests of earlier versions have
    "retriever.build_index": "retriever.gallery.build",
    "retriever.generate_pseudo_query": "retriever.pseudo_queries.generate",
}


def current_name(command: str) -> str:
    """The module that runs a command today.

    >>> current_name("retriever.build_index"), current_name("retriever.train")
    ('retriever.gallery.build', 'retriever.train')
    """
    return EARLIER.get(command, command)


@cache
def _scripts() -> list[tuple[str, str]]:
    """The numbered scripts, seen from the root, each with the command that it runs; none outside a checkout."""
    found = []
    for path in sorted((ROOT / "scripts").glob("[0-9][0-9]_*.sh")):
        last = path.read_text(encoding="utf-8").splitlines()[-1].split()
        if last[:1] == ["run"]:
            found.append((f"scripts/{path.name}", last[1]))
    return found


def scripts_of_commands() -> dict[str, str]:
    """For each command the first script that runs it."""
    return {command: script for script, command in reversed(_scripts())}


def script_of(command: str) -> str:
    """What to run for a command's folder: its script, or the command where there is no script."""
    return scripts_of_commands().get(current_name(command), command)


def scripts_for(folder: Path, *commands: str) -> str:
    """What to run to make a folder: the scripts of the commands that can make it, or the one of the folder's number.

    The variables that lead to this folder, and to no other, stand before each.
    """
    number = next((part[:3] for part in reversed(folder.parts) if re.match(r"\d\d_", part)), None)
    wanted = {current_name(command) for command in commands}
    own = [script for script, command in _scripts() if command in wanted and Path(script).name[:3] == number]
    scripts = own or list(dict.fromkeys(map(script_of, commands)))
    variables = variables_of(folder)
    return " or ".join(f"{variables}{script}" if script.startswith("scripts/") else script for script in scripts)


def again(command: str) -> str:
    """What to do where a command's folder has something that it does not write."""
    return f"run {script_of(command)} --overwrite"
