"""Ranked lists for TREC tools, features for clip-retrieval, pictures from webdataset shards."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Success
from PIL import Image
from pyarrow import parquet

from reranker import test as reorder
from retriever import rank_splits, retrieve
from retriever import test as final
from tests.chain import Chain, files_of
from tools import clip_retrieval, prepare_captions, trec
from tools.captions import Record, read_captions
from tools.errors import BadInput
from tools.features import Features, read_features
from tools.files import read_json, write_json_lines
from tools.ranked import read_lists, reordered_ranks
from tools.recall import NOT_FOUND, report
from tools.shards import braces_expanded

MEASURES = {1: Success @ 1, 5: Success @ 5, 10: Success @ 10}

# TREC


def measured(folder: Path) -> dict[Any, float]:
    """What ir-measures says of a run and its qrels."""
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(folder / "run.trec")))
    found: dict[Any, float] = ir_measures.calc_aggregate([*MEASURES.values(), RR], qrels, run)
    return found


def rank_of(ranked: list[str], image: str) -> int:
    return ranked.index(image) + 1 if image in ranked else NOT_FOUND


def assert_agrees(folder: Path, expected: Any) -> None:
    """Recall exactly; the mean of the reciprocal ranks up to the order in which it is summed."""
    found = measured(folder)
    assert {cutoff: found[measure] for cutoff, measure in MEASURES.items()} == expected.recalls
    assert found[RR] == pytest.approx(expected.mrr, rel=1e-14)


@pytest.fixture(scope="module")
def predictions(chain: Chain, retriever: Path) -> Path:
    """Ranked pictures of two pools."""
    config = retrieve.Config(
        dataset=chain.dataset, retriever=retriever, output=chain.root / "interchange" / "12", pools=("test", "all"),
        precision="fp32", device="cpu",
    )  # fmt: skip
    retrieve.main(config)
    return config.output


def test_recall_of_predictions_is_that_of_the_table(chain: Chain, predictions: Path, tmp_path: Path) -> None:
    """Of ir-measures, against the rows that retriever.test adds to the summary, and unrounded."""
    trec.main(trec.Config(predictions=predictions, output=tmp_path / "trec"))
    summary = tmp_path / "summary.json"
    final.main(
        final.Config(predictions=predictions, output=tmp_path / "final", summary=summary, name="toy", device="cpu")
    )
    rows = {row["pool"]: row for row in read_json(summary) if row["system"] == "retriever" and row["level"] == "image"}
    assert files_of(tmp_path / "trec") == [
        f"{pool}/{name}" for pool in ("all", "test") for name in ("qrels.trec", "queries.tsv", "run.trec")
    ]
    for pool, row in rows.items():
        lines = [json.loads(line) for line in (predictions / f"{pool}.jsonl").read_text().splitlines()]
        ranks = np.array([rank_of(line["ranked"], line["image"]) for line in lines])
        assert_agrees(tmp_path / "trec" / pool, report(ranks))
        found = measured(tmp_path / "trec" / pool)
        assert {str(cutoff): round(found[measure], 5) for cutoff, measure in MEASURES.items()} == row["recall"]
        assert round(found[RR], 5) == row["mrr"]
        texts = (tmp_path / "trec" / pool / "queries.tsv").read_text().splitlines()
        assert texts == [f"q{number}\t{line['query']}" for number, line in enumerate(lines, start=1)]
    first = (tmp_path / "trec" / "test" / "run.trec").read_text().splitlines()[0].split()
    assert [first[place] for place in (0, 1, 3, 5)] == ["q1", "Q0", "1", "12"]


def test_recall_of_lists_before_and_after_reranking(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    rank_splits.main(
        rank_splits.Config(
            dataset=chain.dataset, retriever=retriever, output=tmp_path / "16", train_per_picture=0, beams=12,
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    reorder.main(
        reorder.Config(
            lists=tmp_path / "16", output=tmp_path / "18", summary=tmp_path / "summary.json", name="toy",
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    for folder, name in ((tmp_path / "16", "test-test"), (tmp_path / "18", "test-test.features")):
        output = tmp_path / "trec" / folder.name
        trec.main(trec.Config(lists=folder, output=output, system="my system"))
        lists = read_lists(folder / f"{name}.jsonl")
        in_order = -np.arange(lists.rows.shape[1], dtype=np.float32)[None].repeat(len(lists.rows), axis=0)
        assert_agrees(output / name, report(reordered_ranks(lists, in_order)))
        line = (output / name / "run.trec").read_text().splitlines()[0].split()
        assert line[2] == read_captions(chain.captions).records[lists.rows[0, 0]].image
        assert line[-1] == "my%20system"
    row = next(row for row in read_json(tmp_path / "summary.json") if row["system"] == "retriever+features")
    found = measured(tmp_path / "trec" / "18" / "test-test.features")
    assert {str(cutoff): round(found[measure], 5) for cutoff, measure in MEASURES.items()} == row["recall"]


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(
        st.tuples(st.lists(st.integers(-3, 3), min_size=1, max_size=14), st.integers(0, 20)), min_size=1, max_size=8
    )
)
def test_equal_scores_and_any_ids_keep_their_order(
    tmp_path_factory: pytest.TempPathFactory, lists: list[tuple[list[int], int]]
) -> None:
    """Ids whose order is not that of the lists, with scores of which many are equal."""
    folder = tmp_path_factory.mktemp("trec")
    rankings = [
        trec.Ranking(
            "a text", f"{97 * wanted % 21} ü", [f"{97 * place % 21} ü" for place in range(len(scores))],
            [float(score) / 3 for score in sorted(scores, reverse=True)],
        )
        for scores, wanted in lists
    ]  # fmt: skip
    trec.write_trec(folder, rankings, system="x")
    ranks = np.array([rank_of(each.ranked, each.image) for each in rankings])
    assert_agrees(folder, report(ranks))
    shutil.rmtree(folder)


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [0.0, 0.0], [-1e-30, -1e-30], [2.0, 3.0, 1.0], [-87.25] * 300, []])
def test_scores_fall_in_single_and_in_double_precision(scores: list[float]) -> None:
    written = [f"{score:.9g}" for score in trec.falling(scores)]
    for kind in (np.float32, np.float64):
        assert (np.diff(np.array(written, dtype=kind)) < 0).all()
    assert trec.falling(scores)[:1].tolist() == np.array(scores[:1], dtype=np.float32).tolist()
    ordered = np.array(sorted(scores, reverse=True), dtype=np.float32)
    assert np.abs(trec.falling(ordered) - ordered).max(initial=0) < 1e-2


@settings(deadline=None)
@given(image=st.text(min_size=1))
def test_ids_come_back_and_have_no_white_space(image: str) -> None:
    encoded = trec.encoded(image)
    assert encoded.isascii()
    assert encoded.split() == [encoded]
    assert trec.decoded(encoded) == image


def test_ids_in_other_writing(tmp_path: Path) -> None:
    images = ["my photos/été 1.jpg", "my photos/été 2.jpg", "a\tb\n.png", "100%.png", "写真.jpg", "caf\udce9.png"]
    trec.write_trec(tmp_path, [trec.Ranking("q\ttext\n", images[2], images, [6.0, 5, 4, 3, 2, 1])], system="s")
    lines = [line.split(" ") for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [trec.decoded(line[2]) for line in lines] == images
    assert all(len(line) == 6 for line in lines)
    assert measured(tmp_path)[RR] == pytest.approx(1 / 3)
    assert (tmp_path / "queries.tsv").read_text() == "q1\tq text\n"


def test_trec_refuses_what_it_cannot_read(chain: Chain, predictions: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give either --predictions or --lists"):
        trec.Config(output=tmp_path)
    with pytest.raises(BadInput, match="give either --predictions or --lists"):
        trec.Config(predictions=predictions, lists=predictions, output=tmp_path)
    with pytest.raises(BadInput, match=r"made by retriever\.retrieve, not by retriever\.rank_splits or reranker\.test"):
        trec.main(trec.Config(lists=predictions, output=tmp_path / "x"))
    with pytest.raises(BadInput, match=r"name a folder that scripts/12_retrieve\.sh made"):
        trec.main(trec.Config(predictions=chain.dataset, output=tmp_path / "x"))


# clip-retrieval


def read_layout(folder: Path, kind: str) -> list[np.ndarray[Any, Any]]:
    return [np.load(path) for path in sorted((folder / kind).glob("*.npy"))]


def metadata(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "metadata").iterdir()) for row in parquet.read_table(path).to_pylist()]


@pytest.mark.parametrize(("rows", "parts"), [(1_000_000, 1), (50, 3), (14, 11)])
def test_features_in_the_layout_of_clip_retrieval(chain: Chain, tmp_path: Path, rows: int, parts: int) -> None:
    clip_retrieval.main(clip_retrieval.Config(features=chain.features, output=tmp_path / "out", rows=rows))
    numbers = [f"{number:0{len(str(parts - 1))}d}" for number in range(parts)]
    assert files_of(tmp_path / "out") == [
        *(f"img_emb/img_emb_{number}.npy" for number in numbers),
        *(f"metadata/metadata_{number}.parquet" for number in numbers),
        *(f"text_emb/text_emb_{number}.npy" for number in numbers),
    ]
    features = read_features(chain.features)
    pairs = [(record, text) for record in features.records for text in record.captions]
    images, texts = (read_layout(tmp_path / "out", kind) for kind in ("img_emb", "text_emb"))
    assert (
        [len(part) for part in images]
        == [len(part) for part in texts]
        == [min(rows, len(pairs) - start) for start in range(0, len(pairs), rows)]
    )
    assert {part.dtype for part in [*images, *texts]} == {np.dtype(np.float16)}
    for own, vectors in (
        (np.concatenate(images), features.images[features.owners]),
        (np.concatenate(texts), features.texts),
    ):
        exact = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(own.astype(np.float32), exact, atol=1e-3)
    assert metadata(tmp_path / "out") == [
        {
            "image_path": str(chain.root / "images" / record.file),
            "caption": text,
            "key": record.image,
            "split": record.split,
        }
        for record, text in pairs
    ]


def test_features_by_picture_in_single_precision(chain: Chain, tmp_path: Path) -> None:
    clip_retrieval.main(
        clip_retrieval.Config(features=chain.features, output=tmp_path / "out", by="picture", dtype="float32")
    )
    features = read_features(chain.features)
    [images] = read_layout(tmp_path / "out", "img_emb")
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, features.images / np.linalg.norm(features.images, axis=1, keepdims=True))
    assert [row["caption"] for row in metadata(tmp_path / "out")] == [record.captions[0] for record in features.records]
    assert not (tmp_path / "out" / "text_emb").exists()
    with pytest.raises(BadInput, match="holds something already"):
        clip_retrieval.main(clip_retrieval.Config(features=chain.features, output=tmp_path / "out"))
    with pytest.raises(BadInput, match="--rows must be at least 1, not 0"):
        clip_retrieval.Config(features=chain.features, output=tmp_path / "x", rows=0)


def test_pictures_without_captions_have_rows_by_picture_alone(chain: Chain) -> None:
    """And the text of a row is that of its caption, not of its place."""
    read = read_features(chain.features)
    records = [Record("a", "a.png", "test", ()), Record("b", "b.png", "test", ("x", "y"))]
    some = Features(read.images[:2], read.texts[:2], records, np.array([1, 1]), read.manifest)
    by_picture = clip_retrieval.table_of(some, Path("in"), np.array([0, 1]), None)
    assert (by_picture["caption"], by_picture["image_path"]) == (["", "x"], ["in/a.png", "in/b.png"])
    by_caption = clip_retrieval.table_of(some, Path("in"), some.owners, np.array([0, 1]))
    assert (by_caption["caption"], by_caption["key"]) == (["x", "y"], ["b", "b"])


# webdataset

Member = tuple[str, bytes | tarfile.TarInfo]


def picture(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(content, "PNG")
    return content.getvalue()


def write_shard(path: Path, members: Sequence[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def sample(key: str, colour: str, split: str, *captions: str) -> list[Member]:
    meta = {"captions": list(captions), "split": split, "width": 20}
    return [(f"{key}.png", picture(colour)), (f"{key}.json", json.dumps(meta).encode()), (f"{key}.cls", b"3")]


GOOD = {
    "0000": [*sample("0000/a", "red", "train", "a red square", "red"), *sample("0000/b", "green", "val", "green")],
    "0001": [
        *sample("./c", "blue", "test", "blue", "a blue square"),
        ("d.txt", b"black\n"),
        ("d.png", picture("black")),
    ],
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name, members in GOOD.items():
        write_shard(tmp_path / "shards" / f"{name}.tar", members)
    return tmp_path / "shards"


def prepare(output: Path, *source: Path, **options: Any) -> list[Record]:
    config = prepare_captions.Config(source=source, output=output, workers=0, **options)
    prepare_captions.main(config)
    return read_captions(output).records


def test_shards_give_what_their_pictures_in_a_folder_give(shards: Path, tmp_path: Path) -> None:
    records = prepare(tmp_path / "out", shards)
    for members in GOOD.values():
        for name, content in members:
            if name.endswith(".png"):
                path = tmp_path / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)  # type: ignore[arg-type]
                assert (tmp_path / "out" / "pictures" / name).read_bytes() == content
    rows = [{"image": each.image, "captions": list(each.captions), "split": each.split} for each in records]
    write_json_lines(tmp_path / "captions.jsonl", rows)
    plain = prepare(tmp_path / "plain", tmp_path / "captions.jsonl", images=tmp_path / "images")
    assert records == plain
    assert (tmp_path / "out" / "captions.jsonl").read_bytes() == (tmp_path / "plain" / "captions.jsonl").read_bytes()
    assert [(each.image, each.split, each.captions) for each in records[:3]] == [
        ("0000/a.png", "train", ("a red square", "red")),
        ("0000/b.png", "val", ("green",)),
        ("c.png", "test", ("blue", "a blue square")),
    ]
    assert records[3].captions == ("black",)
    opened = read_captions(tmp_path / "out")
    assert all((opened.images / each.file).is_file() for each in records)
    assert set(opened.manifest.outputs) == {"captions.jsonl"}  # later stages do not hash every picture again


def test_shards_by_folder_files_or_pattern(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = prepare(tmp_path / "folder", shards)
    one = [shards / "0000.tar", shards / "0001.tar"]
    for number, source in enumerate((one, [shards / "*.tar"], [shards / "{0000..0001}.tar"], [shards / "000[01].tar"])):
        assert prepare(tmp_path / str(number), *source) == expected
    capsys.readouterr()
    prepare(tmp_path / "folder", shards)
    assert "is finished; nothing to do" in capsys.readouterr().out
    write_shard(shards / "0000.tar", GOOD["0000"][:3])
    with pytest.raises(BadInput, match=r"source0 \(.*0000\.tar\) has changed since"):
        prepare(tmp_path / "folder", shards)
    with pytest.raises(BadInput, match=r"there is no shard .*0002\.tar"):
        prepare(tmp_path / "x", shards / "{0000..0002}.tar")
    with pytest.raises(BadInput, match="there is no shard"):
        prepare(tmp_path / "x", shards / "none*.tar")


def test_braces_are_those_of_bash() -> None:
    assert list(braces_expanded("a{1,,2}{x}b{8..10}")) == [
        f"a{first}{{x}}b{last}" for first in ("1", "", "2") for last in (8, 9, 10)
    ]
    assert list(braces_expanded("plain.tar")) == ["plain.tar"]


EVIL: Member = ("evil.png", picture("red"))
BAD: dict[str, tuple[list[Member], str]] = {
    "out of the folder": ([("../evil.png", picture("red"))], "member leads out of the shard"),
    "deeper": ([("a/../../evil.png", picture("red")), ("a/../../evil.txt", b"x")], "member leads out of the shard"),
    "absolute": ([("/tmp/evil.png", picture("red"))], "member leads out of the shard"),
    "link": ([link("evil.png", "/etc/hostname"), ("evil.txt", b"x")], "member is no plain file"),
    "hard link": ([link("evil.png", "0000/a.png", tarfile.LNKTYPE)], "member is no plain file"),
    "device": ([link("evil.png", "", tarfile.CHRTYPE)], "member is no plain file"),
    "linked text": ([EVIL, link("evil.txt", "/etc/hostname")], ".txt member is no plain file of at most"),
    "no picture": ([("evil.txt", b"a text")], "sample without a picture"),
    "damaged picture": ([("evil.png", picture("red")[:60])], "picture"),
    "no JSON": ([EVIL, ("evil.json", b"{")], ".json member is not JSON"),
    "key twice": ([EVIL, ("evil.json", b'{"caption": "x", "caption": "y"}')],
                  ".json member has a key that stands twice (caption)"),
    "no object": ([EVIL, ("evil.json", b"[1]")], ".json member is no JSON object"),
    "not UTF-8": ([EVIL, ("evil.txt", b"caf\xe9")], ".txt member is not UTF-8 text"),
    "empty": ([EVIL, ("evil.json", b'{"caption": ["", "red"]}')], "empty caption"),
    "number": ([EVIL, ("evil.json", b'{"caption": [7, "red"]}')], "caption is no text but int"),
    "split": ([EVIL, ("evil.json", b'{"split": "holdout"}')], "split is not one of train, val, test"),
    "two pictures": ([EVIL, ("evil.jpg", picture("red"))], "second picture of the same key"),
    "long name": ([(f"{'x' * 250}.png", picture("red"))], "member's name cannot be a file's (ENAMETOOLONG)"),
    "below a picture": ([("c.png/evil.png", picture("red"))], "member's name cannot be a file's (EEXIST)"),
}  # fmt: skip
STILL_USED = {"empty": ("red",), "number": ("red",), "two pictures": ()}  # captions of evil.png, without what is wrong


def refusal(output: Path, shards: Path) -> str:
    """Why shards are refused; of what the error holds, the folder's lock among it, nothing stays."""
    try:
        prepare(output, shards, split_rule="train")
    except BadInput as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("kind", BAD)
def test_bad_members_are_named_and_left_out(kind: str, shards: Path, tmp_path: Path) -> None:
    tmp_path = tmp_path / "some" / "where"  # nobody else writes around it
    tmp_path.mkdir(parents=True)
    members, said = BAD[kind]
    good = prepare(tmp_path / "good", shards, split_rule="train")
    write_shard(shards / "0002.tar", members)
    around = set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir())
    lines = refusal(tmp_path / "out", shards).splitlines()
    assert lines[0].startswith("1 problem in the data (")
    assert said in lines[1]
    assert "0002.tar, member " in lines[2]
    assert lines[-1] == "Mend them, or go on without them with --skip-bad."
    assert files_of(tmp_path / "out") == ["started.json"]  # so that --skip-bad starts afresh
    records = prepare(tmp_path / "out", shards, split_rule="train", skip_bad=True)
    evil = [Record("evil.png", "evil.png", "train", STILL_USED[kind])] if kind in STILL_USED else []
    assert records == [*good, *evil]
    assert set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir()) == around | {tmp_path / "out"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_captions_of_both_members_come_once(tmp_path: Path) -> None:
    meta = {"caption": "a red square", "captions": None, "status": "success"}
    shard = write_shard(
        tmp_path / "x.tar",
        [("1.txt", b"a red square"), ("1.png", picture("red")), ("1.json", json.dumps(meta).encode()),
         ("2.png", picture("blue")), ("2.json", b'{"width": 20}')],
    )  # fmt: skip
    records = prepare(tmp_path / "out", shard, split_rule="train")
    assert [(each.image, each.captions) for each in records] == [("1.png", ("a red square",)), ("2.png", ())]


def test_a_damaged_shard_is_one_clear_line(shards: Path, tmp_path: Path) -> None:
    content = (shards / "0001.tar").read_bytes()
    for damaged in (content[:700], b"no archive at all" * 100, b""):
        (shards / "0001.tar").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"0001\.tar is damaged \(.*\): fetch it again"):
            prepare(tmp_path / "out", shards, overwrite=True)


def test_a_killed_run_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had unpacked is not written again, and half a picture is."""
    expected = prepare(tmp_path / "expected", shards)
    real: Callable[..., Any] = shutil.copyfileobj
    written: list[str] = []

    def copy(source: Any, target: Any) -> None:
        written.append(Path(target.name).name.split(".png")[0].lstrip("."))
        if len(written) == 3:
            target.write(b"half a picture")
            target.flush()
            os.link(target.name, Path(target.name).with_name(".c.png.1.part"))  # as a kill leaves it
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", shards)
    assert written == ["a", "b", "c"]
    assert prepare(tmp_path / "out", shards) == expected
    assert written == ["a", "b", "c", "c", "d"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_options_that_do_not_go_with_shards(shards: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("image,caption\na.png,x\n")
    for source, options, message in (
        ((shards,), {"images": tmp_path}, "the pictures are in the shards, leave it out"),
        ((shards, table), {}, r"captions\.csv has no webdataset shards, as the others have"),
        ((tmp_path / "none",), {"format": "webdataset"}, "--format webdataset takes --source"),
        ((), {}, "name a folder of --images"),
        ((table,), {"images": tmp_path / "none"}, "none is not a folder"),
        ((tmp_path / "none.csv",), {"images": tmp_path}, r"none\.csv does not exist"),
    ):
        with pytest.raises(BadInput, match=message):
            prepare(tmp_path / "x", *source, **options)


def test_no_query_is_found_where_nothing_is(tmp_path: Path) -> None:
    """A list without the right picture counts as a miss."""
    trec.write_trec(tmp_path, [trec.Ranking("x", "z", ["a"], [1.0]), trec.Ranking("y", "a", ["a"], [1.0])], system="s")
    assert_agrees(tmp_path, report(np.array([NOT_FOUND, 1])))
