"""Runs commands of the chain in folders of their own, disturbs them, restarts them, and compares what is left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tools.files import hash_file, read_json

from .stages import STAGES, Stage, first_inputs
from .zygote import Request, Zygote, environment

PATIENCE = 1200.0  # seconds for one command
TIMED = ("per_second", "seconds")  # of figures that are no two times the same
TIMED_FILES = frozenset({"table.txt"})  # which hold such figures
SPLIT_LINES = re.compile(r"[\r\n]+")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """A signal as its negative."""
    out: str
    errors: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What stands on standard error, progress bars left out."""
        return [line for line in SPLIT_LINES.split(self.errors) if line.strip() and "it/s]" not in line]

    @property
    def refusal(self) -> str | None:
        """The one clear line of a command that gave up; None for any other end."""
        told = [line for line in self.lines if line.startswith("error: ")]
        clear = self.status == 2 and len(told) == 1 and self.lines[-1] == told[0] and "Traceback" not in self.errors
        return told[0] if clear else None


class Undisturbed(NamedTuple):
    """What a stage does when nothing happens to it."""

    content: dict[str, Any]
    changes: int
    """To files, as `zygote.Watch` counts them."""
    seconds: float
    largest: int
    """Bytes of its largest file."""
    total: int
    """Bytes of all its files."""


@dataclass
class Chain:
    """The undisturbed chain, and where its stages are run again.

    Attributes:
        folder: `base`, the first inputs; `after/<stage>`, what each stage left; `run`, where the next command runs.
        pictures: what they are, in words.
    """

    folder: Path
    zygote: Zygote
    stages: tuple[Stage, ...]
    pictures: str = ""
    known: dict[str, Undisturbed] = field(default_factory=dict)
    commands: int = 0

    @property
    def here(self) -> Path:
        return self.folder / "run"

    def make(self, data: Path | None) -> None:
        """Run every stage twice, the second time for its time: the first loads what it needs. Both must agree."""
        self.pictures = first_inputs(self.folder / "base", data)
        for stage in self.stages:
            self.set_up(stage)
            ended, changes = self.count(stage)
            assert ended.status == 0, f"{stage.name}: {ended.errors}"
            self.keep(stage)
            left = [path for path in (self.here / stage.folder).rglob("*") if path.is_file()]
            sizes = [path.stat().st_size for path in left] or [0]
            found = content(self.here, stage)
            self.set_up(stage)
            self.known[stage.name] = Undisturbed(found, changes, self.run(stage).seconds, max(sizes), sum(sizes))
            assert self.differs(stage) is None, f"{stage.name} does not give the same twice: {self.differs(stage)}"

    def set_up(self, stage: Stage, *, finished: bool = False) -> None:
        """A fresh folder with what the stages before left; `finished`: with what it left too, and all up to its reader.

        Files are hard links: what is damaged must be replaced, not written to.
        """
        shutil.rmtree(self.here, ignore_errors=True)
        copy_links(self.folder / "base", self.here)
        names = [each.name for each in self.stages]
        end = names.index(stage.name) + finished
        if finished and stage.reader is not None:
            end = names.index(stage.reader) if stage.reader in names else len(names)
        for earlier in self.stages[:end]:
            if earlier.folder == stage.folder and names.index(earlier.name) > names.index(stage.name):
                continue  # a later change of the same folder
            shutil.rmtree(self.here / earlier.folder, ignore_errors=True)
            copy_links(self.folder / "after" / earlier.name, self.here)

    def keep(self, stage: Stage) -> None:
        """Remember what a stage has left."""
        after = self.folder / "after" / stage.name
        copy_links(self.here / stage.folder, after / stage.folder)
        for name in stage.beside:
            shutil.copy(self.here / name, after / name)

    def count(self, stage: Stage) -> tuple[Ended, int]:
        """Run a stage; how it ended, and how many changes to files it made."""
        request = self.request(stage)
        ended = self.finish(self.zygote.start(request), request)
        return ended, int(Path(f"{request.log}.note").read_text())

    def run(self, stage: Stage, *more: str, **options: Any) -> Ended:
        """Run a stage to its end."""
        request = self.request(stage, *more, **options)
        if request.file_size is not None:
            return self.finish_through_pipes(request)
        return self.finish(self.zygote.start(request), request)

    def request(self, stage: Stage, *more: str, **options: Any) -> Request:
        self.commands += 1
        log = self.folder / "logs" / f"{self.commands:05d}-{stage.name}"
        log.parent.mkdir(exist_ok=True)
        for end in ("out", "err"):
            Path(f"{log}.{end}").touch()
        return Request(stage.module, [*stage.line, *more], str(self.here), str(log), **options)

    def finish(self, pid: int, request: Request, *, kill_after: float | None = None) -> Ended:
        """Wait for a command, and kill its process group after so many seconds, if it is still running."""
        began = time.monotonic()
        status = self.zygote.wait(pid, kill_after) if kill_after is not None else None
        if status is None and kill_after is not None:
            os.killpg(pid, signal.SIGKILL)
        if status is None:
            status = self.zygote.wait(pid, PATIENCE)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            raise TimeoutError(f"{request.module} {request.arguments} took more than {PATIENCE} seconds")
        out, errors = (Path(f"{request.log}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return Ended(status, out, errors, time.monotonic() - began)

    def finish_through_pipes(self, request: Request) -> Ended:
        """The same where the size of files is limited, which that of a pipe is not."""
        texts: dict[str, str] = {}

        def read(end: str) -> None:
            texts[end] = Path(f"{request.log}.{end}.pipe").read_text(errors="replace")

        readers = []
        for end in ("out", "err"):
            os.mkfifo(f"{request.log}.{end}.pipe")
            Path(f"{request.log}.{end}").unlink()
            Path(f"{request.log}.{end}").symlink_to(f"{request.log}.{end}.pipe")
            readers.append(threading.Thread(target=read, args=(end,), daemon=True))
            readers[-1].start()
        began = time.monotonic()
        status = self.zygote.wait(self.zygote.start(request), PATIENCE)
        assert status is not None, f"{request.module} took more than {PATIENCE} seconds"
        for reader in readers:
            reader.join(PATIENCE)
        for end, text in texts.items():
            Path(f"{request.log}.{end}.pipe").unlink()
            Path(f"{request.log}.{end}").unlink()
            Path(f"{request.log}.{end}").write_text(text)
        return Ended(status, texts["out"], texts["err"], time.monotonic() - began)

    def run_alone(self, stage: Stage, *, kill_after: float | None = None) -> Ended:
        """The same as a user does it: `python -m`, in a process of its own."""
        return run_alone([sys.executable, "-m", stage.module, *stage.line], self.here, kill_after=kill_after)

    def differs(self, stage: Stage) -> str | None:
        """What the stage has left that it does not leave undisturbed; None when all is the same."""
        wanted, found = self.known[stage.name].content, content(self.here, stage)
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                return name
        return None

    def remake(self, stage: Stage) -> None:
        """Do what a refusal asks for: the named script again with --overwrite, then what changed its result since."""
        same = [each for each in self.stages if each.folder == stage.folder]
        for each in same[: same.index(stage) + 1]:
            ended = self.run(each, *([] if each.changes else ["--overwrite"]))
            assert ended.status == 0, f"{each.name} --overwrite: {ended.errors}"


def run_alone(
    command: Sequence[str], folder: Path, *, kill_after: float | None = None, more: dict[str, str] | None = None
) -> Ended:
    """Run a command in a process group of its own, and kill that after so many seconds, if it is still running."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env={**environment(), **(more or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=PATIENCE if kill_after is None else kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
    return Ended(process.returncode, out, errors, time.monotonic() - began)


def copy_links(source: Path, target: Path) -> None:
    """Copy a folder by hard links, locks left out."""
    for path in [source, *source.rglob("*")]:
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif path.name != ".lock":
            there.unlink(missing_ok=True)
            os.link(path, there)


def content(folder: Path, stage: Stage) -> dict[str, Any]:
    """What a finished stage says and holds, by name, without times: values of the manifest, hashes of files."""
    manifest = read_json(folder / stage.folder / "manifest.json")
    names = sorted(str(p.relative_to(folder / stage.folder)) for p in (folder / stage.folder).rglob("*") if p.is_file())
    found: dict[str, Any] = {
        "command": manifest["command"],
        "files": [name for name in names if name != ".lock"],
        "facts": {name: value for name, value in manifest["facts"].items() if name != "history"},
        "metrics": untimed(manifest["metrics"]),
    }
    for name, recorded in manifest["outputs"].items():
        if name not in TIMED_FILES:
            found[f"manifest on {name}"] = recorded
            found[name] = hash_file(folder / stage.folder / name)
    return {**found, **{name: untimed(read_json(folder / name)) for name in stage.beside}}


def untimed(value: Any) -> Any:
    """JSON without the figures that are no two times the same."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if not any(word in key for word in TIMED)}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def up_to(last: str) -> tuple[Stage, ...]:
    """The first stages of the chain."""
    names = [stage.name for stage in STAGES]
    return STAGES[: names.index(last) + 1]


def modules(stages: Iterable[Stage]) -> list[str]:
    """The modules of stages, for a zygote to load."""
    return sorted({stage.module for stage in stages})
