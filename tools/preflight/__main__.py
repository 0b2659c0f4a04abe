"""Whether everything is there that a chain of stages will need: one list, before the first of them is run.

In:  on standard input the needs, which scripts/preflight.sh writes: how many words a need has, and these, each closed
     by a NUL. The first word says what kind of need it is (`CHECKS`), the second whose, the others are key=value.
Out: one list on the screen: stage, what, state (ok, MISSING, unknown), what to do.
Command: scripts/preflight.sh [--brief]; --brief leaves out what is there.

Exits with 2 when something is missing that will stop the chain. What cannot be known is "unknown", and stops nothing.
Nothing slow is imported for a need that does not ask for it.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..errors import EXIT_BAD_INPUT
from ..training_memory import GIB
from .devices import check_memory, check_processes, trained_weights
from .models import check_clip, check_model, check_tokenizer, size_of
from .needs import MISSING, OK, UNKNOWN, Finding, Need

SAMPLED = 16  # pictures that are opened
KEPT_BYTES = 4  # of a trained weight, in the model that a training leaves
STATE_BYTES = 32  # of a trained weight while it trains: two states with AdamW's means, two best models
DISK_RESERVE = 2 * GIB  # logs, tables, and what else nobody counts


def check_file(need: Need) -> Iterator[Finding]:
    """path: a file or folder that must be there; advice: how to get it."""
    path = Path(need.values["path"])
    state = OK if path.exists() else MISSING
    yield Finding(need.stage, str(path), state, need.values.get("advice", "put it there"))


def check_pictures(need: Need) -> Iterator[Finding]:
    """path: a folder; count: how many pictures it holds at least, 0 where that is not known; links: follow those."""
    from ..pictures import check_picture, list_pictures

    folder, expected = Path(need.values["path"]), int(need.values.get("count", 0))
    if not folder.is_dir():
        yield Finding(need.stage, str(folder), MISSING, "put the pictures there")
        return
    files = list_pictures(folder, follow_links=bool(need.values.get("links"))).pictures
    what = f"{folder}: {len(files):,} pictures"
    if not files or len(files) < expected:
        yield Finding(need.stage, what, MISSING, f"{max(expected, 1):,} pictures belong there")
        return
    sample = files[:: max(1, len(files) // SAMPLED)]
    broken = [f"{folder / file}: {reason}" for file in sample if (reason := check_picture(folder, file).reason)]
    if broken:
        advice = "--skip-bad leaves damaged pictures out" if need.values.get("skippable") else "copy it again"
        yield Finding(need.stage, broken[0], UNKNOWN, advice)
    else:
        yield Finding(need.stage, what, OK, "")


def check_key(need: Need) -> Iterator[Finding]:
    """variable: the name of an environment variable that holds a key; its value is looked at by nobody."""
    name = need.values["variable"]
    there = bool(os.environ.get(name, "").strip())
    yield Finding(need.stage, f"the key in {name}", OK if there else MISSING, f"export {name}=...")


def check_package(need: Need) -> Iterator[Finding]:
    """name: a package that not every chain takes, and that the pins leave out."""
    name = need.values["name"]
    state = OK if find_spec(name) else MISSING
    yield Finding(need.stage, f"the package {name}", state, f"pip install {name}")


def check_disk(needs: list[Need]) -> Iterator[Finding]:
    """One line a file system, for all stages together: the bytes that they will write, or fetch, below path."""
    wanted: dict[int, list[tuple[Path, int]]] = {}
    for path, size in _sizes(needs):
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        wanted.setdefault(there.stat().st_dev, []).append((there, size))
    for sizes in wanted.values():
        total, folder = sum(size for _, size in sizes) + DISK_RESERVE, sizes[0][0]
        free = shutil.disk_usage(folder).free
        what = f"disk of {folder.resolve()}: about {total / GIB:.0f} GiB, {free / GIB:.0f} free"
        yield Finding("all", what, OK if free > total else _too_little(free, sizes), "free some, or move the folder")


def _too_little(free: int, sizes: list[tuple[Path, int]]) -> str:
    """The sum is an estimate: what is far below it does not fit, what is near it may."""
    return MISSING if free < sum(size for _, size in sizes) / 2 else UNKNOWN


def _sizes(needs: list[Need]) -> Iterator[tuple[Path, int]]:
    """What is written where, and fetched; of the trainings' own states only the largest at a time."""
    states: list[tuple[int, Path]] = []
    for need in needs:
        if need.kind == "disk":
            yield Path(need.values["path"]), int(need.values["bytes"])
        elif need.kind == "model" and (fetched := size_of(need.values["name"])):
            yield fetched
        elif need.kind == "memory" and (weights := trained_weights(need)):
            yield Path(need.values["output"]), weights * KEPT_BYTES
            states.append((weights * STATE_BYTES, Path(need.values["output"])))
    if states:
        size, path = max(states)
        yield path, size


CHECKS: dict[str, Callable[[Need], Iterator[Finding]]] = {
    "file": check_file,
    "pictures": check_pictures,
    "key": check_key,
    "package": check_package,
    "model": check_model,
    "tokenizer": check_tokenizer,
    "clip": check_clip,
    "memory": check_memory,
    "processes": check_processes,
}


def read_needs(words: list[str]) -> list[Need]:
    """Needs from the words of standard input."""
    needs, place = [], 0
    while place < len(words):
        count = int(words[place])
        kind, stage, *rest = words[place + 1 : place + 1 + count]
        needs.append(Need(kind, stage, dict(word.split("=", 1) for word in rest)))
        place += 1 + count
    return needs


def findings(needs: Iterable[Need]) -> list[Finding]:
    """What the checks say, each thing once, for the first stage that needs it."""
    needs, found, said = list(needs), [], set[tuple[str, str]]()
    for need in needs:
        if need.kind == "disk":
            continue
        for finding in _guarded(need.stage, need.kind, partial(CHECKS[need.kind], need)):
            if (finding.what, finding.state) not in said:
                said.add((finding.what, finding.state))
                found.append(finding)
    if needs:
        found += _guarded("all", "disk", lambda: check_disk(needs))
    return found


def _guarded(stage: str, kind: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check that fails says so, and stops nothing: the stage itself will tell."""
    try:
        return list(check())
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return [Finding(stage, f"{kind}: {reason}", UNKNOWN, "look at it yourself")]


def shown(found: list[Finding], *, brief: bool) -> str:
    """The list, or the part of it that is not as it should be."""
    rows = [
        {
            "stage": each.stage,
            "what": each.what,
            "state": each.state,
            "what to do": "" if each.state == OK else each.advice,
        }
        for each in found
        if each.state != OK or not brief
    ]
    if not rows:
        return ""
    from ..logs import table  # brings numpy: not above

    return table(rows)


def main(arguments: list[str]) -> int:
    words = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape").split("\0")[:-1]
    found = findings(read_needs(words))
    if text := shown(found, brief="--brief" in arguments):
        print(text)
    missing = [each for each in found if each.state == MISSING]
    if missing:
        stages = ", ".join(dict.fromkeys(each.stage for each in missing))
        print(f"error: {len(missing)} missing ({stages}); PREFLIGHT=off starts the chain all the same", file=sys.stderr)
    return EXIT_BAD_INPUT if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
