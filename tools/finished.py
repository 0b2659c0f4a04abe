"""Whether a command line has been run to its end already, without loading what the command needs.

`scripts/env.sh` asks this before each command. Yes means: the output folder's manifest has the same arguments, the
command's source is unchanged, every input has the content it had, and the outputs are whole. In all other cases the
command itself decides.
Command: python -m tools.finished -m RQ-VAE.train --features DIR --output DIR; exits 0 when finished, else 1.
"""

import sys
from pathlib import Path

from . import runs, verbosity
from .command_line.place import typed_elsewhere
from .command_line.sweeps import own_place
from .errors import BadInput
from .files import read_json

SHOWN = "table.txt"


def is_finished(command: str, arguments: list[str]) -> Path | None:
    """The finished output folder of a command line, or None."""
    if arguments.count("--output") != 1 or "--overwrite" in arguments:
        return None
    folder = own_place(Path(arguments[(arguments.index("--output") + 1) % len(arguments)]))
    try:
        manifest = read_json(folder / runs.MANIFEST)
        if manifest["facts"].get("grows"):  # the command itself looks whether there is more
            return None
        runs.check_files(folder)
        same = (manifest["command"], manifest["arguments"], manifest["source"]) == (
            command,
            arguments,
            runs.source_of(command),
        )
        inputs = manifest["inputs"].values()
        return (
            folder
            if same and all(runs.fingerprint(Path(i["path"]), i["by"]) == i["fingerprint"] for i in inputs)
            else None
        )
    except (BadInput, KeyError, TypeError, OSError):
        return None


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] != "-m" or typed_elsewhere():
        return 1  # the command itself knows which of the words that were typed elsewhere are paths
    folder = is_finished(arguments[1], verbosity.without(arguments[2:]))
    if folder is None:
        return 1
    print(f"{arguments[1]}: {folder} is finished; nothing to do.")
    if (folder / SHOWN).is_file():
        print((folder / SHOWN).read_text(encoding="utf-8", errors="backslashreplace"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
