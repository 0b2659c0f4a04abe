"""Captions, pictures and ranked lists in the layout of BEIR."""

import json
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, Qrel, ScoredDoc, Success

from retriever import rank_splits, retrieve
from tests.chain import Chain, files_of
from tools import beir, prepare_captions
from tools.captions import Record, read_captions, write_captions
from tools.errors import BadInput
from tools.files import read_json
from tools.recall import NOT_FOUND, Ranks, report

MEASURES = {1: Success @ 1, 5: Success @ 5, 10: Success @ 10}


@pytest.fixture(scope="module")
def predictions(chain: Chain, retriever: Path) -> Path:
    config = retrieve.Config(
        dataset=chain.dataset, retriever=retriever, output=chain.root / "beir-12", pools=("test", "all"),
        precision="fp32", device="cpu",
    )  # fmt: skip
    retrieve.main(config)
    return config.output


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_split_has_its_captions_and_pictures(chain: Chain, tmp_path: Path) -> None:
    beir.main(beir.Config(captions=chain.captions, output=tmp_path / "out"))
    assert files_of(tmp_path / "out") == ["corpus.jsonl", "qrels/test.tsv", "queries.jsonl"]
    records = [record for record in read_captions(chain.captions).records if record.split == "test"]
    corpus = lines_of(tmp_path / "out" / "corpus.jsonl")
    assert [line["image"] for line in corpus] == [record.image for record in records]
    assert all(Path(line["file"]).is_file() and line["text"] == line["title"] == "" for line in corpus)
    queries = lines_of(tmp_path / "out" / "queries.jsonl")
    assert [line["text"] for line in queries] == [text for record in records for text in record.captions]
    judged = (tmp_path / "out" / "qrels" / "test.tsv").read_text().splitlines()
    assert judged[:2] == ["query-id\tcorpus-id\tscore", f"q1\t{records[0].image}\t1"]
    assert len(judged) == len(queries) + 1
    beir.main(beir.Config(captions=chain.captions, output=tmp_path / "all", split="val", all_pictures=True))
    assert len(lines_of(tmp_path / "all" / "corpus.jsonl")) == 48
    with pytest.raises(BadInput, match="holds something already"):
        beir.main(beir.Config(captions=chain.captions, output=tmp_path / "out"))


@pytest.mark.parametrize("all_pictures", [False, True])
def test_runs_are_measured_as_ours_are(
    chain: Chain, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], all_pictures: bool
) -> None:
    """By ir-measures; lists over other pictures are left out, and a line says so."""
    beir.main(
        beir.Config(
            captions=chain.captions, output=tmp_path / "out", predictions=predictions, all_pictures=all_pictures
        )
    )
    said = capsys.readouterr().out
    assert ("all: left out, it ranks pictures of other splits" in said) == (not all_pictures)
    task = beir.read_task(tmp_path / "out", "test")
    qrels = [Qrel(query, image, score) for query, asked in task.relevant.items() for image, score in asked.items()]
    for name in ("test", "all") if all_pictures else ("test",):
        lists = read_json(tmp_path / "out" / "runs" / f"{name}.json")
        run = [ScoredDoc(query, image, score) for query, found in lists.items() for image, score in found.items()]
        found = ir_measures.calc_aggregate([*MEASURES.values(), RR], qrels, run)
        expected = report(ranks_of(lines_of(predictions / f"{name}.jsonl")))
        assert {cutoff: found[measure] for cutoff, measure in MEASURES.items()} == expected.recalls
        assert found[RR] == pytest.approx(expected.mrr, rel=1e-14)


def ranks_of(lines: list[dict[str, Any]]) -> Ranks:
    ranks = [
        line["ranked"].index(line["image"]) + 1 if line["image"] in line["ranked"] else NOT_FOUND for line in lines
    ]
    return np.array(ranks)


def test_lists_of_other_captions_are_left_out(
    chain: Chain, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rank_splits.Config(
        dataset=chain.dataset, retriever=retriever, output=tmp_path / "16", train_per_picture=0, beams=12,
        precision="fp32", device="cpu",
    )  # fmt: skip
    rank_splits.main(config)
    beir.main(beir.Config(captions=chain.captions, output=tmp_path / "out", lists=config.output))
    assert "val-val: left out, its queries are not these captions" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["test-test.json"]


def test_ids_in_other_writing_come_back(chain: Chain, tmp_path: Path) -> None:
    captions = read_captions(chain.captions)
    images = ["my photos/été 1.jpg", "a\tb\n.png", "写真.jpg"]
    records = [Record(image, "x.png", "test", ("a\ttext",)) for image in images]
    beir.write_dataset(tmp_path, captions._replace(records=records), "test", all_pictures=False)
    task = beir.read_task(tmp_path, "test")
    assert [next(iter(asked)) for asked in task.relevant.values()] == task.images
    assert [line["image"] for line in lines_of(tmp_path / "corpus.jsonl")] == images
    assert list(task.queries.values()) == ["a text"] * 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "a"}\n', r"corpus\.jsonl, line 1: it must have _id and file"),
        ("queries.jsonl", '{"_id": 3, "text": "x"}\n', r"queries\.jsonl, line 1: it must have _id and text"),
        ("qrels/test.tsv", "h\nq1 x 1\n", r"test\.tsv, line 2: expected query, picture and score"),
        ("qrels/test.tsv", "h\nq1\tnobody.png\t1\n", r"test\.tsv, line 2: there is no 'nobody\.png'"),
        ("qrels/test.tsv", None, r"test\.tsv does not exist: name a split that was exported"),
    ],
)
def test_a_damaged_folder_is_refused(
    chain: Chain, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    beir.main(beir.Config(captions=chain.captions, output=tmp_path))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=message):
        beir.read_task(tmp_path, "test")


def test_a_split_without_captions_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give either --predictions or --lists, or none of them"):
        beir.Config(captions=chain.captions, output=tmp_path, predictions=tmp_path, lists=tmp_path)
    records = [record._replace(split="train") for record in read_captions(chain.captions).records]
    write_captions(tmp_path / "trained.jsonl", records)
    prepare_captions.main(
        prepare_captions.Config(
            images=chain.root / "images", source=(tmp_path / "trained.jsonl",), output=tmp_path / "01", workers=0
        )
    )
    with pytest.raises(BadInput, match="has no test captions: choose another --split"):
        beir.main(beir.Config(captions=tmp_path / "01", output=tmp_path / "out"))
