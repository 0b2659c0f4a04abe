"""Live search reorders what the beams found by the features that the index keeps."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.clip import encode_tokens, load_clip
from retriever.gallery import add as add_pictures
from retriever.gallery import api, query_encoder, search
from retriever.gallery import build as build_index
from retriever.gallery import remove as remove_pictures
from retriever.gallery.answers import Ranked, reordered
from retriever.gallery.gallery import Gallery, read_gallery
from tests.chain import Chain
from tests.folders import as_earlier
from tools import runs
from tools.errors import BadInput
from tools.features import read_features
from tools.files import read_array, read_json, write_json

ROOT = Path(__file__).parent.parent
QUERY = "a red circle"


class Answer(NamedTuple):
    """What a search prints."""

    head: str
    files: list[str]
    scores: list[float]


@pytest.fixture
def folder(index: Path, tmp_path: Path) -> Path:
    """An index of 48 pictures that the test may change."""
    return Path(shutil.copytree(index, tmp_path / "index"))


def config_of(index: Path, retriever: Path, sheet: Path, **options: Any) -> search.Config:
    fixed = {"queries": (QUERY,), "precision": "fp32", "device": "cpu", "keep": 64, **options}
    return search.Config(index=index, retriever=retriever, sheet=sheet, **fixed)


def answers(config: search.Config, capsys: pytest.CaptureFixture[str]) -> list[Answer]:
    """Every answer of a search; what other commands print meanwhile is passed over."""
    capsys.readouterr()
    search.main(config)
    found: list[Answer] = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith('"'):
            found.append(Answer(line.removesuffix("; the third column is the similarity"), [], []))
        elif picture := re.fullmatch(r" +\d+ +(-?\d+\.\d{3})(?: +-?\d\.\d{3})?  (.+)", line):
            found[-1].scores.append(float(picture[1]))
            found[-1].files.append(picture[2])
    return found


def brute_force(index: Path, query: str) -> dict[str, float]:
    """File -> cosine of all pictures, by the model that the index names and the features that its files give."""
    opened = read_gallery(index)
    clip = load_clip(opened.facts["clip"]["model"], opened.facts["clip"]["pretrained"])
    with torch.inference_mode():
        text = encode_tokens(clip, clip.tokenizer([query])).numpy()[0].astype(np.float64)
    features = opened.read_features().astype(np.float64)
    cosines = features @ text / np.sqrt((text**2).sum())
    return dict(zip((picture.file for picture in opened.pictures()), cosines.tolist(), strict=True))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.75, 1.0])
def test_the_order_is_that_of_brute_force(
    share: float, index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All pictures are found: (1 - share) times the beams' score and share times 100 cosines, computed by hand."""
    config = config_of(index, retriever, tmp_path / "x.png", beams=48)
    [own] = answers(dataclasses.replace(config, rerank=False), capsys)
    cosines = brute_force(index, QUERY)
    expected = {
        file: (1 - share) * score + share * 100 * cosines[file]
        for file, score in zip(own.files, own.scores, strict=True)
    }
    [found] = answers(dataclasses.replace(config, rerank_weight=share), capsys)
    in_order = np.array([expected[file] for file in found.files])
    assert set(found.files) == set(expected)
    assert np.diff(in_order).max() <= 0.001  # scores are shown to three digits, which may be equal
    assert found.files != own.files
    assert found.scores == pytest.approx([expected[file] for file in found.files], abs=0.02)
    assert found.head.endswith(f" s, re-ranked by features (share {share:.2f})")
    if share == 1:
        assert found.files == sorted(cosines, key=lambda file: -cosines[file])


def test_no_share_is_the_beams_own_order(
    index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(index, retriever, tmp_path / "x.png", rerank_weight=0.0)
    [own], [zero] = (answers(one, capsys) for one in (dataclasses.replace(config, rerank=False), config))
    assert zero[1:] == own[1:]
    assert zero.head.endswith(" s")  # nothing is said of features
    assert zero.scores == sorted(zero.scores, reverse=True)
    assert len(zero.files) == 48  # as many as are to be shown
    [few] = answers(dataclasses.replace(config, keep=3), capsys)
    assert few.files == zero.files[:3]


def test_more_pictures_are_reordered_than_are_shown(
    index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default all that 50 wide beams find, of which the best are shown; --beams says otherwise."""
    config = config_of(index, retriever, tmp_path / "x.png", rerank_weight=0.6)
    [everything], [few] = (answers(one, capsys) for one in (config, dataclasses.replace(config, keep=3)))
    assert len(everything.files) == 48
    assert few.files == everything.files[:3]
    narrow = dataclasses.replace(config, beams=4)
    [found], [own] = (answers(one, capsys) for one in (narrow, dataclasses.replace(narrow, rerank_weight=0.0)))
    assert set(found.files) == set(own.files)
    assert len(found.files) == 4


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.integers(-30, 0), min_size=1, max_size=40), share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_equal_scores_keep_the_beams_order(scores: list[int], share: float, seed: int) -> None:
    """Against a sort of tuples; with few values, so that many are equal. No picture is lost or comes twice."""
    own = sorted(map(float, scores), reverse=True)
    cosines = np.random.default_rng(seed).integers(-2, 3, size=len(own)).astype(np.float32) / np.float32(4)
    rows = np.random.default_rng(seed).permutation(100)[: len(own)].tolist()
    found = reordered(Ranked(np.array(rows), np.array(own), cosines), share)
    total = [(1 - share) * score + share * 100 * float(cosine) for score, cosine in zip(own, cosines, strict=True)]
    order = sorted(range(len(own)), key=lambda place: (-total[place], place))
    assert found.rows.tolist() == [rows[place] for place in order]
    assert found.scores == pytest.approx([total[place] for place in order])


def write_tested(folder: Path, **weights: dict[str, float]) -> Path:
    """What a finished run of reranker.test says of the shares it chose."""
    manifest = {
        "command": "reranker.test", "arguments": [], "source": "", "config": {}, "inputs": {}, "outputs": {},
        "facts": {"weights": weights}, "metrics": {}, "seconds": 1.0, "commit": "",
    }  # fmt: skip
    folder.mkdir()
    runs.write_manifest(folder, manifest)
    return folder


def test_the_share_is_what_val_chose(
    index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the default, while the reranker has not been tested; what is given on the command line goes before both."""
    both = {"features": 0.1, "reranker": 0.6}
    tested = write_tested(tmp_path / "tested", features={"features": 0.65}, both=both)
    without = write_tested(tmp_path / "without", reranker={"reranker": 0.4})
    useless = write_tested(tmp_path / "useless", features={"features": 0.0})
    (tmp_path / "unfinished").mkdir()
    write_json(tmp_path / "unfinished" / "started.json", {"command": "reranker.test"})
    for options, said in (
        ({"weights": tested}, " s, re-ranked by features (share 0.65)"),
        ({"weights": tested, "rerank_weight": 0.25}, " s, re-ranked by features (share 0.25)"),
        ({"weights": tested, "rerank": False}, " s"),
        ({"weights": useless}, " s"),
        ({"weights": without}, " s, re-ranked by features (share 0.30)"),
        ({"weights": tmp_path / "unfinished"}, " s, re-ranked by features (share 0.30)"),
        ({"weights": tmp_path / "nowhere"}, " s, re-ranked by features (share 0.30)"),
        ({}, " s, re-ranked by features (share 0.30)"),
    ):
        [found] = answers(config_of(index, retriever, tmp_path / "x.png", **options), capsys)
        assert found.head.partition(" pictures, ")[2].lstrip("0123456789.") == said
    with pytest.raises(BadInput, match=r"made by retriever\.gallery\.build, not by reranker\.test"):
        search.main(config_of(index, retriever, tmp_path / "x.png", weights=index))


@pytest.mark.parametrize("precision", ["auto", "bf16", "int8"])
def test_lower_arithmetic_stays_near(
    precision: Any, index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(index, retriever, tmp_path / "x.png", rerank_weight=1.0, precision=precision)
    [found] = answers(config, capsys)
    cosines = brute_force(index, QUERY)
    assert len(found.files) == 48
    assert found.scores == pytest.approx([100 * cosines[file] for file in found.files], abs=2.0)


def test_an_interactive_search_reorders_by_the_features_of_the_moment(
    chain: Chain,
    folder: Path,
    retriever: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pictures come, others go and move up, and the index is built again without features, between queries."""
    photos, expected, loads = tmp_path / "photos", [], []
    photos.mkdir()
    for name in ("red-circle.png", "blue-ring.png"):
        shutil.copy(chain.root / "images" / name, photos / f"copy of {name}")
    rebuilt = build_index.Config(
        dataset=chain.dataset, rqvae=chain.rqvae, output=folder, keep_features=False, overwrite=True
    )

    def typed() -> Iterator[str]:
        for change in (
            lambda: None,
            lambda: add_pictures.main(
                add_pictures.Config(folder=photos, index=folder, precision="fp32", device="cpu", workers=0)
            ),
            lambda: remove_pictures.main(
                remove_pictures.Config(names=("red-circle.png", "red-line.png"), index=folder)
            ),
        ):
            change()
            expected.append(brute_force(folder, QUERY))
            yield QUERY
        build_index.main(rebuilt)
        yield QUERY

    load = query_encoder.load_encoder

    def counted(opened: Gallery, *how: Any) -> Any:
        loads.append(opened.facts["version"])
        return load(opened, *how)

    monkeypatch.setattr(api, "load_encoder", counted)
    monkeypatch.setattr(search, "typed_queries", typed)
    shown = config_of(folder, retriever, tmp_path / "x.png", queries=(), rerank_weight=None, beams=64)
    config = dataclasses.replace(shown, weights=write_tested(tmp_path / "tested", features={"features": 1.0}))
    *reordered, plain = answers(config, capsys)
    assert [len(found.files) for found in (*reordered, plain)] == [48, 50, 48, 48]
    for found, cosines in zip(reordered, expected, strict=True):
        assert set(found.files) == set(cosines)
        assert found.scores == pytest.approx([100 * cosines[file] for file in found.files], abs=0.02)
        assert found.head.endswith("re-ranked by features (share 1.00)")
    assert plain.head.endswith(" s")
    assert loads == ["version-000000"]


def without_features(index: Path) -> Path:
    """An index as earlier versions of this repository left it."""
    manifest = read_json(as_earlier(index) / "manifest.json")
    del manifest["facts"]["keeps_features"]
    del manifest["outputs"][f"{manifest['facts']['version']}/features.npy"]
    runs.write_manifest(index, manifest)
    (index / manifest["facts"]["version"] / "features.npy").unlink()
    return index


def test_an_index_of_an_earlier_version_is_searched_as_before(
    folder: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, retriever, tmp_path / "x.png")
    [before] = answers(dataclasses.replace(config, rerank=False), capsys)
    without_features(folder)
    [found] = answers(config, capsys)
    assert found[1:] == before[1:]
    assert found.head.endswith(" s")
    [zero] = answers(dataclasses.replace(config, rerank_weight=0.0), capsys)
    assert zero[1:] == before[1:]
    with pytest.raises(BadInput, match=r"index keeps no features to re-rank by: leave their share out, or run "):
        search.main(dataclasses.replace(config, rerank_weight=0.3))


def test_a_model_that_cannot_encode_queries_is_one_clear_line(
    folder: Path,
    retriever: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(folder, retriever, tmp_path / "x.png")
    manifest = read_json(folder / "manifest.json")
    made_by = manifest["facts"]["clip"]
    for other, message in (
        ({"content": ["another"]}, r"clip has changed, or was moved or removed, since .*index was built: search with"),
        (
            {"model": str(tmp_path / "gone")},
            "gone has changed, or was moved or removed, since .*index was built: search with",
        ),
        ({"model": "no-such-model", "content": []}, r"cannot be loaded \(`model` no-such-model is neither"),
    ):
        manifest["facts"]["clip"] = {**made_by, **other}
        runs.write_manifest(folder, manifest)
        with pytest.raises(BadInput, match=message) as error:
            search.main(config)
        assert str(error.value).endswith(
            "search with --no-guided --no-rerank, or run scripts/14_build_index.sh --overwrite and add again what was "
            "added"
        )
        assert answers(dataclasses.replace(config, rerank=False), capsys)[0].files
    manifest["facts"]["clip"] = made_by
    runs.write_manifest(folder, manifest)
    monkeypatch.delitem(sys.modules, "models.clip")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(BadInput, match=r"cannot be loaded \(import of open_clip halted.*--no-rerank"):
        search.main(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rerank": False, "rerank_weight": 0.3}, "--no-rerank and --rerank-weight contradict each other"),
        ({"rerank_weight": 1.1}, r"--rerank-weight is a share, 0 to 1, not 1\.1"),
        ({"rerank_weight": -0.1}, "--rerank-weight is a share"),
        ({"rerank_weight": float("nan")}, "--rerank-weight is a share"),
        ({"beams": 0}, "--beams and --keep must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        config_of(tmp_path, tmp_path, tmp_path / "x.png", **options)
    assert config_of(tmp_path, tmp_path, tmp_path / "x.png", rerank=False, rerank_weight=0.0).beams is None


def test_cosines_are_those_of_the_feature_folder(
    chain: Chain, index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of captions of the dataset, whose features the tokenizer's stages wrote: the two towers are a pair."""
    features = read_features(chain.features)
    texts = [text for record in features.records for text in record.captions]
    chosen = [0, 31, 77, 143]
    files = [str(chain.root / "images" / record.file) for record in features.records]
    queries = tuple(texts[row] for row in chosen)
    config = config_of(index, retriever, tmp_path / "x.png", queries=queries, rerank_weight=1.0)
    for row, found in zip(chosen, answers(config, capsys), strict=True):
        products = features.images @ features.texts[row]
        lengths = np.linalg.norm(features.images, axis=1) * np.linalg.norm(features.texts[row])
        expected = dict(zip(files, (100 * products / lengths).tolist(), strict=True))
        assert found.scores == pytest.approx([expected[file] for file in found.files], abs=0.05)


def test_the_index_says_who_encodes_queries(chain: Chain, index: Path) -> None:
    facts = read_gallery(index).facts
    assert facts["keeps_features"] is True
    assert Path(facts["clip"]["model"]).samefile(chain.features / "clip")
    width = read_gallery(index).read_features().shape[1]
    assert width == read_array(chain.features / "images.npy").shape[1]


def test_scripts_search_reads_the_weights_of_the_system_only_where_there_is_a_reranker() -> None:
    """The last line of scripts/search.sh, with and without RERANKER, spaces included, under `set -u`."""
    line = (ROOT / "scripts" / "search.sh").read_text().splitlines()[-1]
    shown = 'set -euo pipefail; run() { printf "%s\\n" "$@"; }; RETRIEVER=r TRAINED=t SYSTEM=retriever+stage2; '
    for setting, expected in (
        ("RERANKER='a b'; ", ["--weights", "a b/18_test/retriever+stage2", "the words"]),
        ("", ["r/search.png", "the words"]),
    ):
        command = ["bash", "-c", f"{shown}{setting}{line}", "search.sh", "the words"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/bin:/usr/bin"})
        assert printed.stdout.splitlines()[-len(expected) :] == expected
