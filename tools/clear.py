"""Throw away what the run folders of a chain hold, so that the chain can be made anew, or go on after a kill.

The last folder goes first, so that a folder is never there without those that it was made from.
Command: python -m tools.clear FOLDER ...; scripts/quickstart.sh --overwrite calls it.
"""

import sys
from pathlib import Path

from . import runs
from .errors import EXIT_BAD_INPUT, BadInput


def clear_all(folders: list[Path]) -> None:
    """Remove the runs in these folders; one that does not exist is passed over.

    Raises:
        BadInput: a folder is in use, or holds files that no run left; nothing has been removed then.
    """
    there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    for folder in there:
        runs.check_clearable(folder)
    locks = [runs.hold(folder) for folder in there]
    try:
        for folder in reversed(there):
            runs.clear(folder)
    finally:
        for lock in locks:
            lock.close()


def main(folders: list[str]) -> int:
    try:
        clear_all([Path(folder) for folder in folders])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
