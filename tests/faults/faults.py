"""The faults, each a function that disturbs one run of one stage, restarts it, and judges what came of it.

The outcome is "same" (after the restart all is as undisturbed), "clear line" (one line names the damaged file and the
script that remakes it, and that script does), "failed", or "not applicable" (this machine or user cannot do it).
"""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.files import read_json

from .harness import Chain, Ended
from .stages import BY_NAME, Stage
from .zygote import set_immutable

SAME, CLEAR, FAILED, NOT_APPLICABLE = "same", "clear line", "failed", "not applicable"
IN_USE = "in use by another process"
ALREADY = "nothing was removed"  # what the removal of pictures says that are gone
PAGE = 4096


class Outcome(NamedTuple):
    """What one fault led to."""

    outcome: str
    moment: str
    """Where it struck."""
    told: str = ""
    """The line that the disturbed command, or the reader of a damaged file, ended with."""
    wrong: str = ""
    """Why it failed."""
    felt: bool = True
    """It struck before the command had ended, or was in its way."""


class Wrong(AssertionError):
    """The fault led to something that it must not."""


def killed_at_change(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """SIGKILL to the process group right before one of the changes to files."""
    at = draw.randrange(chain.known[stage.name].changes)
    chain.set_up(stage)
    ended = chain.run(stage, action="kill", at=at)
    _require(ended.status in (-signal.SIGKILL, 0), f"status {ended.status}: {ended.errors[-600:]}")
    restart(chain, stage)
    return Outcome(SAME, f"change {at + 1} of {chain.known[stage.name].changes}", felt=ended.status != 0)


def killed_at_time(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """SIGKILL to the process group at a random share of the undisturbed time."""
    seconds = draw.random() * chain.known[stage.name].seconds
    chain.set_up(stage)
    request = chain.request(stage)
    ended = chain.finish(chain.zygote.start(request), request, kill_after=seconds)
    restart(chain, stage)
    moment = f"after {seconds:.2f} of {chain.known[stage.name].seconds:.2f} s"
    return Outcome(SAME, moment, felt=ended.status != 0)


def killed_alone(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """The same with `python -m`, outside the zygote: killed, and restarted."""
    chain.set_up(stage)
    whole = chain.run_alone(stage)
    _require(whole.status == 0 and chain.differs(stage) is None, f"undisturbed: {whole.errors[-600:]}")
    seconds = draw.uniform(0.3, 1.0) * whole.seconds
    chain.set_up(stage)
    killed = chain.run_alone(stage, kill_after=seconds)
    ended = chain.run_alone(stage)
    _require(ended.status == 0 or _is_gone(stage, ended), f"restart: {ended.errors[-600:]}")
    _require_same(chain, stage)
    return Outcome(SAME, f"after {seconds:.1f} of {whole.seconds:.1f} s", felt=killed.status != 0)


def limited_file_size(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """RLIMIT_FSIZE below the largest file: writing it fails with EFBIG."""
    size = draw.randrange(chain.known[stage.name].largest)
    chain.set_up(stage)
    told = _refused_or_done(chain.run(stage, file_size=size))
    restart(chain, stage)
    return Outcome(SAME, f"files of at most {size:,} bytes", told, felt=bool(told))


def full_disk(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """The stage's folder lies on a disk of its own that is too small, and is enlarged afterwards."""
    chain.set_up(stage)
    folder = chain.here / stage.folder
    held = sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())
    size = PAGE * (held + 1 + draw.randrange(1 + chain.known[stage.name].total // PAGE))
    disk = chain.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return Outcome(NOT_APPLICABLE, "a disk cannot be mounted here")
    try:
        if folder.is_dir():
            shutil.copytree(folder, disk, dirs_exist_ok=True)
            shutil.rmtree(folder)
        folder.symlink_to(disk)
        told = _refused_or_done(chain.run(stage))
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        restart(chain, stage)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return Outcome(SAME, f"a disk of {size:,} bytes", told, felt=bool(told))


def read_only(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """From one of the changes to files on, the folder that it changes is read-only, and writable again afterwards."""
    at = draw.randrange(chain.known[stage.name].changes)
    chain.set_up(stage)
    try:
        set_immutable(chain.here, True)
        set_immutable(chain.here, False)
    except OSError as error:
        return Outcome(NOT_APPLICABLE, f"files cannot be made immutable here ({error.strerror})")
    request = chain.request(stage, action="freeze", at=at)
    ended = chain.finish(chain.zygote.start(request), request)
    frozen = Path(f"{request.log}.note")
    if frozen.is_file() and Path(frozen.read_text()).is_dir():
        set_immutable(Path(frozen.read_text()), False)
    told = _refused_or_done(ended)
    restart(chain, stage)
    return Outcome(SAME, f"from change {at + 1} of {chain.known[stage.name].changes} on", told, felt=bool(told))


def truncated(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """A finished file loses its end."""

    def cut(data: bytearray) -> str:
        kept = draw.randrange(len(data))
        del data[kept:]
        return f"cut to {kept:,} bytes"

    return _damaged(chain, stage, draw, cut)


def flipped(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """One bit of a finished file changes, and its times do not, as on a failing disk."""

    def flip(data: bytearray) -> str:
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        return f"bit {place:,} flipped"

    return _damaged(chain, stage, draw, flip)


def twice(chain: Chain, stage: Stage, draw: random.Random) -> Outcome:
    """The same command is started again while it runs."""
    seconds = draw.uniform(0.0, 0.7) * chain.known[stage.name].seconds  # the second, too, takes its time to come there
    chain.set_up(stage)
    first = chain.request(stage)
    pid = chain.zygote.start(first)
    status = chain.zygote.wait(pid, seconds)
    second = chain.run(stage)
    if status is not None:
        chain.zygote.statuses[pid] = status
    both = [chain.finish(pid, first), second]
    for ended in both:
        refused = (ended.refusal is not None and IN_USE in ended.refusal) or _is_gone(stage, ended)
        _require(ended.status == 0 or refused, f"status {ended.status}: {ended.errors[-600:]}")
    _require(any(ended.status == 0 for ended in both), "neither came to its end")
    restart(chain, stage)
    told = next((ended.refusal for ended in both if ended.refusal and IN_USE in ended.refusal), "")
    return Outcome(SAME, f"after {seconds:.2f} of {chain.known[stage.name].seconds:.2f} s", told, felt=bool(told))


FAULTS: dict[str, Callable[[Chain, Stage, random.Random], Outcome]] = {
    "killed at a change": killed_at_change,
    "killed at a time": killed_at_time,
    "file size limited": limited_file_size,
    "disk full": full_disk,
    "read-only": read_only,
    "truncated": truncated,
    "bit flipped": flipped,
    "started twice": twice,
}


def strike(chain: Chain, name: str, stage: Stage, draw: random.Random) -> Outcome:
    """Do one fault and judge it."""
    try:
        return {**FAULTS, "killed, python -m": killed_alone}[name](chain, stage, draw)
    except (AssertionError, TimeoutError) as error:
        return Outcome(FAILED, "", wrong=str(error))


def restart(chain: Chain, stage: Stage) -> None:
    """Start the stage again: it must come to its end, with the undisturbed result."""
    ended = chain.run(stage)
    _require(ended.status == 0 or _is_gone(stage, ended), f"restart ended with {ended.status}: {ended.errors[-600:]}")
    _require_same(chain, stage)


def _damaged(chain: Chain, stage: Stage, draw: random.Random, damage: Callable[[bytearray], str]) -> Outcome:
    """Damage a file of a finished stage: its own command and the next one must refuse it, and remaking must help."""
    chain.set_up(stage, finished=True)
    named = read_json(chain.here / stage.folder / "manifest.json")["outputs"]  # an index has an older version beside it
    left = [chain.here / stage.folder / name for name in ("manifest.json", *named)]
    path = draw.choice([file for file in left if file.stat().st_size])
    data, times = bytearray(path.read_bytes()), path.stat()
    moment = f"{path.relative_to(chain.here)} {damage(data)}"
    path.unlink()  # the link, not the file that it leads to
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    told = ""
    for each in filter(None, (stage, BY_NAME[stage.reader] if stage.reader else None)):
        ended = chain.run(each)
        line = ended.refusal or ""
        relative = str(path.relative_to(chain.here))
        if relative.endswith("manifest.json") and ended.status == 0 and chain.differs(stage) is None:
            continue  # white space, or what is compared with nothing
        _require(bool(line), f"{each.name} ended with {ended.status} for {moment}: {ended.errors[-600:]}")
        _require(relative in line and stage.script in line, f"{each.name}, {moment}: {line}")
        told = line
    if told:
        chain.remake(stage)
    _require_same(chain, stage)
    return Outcome(CLEAR if told else SAME, moment, told)


def _refused_or_done(ended: Ended) -> str:
    """The clear line that a disturbed command ended with; nothing when it came to its end all the same."""
    _require(ended.status == 0 or ended.refusal is not None, f"status {ended.status}: {ended.errors[-900:]}")
    return ended.refusal or ""


def _is_gone(stage: Stage, ended: Ended) -> bool:
    """The pictures that are to be removed had been removed already."""
    return stage.name == "14-" and ended.refusal is not None and ALREADY in ended.refusal


def _require_same(chain: Chain, stage: Stage) -> None:
    different = chain.differs(stage)
    _require(different is None, f"{different} is not as undisturbed")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)
