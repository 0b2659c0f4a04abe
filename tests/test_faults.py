"""A short seeded part of tests/faults: the first stages, disturbed in every way. Long: `python -m tests.faults`.

And how single errors of the machine are told: what is the machine's in one line, what is a bug with its traceback.
"""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.faults.__main__ import as_markdown, plan
from tests.faults.faults import CLEAR, FAULTS, NOT_APPLICABLE, SAME, strike
from tests.faults.harness import Chain, Ended, modules, up_to
from tests.faults.stages import STAGES
from tests.faults.zygote import zygote
from tests.test_commands import PROGRAM, ROOT
from tests.test_runs import Config, begin, config, finish
from tools import runs
from tools.command_line.command_names import scripts_of_commands
from tools.command_line.failures import explain, why_not_written
from tools.errors import BadInput
from tools.files import new_array, read_json, replacing, verified_hash, write_array, write_json
from tools.results import merge_summary

__all__ = ["config"]  # a fixture

DISTURBED = up_to("07")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with zygote(modules(DISTURBED)) as mother:
        chain = Chain(tmp_path_factory.mktemp("faults"), mother, DISTURBED)
        chain.make(None)
        yield chain


SHORT = plan(12, 7, tuple(stage for stage in DISTURBED if stage.name != "02"))  # whose weights are large


@pytest.mark.parametrize("number", range(len(SHORT)))
def test_a_fault_leaves_the_undisturbed_result_or_one_clear_line(number: int, undisturbed: Chain) -> None:
    name, stage = SHORT[number]
    outcome = strike(undisturbed, name, stage, random.Random(number))
    assert outcome.outcome in (SAME, CLEAR, NOT_APPLICABLE), f"{name}, stage {stage.name}: {outcome}"


def test_the_long_part_strikes_every_stage_with_every_fault() -> None:
    pairs = plan(240, 0, STAGES)
    assert len(pairs) == 240
    assert {(name, stage.name) for name, stage in pairs} == {(name, stage.name) for name in FAULTS for stage in STAGES}
    assert plan(240, 0, STAGES) == pairs != plan(240, 1, STAGES)
    scripts = {stage.script for stage in STAGES}
    left_out = {"scripts/00_fetch_emoji.sh", "scripts/11_finetune_retriever_llama.sh", "scripts/19_report.sh"}
    assert scripts == set(scripts_of_commands().values()) - left_out


def test_the_page_has_the_counts_of_the_long_part() -> None:
    report = read_json(ROOT / "docs" / "reliability.json")
    assert as_markdown(report) in (ROOT / "docs" / "reliability.md").read_text()
    assert len(report["faults"]) >= 200
    assert {row["stage"] for row in report["faults"]} >= {stage.name for stage in STAGES}
    assert set(report["outcomes"]) <= {SAME, CLEAR}


@pytest.mark.parametrize(
    ("errors", "clear"),
    [
        ("error: x is damaged: run scripts/y.sh\n", True),
        ("note\nepoch 1:  50%|#| 1/2 [00:01<00:01, 1.00it/s]\rerror: x\n", True),
        ("error: x\nmore\n", False),
        ("error: x\nerror: y\n", False),
        ("Traceback (most recent call last):\nerror: x\n", False),
        ("", False),
    ],
)
def test_what_counts_as_one_clear_line(errors: str, clear: bool) -> None:
    assert (Ended(2, "", errors, 0.0).refusal is not None) is clear
    assert Ended(1, "", errors, 0.0).refusal is None


# What is damaged


def test_damage_is_noticed_by_whoever_reads_the_folder(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(config)
    path = config.output / "result.txt"
    times = path.stat()
    path.write_text("resulu")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as when a bit of the disk flips
    line = r"run/result\.txt is damaged, it has changed since it was made: run tools\.example --overwrite$"
    with pytest.raises(BadInput, match=line):
        runs.read_manifest(config.output, "tools.example")
    with pytest.raises(BadInput, match=line):
        runs.check_files(path)
    with pytest.raises(BadInput, match=line):  # as an input of another run
        runs.begin("tools.other", Config(config.output.parent / "other", path), inputs={"source": path})
    with pytest.raises(BadInput, match=line):
        begin(config)
    runs.check_files(config.output / "nothing.txt")
    with monkeypatch.context() as patch:
        patch.setenv(runs.VERIFY_VARIABLE, "off")
        runs.read_manifest(config.output, "tools.example")
    path.unlink()
    with pytest.raises(BadInput, match=r"run/result\.txt is missing: run tools\.example --overwrite$"):
        runs.read_manifest(config.output, "tools.example")


def test_every_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(config: Config) -> None:
    manifest = finish(config)
    path = config.output / "manifest.json"
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = runs.read_manifest(config.output, "tools.example")
        except BadInput as error:
            assert re.search(r"manifest\.json is damaged \(.*\): run tools\.example --overwrite$", str(error))  # noqa: PT017
        else:
            assert found == manifest
    for cut in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadInput, match=r"manifest\.json is damaged \(.*\): run tools\.example --overwrite$"):
            begin(config)
    assert begin(Config(config.output, config.source, overwrite=True)) is not None


def test_manifests_without_a_checksum_are_read(config: Config) -> None:
    manifest = finish(config)
    values = {**manifest.__dict__}
    del values["folder"]
    write_json(config.output / "manifest.json", values)
    assert runs.read_manifest(config.output, "tools.example") == manifest
    write_json(config.output / "manifest.json", {**values, "chocksum": "x"})
    with pytest.raises(BadInput, match="its checksum is another"):
        runs.read_manifest(config.output, "tools.example")


def test_a_strangers_manifest_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "weights").write_text("x")
    runs.check_files(tmp_path / "weights")


def test_content_that_changes_while_it_is_read_is_read_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = finish(config)
    hashed: list[Path] = []

    def replaced(path: Path) -> str:
        if not hashed:  # another process replaces the outputs after the manifest was read
            path.write_text("newer")
            runs.replace_outputs(manifest, [path], {"levels": 5})
        hashed.append(path)
        return verified_hash(path)

    monkeypatch.setattr(runs, "verified_hash", replaced)
    assert runs.read_manifest(config.output, "tools.example").facts == {"levels": 5}
    assert len(hashed) == 2


def test_a_file_is_hashed_once_while_it_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("one")
    first = verified_hash(path)
    path.write_text("two")  # within the same tick of the clock, perhaps
    second = verified_hash(path)
    assert first != second
    long_ago = time.time() + 100
    monkeypatch.setattr(time, "time", lambda: long_ago)
    assert verified_hash(path) == second
    monkeypatch.setattr("tools.files.hash_file", lambda path: "hashed again")
    assert verified_hash(path) == second
    path.write_text("three")
    assert verified_hash(path) == "hashed again"


# What cannot be written


def refuse(number: int, name: str = "") -> OSError:
    return OSError(number, os.strerror(number), *([name] if name else []))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refuse(errno.ENOSPC, "a/b.npy"), "a/b.npy: no space is left on the disk: free some, then start"),
        (OSError(errno.EROFS, "x", "a/.b.part", None, "a/b"), "a/b: the file system is read-only"),
        (RuntimeError("I/O error: File too large (os error 27)"), "something below out: the file would be larger"),
        (shutil.Error([("a", "out/model/x", "[Errno 28] No space left on device")]), "out/model/x: no space is left"),
        (OSError("1000 requested and 0 written"), "something below out: it could not be written whole"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "something below out: it"),
        (MemoryError(), "there is not enough memory: lower --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough"),
        (
            RuntimeError("] . open file failed with strerror: Operation not permitted"),
            "something below out: the system",
        ),
        (RuntimeError("unable to resize file </torch_1_2_0> to the right size: File too large (27)"), "the processes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "there is not enough memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a process that read pictures"),
    ],
)
def test_what_the_machine_cannot_do_is_told_in_one_line(error: Exception, line: str) -> None:
    told = explain(error, place="out", options="--batch-size")
    assert told is not None
    assert told.startswith(line)
    assert "start the same command again, it resumes" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("shapes do not fit"), FileNotFoundError(2, "x", "y"), OSError("what"), ValueError()],
)
def test_bugs_are_not_explained_away(error: Exception) -> None:
    assert explain(error, place="out", options="") is None
    assert why_not_written(error) is None


def test_the_first_cause_counts() -> None:
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        try:
            raise refuse(errno.ENOSPC)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert (why_not_written(caught.value) or "").startswith("no space is left")


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("raise OSError(28, 'x', 'a/b')", 2, "error: a/b: no space is left on the disk: free some, then start"),
        ("raise MemoryError", 2, "error: there is not enough memory: lower the size of the input"),
        ("raise BadInput('Caught BadInput in worker 0.\\nTraceback ...\\ntools.errors.BadInput: x.png is torn\\n')", 2,
         "error: x.png is torn"),
        ("{}['bug']", 1, "KeyError: 'bug'"),
    ],
)  # fmt: skip
def test_a_command_tells_the_machines_faults_in_one_line_and_bugs_in_full(body: str, status: int, line: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1].startswith(line)
    assert ("Traceback" in done.stderr) == (status == 1)


def write_some(path: Path, kind: str, count: int) -> None:
    """Write so many numbers in one of the ways that the stages have."""
    array = np.zeros(count, np.float32)
    if kind == "array":
        write_array(path, array)
    elif kind == "memory map":
        with replacing(path) as temporary:
            new_array(temporary, dtype=np.float32, shape=array.shape)
    elif kind == "torch":
        with replacing(path) as temporary:
            torch.save({"x": torch.from_numpy(array)}, temporary)
    elif kind == "safetensors":
        with replacing(path) as temporary:
            save_file({"x": torch.from_numpy(array)}, temporary)
    else:
        write_json(path, array.tolist())


@pytest.mark.parametrize("missing", [1, 700, 5000, 900_000])  # bytes; the first are less than what C keeps in hand
@pytest.mark.parametrize("kind", ["array", "memory map", "torch", "safetensors", "text"])
def test_every_way_of_writing_tells_why_it_could_not(kind: str, missing: int, tmp_path: Path) -> None:
    path, count = tmp_path / "file", 300_000 if missing > 5000 else 3000
    write_some(path, kind, count)
    limit = path.stat().st_size - missing
    path.write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(BadInput, match=rf"^{path} cannot be written: .*start the same command again, it resumes$"):
            write_some(path, kind, count)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_place_of_a_run_folder_is_one_line(config: Config) -> None:
    config.output.write_text("no folder")
    for output in (config.output, config.output / "below"):
        with pytest.raises(BadInput, match=r"cannot be a folder, .*run(/below)? is a file: name another --output"):
            begin(Config(output, config.source))


def test_a_command_that_was_killed_with_its_first_file_starts_again(config: Config) -> None:
    config.output.mkdir()
    (config.output / ".started.json.123.part").write_text("{")
    assert begin(config) is not None
    assert not list(config.output.glob(".*.part"))


# What is held


def test_a_child_does_not_keep_the_lock_of_a_killed_command(config: Config) -> None:
    run = begin(config)
    assert run is not None
    assert run.lock is not None
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"forked")
        signal.pause()
    try:
        assert os.read(reading, 6) == b"forked"
        run.lock.close()  # as when the process is killed
        assert begin(config) is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_two_tests_at_once_keep_both_rows(tmp_path: Path) -> None:
    path, children = tmp_path / "summary.json", []
    for number in range(4):
        child = os.fork()
        if not child:
            row = {"system": str(number), "dataset": "x", "split": "x", "pool": "x", "level": "x", "recall": {}}
            try:
                for _ in range(20):
                    merge_summary(path, [row])
                os._exit(0)
            finally:  # whatever goes wrong, it must not run the other tests too
                os._exit(1)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert path.read_text().count('"system"') == 4
