"""Every caption source becomes the one format, and bad data is named before anything is written."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tools.captions import Record, read_captions
from tools.data.splits import random_split
from tools.errors import BadInput
from tools.pictures import find_unreadable
from tools.prepare_captions import Config, main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("a.jpg", "b.jpg", "c.jpg", "val2014/d.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(folder / name)
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def prepare(images: Path, *sources: Path, **options: Any) -> list[Record]:
    config = Config(images=images, source=sources, output=images.parent / "out", workers=1, **options)
    main(config)
    return read_captions(config.output).records


@pytest.mark.parametrize("source", [[], [["a.jpg", "train"], ["b.jpg", "test"], ["c.jpg", "test"]]])
def test_a_picture_that_goes_after_its_check_is_left_to_the_next_stage(
    source: list[list[str]], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*arguments: Any, **options: Any) -> dict[str, str]:
        found = find_unreadable(*arguments, **options)
        (images / "b.jpg").unlink()
        return found

    monkeypatch.setattr("tools.prepare_captions.find_unreadable", check)
    rows = [{"image": name, "caption": "x", "split": split} for name, split in source]
    files = [write(images.parent / "x.json", rows)] if rows else []
    assert "b.jpg" in [record.file for record in prepare(images, *files)]


def test_karpathy_with_restval_and_folders(images: Path) -> None:
    rows = [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one "}, {"raw": "two\nlines"}]},
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "three"}]},
        {"filename": "d.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "four"}]},
    ]
    source = write(images.parent / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    assert prepare(images, source) == [
        Record("a.jpg", "a.jpg", "train", ("one", "two lines")),
        Record("b.jpg", "b.jpg", "train", ("three",)),
        Record("d.jpg", "val2014/d.jpg", "test", ("four",)),
    ]


def test_an_incomplete_copy_is_noticed(images: Path) -> None:
    row = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "x"}]}
    source = write(images.parent / "dataset_flickr30k.json", {"images": [row]})
    with pytest.raises(BadInput, match=r"have \(1, 0, 0\) pictures, --expect says \(29000, 1014, 1000\)"):
        prepare(images, source, expect=(29000, 1014, 1000))
    assert len(prepare(images, source, expect=(1, 0, 0))) == 1


def test_published_split_captions(images: Path) -> None:
    value = {"a.jpg": {"split": "val", "caption": ["x", "y"]}, "b.jpg": {"split": "train", "captions": "z"}}
    source = write(images.parent / "flickr30k_split_captions.json", value)
    assert prepare(images, source) == [
        Record("a.jpg", "a.jpg", "val", ("x", "y")),
        Record("b.jpg", "b.jpg", "train", ("z",)),
    ]


def coco(images: Path, name: str, files: dict[int, str]) -> Path:
    value = {
        "images": [{"id": number, "file_name": file} for number, file in files.items()],
        "annotations": [{"image_id": number, "caption": f"of {file}"} for number, file in files.items()],
    }
    return write(images.parent / name, value)


def test_coco_with_a_rule_for_each_file(images: Path) -> None:
    train = coco(images, "captions_train2014.json", {1: "a.jpg", 2: "b.jpg"})
    val = coco(images, "captions_val2014.json", {3: "c.jpg"})
    records = prepare(images, train, val, split_rule="captions_train2014=train;captions_val2014=test")
    assert [(record.image, record.split, record.captions) for record in records] == [
        ("a.jpg", "train", ("of a.jpg",)),
        ("b.jpg", "train", ("of b.jpg",)),
        ("c.jpg", "test", ("of c.jpg",)),
    ]


def test_csv_one_row_a_caption(images: Path) -> None:
    source = write(
        images.parent / "t.csv", 'image,caption,split\na.jpg,"one, two",train\na.jpg,three,train\nb.jpg,x,val\n'
    )
    assert prepare(images, source) == [
        Record("a.jpg", "a.jpg", "train", ("one, two", "three")),
        Record("b.jpg", "b.jpg", "val", ("x",)),
    ]


def test_jsonl_without_splits_is_divided_the_same_way_every_time(images: Path) -> None:
    rows = [json.dumps({"image": name, "captions": ["x"]}) for name in ("a.jpg", "b.jpg", "c.jpg")]
    source = write(images.parent / "t.jsonl", "\n".join(rows))
    first = prepare(images, source)
    source.write_text("\n".join(rows[:2]))
    assert prepare(images, source, overwrite=True) == first[:2]


def test_random_rule_has_its_shares() -> None:
    bounds = (0.8, 0.9)
    splits = [random_split(f"{number}.jpg", bounds) for number in range(5000)]
    assert 0.78 < splits.count("train") / 5000 < 0.82
    assert 0.09 < splits.count("val") / 5000 < 0.11


def test_a_bare_folder_is_searchable_and_not_trainable(images: Path) -> None:
    records = prepare(images)
    assert [(record.image, record.split, record.captions) for record in records] == [
        (name, "test", ()) for name in ("a.jpg", "b.jpg", "c.jpg", "val2014/d.jpg")
    ]


def test_new_pictures_in_a_bare_folder_are_noticed(images: Path) -> None:
    prepare(images)
    Image.new("RGB", (20, 20), "blue").save(images / "new.jpg")
    with pytest.raises(BadInput, match=r"images .* has changed since"):
        prepare(images)
    assert len(prepare(images, overwrite=True)) == 5


def test_a_csv_in_another_encoding(images: Path) -> None:
    source = images.parent / "x.csv"
    source.write_bytes("image,caption\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"line that is not UTF-8 \(save the file as UTF-8\): x\.csv, line 2"):
        prepare(images, source)


def bad_source(images: Path) -> Path:
    (images / "torn.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    rows = ["image,caption,split", "a.jpg,fine,train", "b.jpg,,train", "gone.jpg,x,train", "torn.jpg,x,val"]
    rows += ["c.jpg,x,train", "c.jpg,x,test", "val2014/d.jpg,x,holdout"]
    return write(images.parent / "bad.csv", "\n".join(rows))


def test_bad_data_is_counted_and_named_and_nothing_is_written(images: Path) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(images, bad_source(images))
    message = str(caught.value)
    for part in (
        "1 × picture missing",
        "picture missing: bad.csv, line 4: gone.jpg",
        "picture unreadable (Truncated File Read): bad.csv, line 5: torn.jpg",
        "empty caption: bad.csv, line 3",
        "picture in two splits: bad.csv, line 6: c.jpg",
        "split is not one of train, val, test: bad.csv, line 8: 'holdout'",
        "--skip-bad",
    ):
        assert part in message
    assert not (images.parent / "out" / "captions.jsonl").exists()


def test_skip_bad_goes_on_without_them(images: Path) -> None:
    source = bad_source(images)
    with pytest.raises(BadInput):
        prepare(images, source)
    assert prepare(images, source, skip_bad=True) == [Record("a.jpg", "a.jpg", "train", ("fine",))]


def test_duplicate_ids(images: Path) -> None:
    row = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "x"}]}
    source = write(images.parent / "k.json", {"images": [row, row]})
    with pytest.raises(BadInput, match=r"duplicate id: k\.json, images\[1\]: a\.jpg"):
        prepare(images, source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"images": [', r"x\.json, line 1: not valid JSON"),
        (
            "x.json",
            '{"images": [{"filename": "a.jpg"}]}',
            r"entry without 'sentences', which Karpathy's files have: x\.json, images\[0\]",
        ),
        ("x.json", "[1, 2]", "name its --format"),
        ("x.json", "[]", r"^no usable picture: there are no rows in .*/x\.json$"),
        ("x.json", '{"data": [{"image": "a.jpg"}]}', r'the objects below its key "data" are not read there: save'),
        (
            "x.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": "1", "caption": "x"}]}',
            r'annotation of an image that is not among the images: x\.json, annotations\[0\]: image_id "1"',
        ),
        ("x.csv", "a.jpg;A dog\n", r"line 1: a\.jpg is a picture and no column's name: put a header above it, such as"),
        ("x.json", '{"a.jpg": {"split": "val"}}', 'entry without "caption": x.json, entry "a.jpg"'),
        (
            "x.csv",
            "id,words\na.jpg,x\n",
            "the columns are id, words: name the columns with --image-column and --caption",
        ),
        ("x.csv", "image,caption\n", r"^no usable picture: there are no rows in .*/x\.csv$"),
        ("x.json", '{"images": [{"id": 1}], "annotations": [{}]}', "entry without id or file_name: x.json, images"),
    ],
)
def test_a_source_of_another_kind(images: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prepare(images, write(images.parent / name, content))


def test_contradicting_options(images: Path, tmp_path: Path) -> None:
    base = Config(images=images, output=tmp_path / "out")
    with pytest.raises(BadInput, match="does not exist"):
        replace(base, source=(tmp_path / "none.csv",))
    with pytest.raises(BadInput, match="is not a folder"):
        replace(base, images=tmp_path / "none")
    source = write(tmp_path / "x.csv", "image,caption\na.jpg,x\n")
    with pytest.raises(BadInput, match="gives no rule"):
        prepare(images, source, split_rule="random:0.5,0.1,0.1")


def test_a_file_name_that_is_not_utf8_is_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a.jpg").rename(os.fsdecode(os.fsencode(images) + b"/caf\xe9.jpg"))
    config = Config(images=images, output=tmp_path / "out", skip_bad=True, workers=1)
    main(config)
    assert f"  file name not UTF-8: {images}: caf\\udce9.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv.gz", gzip.compress(b"image,caption\na.jpg,x\n", mtime=0), r"is compressed: unpack it with gunzip"),
        ("x.csv", b"PK\x03\x04 and more", r"is a zip archive: unpack it and name what it holds"),
        ("x.xlsx", b"PK\x03\x04 and more", r"is a workbook: save it as CSV"),
        ("x.arrow", b"ARROW1\0\0 and more", r"is an \.arrow file: write a \.parquet file from it"),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS: .* git lfs pull"),
        ("x.json", b"\n<!DOCTYPE html>\n<html>", r"is a web page: fetch the file itself"),
        ("x.csv", "image,caption\na.jpg,x\n".encode("utf-16-le"), r"may be text in UTF-16: save it as UTF-8"),
        ("x.npy", b"\x93NUMPY\x01\x00v\x00", r"is no text file, and of no kind that is read"),
        ("images/a.jpg", b"", r"is a picture: name its folder with --images"),
        ("saved/train/data-0.arrow", b"ARROW1", r'load_from_disk\(".*/saved/train"\)\.to_parquet\("train\.parquet"\)'),
        ("saved/0.tfrecord", b"x", r"holds \.tfrecord files"),
        ("images/train/metadata.csv", b"x", r": name the tables, --source \S*/images/train/metadata\.csv$"),
    ],
)
def test_what_is_no_source_says_what_it_is(images: Path, name: str, content: bytes, message: str) -> None:
    path = images.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content:
        path.write_bytes(content)
    source = images if "metadata" in name else images.parent / "saved" if "saved" in name else path
    with pytest.raises(BadInput, match=f"^--source {source} .*{message}"):
        prepare(images, source, split_rule="test")


def test_an_empty_split_is_none_and_no_other_value_is(images: Path) -> None:
    rows = [{"image": name, "caption": "x", "split": split} for name, split in (("a.jpg", "test"), ("b.jpg", 0))]
    source = write(images.parent / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"split is not one of train, val, test: x\.jsonl, line 2: 0"):
        prepare(images, source)
    source.write_text(json.dumps({**rows[0], "split": " "}))
    assert [record.split for record in prepare(images, source, split_rule="val", overwrite=True)] == ["val"]


def test_a_parquet_file_that_has_paths_in_the_place_of_pictures(images: Path) -> None:
    """As `datasets` writes it where the pictures' files are not embedded."""
    source = images.parent / "x.parquet"
    rows = {"image": [{"bytes": None, "path": "a.jpg"}, {"bytes": b"x", "path": "b.jpg"}], "caption": ["x", "y"]}
    parquet.write_table(pyarrow.table(rows), source)
    assert [record.file for record in prepare(images, source, split_rule="test", skip_bad=True)] == ["a.jpg"]
    with pytest.raises(BadInput, match="1 × picture in the file itself, where others are not"):
        prepare(images, source, split_rule="test", overwrite=True)
    bare = Config(source=(source,), output=images.parent / "bare", workers=0)
    with pytest.raises(BadInput, match=r"\(name the folder of the pictures with --images\): x\.parquet, row 1"):
        main(bare)


def test_a_column_that_stands_twice_in_a_parquet_file(images: Path) -> None:
    columns = [pyarrow.array([value]) for value in ("a.jpg", "x", "y")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["image", "caption", "caption"]), images / "x.parquet")
    with pytest.raises(BadInput, match=r"x\.parquet: the column caption stands 2 times: rename the others"):
        prepare(images, images / "x.parquet", split_rule="test")
