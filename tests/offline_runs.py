"""W&B runs that were logged offline, read back from their files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 2**15  # bytes of the file's header, and of a block; a chunk's header has 7 bytes too
FULL, LAST = 1, 4


class OfflineRun(NamedTuple):
    """What a run shows in W&B."""

    name: str
    group: str
    job: str
    id: str
    sweep: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """Every run below a folder, in the order in which they were started."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_ctime_ns)
    return [read_run(file) for file in files]


def read_run(path: Path) -> OfflineRun:
    """One `.wandb` file."""
    run: Any = None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= values(run.config.update)
            summary |= values(run.summary.update)
        elif kind == "config":
            config |= values(record.config.update)
        elif kind == "summary":
            summary |= values(record.summary.update)
        elif kind == "history":
            history.append(values(record.history.item))
    return OfflineRun(run.display_name, run.run_group, run.job_type, run.run_id, run.sweep_id, config, summary, history)


def values(items: Any) -> dict[str, Any]:
    """Key -> value of a protocol buffer's items."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: chunks in blocks, each with checksum, length and kind."""
    assert data[:4] == b":W&B"
    place, record = HEADER, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no chunk begins there
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""
