"""The guide: followed down the beams it gives the cosines of whole codes, and training chooses its weight on val."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from models.decoding import make_writer
from models.guide import GUIDE_NAME, Guide, guide_of, read_guide
from models.rqvae import RqVae, RqVaeConfig
from models.voken_lm import VokenLM
from reranker.data import read_ranked
from retriever import rank_splits, retrieve, train
from retriever.beam import Beams, beam_search
from retriever.data import read_data
from retriever.gallery.api import Retriever
from retriever.graphed_search import GraphedSearch
from retriever.index import build_index, to_device
from retriever.training import WEIGHTS, best_weight
from tests.chain import Chain, encoder_decoder_config
from tests.oracle import exhaustive
from tests.test_beam import CPU, SIZE, Table, search
from tests.test_pipeline import t5_config
from tests.tiny import tiny_encoder_decoder, tiny_llama, tiny_t5
from tools.errors import BadInput
from tools.files import read_json_lines
from tools.interpolation import COSINE_SCALE
from tools.results import GUIDED
from tools.runs import read_manifest
from tools.vokens import VokenSpace

FEATURES, WIDTH = 12, 6
QUERIES = ["a red circle", "drawing of a small blue square", "green"]


def tokenizer(*, levels: int = 3, size: int = SIZE, shared: bool = False, skip: bool = True) -> RqVae:
    torch.manual_seed(0)
    shape = RqVaeConfig(FEATURES, WIDTH, hidden=(8,), levels=levels, codebook_size=size, shared=shared, skip=skip)
    model = RqVae(shape).eval()
    model.mean.normal_()
    return model


def guide(model: RqVae, weight: float) -> Guide:
    codes = torch.randint(0, model.config.codebook_size, (50, model.config.levels))
    found = guide_of(model, codes)
    assert found is not None
    return found._replace(weight=weight)


def cosines(model: RqVae, texts: torch.Tensor, codes: NDArray[np.int64]) -> torch.Tensor:
    """(queries, pictures) of features and what the linear path makes of codes, written down anew."""
    vectors = model.quantizer.decode(torch.tensor(codes)) @ model.skip_out.weight.T + model.mean
    return F.normalize(texts, dim=1) @ F.normalize(vectors, dim=1).T


def test_with_a_large_weight_the_search_is_that_of_the_quantised_features() -> None:
    model = tokenizer()
    rows = [(a, b, c) for a in range(SIZE) for b in range(SIZE) for c in range(SIZE)]
    texts = torch.randn(3, FEATURES)
    found = search(Table(), rows, 3, beams=len(rows), steering=guide(model, 1e5).steer(texts))
    in_order = (
        cosines(model, texts, np.array(rows)).detach().gather(1, found.leaves.clone())
    )  # rows are in the order of leaves
    assert in_order.diff(dim=1).max() < 1e-3
    assert in_order[:, 0].tolist() == pytest.approx(in_order.max(dim=1).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("make", [tiny_t5, tiny_encoder_decoder, tiny_llama])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_those_of_scoring_every_picture(make: Any, shared: bool, tmp_path: Path) -> None:
    space = VokenSpace(3, SIZE, shared=shared)
    lm, model = make(tmp_path, space), tokenizer(shared=shared)
    codes = np.random.default_rng(0).integers(0, SIZE, size=(40, 3))
    texts, leaves = torch.randn(len(QUERIES), FEATURES), np.unique(codes, axis=0)
    writer, tokens = make_writer(lm), lm.tokenize(QUERIES)
    levels = to_device(build_index(codes), CPU)
    steering = guide(model, 7.0).steer(texts)
    found = beam_search(writer, writer.encode(tokens), levels, beams=len(leaves), steering=steering)
    every = exhaustive(lm, leaves, tokens, scoring="full", score_end=False)
    sums = (every + 7.0 * cosines(model, texts, leaves)).detach().numpy()
    for query, expected in enumerate(sums):
        assert found.leaves[query].tolist() == np.argsort(-expected, kind="stable").tolist()
        assert found.scores[query].numpy() == pytest.approx(np.sort(expected)[::-1], abs=1e-4)


@pytest.mark.parametrize("early_beams", [None, 9])
def test_graphs_find_the_same(early_beams: int | None, tmp_path: Path) -> None:
    space = VokenSpace(3, SIZE, shared=False)
    lm, codes = tiny_t5(tmp_path, space), np.random.default_rng(0).integers(0, SIZE, size=(40, 3))
    texts, levels, steers = torch.randn(3, FEATURES), to_device(build_index(codes), CPU), guide(tokenizer(), 7.0)
    writer = make_writer(lm)
    memory = writer.encode(lm.tokenize(QUERIES))
    plain = beam_search(writer, memory, levels, beams=4, early_beams=early_beams, steering=steers.steer(texts))
    graphed = GraphedSearch(writer, levels, beams=4, early_beams=early_beams, guide=steers)
    found: Beams = graphed(graphed.encode(lm.tokenize(QUERIES)), texts)
    assert torch.equal(found.leaves, plain.leaves)
    assert torch.allclose(found.scores, plain.scores, atol=1e-4)


def test_a_guide_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = guide(tokenizer(), 2.5)
    made.save(tmp_path / GUIDE_NAME)
    found = read_guide(tmp_path / GUIDE_NAME)
    assert found is not None
    assert found.weight == 2.5
    assert all(torch.equal(a, b) for a, b in zip(found[:4], made[:4], strict=True))
    assert read_guide(tmp_path / "none") is None
    (tmp_path / GUIDE_NAME).write_bytes(b"no tensors")
    with pytest.raises(BadInput, match=r"guide\.safetensors is not a guide's file"):
        read_guide(tmp_path / GUIDE_NAME)


def test_a_tokenizer_without_a_linear_path_has_none() -> None:
    assert guide_of(tokenizer(skip=False), torch.zeros(2, 3, dtype=torch.long)) is None


def test_the_usual_weight_stays_unless_another_is_clearly_better() -> None:
    def ranks(weights: dict[float, list[int]]) -> Any:
        return lambda weight: np.array(weights.get(weight, [50] * 100))

    good, usual = [1] * 60 + [50] * 40, [1] * 50 + [50] * 50
    weight, found = best_weight(ranks({40.0: good, 80.0: usual, 20.0: usual}))
    assert weight == 40.0
    assert found.tolist() == good
    luck = [50] * 2 + [1] * 48 + [1] * 3 + [50] * 47
    assert best_weight(ranks({160.0: luck, 80.0: usual}))[0] == 80.0
    falling = {weight: [1] * (90 - place * 10) + [50] * (10 + place * 10) for place, weight in enumerate(WEIGHTS)}
    assert best_weight(ranks(falling))[0] == 0.0


@pytest.fixture(scope="module")
def guided(chain: Chain) -> Path:
    output = chain.root / "guided"
    train.main(dataclasses.replace(encoder_decoder_config(chain, output), guide=True, epochs=2))
    return output


def test_training_keeps_the_best_weight_with_the_model(chain: Chain, guided: Path) -> None:
    manifest = read_manifest(guided, "retriever.train")
    kept = read_guide(guided / "model" / GUIDE_NAME)
    assert kept is not None
    assert kept.weight in WEIGHTS
    assert manifest.metrics["val/guide"] == kept.weight
    assert {"val/R@1", "val/R@1 guided"} <= manifest.metrics.keys()


def test_both_searches_are_written_and_without_the_guide_it_is_the_published_one(chain: Chain, guided: Path) -> None:
    options: dict[str, Any] = {"dataset": chain.dataset, "beams": 4, "keep": 4, "precision": "fp32", "device": "cpu"}
    both, plain = chain.root / "both", chain.root / "plain"
    retrieve.main(retrieve.Config(retriever=guided, output=both, **options))
    retrieve.main(retrieve.Config(retriever=guided, guided=False, output=plain, **options))
    assert (both / "test.jsonl").read_bytes() == (plain / "test.jsonl").read_bytes()
    assert not (plain / f"test{GUIDED}.jsonl").exists()
    lines = [line for _, line in read_json_lines(both / f"test{GUIDED}.jsonl")]
    assert lines != [line for _, line in read_json_lines(both / "test.jsonl")]
    assert set(read_manifest(both, "retriever.retrieve").metrics) == {"test", "test" + GUIDED}
    only = chain.root / "only"
    retrieve.main(retrieve.Config(retriever=guided, unguided=False, output=only, **options))
    assert set(read_manifest(only, "retriever.retrieve").metrics) == {"test" + GUIDED}
    assert (only / f"test{GUIDED}.jsonl").read_bytes() == (both / f"test{GUIDED}.jsonl").read_bytes()
    wide = chain.root / "wide-early"
    retrieve.main(retrieve.Config(retriever=guided, output=wide, early_beams=8, **{**options, "beams": 1}))
    retrieve.main(retrieve.Config(retriever=guided, output=chain.root / "narrow", **{**options, "beams": 1}))
    assert (wide / "test.jsonl").read_bytes() == (chain.root / "narrow/test.jsonl").read_bytes()
    assert (wide / f"test{GUIDED}.jsonl").read_bytes() != (chain.root / f"narrow/test{GUIDED}.jsonl").read_bytes()
    lists, options = chain.root / "guided-lists", {**options, "train_beams": 4}
    del options["keep"]
    rank_splits.main(rank_splits.Config(retriever=guided, output=lists, **options))
    assert read_manifest(lists, "retriever.rank_splits").facts["guide"] == kept_weight(guided) > 0
    assert (lists / GUIDE_NAME).read_bytes() == (guided / "model" / GUIDE_NAME).read_bytes()
    assert read_ranked(lists).hubness is not None


def kept_weight(folder: Path) -> float:
    kept = read_guide(folder / "model" / GUIDE_NAME)
    assert kept is not None
    return kept.weight


def test_a_guide_that_did_not_help_is_said_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    guide(tokenizer(), 0.0).save(tmp_path / "model" / GUIDE_NAME)
    config: Any = SimpleNamespace(guided=True, retriever=tmp_path)
    assert retrieve.chosen_guide(config, CPU) is None
    assert "on val the guide did not help" in capsys.readouterr().out


def test_a_dataset_without_a_guide_is_refused_with_what_to_do(chain: Chain) -> None:
    data = read_data(chain.dataset)
    bare = data._replace(folder=chain.root)
    config = dataclasses.replace(t5_config(chain, chain.root), guide=True)
    (chain.root / "train.jsonl").write_text("{}\n")
    (chain.root / "val.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match=r"has no guide.*scripts/06_generate_codes\.sh --overwrite and scripts/07"):
        config.check(bare)


def test_the_slot_reads_the_feature_and_is_kept(chain: Chain) -> None:
    output = chain.root / "slot"
    train.main(dataclasses.replace(encoder_decoder_config(chain, output), text_slot=True, epochs=1))
    lm = VokenLM.from_pretrained(output / "model")
    assert lm.slot is not None
    memory = lm.encode(lm.tokenize(QUERIES))
    one, other = (lm.with_slot(memory, torch.randn(3, lm.slot.in_features)) for _ in range(2))
    assert one.states.shape[1] == memory.states.shape[1] + 1 == one.mask.shape[1]
    assert not torch.equal(one.states, other.states)
    found = chain.root / "slot-found"
    retrieve.main(retrieve.Config(dataset=chain.dataset, retriever=output, output=found, beams=4, device="cpu"))
    assert read_manifest(found, "retriever.retrieve").metrics.keys() == {"test"}


def test_a_head_on_the_models_own_states_takes_the_second_encoders_place(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = chain.root / "headed"
    config = dataclasses.replace(encoder_decoder_config(chain, output), guide=True, guide_head=True, epochs=1)
    train.main(config)
    kept = read_guide(output / "model" / GUIDE_NAME)
    assert kept is not None
    assert kept.head is not None
    lm = VokenLM.from_pretrained(output / "model")
    data = read_data(chain.dataset)
    texts = data.queries("train").texts[:20]
    features = torch.from_numpy(data.text_features(texts, CPU))
    with torch.inference_mode():
        seen = kept.read(lm.encode(lm.tokenize(texts)))
    assert F.cosine_similarity(seen, features).mean() > 0.9
    monkeypatch.setattr(retrieve, "encoding_seconds", refuse)
    found = chain.root / "headed-found"
    retrieve.main(retrieve.Config(dataset=chain.dataset, retriever=output, output=found, beams=4, device="cpu"))
    assert set(read_manifest(found, "retriever.retrieve").metrics) == {"test", "test" + GUIDED}


def refuse(*_: Any, **__: Any) -> float:
    raise AssertionError("nothing passes through a second encoder")


def test_live_search_is_guided(chain: Chain, guided: Path) -> None:
    from retriever.gallery import build

    index = chain.root / "guided-index"
    build.main(build.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=index))
    retriever = Retriever.from_runs(index=index, retriever=guided, device="cpu", precision="fp32")
    assert retriever.guide is not None
    options: dict[str, Any] = {"k": 5, "beams": 50, "rerank": False}
    [with_guide], [without] = (retriever.search(["a red circle"], guided=guided, **options) for guided in (True, False))
    assert [each.score for each in with_guide] != [each.score for each in without]
    assert retriever.hubness is not None
    retriever.hubness = retriever.hubness._replace(strength=0.5)
    [by_features] = retriever.search(["a red circle"], k=5, beams=50, share=1.0)
    for each in by_features:
        row = np.array([retriever.gallery.row(each.image)])
        taken_off = retriever.hubness.taken_off(retriever.gallery.read_features(row).astype(np.float32))[0]
        assert each.similarity is not None
        assert each.score == pytest.approx(COSINE_SCALE * (each.similarity - taken_off), abs=1e-3)
    exported = retriever.save_pretrained(chain.root / "guided-export")
    again = Retriever.load(exported, device="cpu", precision="fp32")
    [found] = again.search(["a red circle"], **options)
    assert [each.image for each in found] == [each.image for each in with_guide]
