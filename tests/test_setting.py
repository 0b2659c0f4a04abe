"""Transductive or inductive is said of what was trained on against what is searched."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from retriever import retrieve
from retriever import test as final
from retriever.data import RetrieverData, read_data
from retriever.gallery.card import setting_of as setting_of_card
from retriever.setting import setting_on
from tests.chain import Chain
from tests.folders import finished
from tools import runs
from tools.files import hash_file, read_json, read_json_lines, write_json_lines
from tools.results import HUBS_CORRECTED


def pseudo(folder: Path, images: list[str], *, captions: str) -> Path:
    """Pseudo queries of pictures."""
    lines = [{"image": image, "query": "a round thing"} for image in images]
    facts = {"captions_fingerprint": captions}
    command = "retriever.pseudo_queries.generate"
    return finished(folder, command, lambda here: write_json_lines(here / "pseudo.jsonl", lines), facts=facts)


def trained(folder: Path, setting: str, **inputs: Path) -> Path:
    """A retriever trained on some inputs."""
    command = "retriever.train_stage2" if "stage1" in inputs else "retriever.train"
    return finished(folder, command, lambda here: None, facts={"setting": setting}, inputs=inputs)


def setting_of(folder: Path, data: RetrieverData) -> str:
    return setting_on(runs.read_manifest(folder, "retriever.train", "retriever.train_stage2"), data)


@pytest.fixture
def data(chain: Chain) -> RetrieverData:
    return read_data(chain.dataset)


def test_only_pictures_that_were_trained_on_make_a_search_transductive(data: RetrieverData, tmp_path: Path) -> None:
    own = pseudo(tmp_path / "own", ["gone.jpg"], captions=data.manifest.facts["captions_fingerprint"])
    same_pictures = pseudo(tmp_path / "same", ["x.jpg", data.images[-1]], captions="prepared again")
    other = pseudo(tmp_path / "other", ["x.jpg", "y.jpg"], captions="of other data")
    for folder, expected in ((own, "transductive"), (same_pictures, "transductive"), (other, "inductive")):
        run = trained(tmp_path / f"on-{folder.name}", "transductive", pseudo_queries=folder)
        assert setting_of(run, data) == expected
    plain = trained(tmp_path / "plain", "inductive")
    assert setting_of(plain, data) == "inductive"


def test_what_a_training_started_from_counts(data: RetrieverData, tmp_path: Path) -> None:
    own = pseudo(tmp_path / "own", [data.images[0]], captions="a")
    other = pseudo(tmp_path / "other", ["x.jpg"], captions="b")
    first = trained(tmp_path / "first", "transductive", pseudo_queries=own)
    more = trained(tmp_path / "more", "transductive", pseudo_queries=other, start=first)
    second = trained(tmp_path / "second", "transductive", stage1=more)
    assert [setting_of(each, data) for each in (first, more, second)] == ["transductive"] * 3
    elsewhere = trained(tmp_path / "elsewhere", "transductive", pseudo_queries=other)
    assert setting_of(trained(tmp_path / "stage2", "transductive", stage1=elsewhere), data) == "inductive"


def test_without_the_pseudo_queries_a_search_keeps_the_setting_of_the_training(
    data: RetrieverData, tmp_path: Path
) -> None:
    other = pseudo(tmp_path / "other", ["x.jpg"], captions="b")
    run = trained(tmp_path / "run", "transductive", pseudo_queries=other)
    second = trained(tmp_path / "second", "transductive", stage1=run)
    shutil.rmtree(other)
    assert setting_of(run, data) == setting_of(second, data) == "transductive"


def test_the_card_of_a_gallery_says_it_too(chain: Chain, data: RetrieverData, index: Path, tmp_path: Path) -> None:
    gallery = runs.read_manifest(index, "retriever.gallery.build")
    for images, expected in ((data.images[:1], "transductive"), (["x.jpg"], "inductive")):
        told = pseudo(tmp_path / f"pseudo-{expected}", images, captions="a")
        run = trained(tmp_path / f"run-{expected}", "transductive", pseudo_queries=told)
        manifest = runs.read_manifest(run, "retriever.train")
        assert setting_of_card(gallery, manifest) == expected
        gone = dataclasses.replace(gallery, inputs={})
        assert setting_of_card(gone, manifest) == "transductive"


def changed(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of a run folder with other files of its own, and other values in its manifest."""
    if not folder.exists():
        shutil.copytree(source, folder)
    manifest = read_json(folder / "manifest.json")
    for name, update in values.items():
        manifest[name] = {**manifest[name], **update}
    manifest["outputs"] = {name: hash_file(folder / name) for name in manifest["outputs"]}
    runs.write_manifest(folder, manifest)
    return folder


def test_rows_on_another_data_set(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    images = read_data(chain.dataset).images
    path = pseudo(tmp_path / "pseudo", images, captions=read_data(chain.dataset).manifest.facts["captions_fingerprint"])
    read = {"pseudo_queries": {"path": str(path), "fingerprint": runs.fingerprint(path), "by": "content"}}
    told = changed(retriever, tmp_path / "told", facts={"setting": "transductive"}, inputs=read)
    shutil.copytree(chain.dataset, tmp_path / "else")
    pool = [line for _, line in read_json_lines(chain.dataset / "pool.jsonl")]
    write_json_lines(tmp_path / "else" / "pool.jsonl", [{**line, "image": f"else/{line['image']}"} for line in pool])
    elsewhere = changed(chain.dataset, tmp_path / "else", facts={"captions_fingerprint": "else"})
    for dataset, expected in ((chain.dataset, "transductive"), (elsewhere, "inductive")):
        found, output = tmp_path / f"found-{expected}", tmp_path / f"test-{expected}"
        retrieve.main(retrieve.Config(dataset=dataset, retriever=told, output=found, precision="fp32", device="cpu"))
        summary = tmp_path / f"{expected}.json"
        final.main(final.Config(predictions=found, output=output, summary=summary, name="toy", device="cpu"))
        rows = {row["system"]: row["setting"] for row in read_json(summary)}
        assert rows == {"two-tower": "inductive", HUBS_CORRECTED: "inductive", "retriever": expected}
