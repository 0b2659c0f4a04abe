"""A prepared cache of the Hugging Face Hub: commands that name a model on the hub find it there without a network.

`<cache>/models--ORG--NAME/` has `blobs/`, `snapshots/<commit>/` with links to them, and `refs/main`, as a download
leaves them.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MARK = "made.txt"  # beside what was made: of what it was made


def once(folder: Path, what: object, write: Callable[[Path], None]) -> Path:
    """A folder that `write` fills, unless it was made of the same before; what was begun is thrown away.

    Args:
        what: all that the content depends on.
    """
    mark = folder.parent / f"{folder.name}.{MARK}"
    if mark.is_file() and mark.read_text() == repr(what):
        return folder
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"making {folder} ...", flush=True)
    write(folder)
    mark.write_text(repr(what))
    return folder


def into_cache(cache: Path, name: str, what: object, write: Callable[[Path], None]) -> Path:
    """A model in the cache, by its name on the hub, unless it is there; returns its snapshot.

    Args:
        write: fills a folder with the model's files.
    """
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = cache / ("models--" + name.replace("/", "--"))

    def write_all(folder: Path) -> None:
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write(snapshot)
        (folder / "blobs").mkdir()
        for path in sorted(snapshot.iterdir()):
            blob = folder / "blobs" / hashlib.sha1(f"{name}/{path.name}".encode()).hexdigest()
            path.replace(blob)
            path.symlink_to(os.path.relpath(blob, snapshot))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)

    return once(folder, what, write_all) / "snapshots" / commit
