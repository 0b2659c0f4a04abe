"""Bulk encoding: the codes of the plain chain, whatever dies on the way, and an index of them that is searched."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from models.rqvae import RqVae, tokenize
from retriever.gallery import build_from_tables
from retriever.gallery.api import Retriever
from retriever.gallery.collection import read_collection
from retriever.gallery.gallery import read_gallery
from tests.chain import Chain
from tests.test_stored_pictures import png, table, tar
from tools import finished, runs
from tools.captions import read_captions
from tools.errors import BadInput
from tools.features import normalized
from tools.files import read_array, read_json_lines

encode_shards = import_module("RQ-VAE.encode_shards")
ROOT = Path(__file__).parent.parent
PER_SHARD = 12
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (requirements-cluster.txt)")


def packed(chain: Chain, folder: Path) -> Path:
    """The chain's 48 pictures in four shards; their keys are their rows."""
    for first in range(0, 48, PER_SHARD):
        records = read_captions(chain.captions).records[first : first + PER_SHARD]
        members = {}
        for row, record in enumerate(records, first):
            members[f"{row:03d}.png"] = (chain.root / "images" / record.file).read_bytes()
            members[f"{row:03d}.json"] = b"{}"
        tar(folder / f"part-{first // PER_SHARD}.tar", members)
    return folder


def config_of(chain: Chain, source: Path, output: Path, **options: Any) -> Any:
    settings = {"workers": 0, "threads": 1, "device": "cpu", "batch_size": 8, "keep_features": True, **options}
    return encode_shards.Config(
        features=chain.features, rqvae=chain.rqvae, source=str(source), output=output, **settings
    )


def codes_in(output: Path) -> dict[str, list[int]]:
    """Codes by id."""
    blocks = (block for _, block in read_collection(output).blocks())
    return {image: codes for block in blocks for image, codes in zip(block.ids, block.codes.tolist(), strict=True)}


def expected(chain: Chain, rows: range = range(48)) -> dict[str, list[int]]:
    """What prepare_emb and generate_codes give, collisions not resolved."""
    features = read_array(chain.features / "images.npy")
    codes = tokenize(RqVae.from_pretrained(chain.rqvae), features, groups=None).codes
    return {f"part-{row // PER_SHARD}/{row:03d}": codes[row].tolist() for row in rows}


def bad_of(output: Path) -> list[tuple[str, str, str]]:
    return [(row["shard"], row["key"], row["reason"]) for _, row in read_json_lines(output / "bad.jsonl")]


def test_codes_and_features_are_those_of_the_plain_chain(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_shards.main(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out"))
    assert codes_in(tmp_path / "out") == expected(chain)
    wanted = normalized(read_array(chain.features / "images.npy"))
    found = np.concatenate([block.features for _, block in read_collection(tmp_path / "out").blocks(features=True)])
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert bad_of(tmp_path / "out") == []
    said = capsys.readouterr().out
    assert "members that are not pictures: .json × 48" in said
    assert "48 pictures of 4 shards have codes" in said


def test_the_columns_are_those_that_are_documented(chain: Chain, tmp_path: Path) -> None:
    encode_shards.main(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out"))
    schema = parquet.read_schema(tmp_path / "out" / "tables" / "part-0.parquet")
    assert [f"{field.name}: {field.type}" for field in schema] == [
        "id: string", "key: string", "shard: string", "file: string", "codes: fixed_size_list<element: int16>[3]",
        "features: fixed_size_list<element: halffloat>[24]", "problem: string",
    ]  # fmt: skip
    page = (ROOT / "docs" / "bulk.md").read_text()
    assert all(f"| `{name}` |" in page for name in schema.names)


def test_bad_pictures_are_listed_and_cost_no_other(chain: Chain, tmp_path: Path) -> None:
    source = packed(chain, tmp_path / "shards")
    first = (chain.root / "images" / read_captions(chain.captions).records[0].file).read_bytes()
    tar(source / "odd.tar", {"a.png": first[: len(first) // 2], "b.png": b"", "c.png": first, "c.jpg": first})
    encode_shards.main(config_of(chain, source, tmp_path / "out"))
    codes = codes_in(tmp_path / "out")
    assert codes.pop("odd/c") == expected(chain)["part-0/000"]
    assert codes == expected(chain)
    (torn, *others) = bad_of(tmp_path / "out")
    assert torn[:2] == ("odd", "a")
    assert torn[2].startswith("picture unreadable")
    assert others == [("odd", "b", "picture file is empty"), ("odd", "c", "second picture of the same key")]


def test_shards_may_have_the_same_keys(chain: Chain, tmp_path: Path) -> None:
    source = packed(chain, tmp_path / "shards")
    (source / "again").mkdir()
    (source / "again" / "part-0.tar").write_bytes((source / "part-0.tar").read_bytes())
    encode_shards.main(config_of(chain, source, tmp_path / "out"))
    codes = codes_in(tmp_path / "out")
    assert len(codes) == 60
    assert codes["again/part-0/003"] == codes["part-0/003"] == expected(chain)["part-0/003"]


def test_parquet_shards_give_the_same_codes(chain: Chain, tmp_path: Path) -> None:
    records = read_captions(chain.captions).records[:PER_SHARD]
    images = [{"bytes": (chain.root / "images" / each.file).read_bytes(), "path": each.file} for each in records]
    table(tmp_path / "rows.parquet", {"image": images, "text": ["x"] * PER_SHARD})
    encode_shards.main(config_of(chain, tmp_path / "rows.parquet", tmp_path / "out", keep_features=False))
    wanted = expected(chain)
    assert codes_in(tmp_path / "out") == {f"rows/{row:02d}": wanted[f"part-0/{row:03d}"] for row in range(PER_SHARD)}


@pytest.mark.parametrize("damage", ["cut", "not a shard", "no pictures"])
def test_a_bad_shard_is_named_and_the_same_command_goes_on(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = packed(chain, tmp_path / "shards")
    whole = (source / "part-2.tar").read_bytes()
    if damage == "no pictures":
        tar(source / "part-2.tar", {"a.json": b"{}"})
    else:
        (source / "part-2.tar").write_bytes(whole[:5000] if damage == "cut" else b"<html>not found</html>")
    config = config_of(chain, source, tmp_path / "out")
    with pytest.raises(BadInput, match=r"1 of 4 shards could not be encoded.*--accept-torn; the same command"):
        encode_shards.main(config)
    assert f"not encoded: file://{source}/part-2.tar: " in capsys.readouterr().out
    with pytest.raises(BadInput, match="was not finished"):
        read_collection(tmp_path / "out")
    before = written(tmp_path / "out")
    (source / "part-2.tar").write_bytes(whole)
    encode_shards.main(config)
    assert codes_in(tmp_path / "out") == expected(chain)
    assert {name: stamp for name, stamp in written(tmp_path / "out").items() if name in before} == before
    assert "3 of 4 shards are encoded already" in capsys.readouterr().out


def written(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "tables").glob("*.parquet")}


def test_what_can_be_read_of_a_torn_shard_is_taken_on_demand(chain: Chain, tmp_path: Path) -> None:
    source = packed(chain, tmp_path / "shards")
    with tarfile.open(source / "part-3.tar") as archive:
        end = archive.getmember("040.png").offset_data + 10
    os.truncate(source / "part-3.tar", end)
    with pytest.raises(BadInput):
        encode_shards.main(config_of(chain, source, tmp_path / "out"))
    encode_shards.main(config_of(chain, source, tmp_path / "out", accept_torn=True))
    assert codes_in(tmp_path / "out") == expected(chain, range(40))
    (row,) = bad_of(tmp_path / "out")
    assert row[:2] == ("part-3", "")
    assert row[2].startswith("shard cannot be read to its end (unexpected end of data")


def test_a_collection_grows(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New shards are encoded, a shard of another size again, and one that has gone is left out."""
    source = packed(chain, tmp_path / "shards")
    later = tmp_path / "part-3.tar"
    (source / "part-3.tar").rename(later)
    config = config_of(chain, source, tmp_path / "out")
    encode_shards.main(config)
    words = ["--features", "x", "--output", str(tmp_path / "out")]
    assert finished.is_finished("RQ-VAE.encode_shards", words) is None  # the command itself must look
    before = written(tmp_path / "out")
    encode_shards.main(config)
    assert "is finished; nothing to do" in capsys.readouterr().out
    later.rename(source / "part-3.tar")
    tar(source / "part-1.tar", {"x.png": png()})
    (source / "part-0.tar").unlink()
    encode_shards.main(config)
    codes = codes_in(tmp_path / "out")
    assert codes.pop("part-1/x")
    assert codes == expected(chain, range(24, 48))
    assert written(tmp_path / "out")["part-2.parquet"] == before["part-2.parquet"]


def test_tables_of_other_models_are_not_written_over(chain: Chain, tmp_path: Path) -> None:
    source, tables = packed(chain, tmp_path / "shards"), str(tmp_path / "tables")
    encode_shards.main(config_of(chain, source, tmp_path / "one", tables=tables))
    assert codes_in(tmp_path / "one") == expected(chain)
    with pytest.raises(BadInput, match="made by other models, or with other options: name another"):
        encode_shards.main(config_of(chain, source, tmp_path / "two", tables=tables, keep_features=False))
    path = tmp_path / "tables" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"part-0\.parquet is missing, or not the table"):
        codes_in(tmp_path / "one")


def test_a_run_that_is_killed_goes_on_at_the_shard(chain: Chain, tmp_path: Path) -> None:
    source, output = packed(chain, tmp_path / "shards"), tmp_path / "out"
    process = subprocess.Popen(command(chain, source, output, workers=0), cwd=ROOT, env=environment())
    wait_for_tables(output, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (output / "tables" / ".part-9.parquet.0123.part").write_bytes(b"half")  # as a worker leaves one that is killed
    before = written(output)
    encode_shards.main(config_of(chain, source, output))
    assert codes_in(output) == expected(chain)
    assert {name: stamp for name, stamp in written(output).items() if name in before} == before
    assert not list(output.rglob("*.part"))


def command(chain: Chain, source: Path, output: Path, **options: Any) -> list[str]:
    words = [sys.executable, "-m", "RQ-VAE.encode_shards", "--keep-features"]
    values: dict[str, Any] = {"features": chain.features, "rqvae": chain.rqvae, "source": source, "output": output}
    values |= {"threads": 1, "device": "cpu", "batch-size": 8, **options}
    return words + [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for_tables(output: Path, count: int) -> None:
    for _ in range(3000):
        if len(list((output / "tables").glob("*.parquet"))) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no table appears")


def test_an_index_of_a_collection_is_searched(chain: Chain, retriever: Path, index: Path, tmp_path: Path) -> None:
    """Against the index of the same pictures as files: the same codes, but for collisions, which share a leaf."""
    encode_shards.main(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out"))
    built = build_from_tables.Config(collection=tmp_path / "out", output=tmp_path / "index")
    build_from_tables.main(built)
    gallery = read_gallery(tmp_path / "index")
    assert dict(
        zip((each.image for each in gallery.pictures()), gallery.read_codes().tolist(), strict=True)
    ) == expected(chain)
    assert gallery.picture(13).file == f"{tmp_path}/shards/part-1.tar/013.png"
    kept = read_gallery(index).read_features()
    assert gallery.keeps_features
    np.testing.assert_allclose(gallery.read_features(), kept, atol=2e-3)
    assert gallery.codebooks_hash == read_gallery(index).codebooks_hash
    (answers,) = Retriever.from_runs(index=tmp_path / "index", retriever=retriever, device="cpu").search(
        ["a red circle"], k=48, beams=48
    )
    assert {answer.image for answer in answers} == set(expected(chain))


def test_an_index_may_name_unpacked_pictures_and_leave_features_out(chain: Chain, tmp_path: Path) -> None:
    encode_shards.main(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out"))
    build_from_tables.main(
        build_from_tables.Config(
            collection=tmp_path / "out", output=tmp_path / "index", unpacked=tmp_path / "files", keep_features=False
        )
    )
    gallery = read_gallery(tmp_path / "index")
    assert not gallery.keeps_features
    assert gallery.picture(0).file == str(tmp_path / "files" / "part-0" / "000.png")


def test_features_that_were_not_kept_cannot_be_asked_for(chain: Chain, tmp_path: Path) -> None:
    encode_shards.main(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out", keep_features=False))
    with pytest.raises(BadInput, match="has no features: encode it with --keep-features"):
        build_from_tables.main(
            build_from_tables.Config(collection=tmp_path / "out", output=tmp_path / "index", keep_features=True)
        )


def test_features_of_the_tower_are_refused(chain: Chain, tmp_path: Path) -> None:
    config = replace(config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out"), features=chain.towers)
    with pytest.raises(BadInput, match=r"another two-tower model|holds tower features"):
        encode_shards.main(config)


def test_a_worker_takes_no_numbered_gpu(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="each worker gets a GPU of its own: write cuda"):
        config_of(chain, tmp_path, tmp_path / "out", workers=None, device="cuda:1")


def test_without_ray_a_line_says_what_to_do(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.cluster.find_spec", lambda name: None)
    config = config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out", workers=2)
    with pytest.raises(BadInput, match=r"Ray is not installed: .*pip install.*requirements-cluster\.txt; or set"):
        encode_shards.main(config)


@needs_ray
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", r"`cluster` 127\.0\.0\.1:9: no Ray cluster answers there \("),
        ("ray://host:10001", r"is no address of a Ray cluster: write HOST:PORT, or auto"),
        ("host", r"is no address of a Ray cluster"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused(chain: Chain, tmp_path: Path, address: str, said: str) -> None:
    config = config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out", workers=None, cluster=address)
    with pytest.raises(BadInput, match=said):
        encode_shards.main(config)


@needs_ray
def test_two_workers_give_the_same_codes_also_when_one_is_killed(chain: Chain, tmp_path: Path) -> None:
    source, output = packed(chain, tmp_path / "shards"), tmp_path / "out"
    for number in range(4, 40):
        (source / f"part-{number}.tar").write_bytes((source / "part-0.tar").read_bytes())
    process = subprocess.Popen(
        command(chain, source, output, workers=2), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE
    )
    wait_for_tables(output, 1)
    workers = worker_processes(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    codes = codes_in(output)
    assert len(codes) == 40 * PER_SHARD
    assert {name: codes[name] for name in expected(chain)} == expected(chain)


@needs_ray
def test_a_killed_driver_takes_its_workers_along_and_resumes(chain: Chain, tmp_path: Path) -> None:
    source, output = packed(chain, tmp_path / "shards"), tmp_path / "out"
    for number in range(4, 40):
        (source / f"part-{number}.tar").write_bytes((source / "part-0.tar").read_bytes())
    process = subprocess.Popen(command(chain, source, output, workers=2), cwd=ROOT, env=environment())
    wait_for_tables(output, 1)
    workers = worker_processes(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(1200):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    before = written(output)
    encode_shards.main(config_of(chain, source, output))
    assert len(codes_in(output)) == 40 * PER_SHARD
    assert {name: stamp for name, stamp in written(output).items() if name in before} == before


def worker_processes(driver: int) -> list[int]:
    """Ray's processes that encode, of those that a driver has started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def is_below(pid: int) -> bool:
        while pid not in (0, driver):
            pid = parents.get(pid, 0)
        return pid == driver

    return [int(row[0]) for row in rows if row[2].startswith("ray::MapWorker") and is_below(int(row[0]))]


@needs_ray
def test_a_shard_that_kills_every_worker_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads behind."""
    code = (
        "from tests.test_encode_shards import Dying\nfrom tools.cluster import Places, spread\nimport json\n"
        f"jobs = [{{'number': number, 'folder': {str(tmp_path)!r}}} for number in range(6)]\n"
        "print('done', json.dumps(sorted(each['number'] for each in spread(Dying, {}, jobs, Places(workers=2)))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("done "))
    assert json.loads(line.removeprefix("done ")) == [0, 1, 2, 4, 5]
    assert len((tmp_path / "3").read_text()) == 4  # it was tried, and three times again


class Dying:
    """A worker that one job kills."""

    def __init__(self, *, gpu: bool, threads: int) -> None:
        assert not gpu
        assert threads == 1

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        with (Path(job["folder"]) / str(job["number"])).open("a") as file:
            file.write("x")
        if job["number"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return job


def test_a_killed_workers_row_is_told_by_the_command(chain: Chain, tmp_path: Path, monkeypatch: Any) -> None:
    """The driver's part: a shard of which no worker has said anything."""

    def spread(worker: Any, arguments: Any, jobs: Any, places: Any) -> Any:
        encoder = worker(**arguments, gpu=False, threads=1)
        return (encoder(job) for job in jobs if job["name"] != "part-1")

    monkeypatch.setattr(encode_shards, "spread", spread)
    config = config_of(chain, packed(chain, tmp_path / "shards"), tmp_path / "out", workers=2)
    with pytest.raises(BadInput, match="1 of 4 shards could not be encoded"):
        encode_shards.main(config)
    assert sorted(written(tmp_path / "out")) == ["part-0.parquet", "part-2.parquet", "part-3.parquet"]
    assert not (tmp_path / "out" / runs.MANIFEST).exists()
