"""Run folders: each command leaves one, and `manifest.json`, written last, says that it is complete.

    run = begin("RQ-VAE.generate_codes", config, inputs={"rqvae": config.rqvae})
    if run is None:      # the same command with the same configuration and inputs is already there
        return
    ...                  # write files into run.folder
    run.finish(facts={"levels": 4}, metrics={"collisions": 0.002})

The next command asks `read_manifest(folder, "RQ-VAE.generate_codes")` and is refused when the folder is not complete,
or a file in it is no longer what the manifest's hashes say. Hashing happens once per process, and takes about a second
for a gigabyte; `VERIFY=off` leaves it out. `started.json`, written first, holds the configuration of a run that has not
finished: the same command then resumes.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from . import environment, processes
from .command_line.command_names import current_name, scripts_for, scripts_of_commands
from .command_line.place import is_untouched, started_by
from .errors import EXIT_BAD_INPUT, BadInput
from .files import file_sizes, hash_file, read_json, remove_torn, verified_hash, write_json

log = logging.getLogger(__name__)

FORMAT = 1  # of a manifest and of what lies beside it: a change that old folders do not fit counts it up
MANIFEST = "manifest.json"
STARTED = "started.json"
LOCK = ".lock"
RESUME = "resume"  # a folder for what only a resumed run needs; removed when the run finishes
KINDS = {"command": str} | dict.fromkeys(("config", "inputs", "outputs", "facts", "metrics"), dict)
CHECKSUM = "checksum"  # of the manifest's other values
VERIFY_VARIABLE = "VERIFY"  # "off": files are not compared with their manifest's hashes; "all": even large ones are
RUNTIME_FIELDS = frozenset(  # these do not change what is computed: a run may go on with others
    {"output", "overwrite", "workers", "device", "threads", "cluster", "accept_torn"}
    | {"api_key_variable", "requests_per_minute", "parallel", "retries", "skip_refused"}
)

_HELD: "weakref.WeakSet[TextIO]" = weakref.WeakSet()  # locks of this process
os.register_at_fork(after_in_child=lambda: [file.close() for file in _HELD])  # a child does not hold what it outlives


class InUse(BadInput):
    """Another process holds a run folder: it will let go of it."""


class StageConfig(Protocol):
    """What every command's configuration has: a dataclass with an output folder and the overwrite flag."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def output(self) -> Path: ...

    @property
    def overwrite(self) -> bool: ...


@dataclass(frozen=True)
class Manifest:
    """A finished run, read back."""

    folder: Path
    command: str
    arguments: list[str]
    source: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    outputs: dict[str, str]
    facts: dict[str, Any]
    metrics: dict[str, Any]
    seconds: float
    commit: str
    format: int = 1
    """`FORMAT` when the manifest was written; those of before it was counted have the first."""
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`environment.describe()` of the process that finished the run; empty in manifests of earlier versions."""

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the folder: equal outputs and facts, equal fingerprint."""
        return _hash_value([self.outputs, self.facts])


@dataclass
class Run:
    """A run under way. Files go into `folder`; what only a resumed run needs goes into `resume_folder`."""

    folder: Path
    started: dict[str, Any]
    began: float
    lock: TextIO | None
    """None in a process that shares the main one's run."""

    @property
    def resume_folder(self) -> Path:
        folder = self.folder / RESUME
        folder.mkdir(exist_ok=True)
        return folder

    def finish(self, *, facts: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None) -> Manifest:
        """Hash every output and write the manifest; only then does what a resumed run needs go.

        Of several processes the main one does this, when all have come here, and tells the others.
        """
        processes.wait()
        manifest = None
        if self.lock is not None:
            self._write_manifest(facts or {}, metrics or {})
            self.lock.close()
            manifest = Manifest(folder=self.folder, **_manifest_values(self.folder))
        told = processes.share(manifest)
        assert told is not None, "the main process has no run"
        return told

    def _write_manifest(self, facts: dict[str, Any], metrics: dict[str, Any]) -> None:
        earlier = float(self.started.get("seconds", 0.0))
        manifest = {
            "format": FORMAT,
            **{key: self.started[key] for key in ("command", "arguments", "source", "config", "inputs")},
            "outputs": _hashes(self.folder, _output_files(self.folder)),
            "facts": facts,
            "metrics": metrics,
            "seconds": round(earlier + time.monotonic() - self.began, 2),
            "commit": current_commit(),
            "environment": environment.describe(),
        }
        write_manifest(self.folder, manifest)
        log.info("%s is finished: %d files, %.1f s", self.folder, len(manifest["outputs"]), manifest["seconds"])
        _drop_leftovers(self.folder)

    def note_time(self) -> None:
        """Add the seconds so far to `started.json`, so that a resumed run reports its whole time."""
        if self.lock is None:
            return
        now = time.monotonic()
        self.started["seconds"] = float(self.started.get("seconds", 0.0)) + now - self.began
        self.began = now
        write_json(self.folder / STARTED, self.started)


def begin(
    command: str, config: StageConfig, *, inputs: dict[str, Path], listings: dict[str, Path] | None = None
) -> Run | None:
    """Open the run folder `config.output`: new, resumed, or None when it is already finished.

    Args:
        command: the module that runs, for example "RQ-VAE.train".
        inputs: field name of `config` -> file or run folder; compared by content, not by path.
        listings: the same for folders too large to read, compared by file names and sizes.

    Raises:
        BadInput: the folder holds another configuration or other inputs and `overwrite` is off, or is in use.
    """
    processes.connect()
    run, refusal = None, None
    if processes.is_main():
        try:
            run = _begin(command, config, inputs, listings or {})
        except BadInput as error:
            refusal = error
    started, refused = processes.share((None if run is None else run.started, refusal is not None))
    if refusal is not None:
        try:
            raise refusal
        finally:
            del refusal  # it and this frame would keep each other, and the folder's lock
    if refused:  # the main process has said why
        raise SystemExit(EXIT_BAD_INPUT)
    if run is None and started is not None:
        return Run(folder=config.output, started=started, began=time.monotonic(), lock=None)
    return run


def _begin(command: str, config: StageConfig, inputs: dict[str, Path], listings: dict[str, Path]) -> Run | None:
    folder = config.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{folder} cannot be a folder, {error.filename} is a file: {_elsewhere()}") from None
    lock = hold(folder)
    started = {
        "command": command,
        "arguments": sys.argv[1:],
        "source": source_of(command),
        "config": _config_values(config),
        "inputs": {
            **{name: _input(path, "content") for name, path in sorted(inputs.items())},
            **{name: _input(path, "listing") for name, path in sorted(listings.items())},
        },
    }
    for torn in folder.glob(f".{STARTED}.*.part"):  # of a run that was killed with its first file
        torn.unlink()
    if config.overwrite:
        clear(folder)
    found = _found(folder, command)
    if found is not None and not (folder / MANIFEST).exists() and not _has_work(folder):
        found = None  # it stopped before it wrote anything: nothing to resume, nothing to lose
    if found is not None:
        _refuse_difference(folder, found, started, _defaults(config))
        if (folder / MANIFEST).exists():
            check_files(folder)
            _drop_leftovers(folder)
            print(f"{command}: {folder} is finished; nothing to do.")
            lock.close()
            return None
        print(f"{command}: resuming in {folder}.")
        started = found
        remove_torn(folder)
    elif unknown := _output_files(folder):
        raise BadInput(f"{folder} holds files no run of this project left ({unknown[0].name}): {_elsewhere()}")
    else:
        shutil.rmtree(folder / RESUME, ignore_errors=True)
    log.debug("%s writes %s, from %s", command, folder, started["inputs"])
    write_json(folder / STARTED, started)
    return Run(folder=folder, started=started, began=time.monotonic(), lock=lock)


def read_manifest(folder: Path, *commands: str, hashed: int | None = None) -> Manifest:
    """Read a finished run folder that one of `commands` made.

    Args:
        hashed: bytes of a file up to which it is compared with its hash, unless `VERIFY=all`; by default all are.

    Raises:
        BadInput: there is no manifest, another command made the folder, or a file in it is damaged; the message names
            the script to run.
    """
    commands = tuple(map(current_name, commands))
    scripts = scripts_for(folder, *commands)
    if not (folder / MANIFEST).is_file():
        state = "was not finished" if (folder / STARTED).is_file() else "has no manifest.json"
        whole = ", or scripts/quickstart.sh, which runs all stages" if is_untouched(folder) and not started_by() else ""
        raise BadInput(f"{folder} {state}: run {scripts} first{whole}")
    values = _manifest_values(folder, *commands)
    if values["command"] not in commands:
        raise BadInput(
            f"{folder} was made by {values['command']}, not by {' or '.join(commands)}: name a folder that "
            f"{scripts} made"
        )
    while damage := _damage(folder, values["outputs"], hashed=hashed):
        newer = _manifest_values(folder, *commands)
        if newer == values:
            raise BadInput(f"{damage}: run {scripts_for(folder, values['command'])} --overwrite")
        values = newer  # the folder's content was replaced in the meantime
    log.debug("%s is whole: made by %s at commit %s", folder, values["command"], values["commit"])
    return Manifest(folder=folder, **values)


def check_files(path: Path) -> None:
    """Compare a run folder, or a file or folder in one, with its manifest; nothing where no finished run left it.

    Raises:
        BadInput: a file is gone or damaged; the message names it and the script to run.
    """
    folder = next((each for each in (path.absolute(), *path.absolute().parents) if (each / MANIFEST).is_file()), None)
    if folder is None or not (folder / LOCK).is_file():  # a stranger's manifest.json
        return
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # as the user knows it
    values = _manifest_values(folder)
    own = {name: content for name, content in values["outputs"].items() if _lies_in(folder / name, path)}
    if damage := _damage(folder, own):
        raise BadInput(f"{damage}: run {scripts_for(folder, values['command'])} --overwrite")


def unchanged_input(manifest: Manifest, name: str) -> Path:
    """The path of a finished run's input.

    Raises:
        BadInput: it is gone, or no longer has the content the run read.
    """
    recorded = manifest.inputs[name]
    path = Path(recorded["path"])
    if fingerprint(path, recorded["by"]) != recorded["fingerprint"]:
        script = scripts_for(manifest.folder, manifest.command)
        raise BadInput(f"{path} has changed since {manifest.folder} was made: run {script} --overwrite")
    return path


def replace_outputs(
    manifest: Manifest, outputs: Iterable[Path], facts: dict[str, Any], *, unread: Iterable[str] = ()
) -> None:
    """Let the manifest of a finished run speak of other files of its folder, in one step that outlives a power cut.

    Args:
        unread: those of its files, seen from the folder, that it speaks of besides, and which have not changed.
    """
    values = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    folder = values.pop("folder")
    hashes = {**{name: manifest.outputs[name] for name in unread}, **_hashes(folder, outputs)}
    write_manifest(folder, {**values, "outputs": hashes, "facts": facts}, durable=True)


def write_manifest(folder: Path, values: dict[str, Any], *, durable: bool = False) -> None:
    """Write a manifest with a checksum of its own, atomically.

    Args:
        durable: as in `replacing`.
    """
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key != CHECKSUM}))
    write_json(folder / MANIFEST, {**plain, CHECKSUM: _hash_value(plain)}, durable=durable)


def reopen(folder: Path, command: str, *, unless: dict[str, Any]) -> None:
    """Make a finished run one under way, where what it was made from has grown since: the same command then goes on.

    Args:
        unless: facts of the manifest; where it has these, the run stays finished.
    """
    if not (folder / MANIFEST).is_file():
        return
    lock = hold(folder)
    try:
        values = _manifest_values(folder, command)
        if values["command"] == command and any(values["facts"].get(name) != value for name, value in unless.items()):
            (folder / MANIFEST).replace(folder / STARTED)
    finally:
        lock.close()


def hold(folder: Path) -> TextIO:
    """Hold a run folder until the file is closed, at the latest when the process ends.

    Raises:
        InUse: another process holds it.
    """
    file = (folder / LOCK).open("a")
    _HELD.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InUse(f"{folder} is in use by another process: wait until it has finished") from None
    return file


def seconds_so_far(folder: Path) -> float | None:
    """Seconds that the run under way in a folder has taken, those before it was resumed too; None without a run."""
    started = folder / STARTED
    if not started.is_file():
        return None
    return float(read_json(started).get("seconds", 0.0)) + time.time() - started.stat().st_mtime  # when they were noted


def check_clearable(folder: Path) -> None:
    """Refuse to clear a folder that no run of this project has written into."""
    if not any((folder / name).is_file() for name in (MANIFEST, STARTED)) and _output_files(folder):
        raise BadInput(
            f"{folder} holds files that no run of this project left: --overwrite will not remove them, move them away"
        )


def clear(folder: Path) -> None:
    """Remove an earlier run's files. Its manifest goes first, so that no reader trusts a torn folder, and becomes the
    record of a run under way, so that the folder is still known as ours when this is cut short."""
    check_clearable(folder)
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).replace(folder / STARTED)
    for path in folder.iterdir():
        if path.name in (LOCK, STARTED):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / STARTED).unlink(missing_ok=True)


def keep_only(folder: Path, pattern: str, kept: Path | None) -> None:
    """Remove the folders of a pattern that the saved state no longer speaks of, all but `kept`."""
    for path in folder.glob(pattern):
        if path != kept:
            shutil.rmtree(path)


def fingerprint(path: Path, by: str = "content") -> str:
    """Content of a run folder (through its manifest), a file, or a plain folder, as a short hex string.

    Args:
        by: "listing" looks at the names and sizes of a folder's files alone, as `file_sizes` has them.
    """
    if by == "listing":
        return _hash_value(file_sizes(path))
    if (path / MANIFEST).is_file():
        values = _manifest_values(path)
        return _hash_value([values["outputs"], values["facts"]])
    if path.is_file():
        return hash_file(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _hash_value([[str(file.relative_to(path)), hash_file(file)] for file in files])
    raise BadInput(f"{path} does not exist")


def source_of(command: str) -> str:
    """Hash of the files beside a command, which hold its configuration's defaults; empty when there is no such file."""
    path = Path(__file__).parent.parent / command.replace(".", "/")
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        return ""
    return _hash_value([[file.name, hash_file(file)] for file in sorted(folder.glob("*.py")) if file.is_file()])


def current_commit(folder: Path | None = None) -> str:
    """The commit of the checkout, with "+changes" when it is dirty; "unknown" outside git.

    Args:
        folder: in the checkout; by default the current one.
    """
    asked: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **asked)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], **asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return str(commit.stdout.strip()) + ("+changes" if status.stdout.strip() else "")


def _config_values(config: StageConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return {name: value for name, value in plain.items() if name not in RUNTIME_FIELDS}


def _defaults(config: StageConfig) -> dict[str, Any]:
    values = {field.name: field.default for field in dataclasses.fields(config)}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _found(folder: Path, command: str) -> dict[str, Any] | None:
    if (folder / MANIFEST).is_file():
        return _manifest_values(folder, command)
    if (folder / STARTED).is_file():
        values = _record(folder / STARTED, {"command", "arguments", "source", "config", "inputs"}, [command])
        return {**values, "command": current_name(values["command"])}
    return None


def _manifest_values(folder: Path, *commands: str) -> dict[str, Any]:
    """What a manifest holds, without its checksum.

    Args:
        commands: that may have made the folder: whose script to name when the manifest is damaged.
    """
    path = folder / MANIFEST
    wanted = {field.name for field in dataclasses.fields(Manifest)} - {"folder"}
    needed = wanted - {"environment", "format"}  # the first manifests have none, and no checksum
    values = _record(path, needed, commands)
    checksum = values.pop(CHECKSUM, None)
    if (checksum is not None and checksum != _hash_value(values)) or not needed <= values.keys() <= wanted:
        raise _damaged_record(path, "its checksum is another", commands)
    return {**values, "command": current_name(values["command"])}


def _record(path: Path, wanted: set[str], commands: Iterable[str]) -> dict[str, Any]:
    try:
        values = read_json(path)
    except BadInput as error:
        raise _damaged_record(path, str(error).removeprefix(str(path)).lstrip(", "), commands) from None
    if not isinstance(values, dict):
        raise _damaged_record(path, f"it holds a {type(values).__name__}", commands)
    _refuse_format(path, values, commands)
    if missing := sorted(wanted - values.keys()):
        raise _damaged_record(path, f"it has no {missing[0]}", commands)
    if wrong := [key for key, kind in KINDS.items() if key in wanted and not isinstance(values[key], kind)]:
        raise _damaged_record(path, f"its {wrong[0]} is a {type(values[wrong[0]]).__name__}", commands)
    return values


def _refuse_format(path: Path, values: dict[str, Any], commands: Iterable[str]) -> None:
    found = values.get("format", 1)
    if type(found) is not int:
        raise _damaged_record(path, "its format is no number", commands)
    if found < FORMAT:
        again = _scripts(path, commands)
        raise BadInput(
            f"{path.parent} was made by an earlier version of this project (format {found}, this one reads {FORMAT}): "
            f"run {again} --overwrite"
        )
    if found > FORMAT:
        raise BadInput(
            f"{path.parent} was made by a later version of this project (format {found}, this one reads {FORMAT}): "
            "update the project (git pull), or name another folder"
        )


def _damaged_record(path: Path, reason: str, commands: Iterable[str]) -> BadInput:
    return BadInput(f"{path} is damaged ({reason}): run {_scripts(path, commands)} --overwrite")


def _scripts(path: Path, commands: Iterable[str]) -> str:
    """Which scripts may have made the folder of a record."""
    by_name = [name for name, script in scripts_of_commands().items() if Path(script).stem == path.parent.name]
    return scripts_for(path.parent, *(list(commands) or by_name)) or f"the command that made {path.parent}"


def _damage(folder: Path, outputs: dict[str, str], *, hashed: int | None = None) -> str:
    """What is wrong with the first file that is not as a manifest has it, or nothing. The main process alone looks.

    Args:
        hashed: as in `read_manifest`.
    """
    if not processes.is_main():  # it ends the others when it is refused
        return ""
    verify = os.environ.get(VERIFY_VARIABLE)
    for name, content in outputs.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if verify == "off" or (hashed is not None and size > hashed and verify != "all"):
                continue
            if verified_hash(path) != content:
                return f"{path} is damaged, it has changed since it was made"
        except FileNotFoundError:
            return f"{path} is missing"
    return ""


def _lies_in(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _refuse_difference(folder: Path, found: dict[str, Any], wanted: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a folder of another run.

    Args:
        defaults: of the configuration: what a run meant that knew nothing of a field.
    """
    if found["command"] != wanted["command"]:
        raise BadInput(f"{folder} was made by {found['command']}: {_elsewhere()}")
    differences = [
        f"--{name.replace('_', '-')} was {found['config'].get(name, defaults.get(name))}, now {value}"
        for name, value in wanted["config"].items()
        if name not in wanted["inputs"] and found["config"].get(name, defaults.get(name)) != value
    ]
    differences += [
        f"{name} ({value['path']}) has changed since"
        for name, value in wanted["inputs"].items()
        if found["inputs"].get(name, {}).get("fingerprint") != value["fingerprint"]
    ]
    differences += [f"{name} was given" for name in found["inputs"] if name not in wanted["inputs"]]
    if differences:
        raise BadInput(f"{folder} holds another run ({'; '.join(differences)}): {_instead(folder, wanted['command'])}")


def _elsewhere() -> str:
    """What to do where something stands in the way of a folder."""
    return "move it away" if started_by() else "name another --output"


def _instead(folder: Path, command: str) -> str:
    """What to do where a folder holds another run."""
    chain = started_by()
    if not chain:
        return "add --overwrite or name another --output"
    alone = f", or this one with {scripts_for(folder, command)} --overwrite and then those that follow it"
    return f"make all stages again with {chain} --overwrite{'' if ' ' in chain else alone}"


def _input(path: Path, by: str) -> dict[str, str]:
    check_files(path)
    return {"path": str(path), "by": by, "fingerprint": fingerprint(path, by)}


def _output_files(folder: Path) -> list[Path]:
    """Everything in a run folder but its records and what only a resumed run needs."""
    own = {folder / name for name in (MANIFEST, STARTED, LOCK)}
    files = (path for path in folder.rglob("*") if path.is_file() and path not in own)
    return sorted(path for path in files if path.relative_to(folder).parts[0] != RESUME)


def _hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def _has_work(folder: Path) -> bool:
    """Whether a run that did not finish left outputs, or a state to resume from."""
    return bool(_output_files(folder)) or any(path.is_file() for path in (folder / RESUME).rglob("*"))


def _drop_leftovers(folder: Path) -> None:
    (folder / STARTED).unlink(missing_ok=True)
    shutil.rmtree(folder / RESUME, ignore_errors=True)


def _hash_value(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
