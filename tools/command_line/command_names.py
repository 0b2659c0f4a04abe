"""Names of commands: what they were called earlier, and which script runs each of them.

The scripts themselves say which command they run, in their last line. So no list of them is kept here.
"""

from functools import cache
from pathlib import Path

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
def scripts_of_commands() -> dict[str, str]:
    """For each command the first numbered script that runs it, seen from the root; none outside a checkout."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "scripts").glob("[0-9][0-9]_*.sh")):
        last = path.read_text(encoding="utf-8").splitlines()[-1].split()
        if last[:1] == ["run"]:
            found.setdefault(last[1], f"scripts/{path.name}")
    return found


def script_of(command: str) -> str:
    """What to run for a command's folder: its script, or the command where there is no script."""
    return scripts_of_commands().get(current_name(command), command)


def again(command: str) -> str:
    """What to do where a command's folder has something that it does not write."""
    return f"run {script_of(command)} again"
