"""The report: one whole page, the results' own numbers, what is missing said; curves that resuming does not bend."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from models.decoding import make_writer
from models.voken_lm import VokenLM
from reranker import test as reranked
from retriever import rank_splits, retrieve
from retriever import test as final
from retriever.data import read_data
from retriever.report import report
from retriever.report.codes import health, paths, prefix_groups
from retriever.report.examples import Lists, choose, explain, read_found, step_log_probabilities, steps, typical_rank
from retriever.report.measures import drawn, enlarged, growing_pools, speed_sizes, timed
from retriever.report.sections import Styles
from tests.chain import Chain, files_of
from tests.test_pipeline import retrieve_config
from tools import curves, plots, runs
from tools.command_line.command_names import script_of
from tools.curves import Curves, read_curves
from tools.errors import BadInput
from tools.features import normalized, read_features
from tools.files import read_json, read_json_lines, write_json_lines
from tools.logs import Tracker
from tools.recall import NOT_FOUND
from tools.report_page import Html, Page, Section, Thumbnails, escape, paragraph, table

ROOT = Path(__file__).parent.parent
HOSTILE = "</p><script>alert('x')</script><img src=\"https://example.org/x.png\"> & co"
SECTIONS = ["recall", "tokenizer", "codes", "curves", "beams", "pools", "speed", "gallery", "runs"]


class Tree(NamedTuple):
    """Finished stages as scripts name them; every test caption ends in `HOSTILE`."""

    root: Path
    dataset: Path
    summary: Path
    retriever: Path
    features: Path


@pytest.fixture(scope="module")
def tree(chain: Chain, retriever: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("report")
    for number, folder in (
        ("04_train_heads", chain.features),
        ("05_train_rqvae", chain.rqvae),
        ("06_generate_codes", chain.codes),
    ):
        (root / number).symlink_to(folder)
    (root / "09_train").mkdir()
    (root / "09_train" / "retriever").symlink_to(retriever)
    dataset = Path(shutil.copytree(chain.dataset, root / "07_dataset"))
    rows = [row for _, row in read_json_lines(dataset / "test.jsonl")]
    write_json_lines(dataset / "test.jsonl", ({**row, "query": f"{row['query']} {HOSTILE}"} for row in rows))
    manifest = dataclasses.replace(runs.read_manifest(chain.dataset, "retriever.prepare"), folder=dataset)
    runs.replace_outputs(manifest, [dataset / name for name in manifest.outputs], manifest.facts)
    made = Tree(root, dataset, root / "summary.json", retriever, chain.features)
    own = chain._replace(dataset=made.dataset)
    found = retrieve_config(own, retriever, root / "12_retrieve" / "retriever", pools=("test", "all"), beams=6)
    retrieve.main(found)
    final.main(
        final.Config(
            predictions=found.output, output=root / "13_test" / "retriever", summary=made.summary, name="toy",
            rqvae=chain.rqvae, device="cpu",
        )
    )  # fmt: skip
    lists = rank_splits.Config(
        dataset=made.dataset, retriever=retriever, output=root / "16_lists" / "retriever", beams=6, train_per_picture=0,
        precision="fp32", device="cpu",
    )  # fmt: skip
    rank_splits.main(lists)
    reranked.main(
        reranked.Config(
            lists=lists.output, output=root / "18_test" / "retriever", summary=made.summary, name="toy", device="cpu"
        )
    )
    return made


def config_of(tree: Tree, output: Path, **options: Any) -> report.Config:
    settings: dict[str, Any] = {
        "runs": (tree.root,), "beams": (1, 4), "speed_queries": 8, "speed_rounds": 1, "largest_pool": 100,
        "examples": 2, "paths": 2, "precision": "fp32", "device": "cpu", **options,
    }  # fmt: skip
    return report.Config(dataset=tree.dataset, summary=tree.summary, name="toy", output=output, **settings)


@pytest.fixture(scope="module")
def made(tree: Tree) -> report.Config:
    """A finished report, and what went to W&B for it."""
    config = config_of(tree, tree.root / "19_report")
    logged: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for method in ("table", "image", "page"):
            patch.setattr(Tracker, method, lambda self, name, value: logged.update({name: value}))
        report.main(config)
    (tree.root / "logged.json").write_text(json.dumps(logged, default=str))
    return config


class Reader(HTMLParser):
    """What a page consists of: tags, attributes, the text of tables and of all."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


def page_of(config: report.Config) -> Reader:
    return Reader((config.output / "report.html").read_text(encoding="utf-8"))


def test_one_page_has_every_section_and_every_tag_is_closed(made: report.Config) -> None:
    page = page_of(made)
    assert page.open == []
    assert page.sections == SECTIONS
    assert runs.read_manifest(made.output, report.COMMAND).facts["absent"] == []
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert anchors == {f"#{name}" for name in SECTIONS}


def test_the_page_needs_nothing_but_itself(made: report.Config) -> None:
    text = (made.output / "report.html").read_text(encoding="utf-8")
    page = page_of(made)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    addresses = [
        value or "" for _, attributes in page.tags for name, value in attributes.items()
        if name in ("src", "srcset", "href", "data", "action", "poster", "background")
    ]  # fmt: skip
    assert len(addresses) > 30
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_captions_are_text_and_nothing_else(made: report.Config) -> None:
    page = page_of(made)
    queries = [said for said in page.said if HOSTILE in said]
    shown = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class") == "query"]
    assert len(queries) == len(shown) >= 4
    assert "<script" not in (made.output / "report.html").read_text(encoding="utf-8")


def test_the_table_has_the_numbers_of_the_summary(made: report.Config) -> None:
    rows = {(row["system"], row["pool"]): row for row in read_json(made.summary) if row["level"] == "image"}
    header, *lines = page_of(made).tables[0]
    assert len(lines) == len(rows) == 9  # four systems over two pools, and +features over test
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        row = rows[cells["system"], cells["pool"].split()[0]]
        assert [cells[f"R@{cutoff}"] for cutoff in (1, 5, 10)] == [f"{row['recall'][str(c)]:.1%}" for c in (1, 5, 10)]
        assert (cells["MRR"], cells["queries"]) == (f"{row['mrr']:.3f}", "24")
        assert cells["queries/s"] == ("–" if (speed := row["queries_per_second"]) is None else f"{speed:,.0f}")
        assert cells["setting"] == row["setting"]


def test_pictures_lie_beside_the_page_and_in_it(made: report.Config) -> None:
    drawn_files = {path.name for path in made.output.glob("*.png")}
    curves_drawn = {"curves-04_train_heads", "curves-05_train_rqvae", "curves-09_train-retriever"}
    figures = {"recall", "tokenizer", "beams", "pools", "speed"} | curves_drawn
    assert drawn_files == {f"{name}{end}.png" for name in figures for end in ("", "-dark")} | {
        "codes.png",
        "gallery.png",
    }
    for name in drawn_files:
        with Image.open(made.output / name) as picture:
            picture.load()
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 3  # something is drawn
    for name in figures:
        light, dark = (Image.open(made.output / f"{name}{end}.png") for end in ("", "-dark"))
        assert light.size == dark.size
        assert light.convert("L").getpixel((2, 2)) == 255
        assert dark.convert("L").getpixel((2, 2)) < 40  # type: ignore[operator]
    other = {"report.html", "measures.json", "table.txt", "manifest.json"}
    assert set(files_of(made.output)) == drawn_files | other
    pictures = [attributes for tag, attributes in page_of(made).tags if tag == "img"]
    assert all(attributes["alt"] for attributes in pictures)
    assert [a["media"] for tag, a in page_of(made).tags if tag == "source"] == [
        "screen and (prefers-color-scheme: dark)"
    ] * len(figures)


def test_weights_and_biases_gets_the_same_under_names_that_stay(made: report.Config, tree: Tree) -> None:
    logged = read_json(tree.root / "logged.json")
    assert {name for name in logged if "curves/" not in name} == {
        "report/recall", "report/tokenizer", "report/tokenizer_levels", "report/codes",
        "report/beams", "report/recall_by_beams", "report/pools", "report/recall_by_pool", "report/speed",
        "report/speed_by_pool", "report/gallery", "report/page",
    }  # fmt: skip
    assert {name for name in logged if "curves/" in name} == {
        "report/curves/04_train_heads", "report/curves/05_train_rqvae", "report/curves/09_train/retriever",
    }  # fmt: skip
    assert logged["report/page"] == str(made.output / "report.html")


def test_a_table_in_weights_and_biases_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    fake: Any = types.ModuleType("wandb")
    fake.Table = lambda columns, data: (columns, data)
    fake.Html = lambda *args, **options: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(Path(), job="x", config={})
    logged: list[Any] = []
    tracker._run = types.SimpleNamespace(log=logged.append)
    tracker.table("t", [{"a": 1, "b": "x", "c": None, "d": 2}, {"a": 0.5, "b": None, "c": None, "d": "y"}])
    assert logged == [{"t": (["a", "b", "c", "d"], [[1, "x", None, "2"], [0.5, "None", None, "y"]])}]
    tracker.page("p", Path("x.html"))  # it fails, and that is all
    assert tracker._run is None


# What is measured


def test_recall_by_beams_is_that_of_the_validation(made: report.Config, tree: Tree) -> None:
    """The training validated all captions of val with 4 beams."""
    trained = runs.read_manifest(tree.retriever, "retriever.train").metrics
    row = next(row for row in read_json(made.output / "measures.json")["recall_by_beams"] if row["beams"] == 4)
    assert row["queries"] == 24
    for cutoff in (1, 5, 10):
        assert row[f"R@{cutoff}"] == pytest.approx(trained[f"val/R@{cutoff}"], abs=1e-5)


def test_recall_by_pool_beside_two_tower_by_hand(made: report.Config, tree: Tree) -> None:
    rows = read_json(made.output / "measures.json")["recall_by_pool"]
    assert [(row["system"], row["pool"]) for row in rows] == [
        ("two-tower", 8), ("two-tower", 48), ("retriever", 8), ("retriever", 48),
    ]  # fmt: skip
    features = read_features(tree.features)
    images, texts = features.image_rows("val"), features.text_rows("val")
    for size, pool in ((8, images), (48, np.arange(48))):
        scores = normalized(features.texts[texts]) @ normalized(features.images[pool]).T
        hits = float((pool[scores.argmax(axis=1)] == features.owners[texts]).mean())
        assert next(row["R@1"] for row in rows if row["pool"] == size) == pytest.approx(hits, abs=1e-5)


def test_pools_grow_around_val_and_queries_stay(chain: Chain) -> None:
    data = read_data(chain.dataset)
    pools = growing_pools(data, seed=3)
    assert [len(pool) for pool in pools] == [8, 48]
    assert set(pools[0]) == set(data.rows("val"))
    assert (np.diff(pools[1]) > 0).all()
    val = data.queries("val")
    few = drawn(val, pools[0], most=5, seed=1)
    assert len(few.texts) == 5
    assert few.texts == drawn(val, pools[1], most=5, seed=1).texts
    assert drawn(val, pools[0][:2], most=99, seed=1).pictures.tolist() == sorted([*pools[0][:2]] * 3)
    for text, picture, caption in zip(*few, strict=True):
        assert (text, picture, caption) in set(zip(*val, strict=True))


def test_speed_pools_are_filled_up_and_every_system_is_timed() -> None:
    assert speed_sizes(8156, largest=100_000) == [100, 1000, 8156, 10_000, 100_000]
    assert speed_sizes(8156, largest=0) == [100, 1000, 8156]
    codes, images = np.arange(12).reshape(4, 3), np.ones((4, 5), np.float32)
    more, features = enlarged(codes, images, 50, codebook_size=12, seed=0)
    assert features is not None
    assert (more.shape, features.shape) == ((50, 3), (50, 5))
    assert (more[:4] == codes).all()
    assert set(more[:, 0]) == set(codes[:, 0])
    assert 0 <= more.min() <= more.max() < 12
    asked: list[str] = []
    answers: dict[str, Callable[[list[str]], object]] = {
        "a": lambda texts: asked.append("a"),
        "b": lambda texts: asked.append("b"),
    }
    assert set(timed(answers, ["x"] * 100, rounds=2)) == {"a", "b"}
    assert asked == ["a", "b"] + ["a", "a", "b", "b"] * 2  # warmed up, then in turns, two batches each


# The gallery


def test_steps_add_up_to_the_score_of_the_search(tree: Tree) -> None:
    data = read_data(tree.dataset)
    found = read_found(runs.read_manifest(tree.root / "12_retrieve" / "retriever", "retriever.retrieve"), data, "test")
    lm = VokenLM.from_pretrained(tree.retriever / "model")
    codes = data.codes[np.array([rows[:3] for rows in found.rows[:4]])]
    logs = step_log_probabilities(make_writer(lm), found.texts[:4], codes, "full")
    written = logs.gather(3, torch.from_numpy(codes)[..., None]).sum(dim=(2, 3))
    assert np.allclose(written.numpy(), [scores[:3] for scores in found.scores[:4]], atol=1e-3)
    alone = step_log_probabilities(make_writer(lm), found.texts[:4], codes, "voken")
    assert torch.allclose(alone.exp().sum(dim=3), torch.ones(4, 3, 3), atol=1e-5)


def test_steps_count_the_codes_that_may_be_written() -> None:
    pool = np.array([[0, 1], [0, 2], [3, 2], [3, 0]])
    logs = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]]).log()
    first, second = steps(logs, np.array([3, 2]), pool)
    assert (first.place, first.choices, [other.code for other in first.others]) == (2, 2, [0])
    assert first.written.probability == pytest.approx(0.1 / 0.6)  # only 0 and 3 begin a picture
    assert [other.probability for other in first.others] == pytest.approx([0.5 / 0.6])
    assert first.log_probability == pytest.approx(math.log(0.1))
    assert (second.place, second.choices, [other.code for other in second.others]) == (1, 2, [0])


def test_examples_are_best_typical_and_worst() -> None:
    ranks = np.array([1, 1, 2, NOT_FOUND, NOT_FOUND, 2, 1, 2, 2])
    targets = np.arange(9)
    scores = [
        [-1.0, -2.0],
        [-1.0, -9.0],
        [-1.0, -1.5],
        [-3.0, -4.0],
        [-0.1, -4.0],
        [-1.0, -2.0],
        [-5.0, -5.1],
        [-1.0, -2.0],
        [-2.0, -3.0],
    ]
    found = Lists([f"query {n}" for n in range(9)], targets, [[0, 1]] * 9, scores, ranks)
    assert typical_rank(ranks) == 2
    chosen = [(each.kind, each.number) for each in choose(found, 2)]
    assert chosen == [("best", 1), ("best", 0), ("typical", 2), ("typical", 8), ("worst", 4), ("worst", 3)]
    one_picture = found._replace(targets=np.zeros(9, dtype=np.int64))
    assert [each.number for each in choose(one_picture, 2)] == [1]
    nothing_wrong = found._replace(ranks=np.ones(9, dtype=np.int64))
    assert {each.kind for each in choose(nothing_wrong, 2)} == {"best", "typical"}
    assert explain(make_writer, [], None, targets, "full") == []  # type: ignore[arg-type]


def test_the_gallery_tells_the_rank_after_reordering(made: report.Config, tree: Tree) -> None:
    told = " ".join(page_of(made).said)
    assert told.count("after +features") == told.count("Right picture: ") >= 4
    assert "Right picture: rank 1" in told


# The codes


def test_prefixes_and_paths_by_hand() -> None:
    codes = np.array([[0, 1, 1], [0, 1, 2], [0, 2, 2], [1, 1, 1], [1, 1, 1]])
    assert tuple(prefix_groups(codes[:, :1])) == pytest.approx((1, (3 * 3 + 2 * 2) / 5, 3, 0.0))
    assert tuple(prefix_groups(codes)) == pytest.approx((3, (3 + 2 * 2) / 5, 2, 0.6))
    for levels in paths(codes, count=2, seed=0):
        assert [len(level.codes) for level in levels] == [1, 2, 3]
        assert [level.pictures for level in levels] == sorted((level.pictures for level in levels), reverse=True)
        for level in levels:
            assert len(level.rows) == level.pictures
            assert {tuple(codes[row, : len(level.codes)]) for row in level.rows} == {level.codes}
            assert level.rows[0] == levels[0].rows[0]
    assert len({levels[0].codes for levels in paths(codes, count=2, seed=0)}) == 2


def test_health_agrees_with_the_tokenizer_report(chain: Chain) -> None:
    data = read_data(chain.dataset)
    figures = runs.read_manifest(chain.codes, "RQ-VAE.generate_codes").metrics
    found = health(data.codes, data.space)
    for use in found.use:
        assert use.perplexity == pytest.approx(figures[f"level{use.level}/perplexity"], abs=1e-4)
    assert 1.0 - found.prefixes[-1].alone == pytest.approx(figures["collisions"], abs=1e-5)
    assert [counts.sum() for counts in found.counts] == [48] * 3


# What is missing, and what has changed


def test_what_has_not_been_run_is_left_out_and_said(chain: Chain, tree: Tree, tmp_path: Path) -> None:
    config = report.Config(
        dataset=chain.dataset, summary=tmp_path / "none.json", name="bare", output=tmp_path / "19_report", device="cpu"
    )
    report.main(config)
    page = page_of(config)
    assert page.sections == ["tokenizer", "codes", "absent"]
    said = " ".join(page.said)
    for words in (
        "no scripts/13_test_retriever.sh has been run", "nothing has been trained here", "no retriever is trained here",
        "no val recall in a finished scripts/06_generate_codes.sh",
    ):  # fmt: skip
        assert words in said


def test_one_system_without_tests_is_measured_all_the_same(tree: Tree, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "09_train").mkdir(parents=True)
    (root / "09_train" / "retriever").symlink_to(tree.retriever)
    (root / "05_broken").mkdir()
    (root / "05_broken" / "manifest.json").write_text("{")
    config = config_of(
        tree._replace(summary=tmp_path / "none.json"), tmp_path / "out", runs=(root,), systems=("retriever", "llama"),
        speed_queries=0,
    )  # fmt: skip
    report.main(config)
    page = page_of(config)
    assert page.sections == ["tokenizer", "codes", "curves", "beams", "pools", "runs", "absent"]
    said = " ".join(page.said)
    assert "llama: no such retriever is trained" in said
    assert "queries of retriever: no finished scripts/12_retrieve.sh of it" in said
    assert "05_broken" in said


def test_it_is_made_again_when_something_has_changed_and_only_then(
    tree: Tree, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text(tree.summary.read_text())
    config = config_of(tree._replace(summary=summary), tmp_path / "out", runs=(), speed_queries=0)
    report.main(config)
    before = (config.output / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    report.main(config)
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert (config.output / "manifest.json").stat().st_mtime_ns == before
    rows = read_json(summary)
    rows[0]["recall"]["1"] = 0.123
    summary.write_text(json.dumps(rows))
    report.main(config)
    header, first, *_ = page_of(config).tables[0]
    assert dict(zip(header, first, strict=True))["R@1"] == "12.3%"
    report.main(dataclasses.replace(config, paths=1))  # other settings too
    assert (config.output / "manifest.json").stat().st_mtime_ns > before
    with pytest.raises(BadInput, match="name another --output"):  # another command's folder stays what it is
        report.main(dataclasses.replace(config, output=tree.root / "13_test" / "retriever"))
    assert (tree.root / "13_test" / "retriever" / "table.txt").is_file()


def test_mistakes_are_one_clear_line(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--beams"):
        config_of(tree, tmp_path, beams=(0,))
    with pytest.raises(BadInput, match="--seed"):
        config_of(tree, tmp_path, seed=-1)


# Curves


def test_curves_are_means_over_windows_and_go_on_from_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_WINDOWS", 3)
    whole, cut = Curves(steps=7), Curves(steps=7)
    for step in range(1, 8):
        if step == 5:  # in the middle of a window
            state = json.loads(json.dumps(cut.state()))
            cut.step(9.0, {"train/loss": 99.0})  # lost with the process
            cut = Curves(steps=7)
            cut.restore(state)
        for each in (whole, cut):
            each.step(step / 7, {"train/loss": float(step)})
            if step == 4:
                each.mark(4 / 7, {"val/R@1": 1 / 3})
    for name, each in (("whole", whole), ("cut", cut)):
        (tmp_path / name).mkdir()
        each.write(tmp_path / name)
    assert read_curves(tmp_path / "whole") == [
        {"epoch": 0.42857, "train/loss": 2.0}, {"epoch": 0.57143, "val/R@1": 0.33333},
        {"epoch": 0.85714, "train/loss": 5.0}, {"epoch": 1.0, "train/loss": 7.0},
    ]  # fmt: skip
    assert (tmp_path / "cut" / "curves.jsonl").read_bytes() == (tmp_path / "whole" / "curves.jsonl").read_bytes()
    broken = Curves(steps=1)
    broken.step(1.0, {"train/loss": math.nan})
    broken.write(tmp_path)
    assert read_curves(tmp_path) == [{"epoch": 1.0, "train/loss": None}]
    assert read_curves(tmp_path / "none") == []


def test_a_training_leaves_its_losses_and_validations(tree: Tree, chain: Chain) -> None:
    points = read_curves(tree.retriever)
    assert [point["epoch"] for point in points if "val/R@1" in point] == [2.0, 4.0, 6.0]
    losses = [point for point in points if "train/loss" in point]
    assert len(losses) == 36  # 96 captions in batches of 16, 6 epochs
    assert losses[-1]["epoch"] == 6.0
    trained = runs.read_manifest(tree.retriever, "retriever.train").metrics
    best = next(point for point in points if point["epoch"] == trained["val/epoch"] and "val/R@1" in point)
    assert best["val/R@1"] == pytest.approx(trained["val/R@1"], abs=1e-5)
    tokenizer = read_curves(chain.rqvae)
    assert [point["epoch"] for point in tokenizer if "val/quantized_R@1" in point] == [0, 4, 8, 12]
    assert len([point for point in tokenizer if "train/reconstruction" in point]) == 12
    assert len([point for point in read_curves(chain.features) if "train/loss" in point]) == 30


# Drawing and writing


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda theme: theme.name)
def test_every_colour_stands_out_and_none_is_told_by_its_hue_alone(theme: plots.Theme) -> None:
    back = luminance(theme.background)
    for colour, least in [(theme.ink, 7.0), (theme.faint, 4.5), *((each, 3.0) for each in theme.colours)]:
        light, dark = max(back, luminance(colour)), min(back, luminance(colour))
        assert (light + 0.05) / (dark + 0.05) >= least, colour
    assert len(set(theme.colours)) == len(set(plots.MARKERS)) == len({str(each) for each in plots.DASHES}) == 8


def test_a_system_looks_the_same_everywhere_and_its_reordered_lists_like_it() -> None:
    names = ["two-tower", "two-tower, quantised", "retriever", "retriever+stage2", "retriever", "retriever+both"]
    styles = Styles(names)
    assert [styles.of(name) for name in names] == [0, 7, 1, 2, 1, 1]
    assert styles.of("retriever+stage2+features") == 2
    assert styles.of("another") not in (0, 1, 2)


def test_names_at_line_ends_do_not_touch() -> None:
    heights = np.random.default_rng(0).random(30).tolist()
    moved = plots.apart(heights, 0.05)
    assert np.diff(np.sort(moved)).min() > 0.05 - 1e-9
    assert np.argsort(moved).tolist() == np.argsort(heights).tolist()
    assert plots.apart([0.1, 0.9], 0.05) == [0.1, 0.9]


def test_html_is_escaped_but_where_it_says_so() -> None:
    assert escape("<b a=\"1\" b='2'>&") == "&lt;b a=&quot;1&quot; b=&#x27;2&#x27;&gt;&amp;"
    assert escape(Html("<b>")) == "<b>"
    assert paragraph("a < b") == "<p>a &lt; b</p>"
    assert Reader(table([{"<i>": "<script>"}])).tables == [[["<i>"], ["<script>"]]]
    page = Page("<title>", lead=paragraph("\ud800\x00"))
    page.add(Section("x", "A & B", [paragraph("text")]))
    page.text().encode()
    assert Reader(page.text()).open == []


def test_a_picture_that_has_gone_is_a_grey_square(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("none.png", "broken.png"):
        assert 'src="data:image/jpeg;base64,' in Thumbnails().image(tmp_path / name, 'a "name"')
        assert "&quot;name&quot;" in Thumbnails().image(tmp_path / name, 'a "name"')


def test_the_script_has_its_plain_name_and_comes_last() -> None:
    assert (ROOT / "scripts" / "report.sh").resolve() == ROOT / "scripts" / "19_report.sh"
    assert script_of(report.COMMAND) == "scripts/19_report.sh"
    for dataset in ("emoji", "flickr30k", "mscoco"):
        text = (ROOT / "scripts" / "datasets" / f"{dataset}.sh").read_text()
        assert text.split('STAGES="')[1].split('"')[0].split()[-1] == "19_report"
