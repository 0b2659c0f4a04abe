"""Pictures in shards: which shards a source stands for, and what is read of whole and of damaged ones."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import fsspec
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tools.errors import BadInput
from tools.pictures import check_picture, picture_in
from tools.stored_pictures import Columns, Reading, Shard, StoredPicture, TornShardError, find_shards


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(path: Path, columns: Columns = Columns()) -> list[StoredPicture]:  # noqa: B008  # a tuple
    return list(Reading(Shard("x", str(path), 0), columns).pictures())


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_a_tar_gives_its_pictures_in_order_and_counts_the_rest(tmp_path: Path, ending: str) -> None:
    members = {"b.png": png(), "b.txt": b"words", "sub/a.jpg": b"no picture", "a.json": b"{}", "folder.x/c.PNG": png()}
    mode = "w:" + ending.rpartition(".")[2].replace("tgz", "gz").replace("tar", "")
    path = tar(tmp_path / f"s{ending}", members, mode)
    reading = Reading(Shard("s", str(path), 0), Columns())
    assert [(each.key, each.file, each.problem) for each in reading.pictures()] == [
        ("b", "b.png", ""), ("sub/a", "sub/a.jpg", ""), ("folder.x/c", "folder.x/c.PNG", ""),
    ]  # fmt: skip
    assert reading.others == {".txt": 1, ".json": 1}


def test_a_tar_lists_what_cannot_be_a_picture(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {"a.png": png(), "a.jpg": png("blue"), "../up.png": png()})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert [(each.key, each.problem, bool(each.content)) for each in read(path)] == [
        ("a", "", True),
        ("a", "second picture of the same key", False),
        ("../up", "member leads out of the shard", False),
        ("link", "member is no plain file", False),
    ]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_off_is_torn(tmp_path: Path, mode: str, cut: float) -> None:
    noise = {f"{number}.png": png(size=(64, 64)) + os.urandom(3000) for number in range(8)}
    path = tar(tmp_path / "s.tar", noise, mode)
    whole = path.read_bytes()
    kept = whole if mode == "w:gz" else whole[: 8 * (512 + 3584)]  # without the filling behind the last member
    path.write_bytes(kept[: int(len(kept) * cut)])
    with pytest.raises(TornShardError, match=r"cut off|cannot be read to its end"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8bnot gzip" * 100])
def test_what_is_no_tar_is_torn(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(TornShardError):
        read(tmp_path / "s.tar")


def test_a_damaged_header_inside_a_tar_is_torn(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {f"{number}.png": png() for number in range(4)})
    content = bytearray(path.read_bytes())
    content[1024:1100] = os.urandom(76)  # the second member's name
    path.write_bytes(content)
    with pytest.raises(TornShardError):
        read(path)


def table(path: Path, columns: Mapping[str, object]) -> Path:
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=2)
    return path


def test_a_parquet_file_gives_pictures_by_key_or_row(tmp_path: Path) -> None:
    struct = [{"bytes": png(), "path": "x/a.png"}, {"bytes": None, "path": "b.png"}, None]
    rows = read(table(tmp_path / "a.parquet", {"image": struct, "caption": ["a", "b", "c"]}))
    assert [(each.key, each.file, each.problem) for each in rows] == [
        ("0", "x/a.png", ""), ("1", "b.png", "row without a picture"), ("2", "2", "row without a picture"),
    ]  # fmt: skip
    plain = table(tmp_path / "b.parquet", {"jpg": [png(), png()], "key": ["k", "k"]})
    assert [(each.key, each.problem) for each in read(plain)] == [("k", ""), ("k", "second picture of the same key")]
    other = table(tmp_path / "c.parquet", {"jpg": [png(), png(), png()], "mask": [png()] * 3, "name": ["7", None, ""]})
    assert [(each.key, each.problem) for each in read(other, Columns("jpg", "name"))] == [
        ("7", ""), ("1", "row without a key"), ("2", "row without a key"),
    ]  # fmt: skip
    with pytest.raises(
        TornShardError, match=r"name its column of pictures with --image-column \(of bytes: jpg, mask\)"
    ):
        read(other)
    with pytest.raises(TornShardError, match="without a column jpeg; did you mean jpg"):
        read(other, Columns("jpeg"))


def test_a_damaged_parquet_file_is_torn(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"image": [png(size=(64, 64)) + os.urandom(5000) for _ in range(6)]})
    whole = path.read_bytes()
    for content in (b"", whole[:-20], whole[: len(whole) // 2], b"PAR1" + whole[2000:]):
        path.write_bytes(content)
        with pytest.raises(TornShardError):
            read(path)


def test_a_source_is_a_shard_a_folder_or_a_pattern(tmp_path: Path) -> None:
    for name in ("a/00.tar", "a/01.tar", "b/00.tar", "b/c/02.parquet", "b/.hidden.tar", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found = {source: [shard.name for shard in find_shards(str(tmp_path / source))] for source in (
        "", "a", "a/00.tar", "*/00.tar", "{a,b}/00.tar", "a/{00..01}.tar", "**/*.parquet",
    )}  # fmt: skip
    assert found == {
        "": ["a/00", "a/01", "b/00", "b/c/02"], "a": ["00", "01"], "a/00.tar": ["00"], "*/00.tar": ["a/00", "b/00"],
        "{a,b}/00.tar": ["a/00", "b/00"], "a/{00..01}.tar": ["00", "01"], "**/*.parquet": ["b/c/02"],
    }  # fmt: skip
    (shard,) = find_shards(str(tmp_path / "a/00.tar"))
    assert (shard.size, shard.address) == (8, f"file://{tmp_path}/a/00.tar")


def test_a_source_at_another_address(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    path = tar(tmp_path / "s.tar", {"a.png": png()})
    memory.pipe_file("/bucket/x/s.tar", path.read_bytes())
    (shard,) = find_shards("memory://bucket/*/s.tar")
    assert shard == Shard("x/s", "memory:///bucket/x/s.tar", path.stat().st_size)
    assert [each.key for each in Reading(shard, Columns()).pictures()] == ["a"]


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ([], "no", r"there is no shard .*no \(a shard ends in \.tar"),
        (["a.txt"], "", "there is no shard"),
        (["a.txt"], "a.txt", "there is no shard"),
        (["0.tar"], "{0..1}.tar", r"there is no shard .*1\.tar"),
        (["0.tar", "0.tgz"], "", r"0\.tar and .*0\.tgz differ in their ending alone: rename one"),
    ],
)
def test_a_source_without_shards_is_refused(tmp_path: Path, files: list[str], source: str, said: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match=said):
        find_shards(f"{tmp_path}/{source}")


def test_an_address_that_cannot_be_opened_is_refused() -> None:
    with pytest.raises(BadInput, match=r"nothere://x\.tar cannot be opened: Protocol not known"):
        find_shards("nothere://x.tar")


def test_bytes_are_refused_for_the_reasons_for_which_files_are(tmp_path: Path) -> None:
    whole = png(size=(64, 64))
    oblong, torn, black = png(size=(1000, 4)), whole[:-30], whole[:60]
    for number, content in enumerate((whole, oblong, torn, black, b"", b"words", b"GIF89a and no more")):
        (tmp_path / f"{number}.png").write_bytes(content)
        decoded = picture_in(content)
        assert decoded.reason == check_picture(tmp_path, f"{number}.png").reason
        assert (decoded.picture is None) == bool(decoded.reason) == (number > 0)
