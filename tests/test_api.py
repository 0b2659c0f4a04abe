"""`Retriever`: against oracles, while its pictures change, and as one folder that is copied."""

import dataclasses
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from models.clip import encode_tokens, load_clip
from models.decoding import make_writer
from models.voken_lm import Lora, VokenLM, build_causal
from retriever import Found, Retriever
from retriever.gallery import build as build_index
from retriever.gallery import card, export, exported
from retriever.gallery.api import chosen_share
from retriever.gallery.gallery import read_gallery
from tests.chain import Chain, files_of
from tests.oracle import exhaustive
from tests.tiny import codebooks, draw_picture, llama_folder
from tools import runs
from tools.errors import BadInput
from tools.features import read_features
from tools.files import read_json, write_json
from tools.results import FIRST
from tools.vokens import VokenSpace

ROOT = Path(__file__).parent.parent
QUERIES = ["a red circle", "drawing of a small blue square", "green ring", "a picture"]
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def found_by(index: Path, retriever: Path) -> Retriever:
    """Whose pictures no test changes."""
    return Retriever.from_runs(index=index, retriever=retriever, **CPU)


@pytest.fixture
def changing(index: Path, retriever: Path, tmp_path: Path) -> Retriever:
    """Whose pictures the test may change."""
    return Retriever.from_runs(index=Path(shutil.copytree(index, tmp_path / "index")), retriever=retriever, **CPU)


@pytest.fixture
def featureless(chain: Chain, retriever: Path, tmp_path: Path) -> Retriever:
    config = build_index.Config(
        dataset=chain.dataset, rqvae=chain.rqvae, output=tmp_path / "without", keep_features=False
    )
    build_index.main(config)
    return Retriever.from_runs(index=config.output, retriever=retriever, **CPU)


@pytest.fixture(scope="module")
def folder(found_by: Retriever, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder, with pictures; nobody changes it."""
    return found_by.save_pretrained(tmp_path_factory.mktemp("exported") / "toy", include_pictures=True)


@contextmanager
def gone(*places: Path) -> Iterator[None]:
    """Nothing lies there any more, for a while."""
    for place in places:
        place.rename(place.with_name(f"{place.name}, moved"))
    try:
        yield
    finally:
        for place in places:
            place.with_name(f"{place.name}, moved").rename(place)


def cosines(retriever: Retriever, chain: Chain, queries: list[str]) -> NDArray[np.float64]:
    """(queries, pictures), by the model of the features."""
    clip = load_clip(str(chain.features / "clip"))
    with torch.inference_mode():
        texts = encode_tokens(clip, clip.tokenizer(queries)).numpy().astype(np.float64)
    return (texts / np.linalg.norm(texts, axis=1, keepdims=True)) @ retriever.gallery.read_features().astype(
        np.float64
    ).T


def images(found: list[Found]) -> list[str]:
    return [one.image for one in found]


# Search


def test_what_is_found_is_what_scoring_every_picture_finds(
    found_by: Retriever, chain: Chain, index: Path, retriever: Path
) -> None:
    """Beams as wide as the index, against a forward pass a picture; by vokens alone, and with features."""
    lm = VokenLM.from_pretrained(retriever / "model")
    pictures = list(read_gallery(index).pictures())
    codes = np.asarray(found_by.gallery.read_codes()).astype(np.int64)
    own = exhaustive(lm, codes, lm.tokenize(QUERIES), scoring="full", score_end=False).double().numpy()
    for share in (0.0, 0.4):
        total = (1 - share) * own + share * 100 * cosines(found_by, chain, QUERIES)
        answers = found_by.search(QUERIES, k=48, beams=48, share=share)
        for scores, answer in zip(total, answers, strict=True):
            order = np.argsort(-scores, kind="stable")
            assert images(answer) == [pictures[row].image for row in order]
            assert [one.score for one in answer] == pytest.approx(scores[order].tolist(), abs=2e-2 if share else 1e-4)
            assert [one.codes for one in answer] == [tuple(codes[row].tolist()) for row in order]
            assert [one.file for one in answer] == [Path(pictures[row].file) for row in order]
    assert found_by.search(QUERIES, k=48, beams=48, rerank=False) == found_by.search(QUERIES, k=48, beams=48, share=0.0)


def test_a_batch_gives_what_each_query_gives(found_by: Retriever) -> None:
    """In the order of the queries, whatever their lengths; 70 are more than are encoded at once."""
    many = [QUERIES[place % 4] for place in range(70)]
    together = found_by.search(many, k=5)
    alone = {query: found_by.search([query], k=5)[0] for query in QUERIES}
    for query, answer in zip(many, together, strict=True):
        assert images(answer) == images(alone[query])
        assert [one.score for one in answer] == pytest.approx([one.score for one in alone[query]], abs=1e-3)
    assert found_by.search([]) == found_by.two_tower([]) == []


def test_k_pictures_are_given(found_by: Retriever) -> None:
    """As many as are asked for, and the best of more; the beams are as wide as they need to be."""
    for options in ({}, {"rerank": False}):
        assert [len(answer) for answer in found_by.search(QUERIES, k=30, **options)] == [30] * 4  # type: ignore[arg-type]
    assert [len(answer) for answer in found_by.search(QUERIES, k=30, beams=3, rerank=False)] == [3] * 4
    assert [len(answer) for answer in found_by.search(QUERIES)] == [10] * 4
    [few], [more] = found_by.search(QUERIES[:1], k=3), found_by.search(QUERIES[:1], k=20)
    assert few == more[:3]


def test_two_tower_is_brute_force(found_by: Retriever, chain: Chain) -> None:
    answers = found_by.two_tower(QUERIES, k=48)
    for scores, answer in zip(cosines(found_by, chain, QUERIES), answers, strict=True):
        rows = [found_by._row(one.image) for one in answer]
        assert sorted(rows) == list(range(48))
        assert [one.score for one in answer] == pytest.approx(scores[rows].tolist(), abs=1e-5)
        assert [one.score for one in answer] == sorted((one.score for one in answer), reverse=True)
    assert [images(answer) for answer in found_by.two_tower(QUERIES, k=2)] == [images(answer)[:2] for answer in answers]


def test_similar_pictures_are_those_of_near_features(found_by: Retriever, chain: Chain) -> None:
    features = read_features(chain.features).images.astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for row in (0, 17, 47):
        scores = features @ features[row]
        found = found_by.similar(found_by.gallery.picture(row).image, k=47)
        rows = [found_by._row(one.image) for one in found]
        assert sorted([*rows, row]) == list(range(48))
        assert [one.score for one in found] == pytest.approx(scores[rows].tolist(), abs=2e-3)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_without_features_similar_pictures_share_vokens(featureless: Retriever) -> None:
    codes = np.asarray(featureless.gallery.read_codes()).tolist()
    for row in (0, 17, 47):
        found = featureless.similar(featureless.gallery.picture(row).image, k=10)
        shared = [next((place for place in range(3) if own[place] != codes[row][place]), 3) for own in codes]
        expected = sorted((other for other in range(48) if other != row), key=lambda other: -shared[other])[:10]
        assert [featureless._row(one.image) for one in found] == expected
        assert [one.score for one in found] == [shared[other] for other in expected]


def test_without_features_there_is_no_search_by_them(featureless: Retriever) -> None:
    assert featureless.search(QUERIES) == featureless.search(QUERIES, rerank=False)
    assert featureless.share_of_features() == 0
    with pytest.raises(BadInput, match=r"without keeps no features to re-rank by: leave their share out, or run"):
        featureless.search(QUERIES, share=0.3)
    with pytest.raises(BadInput, match=r"keeps no features to search by: run scripts/14_build_index\.sh --overwrite"):
        featureless.two_tower(QUERIES)


def test_vokens_sum_to_the_score_and_alternatives_exist(found_by: Retriever) -> None:
    codes = np.asarray(found_by.gallery.read_codes())
    for one in found_by.search(QUERIES[:1], k=48, rerank=False)[0][::9]:
        steps = found_by.vokens(QUERIES[0], one.codes, top=8)
        assert sum(step.log_probability for step in steps) == pytest.approx(one.score, abs=1e-4)
        for level, step in enumerate(steps):
            behind = codes[(codes[:, :level] == one.codes[:level]).all(axis=1), level]
            assert step.written.code == one.codes[level]
            assert step.written.token == f"<v{level}_{one.codes[level]}>"
            assert {each.code for each in step.alternatives} == set(behind.tolist())
            assert step.allowed == len(step.alternatives)
            assert sum(each.probability for each in step.alternatives) == pytest.approx(1)
            assert step.alternatives == sorted(step.alternatives, key=lambda each: -each.probability)
            assert step.written in step.alternatives
        narrow = found_by.vokens(QUERIES[0], one.codes, top=1)
        assert [step.alternatives for step in narrow] == [step.alternatives[:1] for step in steps]
    with pytest.raises(BadInput, match="a picture has 3 codes, not 2"):
        found_by.vokens("a", [1, 2])
    with pytest.raises(BadInput, match="no picture of the index has the codes"):
        found_by.vokens("a", [*one.codes[:2], 99])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": ["a", " \n"]}, "an empty query finds nothing"),
        ({"queries": "a red circle"}, r"queries must be a list of texts: write \[query\]"),
        ({"k": 0}, "k must be at least 1, it is 0"),
        ({"beams": 0}, "beams must be at least 1, it is 0"),
        ({"share": 1.5}, r"the features' share must be 0 to 1, it is 1\.5"),
        ({"share": float("nan")}, "must be 0 to 1, it is nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(found_by: Retriever, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        found_by.search(**{"queries": QUERIES, **options})


def test_a_picture_that_is_not_there(found_by: Retriever) -> None:
    with pytest.raises(BadInput, match=r"'nothing\.png' is not the id of a picture in "):
        found_by.similar("nothing.png")


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, retriever; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); retriever.none"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'retriever' has no attribute 'none'"


# Changes


def test_pictures_come_and_go(changing: Retriever, index: Path, retriever: Path, tmp_path: Path) -> None:
    draw_picture(tmp_path / "photos" / "deep" / "one.png", "red", "square", 100)
    draw_picture(tmp_path / "two.png", "orange", "ring", 101)
    other = Retriever.from_runs(index=changing.gallery.folder, retriever=retriever, **CPU)
    before = changing.search(QUERIES, k=48)
    assert changing.add([tmp_path / "photos", tmp_path / "two.png"], prefix="new/") == [
        "new/deep/one.png",
        "new/two.png",
    ]
    assert len(changing) == 50
    assert changing.similar("new/two.png", k=49)[0].codes != ()
    [found] = changing.search(QUERIES[:1], k=50)
    assert {one.image: one.file for one in found}["new/two.png"].samefile(tmp_path / "two.png")
    assert len(other) == 48
    assert other.search(QUERIES, k=48) == before
    assert [other.refresh(), other.refresh(), changing.refresh()] == [True, False, False]
    assert other.search(QUERIES, k=50) == changing.search(QUERIES, k=50)
    assert other.remove(["new/deep/one.png", str(tmp_path / "two.png")]) == 2
    assert len(other) == 48
    assert changing.refresh()
    assert changing.search(QUERIES, k=48) == before


def test_a_change_that_cannot_be_made_changes_nothing(changing: Retriever, tmp_path: Path) -> None:
    draw_picture(tmp_path / "a" / "red-circle.png", "red", "circle", 1)
    draw_picture(tmp_path / "b" / "x.png", "red", "circle", 1)
    draw_picture(tmp_path / "c" / "x.png", "red", "ring", 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    version = changing.gallery.facts["version"]
    for places, message in (
        ([tmp_path / "a"], "1 of 1 pictures are in the index already"),
        ([tmp_path / "b", tmp_path / "c"], r"would both get the id 'x\.png': add them one after the other"),
        ([tmp_path / "b", tmp_path / "broken.png"], r"broken\.png: .*nothing was added"),
        ([tmp_path / "none.png"], r"none\.png does not exist; nothing was added"),
        ([tmp_path / "empty"], "there is no picture below"),
        ([], "no picture is named"),
    ):
        with pytest.raises(BadInput, match=message):
            changing.add(places)
    for names, message in (
        (["nothing.png"], "1 of 1 name is neither the id nor, as seen from .*, the file"),
        ([picture.image for picture in changing.gallery.pictures()], "an index holds at least one"),
        ([], "no picture is named"),
    ):
        with pytest.raises(BadInput, match=message):
            changing.remove(names)
    assert not changing.refresh()
    assert changing.gallery.facts["version"] == version
    assert changing.add([tmp_path / "b", tmp_path / "broken.png"], skip_bad=True) == ["x.png"]
    assert changing.add([tmp_path / "b"], skip_known=True) == []
    assert changing.add([tmp_path / "c"], replace=True) == ["x.png"]
    assert len(changing) == 49


def test_an_index_of_other_vokens_is_not_taken(changing: Retriever) -> None:
    manifest = read_json(changing.gallery.folder / runs.MANIFEST)
    manifest["facts"] |= {"codebooks": "others"}
    runs.write_manifest(changing.gallery.folder, manifest)
    with pytest.raises(BadInput, match="has vokens of another tokenizer now: load the retriever again"):
        changing.refresh()
    assert len(changing.search(QUERIES[:1])[0]) == 10


def test_threads_share_one_object_while_pictures_change(changing: Retriever, tmp_path: Path) -> None:
    """Every answer is that of the pictures before a change or after it; two changes at once both happen."""
    for name, colour in (("one", "red"), ("two", "blue")):
        draw_picture(tmp_path / f"{name}.png", colour, "square", 5)
    answers: list[list[list[Found]]] = []
    errors: list[BaseException] = []
    allowed = [changing.search(QUERIES, k=48)]
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                answers.append(changing.search(QUERIES, k=50))
        except BaseException as error:
            errors.append(error)

    def add(name: str) -> None:
        try:
            changing.add([tmp_path / f"{name}.png"])
        except BaseException as error:
            errors.append(error)

    searching = [threading.Thread(target=search) for _ in range(3)]
    adding = [threading.Thread(target=add, args=[name]) for name in ("one", "two")]
    for thread in [*searching, *adding]:
        thread.start()
    for thread in adding:
        thread.join()
    done.set()
    for thread in searching:
        thread.join()
    assert not errors
    assert len(changing) == 50
    allowed.append(changing.search(QUERIES, k=50))
    seen = {len(each[0]) for each in answers}
    assert seen <= {48, 49, 50}
    for each in answers:
        if len(each[0]) != 49:  # which of the two pictures came first is open
            assert each == allowed[len(each[0]) == 50]


# One folder

PARTS = [
    "README.md", "clip/open_clip_config.json", "clip/open_clip_model.safetensors", "config.json",
    "index/manifest.json",
    *(f"index/segment-000000/{name}" for name in (
        "codes.npy", "features.npy",
        *(f"level{level}_{part}.npy" for level in range(3) for part in ("bases", "codes", "deltas")),
        "pictures.npy", "pictures.sqlite",
    )),
    *(f"language_model/{name}" for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "vokens.json",
    )),
    "package/avg_retrieval.whl", "rqvae/config.json", "rqvae/manifest.json", "rqvae/model.safetensors",
]  # fmt: skip


def parts_of(folder: Path) -> list[str]:
    """Files of an exported folder; the package's has no version."""
    return [re.sub(r"(?<=/avg_retrieval)-.*(?=\.whl$)", "", name) for name in files_of(folder)]


def everything(retriever: Retriever) -> list[Any]:
    """All that a retriever answers, without where files lie."""
    searches = [retriever.search(QUERIES, k=48, share=share) for share in (None, 0.0, 0.7)]
    codes = searches[0][0][0].codes
    found = [
        *(one for search in searches for one in search),
        *retriever.two_tower(QUERIES),
        retriever.similar("red-ring.png"),
    ]
    plain = [[one._replace(file=Path(one.file.name)) for one in answer] for answer in found]
    return [plain, retriever.vokens(QUERIES[0], codes), retriever.share_of_features(), len(retriever)]


def test_a_copied_folder_answers_to_the_last_bit_without_the_original(
    found_by: Retriever, folder: Path, chain: Chain, tmp_path: Path
) -> None:
    """With the chain, its models and the exported folder gone; and it adds pictures as the chain does."""
    expected = everything(found_by)
    moved = Path(shutil.copytree(folder, tmp_path / "somewhere else" / "copy"))
    draw_picture(tmp_path / "new.png", "orange", "ring", 101)
    original = Retriever.from_runs(
        index=Path(shutil.copytree(found_by.gallery.folder, tmp_path / "index")),
        retriever=chain.root / "retriever",
        **CPU,
    )
    original.add([tmp_path / "new.png"])
    with_new = everything(original)
    with gone(chain.root, folder.parent):
        loaded = Retriever.load(moved, **CPU)
        assert everything(loaded) == expected
        for found in loaded.search(QUERIES[:1], k=48)[0]:
            assert found.file == moved / "pictures" / found.image
            with Image.open(found.file) as picture:
                assert picture.size == (32, 32)
        assert loaded.add([tmp_path / "new.png"]) == ["new.png"]
        assert everything(loaded) == with_new
        assert everything(Retriever.load(str(moved), **CPU)) == with_new
        assert loaded.remove([str(tmp_path / "new.png"), str(moved / "pictures" / "red-line.png")]) == 2
        assert len(Retriever.load(moved, **CPU)) == 47


def test_the_folder_has_exactly_its_files_and_says_nothing_of_this_machine(
    folder: Path, found_by: Retriever, chain: Chain
) -> None:
    pictures = [f"pictures/{picture.image}" for picture in found_by.gallery.pictures()]
    assert parts_of(folder) == sorted([*PARTS, *pictures])
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        assert str(chain.root).encode() not in content, name
        assert str(ROOT).encode() not in content, name
    assert open_clip.create_model(f"local-dir:{folder / 'clip'}") is not None  # others read it too


def test_without_pictures_the_folder_has_their_names(found_by: Retriever, chain: Chain, tmp_path: Path) -> None:
    folder = found_by.save_pretrained(tmp_path / "toy")
    assert parts_of(folder) == PARTS
    loaded = Retriever.load(folder, **CPU)
    [found] = loaded.search(QUERIES[:1])
    assert [one.file for one in found] == [folder / "pictures" / one.image for one in found]
    (folder / "pictures").symlink_to(chain.root / "images")
    assert all(one.file.is_file() for one in Retriever.load(folder, **CPU).search(QUERIES[:1])[0])


def test_in_its_own_repository_pictures_are_found_where_they_are(
    found_by: Retriever, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else; a picture that was added from elsewhere is below the common folder, too."""
    monkeypatch.chdir(chain.root.parent)
    folder = found_by.save_pretrained(tmp_path / "toy")
    place = f"{chain.root.name}/images"
    assert read_json(folder / "index" / "manifest.json")["facts"]["exported"] == {"pictures": place}
    [found] = Retriever.load(folder, **CPU).search(QUERIES[:1])
    assert [one.file for one in found] == [Path(place) / one.image for one in found]
    assert all(one.file.is_file() for one in found)
    monkeypatch.chdir(tmp_path)
    assert Retriever.load(folder, **CPU).search(QUERIES[:1])[0][0].file == folder / "pictures" / found[0].image


def test_pictures_of_several_folders_keep_their_names(changing: Retriever, chain: Chain, tmp_path: Path) -> None:
    draw_picture(tmp_path / "été" / "new one.png", "orange", "ring", 101)
    changing.add([tmp_path / "été"])
    folder = changing.save_pretrained(tmp_path / "toy", include_pictures=True)
    loaded = Retriever.load(folder, **CPU)
    files = {one.image: one.file for one in loaded.search(QUERIES[:1], k=49)[0]}
    assert len(files) == 49
    for image, original in (
        ("new one.png", tmp_path / "été" / "new one.png"),
        ("red-ring.png", chain.root / "images/red-ring.png"),
    ):
        assert files[image].is_relative_to(folder / "pictures")
        assert files[image].read_bytes() == original.read_bytes()
    shutil.rmtree(tmp_path / "été")
    with pytest.raises(
        BadInput, match=r"new one\.png is missing: put it back, remove it from the index, or export without"
    ):
        changing.save_pretrained(tmp_path / "again", include_pictures=True)
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_exported_folder_is_exported_again(folder: Path, tmp_path: Path) -> None:
    """As it is now, with its card."""
    first = Retriever.load(folder, **CPU)
    second = Retriever.load(first.save_pretrained(tmp_path / "again", include_pictures=True), **CPU)
    assert everything(second) == everything(first)
    configs = [read_json(each / "config.json") for each in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert files_of(tmp_path / "again") == files_of(folder)


def test_only_an_exported_folder_is_replaced_and_only_when_told(found_by: Retriever, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="used is there already, and no exported retriever: name another folder"):
        found_by.save_pretrained(tmp_path / "used", overwrite=True)
    assert files_of(tmp_path / "used") == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    folder = found_by.save_pretrained(tmp_path / "empty", include_pictures=True)
    with pytest.raises(BadInput, match="empty holds an exported retriever: replace it with --overwrite"):
        found_by.save_pretrained(folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    Retriever.load(folder, **CPU).remove(["red-ring.png"])
    found_by.save_pretrained(folder, overwrite=True)
    assert len(Retriever.load(folder, **CPU)) == 48
    assert parts_of(folder) == [".git/HEAD", *PARTS]


@pytest.mark.parametrize("when", ["write_index", "put_in_place"])
def test_an_export_that_is_cut_short_leaves_the_earlier_one(
    when: str, found_by: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = found_by.save_pretrained(tmp_path / "toy")
    before = everything(Retriever.load(folder, **CPU))

    def cut(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(exported, when, cut)
        with pytest.raises(OSError, match="no space left"):
            found_by.save_pretrained(folder, overwrite=True)
    assert everything(Retriever.load(folder, **CPU)) == before
    assert parts_of(tmp_path) == [f"toy/{name}" for name in PARTS]
    (folder / "config.json").rename(folder / exported.REPLACED)  # as when it ends while the parts are exchanged
    with pytest.raises(BadInput, match=r"toy is no exported retriever, it has no config\.json: export it again"):
        Retriever.load(folder)
    found_by.save_pretrained(folder, overwrite=True)
    assert parts_of(folder) == PARTS


def test_folders_that_cannot_be_loaded(folder: Path, retriever: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it is a run folder: use Retriever\.from_runs"):
        Retriever.load(retriever)
    with pytest.raises(BadInput, match=r"there is no folder .*none, and it is no name on the Hugging Face"):
        Retriever.load(tmp_path / "none")
    for name, change, message in (
        ("kind", {"format": "bert"}, "is of another kind of model"),
        ("newer", {"version": 2}, "has version 2 of its format, this program reads 1"),
        ("others", {"codebooks": "x"}, r"has vokens of another tokenizer than config\.json says"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        write_json(copy / "config.json", {**read_json(copy / "config.json"), **change})
        with pytest.raises(BadInput, match=message):
            Retriever.load(copy)
    copy = Path(shutil.copytree(folder, tmp_path / "incomplete"))
    (copy / "index" / "segment-000000" / "codes.npy").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"codes\.npy is damaged.*: copy the whole folder again$"):
        Retriever.load(copy)
    (copy / "index" / "segment-000000" / "codes.npy").unlink()
    with pytest.raises(BadInput, match=r"codes\.npy is missing: copy the whole folder again$"):
        Retriever.load(copy)
    (copy / "index" / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"index has no manifest\.json: copy the whole folder again$"):
        Retriever.load(copy)
    shutil.copytree(folder / "index", copy / "index", dirs_exist_ok=True)
    weights = copy / "language_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"language_model cannot be read "):
        Retriever.load(copy)
    shutil.rmtree(copy / "language_model")
    with pytest.raises(BadInput, match="incomplete lacks language_model/: copy the whole folder again"):
        Retriever.load(copy)


def test_changed_models_are_not_exported(changing: Retriever, tmp_path: Path) -> None:
    """The codes and features would be of others."""
    for name in ("clip", "rqvae"):
        facts = changing.gallery.facts
        others = dataclasses.replace(
            changing.gallery.manifest, facts={**facts, name: {**facts[name], "content": ["another"]}}
        )
        gallery = dataclasses.replace(changing.gallery, manifest=others)
        with pytest.raises(BadInput, match=r"has changed, .* since .*index was built: run scripts/14_build_index\.sh"):
            exported.write_exported(tmp_path / "toy", gallery, changing.source)
    assert not (tmp_path / "toy").exists()


def test_a_model_known_by_name_becomes_a_folder(changing: Retriever, tmp_path: Path) -> None:
    """Which needs neither the name's weights nor the place they came from."""
    small = {"layers": 1, "width": 32}
    vision, text = {**small, "image_size": 32, "patch_size": 16, "head_width": 16}, {**small, "heads": 2}
    write_json(tmp_path / "small-by-name.json", {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    open_clip.add_model_config(tmp_path / "small-by-name.json")
    plain = open_clip.create_model("small-by-name").eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    content = [runs.fingerprint(tmp_path / "weights.pt")]
    made_by = {"model": "small-by-name", "pretrained": str(tmp_path / "weights.pt"), "content": content}
    facts = {**changing.gallery.facts, "clip": made_by}
    manifest = dataclasses.replace(changing.gallery.manifest, facts=facts)
    exported.write_clip(tmp_path / "clip", dataclasses.replace(changing.gallery, manifest=manifest))
    clip = load_clip(str(tmp_path / "clip"))
    tokens, pixels = clip.tokenizer(QUERIES), torch.randn(1, 3, *clip.image_size)
    with torch.inference_mode():
        assert torch.allclose(clip.model.encode_text(tokens), plain.encode_text(tokens), atol=1e-6)
        assert torch.allclose(clip.model.encode_image(pixels), plain.encode_image(pixels), atol=1e-6)


def test_adapters_are_merged(tmp_path: Path) -> None:
    """The base model is no longer needed, and the answers are those of the adapted one, to the last bit."""
    space = VokenSpace(3, 8, shared=False)
    llama_folder(tmp_path / "base")
    lm = build_causal(
        str(tmp_path / "base"), space=space, codebooks=codebooks(space, 16), max_source=16,
        prompt="a picture of {query} drawing", lora=Lora(2, 4.0, 0.0, ()),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    lm.save_pretrained(tmp_path / "adapted")
    exported.write_language_model(tmp_path / "merged", tmp_path / "adapted")
    adapted = VokenLM.from_pretrained(tmp_path / "adapted")
    with gone(tmp_path / "base", tmp_path / "adapted"):
        merged = VokenLM.from_pretrained(tmp_path / "merged")
        with torch.inference_mode():
            states = [
                writer.begin(writer.encode(writer.lm.tokenize(QUERIES))).open()
                for writer in (make_writer(adapted), make_writer(merged))
            ]
    assert torch.equal(*states)
    assert not list((tmp_path / "merged").glob("adapter*"))


# The card

ROW = {
    "dataset": "toy", "split": "test", "pool": "test", "pool_size": 8, "level": "image", "setting": "inductive",
    "queries": 24, "recall": {"1": 0.5, "5": 0.75, "10": 1.0}, "mrr": 0.61, "median_rank": 2.0,
    "queries_per_second": 100.0, "machine": "a machine", "run": "/somewhere/12",
}  # fmt: skip
ROWS = [{**ROW, "system": name} for name in ("mine", "other", "mine+features", "mine+both", "two-tower")] + [
    {**ROW, "system": "mine", "level": "code"}
]


def test_the_command_writes_the_card_from_the_manifests(
    index: Path, retriever: Path, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "summary.json", ROWS)
    config = export.Config(
        folder=tmp_path / "toy", index=index, retriever=retriever, summary=tmp_path / "summary.json", system="mine",
        weights=tmp_path / "none",
    )  # fmt: skip
    export.main(config)
    assert capsys.readouterr().out.splitlines()[-1].startswith("48 pictures can be found, ")
    text = (tmp_path / "toy" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_link"]) == ("other", "README.md")  # the towers' licences are not known
    assert front["library_name"] == "avg"
    assert front["pipeline_tag"] == "text-ranking"
    assert "text-to-image-retrieval" in front["tags"]
    assert huggingface_hub.ModelCard(text).data.to_dict() == front  # as the hub reads it
    figures = [line for line in text.splitlines() if "50.0%" in line]
    assert [line.split("|")[1].strip() for line in figures] == [FIRST, "mine", "mine+features"]
    assert "| train | 32 | 96 |" in text
    assert "inductive: no picture of val or test was trained on" in text
    trained = read_json(retriever / runs.MANIFEST)
    [line] = [line for line in text.splitlines() if line.startswith("| retriever.train ")]
    assert f"lr={trained['config']['lr']} " in line
    assert f"| {trained['commit'][:12]} |" in line
    assert [stage["command"] for stage in read_json(tmp_path / "toy" / "config.json")["card"]["stages"]] == [
        "tools.prepare_captions", "RQ-VAE.prepare_emb", "RQ-VAE.train_heads", "RQ-VAE.train",
        "RQ-VAE.generate_codes", "retriever.prepare", "retriever.gallery.build", "retriever.train",
    ]  # fmt: skip
    assert "share of 0.30" in text


def test_stages_that_have_changed_since_are_not_told(chain: Chain, tmp_path: Path) -> None:
    dataset = runs.read_manifest(chain.dataset, "retriever.prepare")
    recorded = {name: {**value, "fingerprint": "another"} for name, value in dataset.inputs.items()}
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_json(folder / runs.MANIFEST, {**read_json(chain.dataset / runs.MANIFEST), "inputs": recorded})
    found = list(card.stages(dataclasses.replace(dataset, folder=folder)))
    assert [each["command"] for each in found] == ["retriever.prepare"]


def test_the_share_is_what_val_chose(index: Path, retriever: Path, tmp_path: Path) -> None:
    manifest = {
        "command": "reranker.test", "arguments": [], "source": "", "config": {}, "inputs": {}, "outputs": {},
        "facts": {"weights": {"features": {"features": 0.65}}}, "metrics": {}, "seconds": 1.0, "commit": "",
    }  # fmt: skip
    (tmp_path / "18").mkdir()
    write_json(tmp_path / "18" / "manifest.json", manifest)
    assert chosen_share(tmp_path / "18") == 0.65
    chosen = Retriever.from_runs(index=index, retriever=retriever, weights=tmp_path / "18", **CPU)
    loaded = Retriever.load(chosen.save_pretrained(tmp_path / "toy"), **CPU)
    assert loaded.share_of_features() == chosen.share_of_features() == 0.65
    assert loaded.search(QUERIES) == [
        [one._replace(file=tmp_path / "toy" / "pictures" / one.image) for one in answer]
        for answer in chosen.search(QUERIES)
    ]
