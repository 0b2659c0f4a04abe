"""What people ask of a search: by a picture, without near-duplicates, with a cut-off, in JSON, and what is not read."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from models.clip import encode_images, load_clip
from models.rqvae import RqVae, tokenize
from retriever import Retriever
from retriever.gallery import build as build_index
from retriever.gallery import search
from retriever.gallery.answers import Ranked, Selection
from retriever.gallery.gallery import KEEPS_FEATURES
from retriever.serve.web import make_app
from tests.chain import Chain
from tests.pages import make_service
from tests.tiny import draw_picture
from tools.errors import BadInput
from tools.pictures import open_picture

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
ALL = 64
QUERY = "a red circle"


@pytest.fixture(scope="module")
def found_by(index: Path, retriever: Path) -> Retriever:
    """Whose pictures no test changes."""
    return Retriever.from_runs(index=index, retriever=retriever, **CPU)


@pytest.fixture
def changing(index: Path, retriever: Path, tmp_path: Path) -> Retriever:
    return Retriever.from_runs(index=Path(shutil.copytree(index, tmp_path / "index")), retriever=retriever, **CPU)


@pytest.fixture
def featureless(chain: Chain, retriever: Path, tmp_path: Path) -> Retriever:
    config = build_index.Config(
        dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "without", keep_features=False
    )
    build_index.main(config)
    return Retriever.from_runs(index=config.output, retriever=retriever, **CPU)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    draw_picture(tmp_path / "photo.png", "green", "ring", 12)
    return tmp_path / "photo.png"


def encoded(chain: Chain, file: Path) -> Any:
    """The feature (width,) of a picture by the model of the features, and not as the search computes it."""
    clip = load_clip(str(chain.features / "clip"))
    return encode_images(clip, clip.preprocess(open_picture(file))[None])[0].detach().numpy().astype(np.float64)


def unit(features: Any) -> Any:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def command(retriever: Retriever, folder: Path, **options: Any) -> None:
    runs: dict[str, Any] = {"index": retriever.gallery.folder, "retriever": retriever.source.model.parent}
    search.main(search.Config(sheet=folder / "sheet.png", **runs, **CPU, **{"queries": (), **options}))


# By a picture


def test_a_picture_finds_the_nearest_features(found_by: Retriever, chain: Chain, photo: Path) -> None:
    gallery = found_by.gallery
    expected = gallery.read_features().astype(np.float64) @ unit(encoded(chain, photo))
    answer = found_by.search_image(photo, k=ALL)
    order = [row for one in answer if (row := gallery.row(one.image)) is not None]
    assert sorted(order) == list(range(48))
    assert [one.score for one in answer] == pytest.approx(expected[order].tolist(), abs=1e-3)
    assert [one.score for one in answer] == sorted((one.score for one in answer), reverse=True)
    with Image.open(photo) as opened:
        assert found_by.search_image(opened, k=ALL) == answer
    assert found_by.search_image(str(photo), k=3) == answer[:3]


def test_one_of_the_index_finds_itself_and_then_those_like_it(found_by: Retriever, chain: Chain) -> None:
    [first, *others] = found_by.search_image(chain.root / "images" / "red-circle.png", k=11)
    assert first.image == "red-circle.png"
    assert first.score == pytest.approx(1, abs=1e-3)
    similar = found_by.similar("red-circle.png", k=10)
    assert [one.score for one in others] == pytest.approx([one.score for one in similar], abs=2e-3)


def test_without_features_the_leading_vokens_count(featureless: Retriever, chain: Chain, photo: Path) -> None:
    model = RqVae.from_pretrained(chain.rqvae)
    own = tokenize(model, encoded(chain, photo)[None].astype(np.float32), groups=None).codes[0].tolist()

    def leading(codes: tuple[int, ...]) -> int:
        return next((level for level in range(3) if codes[level] != own[level]), 3)

    answer = featureless.search_image(photo, k=ALL)
    assert [one.score for one in answer] == sorted((leading(one.codes) for one in answer), reverse=True)
    assert len({one.image for one in answer}) == 48
    assert {one.similarity for one in answer} == {None}
    for refused in ({"by": "features"}, {"min_similarity": 0.5}):
        with pytest.raises(BadInput, match=r"keeps no features to search by: run scripts/14_build_index\.sh"):
            featureless.search_image(photo, **refused)


def test_by_vokens_where_features_are_kept_too(found_by: Retriever, photo: Path) -> None:
    answer = found_by.search_image(photo, k=ALL, by="vokens")
    pairs = [(one.score, one.similarity) for one in answer]
    assert pairs == sorted(pairs, reverse=True)
    assert {one.score for one in answer} <= {0.0, 1.0, 2.0, 3.0}


def test_a_picture_is_seen_as_its_exif_says(found_by: Retriever, photo: Path, tmp_path: Path) -> None:
    with Image.open(photo) as opened:
        turned = opened.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert found_by.search_image(tmp_path / "turned.png", k=5) == found_by.search_image(photo, k=5)
    with Image.open(tmp_path / "turned.png") as opened:
        assert found_by.search_image(opened, k=5) == found_by.search_image(photo, k=5)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, r"photo\.png: picture unreadable \(.+\): name a picture to search by"),
        (lambda path: path.write_bytes(b""), r"photo\.png: picture file is empty: name a picture to search by"),
        (lambda path: path.write_text("words"), r"photo\.png: .*no picture.*: name a picture to search by"),
        (lambda path: path.unlink(), r"photo\.png: picture missing: name a picture to search by"),
        (lambda path: (path.unlink(), path.mkdir()), r"photo\.png is a folder: name one picture to search by"),
        (lambda path: Image.new("RGB", (500, 2)).save(path), r"picture more than 200 times as long as wide"),
    ],
    ids=["cut short", "empty", "text", "gone", "folder", "oblong"],
)
def test_a_picture_that_cannot_be_read_is_one_line(
    spoil: Callable[[Path], object], message: str, found_by: Retriever, photo: Path, tmp_path: Path
) -> None:
    spoil(photo)
    with pytest.raises(BadInput, match=message):
        found_by.search_image(photo)
    with pytest.raises(BadInput, match=message):
        command(found_by, tmp_path, picture=photo)


def test_an_opened_picture_that_cannot_be_read_is_one_line(found_by: Retriever, photo: Path) -> None:
    cut_short(photo)
    told = r"the picture to search by cannot be read \(OSError\): give another one"
    with Image.open(photo) as opened, pytest.raises(BadInput, match=told):
        found_by.search_image(opened)
    with pytest.raises(BadInput, match="has 500 × 2 pixels"):
        found_by.search_image(Image.new("RGB", (500, 2)))


def test_a_changed_model_is_one_line(changing: Retriever, photo: Path) -> None:
    changing.gallery.facts["clip"]["content"] = ["another"]
    with pytest.raises(BadInput, match=r"has changed, or was moved or removed, since .* was built: search with words"):
        changing.search_image(photo)


def test_the_command_searches_by_a_picture(
    found_by: Retriever, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(found_by, tmp_path, picture=photo, keep=3)
    head, *printed, drawn = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{photo}, 48 pictures, ")
    assert ", by features" in head
    expected = found_by.search_image(photo, k=3)
    assert [line.split(maxsplit=3)[3] for line in printed] == [str(one.file) for one in expected]
    assert drawn == f"drawn: {tmp_path / 'sheet.png'}"
    with pytest.raises(BadInput, match="--picture is a search of its own"):
        search.Config(queries=("a",), picture=photo, index=tmp_path, retriever=tmp_path, sheet=tmp_path)


# Near-duplicates


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 99), count=st.integers(1, 40), k=st.integers(1, 12), at=st.sampled_from([0.5, 0.9, 0.99]),
    least=st.sampled_from([None, 0.0, 0.5]), kept=st.booleans(),
)  # fmt: skip
def test_what_is_shown_is_what_a_loop_over_the_ranking_shows(
    seed: int, count: int, k: int, at: float, least: float | None, kept: bool, found_by: Retriever
) -> None:
    """Against one picture after the other: under the first result that it is near to, else a result of its own."""
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.permutation(48)[:count])
    centres = unit(generator.normal(size=(4, 6)))
    features = unit(centres[generator.integers(0, 4, 48)] + 0.2 * generator.normal(size=(48, 6))).astype(np.float16)
    gallery = found_by.gallery
    facts = {**gallery.facts, KEEPS_FEATURES: kept}
    [segment] = gallery.segments
    changed = dataclasses.replace(
        gallery,
        manifest=dataclasses.replace(gallery.manifest, facts=facts),
        segments=[dataclasses.replace(segment, features=features if kept else None)],
    )
    cosines = generator.uniform(-1, 1, len(rows)).astype(np.float32)
    if not kept:
        least = None
    selection = Selection.of(changed, k=k, min_similarity=least, fold=at)
    shown, _ = selection.apply(changed, Ranked(rows, np.arange(len(rows), 0, -1.0), cosines))

    groups: list[list[int]] = []
    for row, cosine in zip(rows.tolist(), cosines, strict=True):
        if least is not None and cosine < least:
            continue

        def near(other: int, row: int = row) -> bool:
            if kept:
                return bool(unit(features[row].astype(np.float64)) @ unit(features[other].astype(np.float64)) >= at)
            return gallery.code(row)[:-1] == gallery.code(other)[:-1]

        home = next((group for group in groups if near(group[0])), None)
        groups.append([row]) if home is None else home.append(row)
    assert [[gallery.row(one.image) for one in (best, *best.folded)] for best in shown] == groups[:k]


def test_copies_become_one_result_and_as_many_are_shown(changing: Retriever, chain: Chain, tmp_path: Path) -> None:
    """Twelve copies of one picture take no places from others, in every kind of search."""
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(12):
        shutil.copy(chain.root / "images" / "red-circle.png", copies / f"{number:02}.png")
    changing.add([copies])
    names = {f"{number:02}.png" for number in range(12)} | {"red-circle.png"}
    fold = 1.0
    photo = copies / "00.png"
    for answer in (
        changing.search([QUERY], k=20, beams=20, fold=fold)[0],
        changing.search([QUERY], k=20, rerank=False, fold=fold)[0],
        changing.two_tower([QUERY], k=20, fold=fold)[0],
        changing.search_image(photo, k=20, fold=fold),
    ):
        assert len(answer) == 20
        ids = [one.image for best in answer for one in (best, *best.folded)]
        assert len(ids) == len(set(ids))
        groups = [{best.image, *(one.image for one in best.folded)} for best in answer]
        assert all(not names & group or group <= names for group in groups)
        assert sum(bool(names & group) for group in groups) <= 1
    first = changing.search_image(photo, k=5, fold=fold)[0]
    assert {first.image, *(one.image for one in first.folded)} == names
    assert [len(one.folded) for one in changing.search_image(photo, k=5)] == [0] * 5
    alike = changing.similar("red-circle.png", k=3, fold=fold)
    assert len(alike[0].folded) == 11


def test_folding_looks_as_far_as_it_must(changing: Retriever, chain: Chain, tmp_path: Path) -> None:
    """More copies than the search looks at first."""
    (tmp_path / "copies").mkdir()
    for number in range(70):
        shutil.copy(chain.root / "images" / "red-circle.png", tmp_path / "copies" / f"{number}.png")
    changing.add([tmp_path / "copies"])
    for answer in (
        changing.search([QUERY, "a blue line"], k=6, fold=0.99999)[0],
        changing.search_image(tmp_path / "copies" / "0.png", k=6, fold=0.99999),
    ):
        assert len(answer) == 6


# Similarity


def test_each_result_shows_its_cosine_and_the_cut_off_holds(found_by: Retriever) -> None:
    [answer] = found_by.search([QUERY], k=ALL, beams=ALL)
    brute = {one.image: one.score for one in found_by.two_tower([QUERY], k=ALL)[0]}
    assert [one.similarity for one in answer] == pytest.approx([brute[one.image] for one in answer], abs=1e-4)
    middle = float(np.median(list(brute.values())))
    [cut] = found_by.search([QUERY], k=ALL, beams=ALL, min_similarity=middle)
    assert cut == [one for one in answer if one.similarity is not None and one.similarity >= middle]
    assert 0 < len(cut) < 48
    assert [len(each) for each in found_by.search([QUERY, "a ring"], min_similarity=1.0)] == [0, 0]
    [plain] = found_by.search([QUERY], rerank=False)
    assert {one.similarity for one in plain} == {None}  # no text tower was needed
    [asked] = found_by.search([QUERY], k=ALL, beams=ALL, rerank=False, min_similarity=middle)
    assert {one.image for one in asked} == {one.image for one in cut}
    for one in found_by.two_tower([QUERY], k=ALL, min_similarity=middle)[0]:
        assert one.score >= middle


@pytest.mark.parametrize("options", [{"min_similarity": 1.5}, {"min_similarity": float("nan")}, {"fold": -2.0}])
def test_what_is_no_cosine_is_refused(options: dict[str, Any], found_by: Retriever, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a cosine, -1 to 1, not"):
        found_by.search([QUERY], **options)
    if "min_similarity" in options:
        with pytest.raises(BadInput, match="--min-similarity is a cosine"):
            command(found_by, tmp_path, queries=(QUERY,), **options)


def test_the_command_says_that_none_is_close(
    found_by: Retriever, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(found_by, tmp_path, queries=(QUERY,), min_similarity=0.999)
    assert capsys.readouterr().out.splitlines()[1] == (
        'no picture is close to "a red circle": none that was found has a similarity of at least 0.999 '
        "(--min-similarity)"
    )


# JSON


def test_json_is_all_that_is_printed(
    changing: Retriever, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(chain.root / "images" / "red-circle.png", tmp_path / "late.png")
    changing.add([tmp_path / "late.png"])
    (tmp_path / "late.png").unlink()
    long = " ".join(["small"] * 60)
    capsys.readouterr()
    command(changing, tmp_path, queries=(QUERY, long), json=True, keep=ALL, beams=ALL, fold=True, fold_at=0.99999)
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    [expected] = changing.search([QUERY], k=ALL, beams=ALL, fold=0.99999)
    assert first.keys() == {"query", "picture", "pictures", "seconds", "unread", "results"}
    assert (first["query"], first["picture"], first["pictures"], first["unread"]) == (QUERY, None, 49, [])
    assert [one["rank"] for one in first["results"]] == list(range(1, len(expected) + 1))
    for one, found in zip(first["results"], expected, strict=True):
        assert one.keys() == {"rank", "image", "file", "score", "similarity", "vokens", "gone", "folded"}
        assert (one["image"], one["file"], tuple(one["vokens"])) == (found.image, str(found.file), found.codes)
        assert one["score"] == pytest.approx(found.score, abs=1e-3)
        assert one["similarity"] == pytest.approx(found.similarity, abs=1e-3)
        assert [other["image"] for other in one["folded"]] == [other.image for other in found.folded]
    everything = [other for one in first["results"] for other in (one, *one["folded"])]
    assert [one["image"] for one in everything if one["gone"]] == ["late.png"]
    assert second["query"] == long
    assert "are not read by the language model" in second["unread"][0] or len(second["unread"]) == 1
    assert not (tmp_path / "sheet.png").exists()


def test_json_has_a_line_for_a_query_that_fails(
    found_by: Retriever, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(queries: list[str], **options: Any) -> Any:
        if queries == ["bad"]:
            raise BadInput("the scores are no numbers")
        return found_by.search(queries, **options)

    class Failing:
        guide, gallery = None, found_by.gallery
        search, refresh = staticmethod(answer), staticmethod(found_by.refresh)
        share_of_features = staticmethod(found_by.share_of_features)

        def __len__(self) -> int:
            return 48

    monkeypatch.setattr(Retriever, "from_runs", lambda **_: Failing())
    monkeypatch.setattr(search, "typed_queries", lambda: iter(["a ring", "bad", "a line"]))
    command(found_by, tmp_path, json=True)
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [one["query"] for one in answers] == ["a ring", "bad", "a line"]
    assert answers[1] == {"query": "bad", "error": "the scores are no numbers"}


# What is not read, and files that are gone


def test_a_long_query_is_answered_and_said_to_be_cut(
    found_by: Retriever, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["small"] * 60)
    with pytest.warns(UserWarning, match="words 15 and on of the query are not read by the text tower"):
        answer = found_by.search([long, QUERY])
    notes: list[list[str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found_by.search([long, QUERY], unread=notes) == answer
        found_by.search([QUERY])
        found_by.two_tower([QUERY])
    assert notes[1] == []
    tower = "words 15 and on of the query are not read by the text tower, which reads 16 tokens"
    assert notes[0][-1] == tower
    with pytest.warns(UserWarning, match="the text tower"):
        found_by.two_tower([long])
    only: list[list[str]] = []
    found_by.search([long], rerank=False, unread=only)
    assert tower not in only[0]  # it is not asked
    command(found_by, tmp_path, queries=(long,))
    assert f"note: {tower}" in capsys.readouterr().err.splitlines()


def test_a_query_beyond_what_is_looked_at(found_by: Retriever) -> None:
    notes: list[list[str]] = []
    found_by.search(["red " * 10_000], unread=notes)
    assert any("words 15 and on" in note for note in notes[0])


def test_a_file_that_is_gone_is_marked_everywhere(
    changing: Retriever, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_picture(tmp_path / "late.png", "red", "circle", 5)
    changing.add([tmp_path / "late.png"])
    (tmp_path / "late.png").unlink()
    [answer] = changing.search([QUERY], k=ALL, beams=ALL)
    assert [one.image for one in answer if one.gone] == ["late.png"]
    capsys.readouterr()
    command(changing, tmp_path, queries=(QUERY,), keep=ALL, beams=ALL)
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("  (file is gone)")]
    assert len(marked) == 1
    assert "late.png" in marked[0]
    assert (tmp_path / "sheet.png").is_file()


# The server


def test_the_server_has_all_of_it(index: Path, retriever: Path, photo: Path, tmp_path: Path) -> None:
    service = make_service(Path(shutil.copytree(index, tmp_path / "index")), retriever)
    content = photo.read_bytes()
    with TestClient(make_app(service), base_url="http://127.0.0.1:7860") as client:
        client.post("/api/pictures", files=[("pictures", ("a.png", content)), ("pictures", ("b.png", content))])
        (service.uploads / "b.png").unlink()
        words: dict[str, Any] = {"q": "a green ring", "k": 60, "beams": 60}
        plain = client.get("/api/search", params=words).json()["pictures"]
        assert [one["id"] for one in plain if one["gone"]] == ["uploads/b.png"]
        assert all(one["folded"] == [] for one in plain)
        one_each = client.get("/api/search", params={**words, "fold": True, "fold_at": 0.99999}).json()["pictures"]
        pairs = [{one["id"], *(other["id"] for other in one["folded"])} for one in one_each]
        assert {"uploads/a.png", "uploads/b.png"} in pairs
        middle = sorted(one["similarity"] for one in plain)[25]
        near = client.get("/api/search", params={**words, "min_similarity": middle, "two_tower": True}).json()
        assert all(one["similarity"] >= middle - 1e-5 for one in (*near["pictures"], *near["two_tower"]))
        assert 0 < len(near["pictures"]) < 50
        told = client.get("/api/search", params={"q": "small " * 60, "two_tower": True}).json()
        assert "words 15 and on of the query are not read by the text tower, which reads 16 tokens" in told["unread"]
        assert near["unread"] == []

        answer = client.post("/api/similar", params={"k": 4}, files={"picture": ("mine.png", content)}).json()
        expected = service.retriever.search_image(photo, k=4)
        assert [one["id"] for one in answer["pictures"]] == [one.image for one in expected]
        assert (answer["name"], answer["by"], answer["pool"]) == ("mine.png", "features", 50)
        by_vokens = client.post("/api/similar", params={"by": "vokens"}, files={"picture": ("m.png", content)}).json()
        assert by_vokens["by"] == "vokens"
        refused = client.post("/api/similar", files={"picture": ("mine.png", b"words")})
        assert (refused.status_code, refused.json()["detail"][:40]) == (422, "mine.png is not a picture that can be re")
        assert client.post("/api/similar").json()["detail"] == "picture: field required"
        for name, value in (("min_similarity", "nan"), ("min_similarity", 2), ("fold_at", -3)):
            assert client.get("/api/search", params={"q": "a", name: value}).status_code == 422
        assert len(service.retriever) == 50
