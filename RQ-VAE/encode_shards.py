"""Encode and tokenize a large collection: pictures in tar or parquet shards, on this machine or on a cluster.

In:  the feature folder and the `RQ-VAE.train` folder of a finished chain, and the address of the shards
     (tools/stored_pictures.py). Captions in them are not read.
Out: for each shard a table of codes (tools/code_tables.py), in `<output>/tables` or elsewhere; `shards.jsonl`, the
     heads of all tables; `bad.jsonl` {"shard", "key", "reason"}, the pictures without codes; `codebooks.npy`.
     Collisions stay: to resolve them, one must know all codes.
Command: python -m RQ-VAE.encode_shards --features DIR --rqvae DIR --source "s3://bucket/train-{0000..0999}.tar"
         --output DIR
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.compute import pick_device
from models.options import DeviceOptions
from models.picture_codes import PictureCoder
from models.rqvae import RqVae
from tools import code_tables, runs
from tools.ahead import ahead
from tools.cluster import Places, spread
from tools.code_tables import Head, Tables
from tools.command_line.command_names import script_of
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.command_line.place import NameOrPath
from tools.errors import BadInput
from tools.features import HEADS, TOWERS, encoder_of, normalized, refuse_other_encoder
from tools.files import remove_torn, write_array, write_json_lines
from tools.logs import progress
from tools.pictures import picture_in
from tools.stored_pictures import Columns, Reading, Shard, StoredPicture, TornShardError, find_shards
from tools.texts import plural, printable
from tools.vokens import VokenSpace

COMMAND = "RQ-VAE.encode_shards"
TABLES, SHARDS, BAD = "tables", "shards.jsonl", "bad.jsonl"
MODEL_FACTS = ("model", "pretrained", "activation", "precision")
NAMED = 10  # shards that could not be encoded, in lines of their own


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DeviceOptions):
    """Which shards, by which models, and where."""

    features: Path
    """Feature folder whose two-tower model encodes the pictures, in the precision that it was made with."""
    rqvae: Path
    """Run folder of RQ-VAE.train, the tokenizer."""
    source: NameOrPath
    """A shard, a folder of shards, or a pattern with *, ? or braces: a path, or another address that fsspec opens."""
    tables: NameOrPath | None = None
    """Folder or address for the tables of codes, which all workers reach; by default `tables` in the output folder."""
    keep_features: bool = False
    """Store the pictures' features too, 2 bytes per number, by which search reorders what it finds."""
    accept_torn: bool = False
    """Take what can be read of a damaged shard, and finish without the rest."""
    image_column: str | None = None
    """Column of pictures in parquet shards; by default the one that holds bytes."""
    key_column: str | None = None
    """Column of keys in parquet shards; by default `key` or `__key__`, else the row's number."""
    batch_size: int = 64
    """Pictures per batch of a worker."""
    cluster: str | None = None
    """Address of a Ray cluster, or "auto" for the one that this machine belongs to; by default workers are processes of
    this machine."""
    workers: int | None = None
    """Worker processes; by default one for each GPU, or else for each core. 0: this process alone, without Ray."""
    threads: int | None = None
    """Threads of each worker that decode pictures and, without a GPU, compute; by default 1, or with GPUs an equal
    share of the cores."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.threads or 1) < 1 or (self.workers or 0) < 0:
            raise BadInput("`batch_size` and `threads` must be at least 1, `workers` at least 0")
        if self.workers == 0 and self.cluster is not None:
            raise BadInput("`workers` 0 works in this process alone: leave `cluster` out")
        if self.workers != 0 and ":" in (self.device or ""):
            raise BadInput(
                f"`device` {self.device}: each worker gets a GPU of its own: write cuda, or set `workers` to 0"
            )


class ShardEncoder:
    """Encodes shards one by one, in one process.

    Args:
        facts, heads_apart: of the feature folder, as `PictureCoder` takes them; workers need not check its files.
        made_by: `Head.made_by` of the tables.
        space: levels, codebook size and sharing, as `VokenSpace` has them.
        keep_features, batch_size, columns: as in `Config`.
        accept_torn: write the table of a damaged shard.
        device: None for the GPU where the worker has one, else the CPU.
    """

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        heads_apart: bool,
        rqvae: str,
        tables: str,
        made_by: str,
        space: Sequence[Any],
        keep_features: bool,
        accept_torn: bool,
        columns: Sequence[str | None],
        batch_size: int,
        device: str | None,
        gpu: bool,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        place = pick_device(device or ("cuda" if gpu else "cpu"))
        tokenizer = RqVae.from_pretrained(Path(rqvae))
        self.coder = PictureCoder(facts, tokenizer, heads_apart=heads_apart, device=place)
        self.tables, self.made_by, self.space = Tables(tables), made_by, VokenSpace(*space)
        self.width = tokenizer.config.features if keep_features else None
        self.accept_torn, self.columns, self.batch_size = accept_torn, Columns(*columns), batch_size
        self.threads = threads

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """Write the table of one shard.

        Args:
            job: a `Shard`.

        Returns:
            Its name; why it failed, or nothing; members that are not pictures, by ending; seconds of CPU.
        """
        worked, failed = time.process_time(), ""
        reading = Reading(Shard(**job), self.columns)
        try:
            self._encode(reading)
        except TornShardError as error:
            failed = str(error)
        except OSError as error:
            failed = f"its table cannot be written: {error.strerror or error}"
        cpu = time.process_time() - worked
        return {"shard": reading.shard.name, "failed": failed, "others": dict(reading.others), "cpu": cpu}

    def _encode(self, reading: Reading) -> None:
        collected = Collected(reading.shard)
        try:
            for pictures, pixels in batches(reading.pictures(), self._pixels, self.batch_size, self.threads):
                collected.add(pictures, None if pixels is None else self.coder.code(pixels))
            if not collected.pictures:
                raise TornShardError(f"shard without pictures (members end in {_endings(reading.others)})")
        except TornShardError as error:
            if not self.accept_torn:
                raise
            collected.pictures.append(StoredPicture("", "", b"", str(error)))
        table, head = collected.table(self.space, self.width, self.made_by)
        self.tables.write(table, head)

    def _pixels(self, picture: StoredPicture) -> Tensor | None:
        """A picture as the tower reads it; None, and its problem said, where there is none."""
        if picture.problem:
            return None
        decoded = picture_in(picture.content)
        picture.content, picture.problem = b"", decoded.reason
        return None if decoded.picture is None else self.coder.clip.preprocess(decoded.picture)


class Collected:
    """The pictures of a shard that have been encoded so far, with or without a problem."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.pictures: list[StoredPicture] = []
        self.codes: list[Any] = []
        self.features: list[Any] = []

    def add(self, pictures: list[StoredPicture], coded: Any) -> None:
        """Take pictures, and codes and features of those that have no problem, in their order."""
        self.pictures += pictures
        if coded is not None:
            self.codes.append(coded.codes.numpy())
            self.features.append(normalized(coded.features.numpy()).astype(np.float16))

    def table(self, space: VokenSpace, width: int | None, made_by: str) -> tuple[Any, Head]:
        """The shard's table, and what it says of itself."""
        import pyarrow

        kinds = code_tables.schema(space, width)
        there = np.array([not picture.problem for picture in self.pictures], dtype=bool)
        name, count = self.shard.name, int(there.sum())
        codes = np.concatenate([np.zeros((0, space.levels), dtype=np.int64), *self.codes])
        columns: dict[str, Any] = {
            "id": [f"{name}/{picture.key}" for picture in self.pictures],
            "key": [picture.key for picture in self.pictures],
            "shard": [name] * len(there),
            "file": [picture.file for picture in self.pictures],
            "codes": code_tables.lists(codes, there, kinds.field("codes").type),
        }
        if width is not None:
            features = np.concatenate([np.zeros((0, width), dtype=np.float16), *self.features])
            columns["features"] = code_tables.lists(features, there, kinds.field("features").type)
        columns["problem"] = [picture.problem or None for picture in self.pictures]
        head = Head(name, self.shard.address, self.shard.size, made_by, count, len(there) - count)
        return pyarrow.table(columns, schema=kinds), head


def batches(
    pictures: Iterator[StoredPicture],
    pixels_of: Callable[[StoredPicture], Tensor | None],
    size: int,
    threads: int,
) -> Iterator[tuple[list[StoredPicture], Tensor | None]]:
    """Pictures in their order, with the pixels (batch, 3, height, width) of those that have any; mostly `size` of them.

    Reading goes on in a thread and decoding in others while the caller computes, at most two batches ahead.

    Raises:
        TornShardError: as the pictures do, behind the last of them.
    """
    waiting: list[StoredPicture] = []
    pixels: list[Tensor] = []
    torn: TornShardError | None = None
    try:
        for picture, decoded in ahead(pictures, pixels_of, 2 * size, threads):
            waiting.append(picture)
            if decoded is not None:
                pixels.append(decoded)
            if len(pixels) == size:
                yield waiting, torch.stack(pixels)
                waiting, pixels = [], []
    except TornShardError as error:
        torn = error
    if waiting:
        yield waiting, torch.stack(pixels) if pixels else None
    if torn is not None:
        raise torn


def main(config: Config) -> None:
    made, rqvae = read_models(config)
    shards = find_shards(config.source)
    listing = _hash([shard._asdict() for shard in shards])
    runs.reopen(config.output, COMMAND, unless={"listing": listing})
    run = runs.begin(COMMAND, config, inputs={"features": config.features, "rqvae": config.rqvae})
    if run is None:
        return
    space = {name: rqvae.facts[name] for name in VokenSpace._fields}
    tables = Tables(config.tables or str(run.folder / TABLES))
    made_by = _hash([encoder_of(made), made.facts["precision"], runs.fingerprint(config.rqvae), config.keep_features])
    left = missing(tables, shards, made_by, config)
    arguments = {
        "facts": {name: made.facts[name] for name in MODEL_FACTS if name in made.facts},
        "heads_apart": made.command == HEADS,
        "rqvae": str(config.rqvae),
        **{name: getattr(config, name) for name in ("keep_features", "accept_torn", "batch_size", "device")},
        "tables": tables.address,
        "made_by": made_by,
        "space": list(space.values()),
        "columns": [config.image_column, config.key_column],
    }
    said = {
        each["shard"]: each
        for each in progress(encode(left, arguments, config), "encoding", total=len(left), unit="shard")
    }
    refuse_failed(left, said)
    remove_torn(run.folder)  # what a worker that was killed left
    heads = [head for shard in shards if (head := tables.head(shard.name)) is not None]
    write_lists(run.folder, tables, heads)
    model = RqVae.from_pretrained(config.rqvae)
    write_array(run.folder / "codebooks.npy", model.quantizer.codebooks.detach().numpy())
    pictures, bad = code_tables.total(heads), sum(head.problems for head in heads)
    places = {"tables": config.tables or TABLES, "width": model.config.features if config.keep_features else None}
    run.finish(
        facts={**space, **places, "listing": listing, "grows": True, "pictures": pictures},
        metrics={"bad_pictures": bad},
    )
    tell(config, heads, said.values())


def read_models(config: Config) -> tuple[runs.Manifest, runs.Manifest]:
    """The manifests of the features and of the tokenizer.

    Raises:
        BadInput: they are not finished, or do not belong together.
    """
    made = runs.read_manifest(config.features, TOWERS, HEADS)
    rqvae = runs.read_manifest(config.rqvae, "RQ-VAE.train")
    refuse_other_encoder(made, rqvae)
    if made.facts["layer"] != "embedding":
        raise BadInput(f"{config.features} holds {made.facts['layer']} features: name the folder of {script_of(HEADS)}")
    return made, rqvae


def encode(left: Sequence[Shard], arguments: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """What the workers say of each shard, in any order; nothing of one whose worker died each time."""
    jobs = [shard._asdict() for shard in left]
    if not jobs:
        return
    if config.workers == 0:
        gpu = pick_device(config.device).type == "cuda"
        encoder = ShardEncoder(**arguments, gpu=gpu, threads=config.threads or torch.get_num_threads())
        yield from map(encoder, jobs)
        return
    gpu_wanted = None if config.device is None else config.device.startswith("cuda")
    yield from spread(ShardEncoder, arguments, jobs, Places(config.cluster, config.workers, config.threads, gpu_wanted))


def missing(tables: Tables, shards: Sequence[Shard], made_by: str, config: Config) -> list[Shard]:
    """Shards that have no table yet, or one of another content.

    Raises:
        BadInput: there are tables that other models made.
    """
    left: list[Shard] = []
    for shard in shards:
        head = None if config.overwrite else tables.head(shard.name)
        if head is not None and head.made_by != made_by:
            raise BadInput(
                f"{tables.path(shard.name)} was made by other models, or with other options: name another folder or "
                "address with `tables`"
            )
        if head is None or (head.address, head.size) != (shard.address, shard.size):
            left.append(shard)
    if done := len(shards) - len(left):
        print(f"{done:,} of {plural(len(shards), 'shard')} are encoded already")
    return left


def refuse_failed(left: Sequence[Shard], said: dict[str, dict[str, Any]]) -> None:
    """Name the shards that have no table.

    Raises:
        BadInput: there are some.
    """
    died = "its worker died, or failed, each time it was tried"
    failed = {shard: said[shard.name]["failed"] if shard.name in said else died for shard in left}
    failed = {shard: reason for shard, reason in failed.items() if reason}
    for shard, reason in list(failed.items())[:NAMED]:
        print(printable(f"not encoded: {shard.address}: {reason}"))
    if failed:
        torn = "" if died in failed.values() else ", or take what can be read of them with --accept-torn"
        raise BadInput(
            f"{len(failed):,} of {len(left):,} shards could not be encoded, and the others are done: mend or remove "
            f"them{torn}; the same command then goes on"
        )


def write_lists(folder: Path, tables: Tables, heads: Sequence[Head]) -> None:
    """Write which tables there are, and which pictures have no codes."""
    write_json_lines(folder / SHARDS, (head._asdict() for head in heads))
    bad = (problem for head in heads if head.problems for problem in tables.problems(head.shard))
    write_json_lines(folder / BAD, (problem._asdict() for problem in bad))


def tell(config: Config, heads: Sequence[Head], said: Collection[dict[str, Any]]) -> None:
    """The summary."""
    bad, pictures = sum(head.problems for head in heads), code_tables.total(heads)
    others: Counter[str] = Counter()
    for result in said:
        others.update(result["others"])
    if others:
        print(f"members that are not pictures: {_endings(others)}")
    if bad:
        print(f"{plural(bad, 'picture')} without codes, with shard, key and reason in {config.output / BAD}")
    shards, seconds = plural(len(heads), "shard"), sum(result["cpu"] for result in said)
    work = f"; {plural(len(said), 'shard')} took {seconds:,.0f} s of the workers' CPUs" if said else ""
    print(f"{plural(pictures, 'picture')} of {shards} have codes{work} -> {config.output}")


def _endings(others: Counter[str]) -> str:
    return printable(", ".join(f"{ending} × {count:,}" for ending, count in others.most_common(NAMED))) or "nothing"


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


if __name__ == "__main__":
    run_command(main, Config)
