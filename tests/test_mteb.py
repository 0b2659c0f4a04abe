"""A retriever on text-to-image tasks: MTEB's figures against ours, and the search against `Retriever.search`.

What needs MTEB is skipped where it is not installed (requirements-benchmarks.txt); the rest needs no more than columns.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retriever import Retriever, retrieve
from retriever import test as final
from retriever.gallery import benchmark
from retriever.gallery.mteb_model import MtebRetriever
from tests.chain import Chain
from tools import beir
from tools.errors import BadInput
from tools.files import read_json
from tools.recall import NOT_FOUND

QUERIES = ["a red circle", "drawing of a small blue square", "green ring", "a picture"]
TASK = SimpleNamespace(name="Toy", category="t2i")
PLACE: dict[str, Any] = {"hf_split": "test", "hf_subset": "default"}
NEEDS = "MTEB is not installed: pip install -r requirements-benchmarks.txt"


class Columns:
    """As much of `datasets.Dataset` as a model of MTEB sees."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(self.columns["id"])

    def __getitem__(self, key: str | slice) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: each[key] for name, each in self.columns.items()}


@pytest.fixture(scope="module")
def searcher(index: Path, retriever: Path) -> Retriever:
    return Retriever.from_runs(index=index, retriever=retriever, device="cpu", precision="fp32")


@pytest.fixture
def corpus(chain: Chain, searcher: Retriever) -> Columns:
    images = [picture.image for picture in searcher.gallery.pictures()]
    return Columns(id=images, image=[Image.open(chain.root / "images" / image) for image in images])


def asked(texts: list[str]) -> Columns:
    return Columns(id=[f"q{number}" for number in range(len(texts))], text=texts)


def found(model: MtebRetriever, texts: list[str], top_k: int = 1000) -> list[list[str]]:
    lists = model.search(asked(texts), task_metadata=TASK, top_k=top_k, **PLACE)
    for each in lists.values():  # MTEB sorts by score, and equal ones by id
        assert (np.diff(list(each.values())) < 0).all()
    return [list(each) for each in lists.values()]


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("rename", [False, True])
def test_the_index_s_own_pictures_are_searched_as_the_index_is(
    searcher: Retriever, corpus: Columns, share: float, rename: bool
) -> None:
    """Whatever their ids: they keep their vokens and features."""
    names = {image: f"other {image}" if rename else image for image in corpus["id"]}
    corpus.columns["id"] = list(names.values())
    model = MtebRetriever(searcher, beams=12, share=share)
    model.index(corpus, task_metadata=TASK)
    assert model.pool.known == 48
    np.testing.assert_array_equal(model.pool.codes, searcher.gallery.read_codes())
    expected = [[names[one.image] for one in each] for each in searcher.search(QUERIES, k=12, beams=12, share=share)]
    assert found(model, QUERIES) == expected
    assert found(model, QUERIES, top_k=3) == [each[:3] for each in expected]
    short = MtebRetriever(searcher, beams=12, keep=5, share=share)
    short.index(corpus, task_metadata=TASK)
    assert found(short, QUERIES) == [each[:5] for each in expected]


def test_other_pictures_are_tokenized_and_found(
    chain: Chain, index: Path, retriever: Path, corpus: Columns, tmp_path: Path
) -> None:
    """As `add` codes them: pictures that the index has not get free codes, and the index stays as it is."""
    smaller = Retriever.from_runs(
        index=Path(shutil.copytree(index, tmp_path / "index")), retriever=retriever, device="cpu", precision="fp32"
    )
    gone = corpus["id"][::7]
    smaller.remove(gone)
    model = MtebRetriever(smaller, beams=48, rerank=False)
    model.index(corpus, task_metadata=TASK, encode_kwargs={"batch_size": 5})
    assert (len(smaller), model.pool.known) == (48 - len(gone), 48 - len(gone))
    assert sorted(found(model, QUERIES[:1])[0]) == sorted(corpus["id"])
    smaller.add([chain.root / "images" / image for image in gone])
    rows = {picture.image: row for row, picture in smaller.gallery.with_images(corpus["id"]).items()}
    assert model.pool.codes.tolist() == [list(smaller.gallery.code(rows[image])) for image in corpus["id"]]


def test_two_copies_of_a_picture_have_codes_of_their_own(searcher: Retriever, corpus: Columns) -> None:
    corpus.columns["id"].append("copy")
    corpus.columns["image"].append(corpus["image"][0])
    model = MtebRetriever(searcher, beams=49, rerank=False)
    model.index(corpus, task_metadata=TASK)
    assert model.pool.known == 48
    np.testing.assert_array_equal(model.pool.codes[:48], searcher.gallery.read_codes())
    assert len(np.unique(model.pool.codes, axis=0)) == 49


def test_a_setting_is_that_of_the_task_s_pictures(
    searcher: Retriever, corpus: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MtebRetriever(searcher)
    model.index(corpus, task_metadata=TASK)
    assert model.setting == "inductive"
    assert searcher.source.trained is not None
    monkeypatch.setitem(searcher.source.trained.facts, "setting", "transductive")
    assert model.setting == "transductive"
    model.index(Columns(id=["noise"], image=[Image.effect_noise((32, 32), 90)]), task_metadata=TASK)
    assert (model.pool.known, model.setting) == (0, "inductive")


def test_a_revision_tells_models_and_searches_apart(searcher: Retriever) -> None:
    models = [MtebRetriever(searcher, **options) for options in ({}, {"beams": 3}, {"keep": 3}, {"rerank": False})]
    assert len({model.revision for model in models}) == 4
    assert models[0].revision == MtebRetriever(searcher).revision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": "i2i"}, "Toy is a task of category i2i, and a retriever finds pictures for texts"),
        ({"ids": ["a", "a"]}, r"Toy: several pictures have the id 'a' \(1 such id\)"),
        ({"pictures": [None, None]}, "picture a of the task is missing"),
        ({"pictures": [Image.new("RGB", (9000, 2))] * 2}, "picture a of the task: the picture to search by has 9000"),
        ({"ids": [], "pictures": []}, "Toy has no pictures to search"),
    ],
)
def test_a_task_that_cannot_be_searched_is_refused(searcher: Retriever, changes: dict[str, Any], message: str) -> None:
    task = SimpleNamespace(name="Toy", category=changes.get("category", "t2i"))
    pictures = changes.get("pictures", [Image.new("RGB", (32, 32))] * 2)
    with pytest.raises(BadInput, match=message):
        MtebRetriever(searcher).index(Columns(id=changes.get("ids", ["a", "b"]), image=pictures), task_metadata=task)


def test_a_search_that_has_no_answer_is_refused(
    searcher: Retriever, corpus: Columns, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MtebRetriever(searcher)
    with pytest.raises(BadInput, match="no task's pictures are indexed"):
        found(model, QUERIES)
    model.index(corpus, task_metadata=TASK)
    with pytest.raises(BadInput, match="Toy: query q1 has no text to search with"):
        found(model, ["a", " \n"])
    with pytest.raises(BadInput, match="Toy gives pictures to reorder"):
        model.search(asked(QUERIES), task_metadata=TASK, top_k=3, top_ranked={"q0": ["a"]}, **PLACE)
    instructed = Columns(id=["q0"], text=["a red circle"], instruction=["find it"])
    model.search(instructed, task_metadata=TASK, top_k=3, **PLACE)
    assert "Toy: the instructions of the queries are not read" in capsys.readouterr().out
    for options, message in (({"name": "x"}, "write owner/name"), ({"beams": 0}, "beams must be at least 1")):
        with pytest.raises(BadInput, match=message):
            MtebRetriever(searcher, **options)


def test_ranks_are_of_the_first_right_picture() -> None:
    lists = {"q1": {"a": 3.0, "b": 2.0}, "q2": {"a": 1.0}, "q3": {"a": 1.0}}
    relevant = {"q1": {"b": 1, "z": 1}, "q2": {"b": 1}, "q3": {"a": 0, "c": 1}, "not searched": {"a": 1}}
    assert benchmark.first_ranks(lists, relevant).tolist() == [2, NOT_FOUND, NOT_FOUND]


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"folder": tmp_path}, "give either --tasks or --beir"),
        ({"folder": tmp_path, "beir": tmp_path, "tasks": ("x",)}, "give either --tasks or --beir"),
        ({"beir": tmp_path}, "give either --folder, or --index and --retriever"),
        ({"beir": tmp_path, "index": tmp_path}, "give either --folder, or --index and --retriever"),
        ({"beir": tmp_path, "folder": tmp_path, "rerank": False, "rerank_weight": 0.3}, "contradict each other"),
    ):
        with pytest.raises(BadInput, match=message):
            benchmark.Config(output=tmp_path, **options)


# With MTEB itself


@pytest.fixture(scope="module")
def exported(chain: Chain, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The test split as a task, with what retriever.retrieve found; and the rows that retriever.test makes of it."""
    pytest.importorskip("mteb", reason=NEEDS)
    root = tmp_path_factory.mktemp("mteb")
    config = retrieve.Config(
        dataset=chain.dataset, retriever=retriever, output=root / "12", precision="fp32", device="cpu"
    )
    retrieve.main(config)
    summary = root / "summary.json"
    final.main(final.Config(predictions=root / "12", output=root / "13", summary=summary, name="toy", device="cpu"))
    beir.main(beir.Config(captions=chain.captions, output=root / "toy", predictions=root / "12"))
    return root / "toy", summary


class Replayed:
    """A model of MTEB whose lists are given."""

    def __init__(self, lists: dict[str, dict[str, float]]) -> None:
        from mteb.models import ModelMeta

        self.lists = lists
        self.mteb_model_meta = ModelMeta.create_empty({"name": "toy/lists", "modalities": ["text", "image"]})

    def index(self, corpus: Any, **_: Any) -> None:
        self.images = set(corpus["id"])

    def search(self, queries: Any, **_: Any) -> dict[str, dict[str, float]]:
        assert list(queries["id"]) == list(self.lists)
        assert all(set(each) <= self.images for each in self.lists.values())
        return self.lists


def scores_of(model: Any, task: Any) -> dict[str, float]:
    import mteb

    task.load_data()
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    scores: dict[str, float] = result.scores["test"][0]
    return scores


def own_row(summary: Path, system: str = "retriever") -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in read_json(summary) if row["system"] == system and row["level"] == "image")
    return row


def assert_same(scores: dict[str, float], row: dict[str, Any]) -> None:
    for measure in ("recall", "hit_rate"):
        assert {cutoff: scores[f"{measure}_at_{cutoff}"] for cutoff in row["recall"]} == row["recall"]
    assert round(scores["mrr_at_10"], 5) == row["mrr"]
    assert scores["accuracy"] == row["recall"]["1"]


def test_mteb_and_our_table_have_the_same_figures(exported: tuple[Path, Path]) -> None:
    """Of the lists that retriever.retrieve wrote, to the last digit."""
    folder, summary = exported
    lists = read_json(folder / "runs" / "test.json")
    assert_same(scores_of(Replayed(lists), benchmark.folder_task(folder, "test")), own_row(summary))


def test_a_search_by_mteb_has_the_figures_of_our_table(
    exported: tuple[Path, Path], index: Path, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, summary = exported
    benchmark.main(
        benchmark.Config(
            output=tmp_path, beir=folder, index=index, retriever=retriever, beams=10, rerank=False, guided=False,
            device="cpu", precision="fp32",
        )
    )  # fmt: skip
    [scores] = read_json(tmp_path / "toy.json")["scores"]["test"]
    assert_same(scores, own_row(summary))
    said = capsys.readouterr().out
    assert "toy: 8 pictures, 8 of them in the retriever's own index; inductive" in said
    row = dict(zip(*(line.split() for line in said.splitlines()[-2:]), strict=True))
    for cutoff in ("1", "5", "10"):
        assert row[f"R@{cutoff}"] == row[f"hit_rate_at_{cutoff}"] == f"{own_row(summary)['recall'][cutoff]:.5f}"
    lists = read_json(tmp_path / "toy_predictions.json")["default"]["test"]
    expected = read_json(folder / "runs" / "test.json")
    for query, found in lists.items():
        assert sorted(found, key=lambda image: -found[image]) == list(expected[query])


def test_several_right_pictures_are_where_figures_differ(exported: tuple[Path, Path]) -> None:
    """MTEB's recall is the share of them that a list has; ours, and MTEB's hit rate, ask for one."""
    folder, _ = exported
    task = benchmark.folder_task(folder, "test")
    task.load_data()
    data = task.dataset["default"]["test"]
    images = list(data["corpus"]["id"])
    data["relevant_docs"] = {
        query: dict.fromkeys([*asked, images[0]], 1) for query, asked in data["relevant_docs"].items()
    }
    lists = read_json(folder / "runs" / "test.json")
    ranks = benchmark.first_ranks(lists, data["relevant_docs"])
    scores = scores_of(Replayed(lists), task)
    for cutoff in (1, 5, 10):
        assert scores[f"hit_rate_at_{cutoff}"] == round(float((ranks <= cutoff).mean()), 5)
    assert scores["recall_at_1"] < scores["hit_rate_at_1"]


def test_tasks_of_mteb_s_own_tests(exported: tuple[Path, Path], searcher: Retriever) -> None:
    """Their category decides; two pictures are found wherever they rank."""
    from mteb.mocks.mock_tasks import retrieval as mocks

    model = MtebRetriever(searcher, beams=2)
    scores = scores_of(model, mocks.MockAny2AnyRetrievalT2ITask())
    assert (scores["hit_rate_at_3"], scores["recall_at_1000"], model.pool.known) == (1.0, 1.0, 0)
    ranks = benchmark.first_ranks(model.searched["default", "test"].lists, {"q0": {"d1": 1, "d2": 0}, "q1": {"d2": 1}})
    assert scores["mrr_at_10"] == pytest.approx(float((1 / ranks).mean()))
    with pytest.raises(BadInput, match="is a task of category i2t"):
        scores_of(model, mocks.MockAny2AnyRetrievalI2TTask())


def test_queries_without_a_judgement_are_left_out(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "fewer"))
    judged = (folder / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels" / "test.tsv").write_text("".join(judged[:3]))
    task = benchmark.folder_task(folder, "test")
    task.load_data()
    assert list(task.dataset["default"]["test"]["queries"]["id"]) == ["q1", "q2"]


def test_missing_files_and_unknown_tasks_are_told(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "moved"))
    content = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(content.replace("/images/", "/gone/"))
    with pytest.raises(BadInput, match=r"the picture .*gone.* is not there"):
        benchmark.folder_task(folder, "test")
    with pytest.raises(BadInput, match=r"no text-to-image task 'Flickr30kT2IRetrival'; did you mean Flickr30kT2I"):
        benchmark.named_tasks(("Flickr30kT2IRetrival",))
    [task] = benchmark.named_tasks(("Flickr30kT2IRetrieval",))
    with pytest.raises(BadInput, match="the data of Flickr30kT2IRetrieval cannot be loaded"):
        benchmark.load_data(task)
