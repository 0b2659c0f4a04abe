"""What a dataset's file in scripts/ says, read by running bash on it: nothing of a recipe is written twice.

A file is sourced alone, without scripts/env.sh: it sets plain variables and arrays of options.
"""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from tools.errors import BadInput

ConfigT = TypeVar("ConfigT")

FOLDER = Path("scripts/datasets")
# Every variable that a dataset's file sets, one a block: its name, the number of its values, and these.
DUMP = """
set -euo pipefail
before=" $(compgen -v | tr '\\n' ' ') "
source "$1"
set +u # an empty array counts as unset
for name in $(compgen -v); do
    case "$before before name values _ BASH_LINENO BASH_ARGC PIPESTATUS " in *" $name "*) continue ;; esac
    declare -n values="$name"
    printf '%s\\0%s\\0' "$name" "${#values[@]}"
    if [ "${#values[@]}" -gt 0 ]; then printf '%s\\0' "${values[@]}"; fi
    unset -n values
done
"""


class Recipe(NamedTuple):
    """The settings of one dataset's file."""

    name: str
    """Of the dataset."""
    recipe: str
    """What RECIPE was."""
    values: dict[str, list[str]]
    """Every variable, as the words it holds: an array's elements, or one."""

    @property
    def stages(self) -> list[tuple[str, str]]:
        """Scripts in order, each with the SYSTEM that it runs for."""
        words = self.values["STAGES"][0].split()
        return [(script, system or "retriever") for script, _, system in (word.partition("@") for word in words)]

    def config(self, variable: str, config_type: type[ConfigT], **paths: Any) -> ConfigT:
        """The options of one array, as the command that gets them reads them.

        Args:
            paths: the command's other options, by the names of its fields: folders that the script adds.
        """
        options = [word for name, value in paths.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return tyro.cli(config_type, args=[*options, *self.values[variable]])


def read_recipe(dataset: str, recipe: str) -> Recipe:
    """Read a dataset's file: a name in scripts/datasets/, or a file.

    Raises:
        BadInput: there is none, or bash cannot read it.
    """
    path = Path(dataset) if Path(dataset).is_file() else FOLDER / f"{dataset}.sh"
    if not path.is_file():
        raise BadInput(f"there is no {path}: name a dataset of {FOLDER}, or a file of that form")
    environment = {**os.environ, "RECIPE": recipe}
    command = ["bash", "-c", DUMP, "bash", str(path)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        reason = done.stderr.decode().strip().splitlines() or ["no reason given"]
        raise BadInput(f"bash cannot read {path}: {reason[-1]}")
    words = done.stdout.decode().split("\0")[:-1]
    values, place = {}, 0
    while place < len(words):
        name, count = words[place], int(words[place + 1])
        values[name] = words[place + 2 : place + 2 + count]
        place += 2 + count
    return Recipe(path.stem, recipe, values)


def shown(words: list[str]) -> str:
    """Options as they would be typed."""
    return " ".join(shlex.quote(word) for word in words)
