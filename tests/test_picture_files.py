"""Which files of a folder or shard are pictures, what becomes of all the others, and what a picture shows."""

import io
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retriever.serve.uploads import Upload, check, thumbnail
from tools import prepare_captions
from tools.captions import Record, read_captions
from tools.errors import BadInput
from tools.picture_formats import BUILT_IN, FORMATS, MISSING, OPTIONAL, PICTURE_ENDINGS, unidentified
from tools.picture_listing import DEAD_ENDS, Listing, ending_of
from tools.pictures import FIRST_FRAME, STRETCHED, find_unreadable, list_pictures, open_picture
from tools.shards import Unpacking, list_shards

from .test_bad_input import without_privileges

HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
UNREAD = ".heic" if "HEIF" in MISSING else ".svg"
JPEG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(JPEG, "JPEG")


def drawn(path: Path, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, kind)
    return path


def reachable(folder: Path) -> None:
    """Open the way to a folder of pytest's for other users."""
    for each in (folder, *folder.parents):
        if each.stat().st_uid == os.geteuid() and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o055)


def prepare(output: Path, **options: Any) -> list[Record]:
    config = prepare_captions.Config(output=output, workers=0, **options)
    prepare_captions.main(config)
    return read_captions(output).records


def files(records: list[Record]) -> list[str]:
    return [record.file for record in records]


# Folders


@pytest.mark.parametrize("ending", sorted(PICTURE_ENDINGS))
def test_every_ending_is_listed_and_taken_as_an_upload(ending: str, tmp_path: Path) -> None:
    (name,) = (name for name, endings in FORMATS.items() if ending in endings)
    mode = "L" if ending in (".pgm", ".pbm") else "RGB"
    content = io.BytesIO()
    if ending == ".pfm":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(content, name)
    else:
        Image.new(mode, (8, 8)).save(content, name, **({"lossless": True} if name == "JXL" else {}))
    path = tmp_path / f"a{ending.upper()}"
    path.write_bytes(content.getvalue())
    assert list_pictures(tmp_path).pictures == [path.name]
    assert find_unreadable([path.name], workers=0, folder=tmp_path) == {path.name: ""}
    assert open_picture(path).size == (8, 8)
    assert check(Upload(path.name, content.getvalue())) == ending
    assert check(Upload("a.xyz", content.getvalue())) == FORMATS[name][0]


def test_the_docs_name_every_ending() -> None:
    page = (Path(__file__).parent.parent / "docs" / "pictures.md").read_text()
    table = page.partition("## Files that are read")[2].partition("\n* ")[0]
    known = {ending for endings in (BUILT_IN | OPTIONAL).values() for ending in endings}
    assert {word.strip("`") for word in table.split() if word.startswith("`.")} == known


def test_a_folder_of_unusual_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No ending, that of another format, or what programs put behind one: the content tells."""
    for name in ("plain.jpg", "noending", "IMG_1.heic", "photo.jpg_large", "at 10.30", "saved.jpg~"):
        drawn(tmp_path / name)
    for name, content in ((f"real{UNREAD}", HEIC_START), ("notes.txt", b"x"), ("README", b"words"), ("b.TXT", b"x")):
        (tmp_path / name).write_bytes(content)
    drawn(tmp_path / "picture.txt")  # not opened: its ending says what it is
    records = prepare(tmp_path.parent / "out", images=tmp_path)
    assert files(records) == ["IMG_1.heic", "at 10.30", "noending", "photo.jpg_large", "plain.jpg", "saved.jpg~"]
    counted = f"{tmp_path}: 5 other files: 3 .txt, 1 {UNREAD}, 1 file without an ending"
    advice = f" (to read .heic: {MISSING['HEIF']})" if UNREAD == ".heic" else ""
    assert counted + advice in capsys.readouterr().out.splitlines()


def test_pictures_that_no_source_names_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        drawn(tmp_path / "p" / name)
    (tmp_path / "p" / "link.jpg").symlink_to("c.jpg")
    rows = ["image,caption", "./a.jpg,x", "link.jpg,y"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    prepare(tmp_path / "out", images=tmp_path / "p", source=(tmp_path / "x.csv",), split_rule="train")
    said = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'p'}: pictures that no source names: 2 (b.jpg, d.jpg)" in said
    (tmp_path / "x.csv").write_text("\n".join([*rows, "b.jpg,z", "d.jpg,z"]))
    prepare(tmp_path / "all", images=tmp_path / "p", source=(tmp_path / "x.csv",), split_rule="train")
    assert "no source names" not in capsys.readouterr().out


def test_what_systems_leave_behind_is_left_out_and_counted(tmp_path: Path) -> None:
    for folder in (
        ".thumbnails",
        "@eaDir",
        ".trash",
        ".Trash-1000",
        "__MACOSX",
        "#recycle",
        "lost+found",
        "sub/@eaDir",
    ):
        drawn(tmp_path / folder / "x.jpg")
    for name in ("._x.jpg", "x.jpg", "sub/y.jpg", ".hidden.png"):
        drawn(tmp_path / name)
    listing = list_pictures(tmp_path)
    assert listing.pictures == ["sub/y.jpg", "x.jpg"]
    assert listing.summary() == "10 other files: 5 system folders, 3 hidden folders, 2 hidden files"


def test_a_folder_without_pictures_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    with pytest.raises(
        BadInput, match=r"^there is no picture below .*/q \(the folder is empty\); pictures end in .*\.avif"
    ):
        prepare(tmp_path / "out", images=tmp_path / "q")
    (tmp_path / "q" / f"a{UNREAD}").write_bytes(HEIC_START)
    with pytest.raises(BadInput, match=rf"^there is no picture below .*/q \(1 other file: 1 {UNREAD}"):
        prepare(tmp_path / "out", images=tmp_path / "q")


def test_links_and_what_lies_behind_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "p"
    drawn(photos / "0.jpg")
    for name in ("1.jpg", "2.jpg"):
        drawn(tmp_path / "real" / "trip" / name)
    (photos / "trip").symlink_to(tmp_path / "real" / "trip")
    (tmp_path / "real" / "trip" / "back").symlink_to(photos)
    (photos / "x.jpg").symlink_to("/gone/x.jpg")
    (photos / "one.jpg").symlink_to(tmp_path / "real" / "trip" / "1.jpg")
    with pytest.raises(BadInput) as caught:
        prepare(tmp_path / "a", images=photos)
    lines = str(caught.value).splitlines()
    assert f"  link to a folder, not followed (--follow-links lets it): {photos}: trip" in lines
    assert "  1 × link that leads out of the folder, not followed (--follow-links lets it)" in lines
    assert files(prepare(tmp_path / "b", images=photos, skip_bad=True)) == ["0.jpg"]
    capsys.readouterr()
    assert files(prepare(tmp_path / "c", images=photos, follow_links=True)) == ["0.jpg", "trip/1.jpg", "trip/2.jpg"]
    said = capsys.readouterr().out.splitlines()
    assert f"{photos}: 1 × link that leads nowhere: x.jpg" in said
    rest = "1 link to a folder listed under another name, 1 link to a picture listed under another name"
    assert f"{photos}: 2 other files: {rest}" in said
    drawn(tmp_path / "real" / "trip" / "3.jpg")
    with pytest.raises(BadInput, match=r"images/trip .* has changed since"):
        prepare(tmp_path / "c", images=photos, follow_links=True)


def test_links_to_pictures_of_the_same_folder_are_the_same_pictures(tmp_path: Path) -> None:
    drawn(tmp_path / "store" / "1.jpg")
    drawn(tmp_path / ".annex" / "2.jpg")
    for name, target in (("a.jpg", "store/1.jpg"), ("b.jpg", "a.jpg"), ("c.jpg", ".annex/2.jpg"), ("d.jpg", "c.jpg")):
        (tmp_path / name).symlink_to(target)
    listing = list_pictures(tmp_path)
    assert listing.pictures == ["c.jpg", "store/1.jpg"]  # a hidden folder is not listed itself
    assert listing.summary() == "4 other files: 3 links to pictures listed under another name, 1 hidden folder"


def test_a_locked_folder_is_named(tmp_path: Path) -> None:
    reachable(tmp_path)
    drawn(tmp_path / "open" / "a.jpg")
    drawn(tmp_path / "shut" / "b.jpg")
    (tmp_path / "shut").chmod(0)
    with without_privileges():
        listing = list_pictures(tmp_path)
    (tmp_path / "shut").chmod(0o755)
    assert (listing.pictures, listing.lost) == (["open/a.jpg"], {"shut": "no permission to read the folder"})


NAMES = ("a.jpg", "b", "c.JFIF", "d.txt", "e.heic", ".f.png", "@eaDir", "__MACOSX", ".g", "h.5", "\udcff.png")
PLAIN: dict[str, Callable[[Path], object]] = {
    "picture": lambda path: path.write_bytes(JPEG.getvalue()),
    "text": lambda path: path.write_text("words"),
    "pipe": os.mkfifo,
}
LINKS = ("gone", "..", ".", "a.jpg", "b", "c.JFIF/a.jpg", "h.5", "{outside}", "{outside}/o.jpg", "{outside}/a.jpg")
TREES = st.recursive(
    st.sampled_from([*PLAIN, *LINKS]),
    lambda parts: st.dictionaries(st.sampled_from(NAMES), parts, max_size=5),
    max_leaves=20,
).filter(lambda tree: isinstance(tree, dict))


def grow(path: Path, tree: Any, outside: Path) -> None:
    """Make files (see `PLAIN`), links (to what they say) and folders (of dictionaries)."""
    if isinstance(tree, dict):
        path.mkdir()
        for name, part in tree.items():
            grow(path / name, part, outside)
    elif tree in PLAIN:
        PLAIN[tree](path)
    else:
        path.symlink_to(tree.format(outside=outside))


def is_left_out(path: Path) -> bool:
    folder = path.is_dir()
    return path.name.startswith(".") or (folder and path.name in ("@eaDir", "__MACOSX"))


def entries(folder: Path) -> Iterator[Path]:
    """All entries below a folder that are no folders to be read; links to folders are entries."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and not is_left_out(path):
            yield from entries(path)
        else:
            yield path


@settings(deadline=None, max_examples=150)
@given(tree=TREES)
def test_every_entry_of_any_folder_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    base = tmp_path_factory.mktemp("tree").resolve()
    grow(base / "outside", {"o.jpg": "picture", "sub": {"a.jpg": "picture", "up": "../.."}}, base)
    grow(base / "in", tree, base / "outside")
    listing = list_pictures(base / "in")
    there = {str(path.relative_to(base / "in")): path for path in entries(base / "in")}
    assert len(listing.pictures) + len(listing.problems) + listing.others.total() == len(there)
    assert not set(listing.pictures) & listing.problems.keys()
    assert {*listing.pictures, *listing.problems} <= there.keys()
    assert listing.pictures == sorted(listing.pictures, key=lambda path: Path(path).parts)
    assert len({there[file].resolve() for file in listing.pictures}) == len(listing.pictures)
    for file, path in there.items():
        ours = path.is_file() and path.resolve().is_relative_to(base / "in") and not is_left_out(path)
        if ours and path.suffix.lower() in PICTURE_ENDINGS and "\udcff" not in file and not path.is_symlink():
            assert file in listing.pictures
        if path.is_file() and path.suffix == ".txt" and not is_left_out(path):
            assert file not in listing.pictures
    followed = list_pictures(base / "in", follow_links=True)
    reals = [(base / "in" / file).resolve() for file in followed.pictures]
    assert len(set(reals)) == len(reals)
    assert {there[file].resolve() for file in listing.pictures} <= set(reals)
    assert set(followed.problems.values()) <= {*DEAD_ENDS, "file name not UTF-8"}
    shutil.rmtree(base)


# Shards


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_captions_of_all_members_are_read_and_a_null_one_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "0.caption": b"a", "1.text": b"b", "2.cap": b"c", "3.json": b'{"text": "d"}', "4.txt": b"e",
        "5.json": b'{"captions": ["f", "g"], "caption": "h"}', "6.txt": b"i", "6.json": b'{"caption": null}',
    }  # fmt: skip
    pictures = {f"{number}.jpg": JPEG.getvalue() for number in range(8)}
    others = {"1.cls": b"1", "1.url": b"u", f"7{UNREAD}": HEIC_START, "._1.jpg": b"x", "LICENSE": b"x"}
    path = shard(tmp_path / "s.tar", {**pictures, **texts, **others})
    records = prepare(tmp_path / "out", source=(path,), split_rule="train")
    said = capsys.readouterr().out
    assert [record.captions for record in records] == [*(tuple(letter) for letter in "abcde"), tuple("fgh"), ("i",), ()]
    assert "in the shards: 5 other files: 1 .cls, 1 " in said
    assert f"1 {UNREAD}, " in said
    assert "1 of 8 pictures have no caption in the shards" in said
    for nothing in (b'{"caption": null, "url": "u"}', b'{"captions": []}', b'{"text": ""}'):
        shard(path, {**pictures, **texts, "7.json": nothing})
        with pytest.raises(BadInput, match=r"picture without a caption: s\.tar, member 7\.jpg"):
            prepare(tmp_path / "null", source=(path,), split_rule="train")


def test_a_folder_of_shards_and_of_what_lies_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compressed ones and those in folders below; keys that start anew in each keep their pictures."""
    for number, (name, mode) in enumerate((("00000.tar", "w"), ("00001.tar.gz", "w:gz"), ("sub/00000.tgz", "w:gz"))):
        shard(tmp_path / "s" / name, {"000.jpg": JPEG.getvalue(), "000.txt": str(number).encode()}, mode)
    for name in ("00000_stats.json", "00000.parquet", "00001.parquet"):
        (tmp_path / "s" / name).write_bytes(b"x")
    (tmp_path / "s" / "again.tar").symlink_to("00000.tar")
    records = prepare(tmp_path / "out", source=(tmp_path / "s",), split_rule="train")
    assert [(record.image, record.captions) for record in records] == [
        ("000.jpg", ("0",)), ("00001/000.jpg", ("1",)), ("sub/00000/000.jpg", ("2",)),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "4 other files: 2 .parquet, 1 .json, 1 link to a shard listed under another name" in said
    assert list_shards(tmp_path / "s", follow_links=False).pictures == ["00000.tar", "00001.tar.gz", "sub/00000.tgz"]


def test_text_files_beside_pictures_have_endings_of_any_letters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    for name in ("a.jpg", "b.JPG"):
        drawn(folder / name)
    for name in ("a.TXT", "a.caption", "b.txt", "b.TXT", "c.Txt"):
        (folder / name).write_text(name)
    records = prepare(tmp_path / "out", source=(folder,), images=folder, split_rule="train")
    assert [record.captions for record in records] == [("a.TXT", "a.caption"), ("b.txt",)]
    assert "text files that belong to no picture and are not read: 2 (b.TXT, c.Txt)" in capsys.readouterr().out


def test_a_name_to_which_no_ending_can_be_put_has_no_text_beside_it(tmp_path: Path) -> None:
    """File systems take names of 255 bytes."""
    name = f"{'x' * 251}.jpg"
    drawn(tmp_path / "pictures" / name)
    assert files(prepare(tmp_path / "out", images=tmp_path / "pictures")) == [name]


def test_sources_without_shards_or_with_one_twice(tmp_path: Path) -> None:
    drawn(tmp_path / "pictures" / "a.jpg")
    with pytest.raises(BadInput, match="has no shard, no parquet file, and no picture with a text file beside it"):
        prepare(tmp_path / "out", source=(tmp_path / "pictures",), images=tmp_path / "pictures")
    path = shard(tmp_path / "s" / "a.tar", {"1.jpg": JPEG.getvalue()})
    with pytest.raises(BadInput, match=r"--source names .*/s/a\.tar more than once: leave one out"):
        prepare(tmp_path / "out", source=(path.parent, path))
    shard(path, {"1.txt": b"a text", "1.tiff.gz": b"x"})
    with pytest.raises(BadInput, match=r"^there is no picture in the shards \(1 other file: 1 \.tiff\.gz\)"):
        prepare(tmp_path / "out", source=(path,))


def test_a_shard_that_ends_too_early_is_named(tmp_path: Path) -> None:
    """tarfile takes a damaged member for the end, and a missing end for one."""
    path = shard(tmp_path / "s.tar", {f"{number}.jpg": JPEG.getvalue() for number in range(3)})
    whole = path.read_bytes()
    step = 512 + -(-len(JPEG.getvalue()) // 512) * 512  # header and content of a member
    damages = {
        "a damaged header": whole[: step + 100] + b"\xff" * 300 + whole[step + 400 :],
        "a cut header": whole[: 2 * step + 100],
        "cut content": whole[: 2 * step + 600],
        "two in one": whole + whole,
    }
    for name, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"s\.tar is damaged \(.*\): fetch it again"):
            prepare(tmp_path / name, source=(path,))
    path.write_bytes(whole[: 2 * step])
    with pytest.raises(BadInput, match=r"shard without the mark of its end: it may be cut off: s\.tar"):
        prepare(tmp_path / "no end", source=(path,))
    assert len(prepare(tmp_path / "no end", source=(path,), skip_bad=True)) == 2
    cut = shard(tmp_path / "s.tar.gz", {"1.jpg": JPEG.getvalue()}, "w:gz").read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(BadInput, match=r"s\.tar\.gz is damaged \(.*\): fetch it again"):
        prepare(tmp_path / "gz", source=(tmp_path / "s.tar.gz",))


MEMBERS = st.dictionaries(
    st.tuples(
        st.sampled_from(["0", "1", "a/0", "a b", ".h", "./2", "v.2"]),
        st.sampled_from([".jpg", ".PNG", ".txt", ".cap", ".json", ".cls", UNREAD, "", ".seg.png"]),
    ).map("".join),
    st.sampled_from([b"words", b"", b'{"caption": "x"}', b'{"caption": null}', b"\xff"]),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(MEMBERS, min_size=1, max_size=3))
def test_every_member_of_any_shards_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, contents: list[dict[str, bytes]]
) -> None:
    base = tmp_path_factory.mktemp("shards")
    shards = [shard(base / f"{number}.tar", members) for number, members in enumerate(contents)]
    unpacking = Unpacking(shards, base / "out")
    samples = [sample for _, sample in unpacking.samples()]
    pictures = [sample for sample in samples if sample.has_picture]
    kept = [sample for sample in pictures if not sample.problem]
    assert len({sample.name for sample in kept}) == len(kept)
    assert all((base / "out" / sample.name).is_file() for sample in kept)
    names = [Path(name) for members in contents for name in members]
    texts = {".txt", ".cap", ".json"}
    others = [path for path in names if path.name.startswith(".") or path.name.count(".") != 1]
    others += [path for path in names if path not in others and path.suffix.lower() not in texts | {".jpg", ".png"}]
    assert unpacking.others.total() == len(others)
    assert len(pictures) == sum(path.suffix.lower() in (".jpg", ".png") for path in names if path not in others)
    said = [
        path for path, content in ((Path(name), content) for members in contents for name, content in members.items())
        if path not in others and path.suffix.lower() in texts and content not in (b"\xff", b'{"caption": null}')
    ]  # fmt: skip
    assert sum(len(sample.captions) for sample in samples) <= len(said) + len(samples)
    shutil.rmtree(base)


# What pictures show


def saved(picture: Image.Image, path: Path, **options: Any) -> np.ndarray[Any, Any]:
    picture.save(path, **options)
    assert find_unreadable([path.name], workers=0, folder=path.parent) == {path.name: ""}
    return np.asarray(open_picture(path))


RAMP = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("unit.tif", RAMP, ""),
        ("bytes.tif", 255 * RAMP, ""),
        ("heights.tif", 5000 * RAMP - 1000, STRETCHED),
        ("map.pfm", RAMP, ""),
        ("deep.png", (65535 * RAMP).astype(np.uint16), ""),
        ("deep.tif", (65535 * RAMP).astype(np.uint16), ""),
        ("deep.pgm", (65535 * RAMP).astype(np.uint16), ""),
        ("long.tif", (2e9 * RAMP).astype(np.int32), STRETCHED),
        ("signed.tif", (2000 * RAMP - 1000).astype(np.int32), STRETCHED),
    ],
)
def test_greys_of_any_range_keep_their_steps(
    name: str, values: np.ndarray[Any, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = saved(Image.fromarray(values), tmp_path / name)
    np.testing.assert_allclose(seen, np.repeat((255 * RAMP)[..., None], 3, axis=2), atol=1)
    assert capsys.readouterr().out == (f"1 picture {note}\n" if note else "")


def test_values_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    seen = saved(Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP)), tmp_path / "a.tif")
    assert seen[3].max() == 0


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255)), ("P", 0)])
@pytest.mark.parametrize("ending", [".tif", ".jpg"])
def test_other_colour_spaces_are_converted(mode: str, colour: Any, ending: str, tmp_path: Path) -> None:
    if (mode, ending) == ("P", ".jpg"):
        pytest.skip("JPEG has no palette")
    picture = Image.new(mode, (8, 8), colour)
    if mode == "P":
        picture.putpalette([255, 0, 0])
    seen = saved(picture, tmp_path / f"a{ending}")
    assert np.abs(seen[0, 0].astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_pictures_are_upright(orientation: int, ending: str, tmp_path: Path) -> None:
    """As Pillow's own exif_transpose has it, whatever else the EXIF holds."""
    stored = Image.new("RGB", (20, 30), "white")
    stored.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = saved(stored, tmp_path / f"a{ending}", exif=exif)
    turned = stored.copy()
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).mean() < 8


def test_an_animation_says_that_its_first_frame_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif", "a.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert not any(find_unreadable(names, workers=0, folder=tmp_path).values())
    assert capsys.readouterr().out == f"5 pictures {FIRST_FRAME}\n"
    assert {tuple(np.asarray(open_picture(tmp_path / name))[0, 0] // 250) for name in names} == {(1, 0, 0)}


# Formats of packages


def test_a_phones_jpeg_is_a_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "IMG_0001.jpg"
    Image.new("RGB", (96, 96), "red").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (48, 48))])
    with Image.open(path) as picture:
        assert picture.format == "MPO"
    assert find_unreadable([path.name], workers=0, folder=tmp_path) == {path.name: ""}
    assert check(Upload(path.name, path.read_bytes())) == ".jpg"


@pytest.mark.skipif("HEIF" not in MISSING, reason="pillow-heif is installed")
def test_a_heic_file_names_the_package_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC_START)
    said = f"HEIC picture: {MISSING['HEIF']}"
    assert said.endswith("pip install pillow-heif")
    assert sys.executable in said
    assert find_unreadable(["a.heic"], workers=0, folder=tmp_path) == {"a.heic": said}
    with pytest.raises(BadInput, match=re.escape(said)):
        check(Upload("a.heic", HEIC_START))


@pytest.mark.skipif("HEIF" in MISSING, reason="pillow-heif is not installed")
def test_a_heic_file_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic", "HEIF")
    assert files(prepare(tmp_path / "out", images=tmp_path)) == ["a.heic"]
    assert check(Upload("a.heic", (tmp_path / "a.heic").read_bytes())) == ".heic"
    assert np.abs(np.asarray(open_picture(tmp_path / "a.heic"))[9, 9].astype(int) - (255, 0, 0)).max() < 9
    with Image.open(io.BytesIO(thumbnail(tmp_path / "a.heic", 0))) as small:
        assert small.format == "WEBP"


def test_what_is_damaged_says_so(tmp_path: Path) -> None:
    assert unidentified(b"\x89PNG\r\n\x1a\n and words") == "PNG file that is damaged or of a kind that is not read"
    assert unidentified(b"Python, and other words") == "file is no picture"
    assert ending_of("a.tar.gz") == ".gz"
    assert (
        Listing(others=Counter({f".{letter}": 1 for letter in "abcdefghijklmn"}))
        .summary()
        .endswith("1 .l, 2 of 2 further kinds")
    )


def noise(name: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(file, name)
    return file.getvalue()


def test_a_text_beside_captions_in_a_shard_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, content in (("0.png", noise("PNG")), ("0.json", b'{"caption": "a", "text": "b"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    [record] = prepare(tmp_path / "out", source=(tmp_path / "s.tar",), split_rule="train")
    assert record.captions == ("a",)
    assert "JSON with a text beside its captions, which is not read: 1" in capsys.readouterr().out


WHOLE = {name: noise(name) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_a_damaged_picture_has_one_reason_wherever_it_comes_from(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Cut anywhere, or with other bytes anywhere: a folder, an upload and decoding itself say the same of it."""
    whole = WHOLE[name]
    place = data.draw(st.integers(0, len(whole) - 1))
    others = data.draw(st.binary(max_size=8))
    content = whole[:place] + others + (whole[place + len(others) :] if data.draw(st.booleans()) else b"")
    path = tmp_path_factory.mktemp("damaged") / f"a{FORMATS[name][0]}"
    path.write_bytes(content)
    reason = find_unreadable([path.name], workers=0, folder=path.parent)[path.name]
    assert "Error" not in reason  # a kind of error is no reason
    refusal = why_refused(Upload(path.name, content))
    if "are allowed" in refusal:  # fewer pixels than in a folder
        return
    assert reason in refusal
    assert bool(reason) == bool(refusal)
    if not reason:
        open_picture(path)


def why_refused(upload: Upload) -> str:
    try:
        check(upload)
    except BadInput as error:
        return str(error)
    return ""
