"""A picture is its file, however its name is spelled; ids are names as long as they are unique."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.captions import Record, read_captions
from tools.data.found import Found, picture_of
from tools.data.identity import join, resolve
from tools.errors import BadInput
from tools.prepare_captions import Config, main

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.jpg", "b.jpg", "sub/b.jpg", "sub/deep/c.jpg", DECOMPOSED)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4 + number), "red").save(path)
    return tmp_path / "images"


def prepare(images: Path, *sources: Path, **options: Any) -> list[Record]:
    config = Config(images=images, source=sources, output=images.parent / "out", workers=0, **options)
    main(config)
    return read_captions(config.output).records


def table(images: Path, *rows: str) -> Path:
    path = images.parent / "t.csv"
    path.write_text("\n".join(["image,caption,split", *rows]) + "\n")
    return path


SPELLINGS = [
    ("a.jpg", "./a.jpg"), ("sub/b.jpg", "sub//b.jpg"), ("sub/b.jpg", "sub/deep/../b.jpg"), ("a.jpg", "{images}/a.jpg"),
    ("sub/b.jpg", "{images}/sub/../sub/b.jpg"), ("sub/b.jpg", "sub\\b.jpg"), (DECOMPOSED, COMPOSED),
    ("a.jpg", "a.jpg "), ("sub/deep/c.jpg", "c.jpg"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "other"), SPELLINGS)
def test_two_spellings_of_a_file_are_one_picture(name: str, other: str, images: Path) -> None:
    other = other.format(images=images)
    with pytest.raises(BadInput) as caught:
        prepare(images, table(images, f"{name},one,train", f"{other},two,test"))
    assert "  2 × picture in two splits" in str(caught.value).splitlines()
    del caught
    (record,) = prepare(images, table(images, f"{name},one,train", f"{other},two,train"), overwrite=True)
    assert (record.image, record.file, record.captions) == (name, name, ("one", "two"))


def test_links_within_the_folder_are_names_of_one_picture(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "link.jpg").symlink_to("a.jpg")
    with pytest.raises(BadInput, match="2 × picture in two splits"):
        prepare(images, table(images, "a.jpg,one,train", "link.jpg,two,test"))
    records = prepare(images, table(images, "a.jpg,one,train", "link.jpg,two,train"), overwrite=True)
    assert [record.image for record in records] == ["a.jpg", "link.jpg"]
    assert "further names of a picture (links), each counted as a picture of its own: 1" in capsys.readouterr().out


def test_two_files_whose_names_differ_in_their_unicode_form_are_two_pictures(images: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(images / COMPOSED)
    records = prepare(images, table(images, f"{COMPOSED},one,train", f"{DECOMPOSED},two,test"))
    assert [record.file for record in records] == [COMPOSED, DECOMPOSED]


@pytest.mark.parametrize("copy", [shutil.copyfile, os.link])
def test_equal_bytes_in_train_and_test_are_said(
    copy: Callable[[Path, Path], object], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(images / "a.jpg", images / "copy.jpg")
    prepare(images, table(images, "a.jpg,one,train", "copy.jpg,two,test", "b.jpg,three,val"))
    line = "val and test pictures with the bytes of a train picture: 1 of 2 (copy.jpg = a.jpg)"
    assert line in capsys.readouterr().out.splitlines()
    prepare(images, table(images, "a.jpg,one,train", "copy.jpg,two,train", "b.jpg,three,val"), overwrite=True)
    assert "with the bytes of" not in capsys.readouterr().out


# The same name in two folders, and names without their folder


def test_ids_are_names_while_they_are_unique_and_else_paths(images: Path) -> None:
    rows = [("", "b.jpg"), ("sub", "b.jpg"), ("sub/deep", "c.jpg")]
    value = [
        {"filepath": folder, "filename": name, "split": "train", "sentences": [{"raw": f"{folder}/{name}"}]}
        for folder, name in rows
    ]
    source = images.parent / "k.json"
    source.write_text(json.dumps({"images": value}))
    assert [(record.image, record.file, record.captions) for record in prepare(images, source)] == [
        ("b.jpg", "b.jpg", ("/b.jpg",)),
        ("sub/b.jpg", "sub/b.jpg", ("sub/b.jpg",)),
        ("c.jpg", "sub/deep/c.jpg", ("sub/deep/c.jpg",)),
    ]


def coco(path: Path, *images: tuple[int, str, str]) -> Path:
    value = {
        "images": [{"id": number, "file_name": name} for number, name, _ in images],
        "annotations": [{"image_id": number, "caption": caption} for number, _, caption in images],
    }
    path.write_text(json.dumps(value))
    return path


def test_coco_as_it_is_unpacked(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train2017/000000000011.jpg", "val2017/000000000022.jpg"):
        (images / name).parent.mkdir()
        Image.new("RGB", (4, 4), "red").save(images / name)
    train = coco(images.parent / "captions_train2017.json", (11, "000000000011.jpg", "one"))
    val = coco(images.parent / "captions_val2017.json", (22, "000000000022.jpg", "two"))
    records = prepare(images, train, val, split_rule="captions_train2017.json=train;captions_val2017.json=test")
    assert [tuple(record) for record in records] == [
        ("000000000011.jpg", "train2017/000000000011.jpg", "train", ("one",)),
        ("000000000022.jpg", "val2017/000000000022.jpg", "test", ("two",)),
    ]
    assert f"pictures found by their name in a folder below {images}: 1 (train2017)" in capsys.readouterr().out


def test_a_name_that_several_folders_have_is_no_guess(images: Path) -> None:
    (images / "b.jpg").rename(images / "sub" / "deep" / "b.jpg")
    source = coco(images.parent / "c.json", (1, "b.jpg", "x"), (2, "a.jpg", "y"))
    problem = r"name of pictures in several folders \(write the path with its folder\): c\.json, images\[0\]: b\.jpg \("
    with pytest.raises(BadInput, match=problem + r"sub/b\.jpg, sub/deep/b\.jpg\)"):
        prepare(images, source, split_rule="test")


# Ids and keys that stand twice

TWICE = [
    ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], '
     '"annotations": [{"image_id": 1, "caption": "x"}]}',
     "several images have one id: t.json, images[0]: id 1"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}], '
     '"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}]}',
     "duplicate id: t.json, images[1]: a.jpg"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "image_id": 2, "caption": "x"}]}',
     "key that stands twice: t.json, annotations[0]: image_id"),
    ('{"images": [], "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "the key images stands twice"),
    ('{"a.jpg": {"split": "train", "caption": "x"}, "a.jpg": {"split": "test", "caption": "y"}}',
     'key that stands twice: t.json, entry "a.jpg"'),
    ('{"a.jpg": {"split": "train", "caption": "x", "caption": "y"}}',
     'key that stands twice: t.json, entry "a.jpg": caption'),
    ('{"images": [{"filename": "a.jpg", "split": "val", "split": "test", "sentences": [{"raw": "x"}]}]}',
     "key that stands twice: t.json, images[0]: split"),
    ('[{"image": "a.jpg", "caption": "x", "caption": "y"}]', "key that stands twice: t.json, entry 0: caption"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "problem"), TWICE)
def test_what_stands_twice_is_named(content: str, problem: str, images: Path) -> None:
    (images.parent / "t.json").write_text(content)
    with pytest.raises(BadInput) as caught:
        prepare(images, images.parent / "t.json", split_rule="test")
    assert problem in str(caught.value)


def test_one_id_for_two_files_is_a_duplicate(images: Path) -> None:
    rows = [{"image": "x", "file": file, "captions": [file], "split": "train"} for file in ("a.jpg", "b.jpg")]
    source = images.parent / "t.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=r"duplicate id: t\.jsonl, line 2: x"):
        prepare(images, source)


# Generated spellings

FORMS = [partial(unicodedata.normalize, "NFC"), partial(unicodedata.normalize, "NFD")]
NAMES = st.sampled_from(["a", "b", "É", "日本", "x y"])
PATHS = st.builds(lambda folders, name: "/".join([*folders, f"{name}.jpg"]), st.lists(NAMES, max_size=3), NAMES)


@st.composite
def spelled(draw: st.DrawFn) -> tuple[str, str]:
    """A path below a folder, and another spelling of it."""
    path = draw(PATHS)
    parts: list[str] = []
    for part in path.split("/"):
        parts += draw(st.lists(st.sampled_from([".", "", "gone/..", "./"]), max_size=2)) if parts else []
        parts.append(part)
    start = draw(st.sampled_from(["", "./", ".//", "{folder}/", "{folder}//./"]))
    return path, start + draw(st.sampled_from(FORMS))("/".join(parts))


@settings(deadline=None)
@given(pair=spelled())
def test_any_spelling_of_a_path_is_the_same_picture(
    pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, spelling = pair
    folder = tmp_path_factory.mktemp("spellings")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).touch()
    rows: list[Found] = [picture_of(path, ["one"], "1"), picture_of(spelling.format(folder=folder), ["two"], "2")]
    resolved = resolve(rows, folder)
    assert {(row.image, row.file) for row in resolved} == {(path, path)}
    joined = join([row._replace(split="train") for row in resolved])
    assert [text for row in joined for text in row.captions] == ["one", "two"]
    assert len(joined) == (2 if spelling == path else 1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("A.JPG", "picture missing, one has its name in other capitals (write it as the file is called): {} (a.jpg)"),
        ("old/a.jpg", "picture missing there, another folder has its name (write its path below --images): {} (a.jpg)"),
        ("C:\\\\me\\\\c.jpg",
         "picture missing there, another folder has its name (write its path below --images): {} (sub/deep/c.jpg)"),
        ("https://example.org/a.jpg",
         "web address in place of a file's name (fetch the pictures first, for example with img2dataset): {}"),
        ("none.jpg", "picture missing: {}"),
        ("a\\u0000.jpg", "name with a NUL character, which no file can have: {}"),
    ],
)  # fmt: skip
def test_a_name_that_no_file_has_is_no_guess(name: str, problem: str, images: Path) -> None:
    source = images.parent / "t.jsonl"
    source.write_text(f'{{"image": "{name}", "caption": "x"}}\n')
    with pytest.raises(BadInput) as refused:
        prepare(images, source, split_rule="test")
    shown = name.replace("\\\\", "\\").replace("u0000", "x00")
    assert "  " + problem.format(f"t.jsonl, line 1: {shown}") in str(refused.value).splitlines()


def test_metadata_names_the_pictures_of_its_own_folder(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in Hugging Face's image folders; the split is its folder's, unless a column says another."""
    for number, split in enumerate(("train", "validation/b", "plain")):
        (images / split).mkdir(parents=True)
        Image.new("RGB", (6, 4 + number), "red").save(images / split / "a.jpg")
        (images / split / "metadata.csv").write_text(f"file_name,text\na.jpg,{split}\nsub/deep/c.jpg,{number}\n")
    (images / "plain" / "metadata.csv").write_text("file_name,text,split\na.jpg,plain,test\n")
    sources = [images / split / "metadata.csv" for split in ("train", "plain")]
    assert [(record.image, record.split, record.captions) for record in prepare(images, *sources)] == [
        ("train/a.jpg", "train", ("train",)), ("sub/deep/c.jpg", "train", ("0",)), ("plain/a.jpg", "test", ("plain",)),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "train/metadata.csv: its names are those of pictures in train, and its split is train" in said
    records = prepare(images, images / "validation" / "b" / "metadata.csv", overwrite=True)
    assert [(record.file, record.split) for record in records] == [
        ("validation/b/a.jpg", "val"), ("sub/deep/c.jpg", "val"),
    ]  # fmt: skip
    (images / "train" / "metadata.csv").write_text("file_name,text\n,x\n")
    with pytest.raises(BadInput, match=r"row without a picture: train/metadata\.csv, line 2"):
        prepare(images, sources[0], overwrite=True)


def test_a_source_that_stands_twice_is_refused(images: Path) -> None:
    source = table(images, "a.jpg,x,test")
    (images.parent / "link.csv").symlink_to(source)
    for again in (source, images / ".." / "t.csv", images.parent / "link.csv"):
        with pytest.raises(BadInput, match=r"^--source names .*/t\.csv more than once: leave one out$"):
            prepare(images, source, again)
