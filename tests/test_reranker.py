"""The reranker's commands on the small chain: files, tokens, lists, negatives, shares, rows, many processes."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import models.training
from models.batches import Part
from models.compute import seed_everything
from models.decoding import make_writer
from models.hubness import Hubness
from models.patch_tokenizer import PatchTokenizer
from models.scorer import Scorer
from models.seed_tokenizer import SeedTokenizer
from models.voken_lm import VokenLM
from reranker import convert, rerank, train
from reranker import test as final
from reranker.data import read_ranked, read_tokens
from retriever import rank_splits, retrieve
from retriever.beam import beam_search
from retriever.data import read_data
from retriever.queries import LiveQueries
from retriever.retrieve import search_queries
from tests.chain import Chain, files_of
from tests.test_pipeline import interrupted, retrieve_config
from tests.test_processes import assert_same, start, train_anew
from tests.test_seed_tokenizer import GOLDEN, golden_states
from tests.test_sharding import train_in_parts
from tests.tiny import batch_of, bert_folder, llama_folder
from tools import prepare_captions, runs
from tools.captions import read_captions
from tools.errors import BadInput
from tools.features import normalized, read_features
from tools.files import read_json, read_json_lines, write_array, write_json
from tools.interpolation import COSINE_SCALE, choose_weights
from tools.logs import Tracker
from tools.ranked import NO_PICTURE, read_lists
from tools.recall import CUTOFFS

BEAMS = 6


class Stages(NamedTuple):
    """Finished folders of the reranker's chain."""

    chain: Chain
    retriever: Path
    tokens: Path
    lists: Path
    model: Path


def convert_config(chain: Chain, output: Path, **options: Any) -> convert.Config:
    settings: dict[str, Any] = {
        "tokenizer": "patches", "model": str(chain.root / "clip"), "grid": 2, "patch_width": 8, "levels": 2,
        "codebook_size": 12, "batch_size": 8, "workers": 0, "precision": "fp32", "device": "cpu", **options,
    }  # fmt: skip
    return convert.Config(captions=chain.captions, output=output, **settings)


def lists_config(chain: Chain, retriever: Path, output: Path, **options: Any) -> rank_splits.Config:
    settings: dict[str, Any] = {
        "pools": ("test", "all"), "train_beams": 12, "beams": BEAMS, "batch_size": 8, "precision": "fp32",
        "device": "cpu", **options,
    }  # fmt: skip
    return rank_splits.Config(dataset=chain.dataset, retriever=retriever, output=output, **settings)


def train_config(stages: Stages, output: Path, **options: Any) -> train.Config:
    """A new small model."""
    language_model = stages.chain.root / "words"
    if not language_model.is_dir():
        bert_folder(language_model)
    settings: dict[str, Any] = {
        "new_layers": 1, "new_width": 16, "new_heads": 2, "epochs": 2, "batch_size": 16, "lr": 3e-3,
        "precision": "fp32", "device": "cpu", **options,
    }  # fmt: skip
    return train.Config(
        lists=stages.lists, tokens=stages.tokens, language_model=str(language_model), output=output, **settings
    )


def lora_config(stages: Stages, output: Path, **options: Any) -> train.Config:
    """A small LLaMA with adapters."""
    base = stages.chain.root / "reranker-llama"
    if not base.is_dir():
        llama_folder(base)
    settings = {"lora_rank": 2, "lora_dropout": 0.1, "gradient_checkpointing": True, "new_layers": 0, **options}
    return dataclasses.replace(train_config(stages, output, **settings), language_model=str(base))


def final_config(stages: Stages, output: Path, **options: Any) -> final.Config:
    settings: dict[str, Any] = {
        "reranker": stages.model, "tokens": stages.tokens, "precision": "fp32", "device": "cpu", "top_k": BEAMS,
        "summary": output.parent / "summary.json", **options,
    }  # fmt: skip
    return final.Config(lists=stages.lists, output=output, name="toy", **settings)


@pytest.fixture(scope="module")
def stages(chain: Chain, retriever: Path) -> Stages:
    made = Stages(chain, retriever, *(chain.root / name for name in ("15", "16", "17")))
    convert.main(convert_config(chain, made.tokens))
    rank_splits.main(lists_config(chain, retriever, made.lists))
    train.main(train_config(made, made.model))
    return made


@pytest.fixture(scope="module")
def tested(stages: Stages) -> final.Config:
    """What reordering by features, reranker and both has left."""
    config = final_config(stages, stages.chain.root / "18" / "test")
    config.output.mkdir(parents=True)
    write_json(
        config.summary,
        [{"system": "another", "dataset": "toy", "split": "test", "pool": "x", "level": "x", "recall": {}}],
    )
    final.main(config)
    return config


# Files


def test_each_command_leaves_exactly_its_files(stages: Stages, tested: final.Config) -> None:
    assert files_of(stages.tokens) == [
        "codebook.npy", "manifest.json", "tokenizer/patch_tokenizer.json",
        "tokenizer/patch_tokenizer.safetensors", "tokens.npy",
    ]  # fmt: skip
    assert files_of(stages.lists) == [
        "manifest.json", "test-all.jsonl", "test-test.jsonl", "train-train.jsonl", "val-val.jsonl",
    ]  # fmt: skip
    assert files_of(stages.model) == [
        "curves.jsonl", "manifest.json", "model/config.json", "model/head.safetensors", "model/model.safetensors",
        "model/scorer.json", "model/tokenizer.json", "model/tokenizer_config.json",
    ]  # fmt: skip
    cases = ("test-all", "test-test", "val-val")
    scores = [f"{case}.{name}.npy" for case in cases for name in ("features", "reranker")]
    orders = [f"{case}.{name}.jsonl" for case in cases for name in ("features", "reranker", "both")]
    assert files_of(tested.output) == sorted(["manifest.json", "table.txt", *scores, *orders])


def test_a_finished_command_does_nothing_twice(
    stages: Stages, tested: final.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[Callable[[Any], None], Any]] = [
        (convert.main, convert_config(stages.chain, stages.tokens)),
        (rank_splits.main, lists_config(stages.chain, stages.retriever, stages.lists)),
        (train.main, train_config(stages, stages.model)),
        (final.main, tested),
    ]
    for main, config in done:
        before = (config.output / "manifest.json").stat().st_mtime_ns
        main(config)
        assert "is finished; nothing to do" in capsys.readouterr().out
        assert (config.output / "manifest.json").stat().st_mtime_ns == before


# Tokens


def test_tokens_are_those_of_each_picture(stages: Stages) -> None:
    read = read_tokens(stages.tokens)
    captions = read_captions(stages.chain.captions)
    tokenizer = PatchTokenizer.from_pretrained(stages.tokens / "tokenizer")
    assert (read.images.length, read.images.size) == (8, 24) == (tokenizer.length, tokenizer.codebook_size)
    assert read.tokens.dtype == np.int32
    for row, record in enumerate(captions.records):
        with Image.open(captions.images / record.file) as picture:
            ids = tokenizer.encode(tokenizer.preprocess(picture.convert("RGB"))[None])
        assert ids[0].tolist() == read.tokens[row].tolist(), record.file
    assert np.array_equal(read.codebook, tokenizer.codebook.detach().numpy())
    metrics = runs.read_manifest(stages.tokens, "reranker.convert").metrics
    assert metrics["tokens_used"] == len(np.unique(read.tokens)) / 24
    assert metrics["pictures_with_own_tokens"] == len({tuple(row) for row in read.tokens.tolist()}) / 48


def test_codebooks_are_fitted_on_train_pictures_alone(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []
    real = convert.loading

    def loading(files: list[str], *rest: Any) -> Any:
        read.append(files)
        return real(files, *rest)

    monkeypatch.setattr(convert, "loading", loading)
    convert.main(convert_config(stages.chain, tmp_path / "tokens", fit_pictures=20))
    records = read_captions(stages.chain.captions).records
    train_files = {record.file for record in records if record.split == "train"}
    assert len(read[0]) == len(set(read[0])) == 20
    assert set(read[0]) < train_files
    assert read[1] == [record.file for record in records]


@pytest.fixture
def seed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options for SEED's tokenizer at a small size."""
    quantizer, vision = golden_states()
    torch.save(quantizer, tmp_path / "seed_quantizer.pt")
    torch.save(vision, tmp_path / "eva_vit_g.pth")
    small = partial(SeedTokenizer.from_checkpoints, config=GOLDEN)
    monkeypatch.setattr(SeedTokenizer, "from_checkpoints", small)
    return {
        "tokenizer": "seed", "model": None, "quantizer": tmp_path / "seed_quantizer.pt",
        "vision": str(tmp_path / "eva_vit_g.pth"),
    }  # fmt: skip


def test_seeds_tokens_go_through_the_same_command(
    stages: Stages, seed_files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert.main(convert_config(stages.chain, tmp_path / "tokens", **seed_files))
    assert files_of(tmp_path / "tokens") == ["codebook.npy", "manifest.json", "tokens.npy"]
    assert "82 tensors used" in capsys.readouterr().out
    read = read_tokens(tmp_path / "tokens")
    assert read.images == (32, 64)
    tokenizer = SeedTokenizer.from_checkpoints(seed_files["quantizer"], seed_files["vision"])
    folder = read_captions(stages.chain.captions).images
    for row in (0, 17, 47):
        with Image.open(folder / read.records[row].file) as picture:
            assert tokenizer.encode(tokenizer.preprocess(picture)[None])[0].tolist() == read.tokens[row].tolist()
    assert np.array_equal(read.codebook, tokenizer.codebook.detach().numpy())
    assert set(runs.read_manifest(tmp_path / "tokens", "reranker.convert").inputs) == {
        "captions", "quantizer", "vision",
    }  # fmt: skip
    lora = lora_config(stages._replace(tokens=tmp_path / "tokens"), tmp_path / "model", epochs=1, max_query=8)
    train.main(lora)
    scorer = Scorer.from_pretrained(lora.output / "model")
    assert scorer.images == (32, 64)
    assert scorer.picture_ids(read.tokens[:1]).shape[1] == len(scorer.before) + 32 + len(scorer.between)


# Lists


def test_lists_are_what_the_search_finds(stages: Stages) -> None:
    data = read_data(stages.chain.dataset)
    lm = VokenLM.from_pretrained(stages.retriever / "model")
    manifest = runs.read_manifest(stages.lists, "retriever.rank_splits")
    lists = read_ranked(stages.lists)
    assert lists.test_pools() == ["test", "all"]
    features = read_features(stages.chain.features)
    texts = [caption for record in features.records for caption in record.captions]
    for split, pool, beams in (("train", "train", 12), ("val", "val", BEAMS), ("test", "all", BEAMS)):
        found = lists.read(split, pool)
        queries = data.queries(split)  # type: ignore[arg-type]
        assert found.texts == queries.texts == [texts[row] for row in found.captions]
        assert found.pictures.tolist() == queries.pictures.tolist() == features.owners[found.captions].tolist()
        ranking = search_queries(
            make_writer(lm, "fp32"), LiveQueries(lm, queries.texts), data.codes, data.rows(pool), beams=beams,
            keep=beams, batch_size=64, quiet=True,
        )  # fmt: skip
        assert found.rows.shape == (len(queries.texts), beams)
        for row, scores, one in zip(found.rows, found.scores, ranking, strict=True):
            assert row.tolist() == one.rows[:beams]
            assert np.allclose(scores, one.scores[:beams], atol=2e-4)
            assert len(set(row.tolist())) == beams
        share = float(np.mean([picture in row for picture, row in zip(found.pictures, found.rows, strict=True)]))
        assert manifest.metrics[f"{split}-{pool}"]["found"] == pytest.approx(share)
    assert manifest.facts["setting"] == "inductive"


def test_some_captions_of_each_train_picture_are_ranked(stages: Stages, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        config = lists_config(stages.chain, stages.retriever, tmp_path / str(seed), train_per_picture=2, seed=seed)
        rank_splits.main(config)
        lists = read_ranked(config.output)
        some = lists.read("train", "train")
        assert np.bincount(some.pictures)[np.unique(some.pictures)].tolist() == [2] * 32
        whole = read_ranked(stages.lists).read("train", "train")
        places = [whole.captions.tolist().index(caption) for caption in some.captions]
        assert np.array_equal(some.rows, whole.rows[places])
        assert len(lists.read("val", "val").texts) == 24
        drawn.append(some.captions.tolist())
    assert drawn[0] != drawn[1]
    config = lists_config(stages.chain, stages.retriever, tmp_path / "none", train_per_picture=0, pools=("test",))
    rank_splits.main(config)
    assert files_of(config.output) == ["manifest.json", "test-test.jsonl", "val-val.jsonl"]
    with pytest.raises(BadInput, match=r"has no train lists: run scripts/16_prepare_reranker_dataset\.sh"):
        train.main(train_config(stages._replace(lists=config.output), tmp_path / "model"))


# Negatives


def training_of(stages: Stages, output: Path, **options: Any) -> train.Training:
    """A training that has not begun."""
    config = train_config(stages, output, **options)
    pictures, lists = read_tokens(stages.tokens), read_ranked(stages.lists)
    run = runs.begin("reranker.train", config, inputs={"lists": config.lists})
    assert run is not None
    seed_everything(config.seed)
    return train.Training(config, lists, pictures, run, train.build_model(config, pictures))


def part_with(batch: NDArray[np.int64], **place: int) -> Part:
    return Part(batch_of(batch, **place), np.arange(len(batch)), 1.0)


def all_groups(training: train.Training) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Every batch of every epoch with its groups."""
    found = []
    for epoch in range(training.config.epochs):
        for number, batch in enumerate(training.batches(epoch)):
            found.append((batch, training.groups(part_with(batch, epoch=epoch, number=number))))
    return found


def test_negatives_come_from_the_list_and_are_drawn_anew(stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a")
    ranked = read_ranked(stages.lists).read("train", "train")
    train_rows = set(training.pool.tolist())
    drawn: dict[int, list[tuple[int, ...]]] = {}
    for batch, groups in all_groups(training):
        assert groups.shape == (len(batch), 8)
        for query, group in zip(batch.tolist(), groups.tolist(), strict=True):
            assert group[0] == ranked.pictures[query]
            negatives = group[1:]
            assert len(set(negatives)) == 7
            assert group[0] not in negatives
            assert set(negatives) <= set(ranked.rows[query].tolist()) - {NO_PICTURE} <= train_rows
            drawn.setdefault(query, []).append(tuple(negatives))
    assert len(drawn) == 96
    assert all(len(each) == 2 for each in drawn.values())  # in both epochs
    assert np.mean([first != second for first, second in drawn.values()]) > 0.95
    first = training.batches(0)[0]
    same = [
        training.groups(part_with(first, epoch=epoch, number=number)).tolist()
        for epoch, number in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({str(groups) for groups in same}) == 3
    again = training_of(stages, tmp_path / "b")
    for (batch, groups), (other_batch, others) in zip(all_groups(training), all_groups(again), strict=True):
        assert np.array_equal(batch, other_batch)
        assert np.array_equal(groups, others)
    other = training_of(stages, tmp_path / "c", seed=1)
    assert not np.array_equal(all_groups(training)[0][0], all_groups(other)[0][0])


def test_a_picture_under_the_same_words_is_no_negative(stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a", negatives=3)
    pictures = read_tokens(stages.tokens)
    names = [record.image for record in pictures.records]
    first, second = names.index("red-circle.png"), names.index("red-square.png")
    records = list(pictures.records)
    records[second] = records[second]._replace(captions=("a red circle", "another"))
    spared = train.spared_pictures(pictures._replace(records=records))
    assert spared["a red circle"] == {first, second}
    assert spared["another"] == {second}
    assert not any("test" in text for text in spared)
    assert set().union(*spared.values()) == set(training.pool.tolist())
    query = training.train.texts.index("a red circle")
    training.train.listed[query] = np.array([first, second, *training.pool[-3:]])
    for sparing in ({}, spared):
        training.spared = sparing
        found = {
            row for seed in range(20)
            for row in training.draw(np.array([query]), 0, np.random.default_rng(seed)).tolist()
        }  # fmt: skip
        assert first not in found
        assert (second in found) == (not sparing)
    published = training_of(stages, tmp_path / "b", spare_same_words=False)
    assert published.spared == {}
    assert training_of(stages, tmp_path / "c").spared != {}


def test_short_lists_are_filled_at_random(stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a")
    right = int(training.train.pictures[0])
    wrong = [row for row in training.pool.tolist() if row != right]
    training.train.listed[0] = np.array([right, *wrong[:2]])
    seen: set[int] = set()
    for seed in range(30):
        negatives = training.draw(np.array([0]), 0, np.random.default_rng(seed)).tolist()
        assert len(set(negatives)) == 7
        assert set(wrong[:2]) <= set(negatives) <= set(wrong)
        seen |= set(negatives)
    assert len(seen) > 25  # of 31
    training.pool = np.array([right, *wrong[:4]])
    negatives = training.draw(np.array([0]), 0, np.random.default_rng(0)).tolist()
    assert len(negatives) == 7  # fewer than 7 are wrong: some come twice
    assert set(negatives) <= set(wrong[:4])
    training.pool = np.array([right])
    training.train.listed[0] = np.array([right])
    with pytest.raises(BadInput, match="no train picture is wrong for 'a red circle'"):
        training.draw(np.array([0]), 0, np.random.default_rng(0))


def shares_from_lists(training: train.Training) -> list[float]:
    """For each batch the mean number of negatives that are on their query's list."""
    shares = []
    for batch, groups in all_groups(training):
        hits = [np.isin(g[1:], training.train.listed[q]).sum() for q, g in zip(batch, groups, strict=True)]
        shares.append(float(np.mean(hits)))
    return shares


def test_easing_goes_from_random_to_hard(stages: Stages, tmp_path: Path) -> None:
    """Lists of 3 in a pool of 32: a random picture is seldom on its query's list."""
    training = training_of(stages, tmp_path / "a", epochs=4, easing=0.5, negatives=4, random_negatives=1)
    right = training.train.pictures
    for query in range(len(right)):
        training.train.listed[query] = training.pool[training.pool != right[query]][:3]
    shares = shares_from_lists(training)
    assert len(shares) == 4 * 6
    assert shares[0] < 1  # 4 random ones, 3 of 31 pictures on the list
    assert all(share >= 3 for share in shares[12:])  # from the middle on: 3 of the list, 1 random
    assert all(share < 3.3 for share in shares)
    assert shares[0] < shares[4] < shares[8] < shares[12]
    hard, soft = (training_of(stages, tmp_path / str(n), negatives=3, random_negatives=n) for n in (0, 3))
    hard.train = soft.train = training.train
    assert set(shares_from_lists(hard)) == {3.0}
    assert max(shares_from_lists(soft)) < 1


def test_queries_of_a_picture_share_their_negatives(stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a", by_picture=True, batch_size=12)
    ranked = read_ranked(stages.lists).read("train", "train")
    assert sorted(training.train.texts) == sorted(ranked.texts)
    epochs = []
    for batch, groups in all_groups(training):
        for picture in np.unique(groups[:, 0]):
            own = np.flatnonzero(groups[:, 0] == picture)
            assert len(own) == 3  # all captions of a picture stand in one batch
            assert (groups[own] == groups[own[0]]).all()
            texts = [training.train.texts[query] for query in batch[own]]
            listed = {row for text in texts for row in ranked.rows[ranked.texts.index(text)].tolist()}
            assert set(groups[own[0], 1:].tolist()) <= listed - {int(picture)}
        epochs.append(batch.tolist())
    assert sorted(query for batch in epochs[:8] for query in batch) == list(range(96))
    assert epochs[:8] != epochs[8:]


def test_all_captions_of_a_picture_learn_from_the_lists_of_some(stages: Stages, tmp_path: Path) -> None:
    some = lists_config(stages.chain, stages.retriever, tmp_path / "lists", train_per_picture=1, pools=("test",))
    rank_splits.main(some)
    few = stages._replace(lists=some.output)
    alone = training_of(few, tmp_path / "alone")
    assert len(alone.train.texts) == 32
    shared = training_of(few, tmp_path / "shared", by_picture=True)
    assert len(shared.train.texts) == 96
    records = read_tokens(stages.tokens).records
    by_picture = dict(zip(alone.train.pictures.tolist(), alone.train.listed, strict=True))
    for text, picture, listed in zip(*shared.train, strict=True):
        assert text in records[picture].captions
        assert set(listed.tolist()) == set(by_picture[picture].tolist())


@pytest.mark.parametrize("by_picture", [False, True])
def test_an_epoch_of_drawn_queries_reads_no_others(by_picture: bool, stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a", by_picture=by_picture, queries_per_epoch=30, batch_size=12, epochs=3)
    epochs = [np.concatenate(training.batches(epoch)).tolist() for epoch in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [30] * 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3
    assert [len(batch) for batch in training.batches(0)].count(12) == 2
    assert len(list(training.checkpoint.steps(training.batches(0), seed=0))) == 3


# Training


def test_the_loss_falls_and_every_parameter_moves(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    monkeypatch.setattr(
        Tracker, "log", lambda self, values, **_: losses.extend(v for k, v in values.items() if k == "train/loss")
    )
    training = training_of(stages, tmp_path / "a", epochs=12, lr=1e-2)
    before = {name: value.detach().clone() for name, value in training.scorer.named_parameters()}
    train.train(training, Tracker(tmp_path / "a", job="x", config={}))
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])
    assert losses[0] == pytest.approx(np.log(8), abs=0.3)
    for name, value in training.scorer.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_the_loss_is_the_same_by_either_path(stages: Stages, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        training = training_of(stages, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        training.scorer.train()
        losses.append(training.loss(part_with(training.batches(0)[0])).item())
        assert training.scorer.model.is_gradient_checkpointing == checkpointing
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_loss_of_a_part_is_that_of_its_queries(stages: Stages, tmp_path: Path) -> None:
    training = training_of(stages, tmp_path / "a")
    batch = training.batches(0)[0]
    groups = training.groups(part_with(batch))
    scorer, losses = training.scorer.eval(), []
    for query, group in zip(batch, groups, strict=True):
        ids = scorer.query_ids([training.train.texts[query]])
        pairs = scorer.pairs(training.tokens[group], ids, torch.arange(8), torch.zeros(8, dtype=torch.long))
        with torch.no_grad():
            losses.append(-scorer(pairs).log_softmax(dim=0)[0].item())
    assert training.loss(part_with(batch)).item() == pytest.approx(np.mean(losses), abs=1e-5)
    own = np.array([1, 5, 9])
    assert training.loss(Part(batch_of(batch), own, 1.0)).item() == pytest.approx(
        np.mean(np.array(losses)[own]), abs=1e-5
    )


def test_val_is_reranked_as_the_final_test_does(stages: Stages, tested: final.Config) -> None:
    trained = runs.read_manifest(stages.model, "reranker.train").metrics
    rows = table_metrics(tested)
    assert trained["val/R@1"] == pytest.approx(rows["retriever+reranker/val-val/R@1"], abs=1e-5)
    scores = np.load(tested.output / "val-val.reranker.npy")
    choice = choose_weights(read_ranked(stages.lists).read("val", "val"), {"reranker": scores})
    assert trained["val/mean"] == pytest.approx(choice.mean_recall)


def table_metrics(config: final.Config) -> dict[str, float]:
    return runs.read_manifest(config.output, "reranker.test").metrics


@pytest.mark.parametrize("build", [train_config, lora_config])
def test_a_killed_training_ends_with_the_same_weights(
    build: Callable[..., train.Config], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.training, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(models.training, "MOST_SAVING", 1e9)  # after every step
    whole, cut = build(stages, tmp_path / "whole", easing=0.8), build(stages, tmp_path / "cut", easing=0.8)
    train.main(whole)
    interrupted(monkeypatch, train.main, cut, torch.nn.utils, "clip_grad_norm_", 10)
    assert files_of(whole.output) == files_of(cut.output)
    for name in ("head.safetensors", "adapter_model.safetensors" if build is lora_config else "model.safetensors"):
        first, second = (load_file(config.output / "model" / name) for config in (whole, cut))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.allclose(value, second[key], atol=1e-6), key
    manifests = [runs.read_manifest(config.output, "reranker.train") for config in (whole, cut)]
    assert manifests[0].metrics == manifests[1].metrics
    assert manifests[0].facts == manifests[1].facts
    assert manifests[0].outputs["curves.jsonl"] == manifests[1].outputs["curves.jsonl"]


def test_a_model_with_adapters_goes_through_the_final_test(stages: Stages, tmp_path: Path) -> None:
    config = lora_config(stages, tmp_path / "model", epochs=1)
    train.main(config)
    files = {Path(name).name for name in files_of(config.output / "model")}
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "scorer.json"} <= files
    assert "model.safetensors" not in files
    settings = final_config(stages._replace(model=config.output), tmp_path / "test")
    final.main(settings)
    metrics = runs.read_manifest(config.output, "reranker.train").metrics
    assert table_metrics(settings)["retriever+reranker/val-val/R@1"] == pytest.approx(metrics["val/R@1"], abs=1e-5)


def test_the_published_reading_goes_through_all_commands(stages: Stages, tmp_path: Path) -> None:
    config = train_config(stages, tmp_path / "model", epochs=1, compat=True, max_length=24)
    train.main(config)
    scorer = Scorer.from_pretrained(config.output / "model")
    assert scorer.compat == 24
    settings = final_config(stages._replace(model=config.output), tmp_path / "test")
    final.main(settings)
    scores = np.load(settings.output / "val-val.reranker.npy")
    pictures, val = read_tokens(stages.tokens), read_ranked(stages.lists).read("val", "val")
    pairs = scorer.pairs(
        pictures.tokens[val.rows[0]], scorer.query_ids(val.texts[:1]), torch.arange(BEAMS), torch.zeros(BEAMS).long()
    )
    with torch.no_grad():
        assert np.allclose(scores[0], scorer(pairs), atol=1e-5)


# The final test


def recall_by_hand(order: list[list[int]], pictures: list[int]) -> dict[str, float]:
    return {
        str(cutoff): round(float(np.mean([p in row[:cutoff] for p, row in zip(pictures, order, strict=True)])), 5)
        for cutoff in CUTOFFS
    }


def test_rows_of_the_summary(stages: Stages, tested: final.Config) -> None:
    rows = read_json(tested.summary)
    assert [(row["system"], row["pool"]) for row in rows] == [("another", "x")] + [
        (f"retriever+{name}", pool) for pool in ("test", "all") for name in ("features", "reranker", "both")
    ]
    lists = read_ranked(stages.lists)
    weights = runs.read_manifest(tested.output, "reranker.test").facts["weights"]
    for row in rows[1:]:
        assert (row["dataset"], row["split"], row["level"], row["setting"]) == ("toy", "test", "image", "inductive")
        assert row["queries"] == 24
        assert row["pool_size"] == {"test": 8, "all": 48}[row["pool"]]
        assert row["top_k"] == BEAMS
        assert row["run"] == str(tested.output)
        assert row["reranker_queries_per_second"] > 0
        found = lists.read("test", row["pool"])
        pictures = found.pictures.tolist()
        assert row["before"] == recall_by_hand(found.rows.tolist(), pictures)
        assert row["ceiling"] == round(float(np.mean([p in r for p, r in zip(pictures, found.rows, strict=True)])), 5)
        name = row["system"].removeprefix("retriever+")
        assert row["weights"] == weights[name]
        total = (1 - sum(row["weights"].values())) * found.scores.astype(np.float64)
        for each, weight in row["weights"].items():
            total = total + weight * np.load(tested.output / f"test-{row['pool']}.{each}.npy")
        places = np.argsort(-total, axis=1, kind="stable")
        assert row["recall"] == recall_by_hand(np.take_along_axis(found.rows, places, axis=1).tolist(), pictures)
        written = read_lists(tested.output / f"test-{row['pool']}.{name}.jsonl")
        assert recall_by_hand(written.rows.tolist(), pictures) == row["recall"]
        assert (np.sort(written.rows, axis=1) == np.sort(found.rows, axis=1)).all()
        assert (np.diff(written.scores, axis=1) <= 1e-3).all()


def test_before_and_ceiling_are_the_retrievers_recall(stages: Stages, tested: final.Config, tmp_path: Path) -> None:
    settings = {"pools": ("test", "all"), "beams": BEAMS, "keep": BEAMS}
    retrieve.main(retrieve_config(stages.chain, stages.retriever, tmp_path / "found", **settings))
    for pool in ("test", "all"):
        lines = [line for _, line in read_json_lines(tmp_path / "found" / f"{pool}.jsonl")]
        row = next(row for row in read_json(tested.summary) if row["pool"] == pool)
        for cutoff in (1, 5):
            recall = np.mean([line["image"] in line["ranked"][:cutoff] for line in lines])
            assert row["before"][str(cutoff)] == pytest.approx(recall, abs=1e-5)
        ceiling = np.mean([line["image"] in line["ranked"][:BEAMS] for line in lines])
        assert row["ceiling"] == pytest.approx(ceiling, abs=1e-5)
        assert 0 < ceiling < 1 or pool == "test"


def test_feature_scores_are_scaled_cosines(stages: Stages, tested: final.Config) -> None:
    features = read_features(stages.chain.features)
    found = read_ranked(stages.lists).read("test", "all")
    scores = np.load(tested.output / "test-all.features.npy")
    texts, images = normalized(features.texts[:]), normalized(features.images[:])
    for place in (0, 7, 23):
        assert np.allclose(
            scores[place], COSINE_SCALE * images[found.rows[place]] @ texts[found.captions[place]], rtol=1e-4
        )
    hubness = Hubness(torch.from_numpy(normalized(features.texts[:5])), torch.full((5,), 0.2).log(), 0.5)
    without_hubs = final.cosines(found, features, hubness)
    assert np.allclose(without_hubs, scores - COSINE_SCALE * hubness.taken_off(images)[found.rows], atol=1e-3)
    assert not np.allclose(without_hubs, scores, atol=1.0)
    table = (tested.output / "table.txt").read_text()
    metrics = table_metrics(tested)
    rows = features.image_rows("test")
    hits = [rows[np.argmax(images[rows] @ texts[c])] == p for c, p in zip(found.captions, found.pictures, strict=True)]
    assert metrics["two-tower/test-test/R@1"] == pytest.approx(np.mean(hits), abs=1e-5)
    assert table.count("two-tower") == 3
    assert "ceiling" in table


def test_shares_are_chosen_on_val_alone(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that know most of val's answers, and say nothing of test's."""
    real, garbage = final.read_case, False

    def read_case(split: str, *rest: Any) -> final.Case:
        case = real(split, *rest)
        noise = np.random.default_rng(0).normal(size=case.lists.rows.shape).astype(np.float32)
        if split == "test":
            return case._replace(scores=dict.fromkeys(case.scores, 100 * noise)) if garbage else case
        own = 100 * (case.lists.rows == case.lists.pictures[:, None]).astype(np.float32)
        return case._replace(scores={**case.scores, "features": own + noise})

    monkeypatch.setattr(final, "read_case", read_case)
    configs = [final_config(stages, tmp_path / name) for name in ("as_they_are", "garbage")]
    for config in configs:
        final.main(config)
        garbage = True
    weights = [runs.read_manifest(each.output, "reranker.test").facts["weights"] for each in configs]
    assert weights[0] == weights[1]
    assert sum(weights[0]["both"].values()) > 0
    metrics = [table_metrics(each) for each in configs]
    assert metrics[0] != metrics[1]
    val = read_ranked(stages.lists).read("val", "val")
    scores = {name: np.load(configs[0].output / f"val-val.{name}.npy") for name in ("features", "reranker")}
    assert weights[0]["both"] == choose_weights(val, scores).weights
    assert weights[0]["features"] == choose_weights(val, {"features": scores["features"]}).weights


def test_features_alone_reorder_without_a_reranker(stages: Stages, tested: final.Config, tmp_path: Path) -> None:
    config = final_config(stages, tmp_path / "features", reranker=None, tokens=None, system="mine")
    final.main(config)
    rows = read_json(config.summary)
    assert [(row["system"], row["pool"]) for row in rows] == [("mine+features", "test"), ("mine+features", "all")]
    assert rows[0]["recall"] == read_json(tested.summary)[1]["recall"]
    assert rows[0]["reranker_queries_per_second"] is None
    assert not list(config.output.glob("*reranker*"))
    alone = final_config(stages, tmp_path / "alone", features=False, summary=tmp_path / "alone.json")
    final.main(alone)
    assert {row["system"] for row in read_json(alone.summary)} == {"retriever+reranker"}


def test_fewer_pictures_of_each_list_are_reordered(stages: Stages, tmp_path: Path) -> None:
    config = final_config(stages, tmp_path / "two", top_k=2, reranker=None, tokens=None)
    final.main(config)
    for row in read_json(config.summary):
        found = read_ranked(stages.lists).read("test", row["pool"]).first(2)
        assert row["top_k"] == 2
        share = float(np.mean([p in r for p, r in zip(found.pictures, found.rows, strict=True)]))
        assert row["ceiling"] == round(share, 5) == row["recall"]["5"] == row["recall"]["10"]


def test_a_share_that_does_not_help_is_said(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(final, "cosines", lambda lists, *_: np.where(lists.present, 0.0, -np.inf))
    config = final_config(stages, tmp_path / "zero", reranker=None, tokens=None)
    final.main(config)
    assert "on val features did not help" in capsys.readouterr().out
    assert all(row["recall"] == row["before"] for row in read_json(config.summary))


# Bad input


def test_contradictions_are_named_before_any_work(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tokens, lists = partial(convert_config, stages.chain, out), partial(lists_config, stages.chain, tmp_path, out)
    learning, testing = partial(train_config, stages, out), partial(final_config, stages, out)
    wrong: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (tokens, {"tokenizer": "seed"}, "--tokenizer seed needs --quantizer seed_quantizer.pt and --vision"),
        (tokens, {"model": None}, "--tokenizer patches needs the --model"),
        (tokens, {"grid": 0}, "--grid, "),
        (lists, {"beams": 0}, "--train-beams, --beams and "),
        (lists, {"pools": ()}, "number of --pools must be at least 1"),
        (lists, {"pools": ("test", "val")}, "--pools val has no picture of the test captions"),
        (lists, {"train_per_picture": -1}, "--train-per-picture must be at least 0"),
        (lists, {"scoring": "voken", "score_end": True}, "--score-end needs --scoring full"),
        (learning, {"layers": 2}, "--new-layers makes a model from nothing, --layers cuts a trained one"),
        (learning, {"tokenizer": "x"}, "--new-layers takes the tokenizer of --language-model"),
        (learning, {"new_heads": 0}, "--new-heads must be at least 1"),
        (learning, {"layers": 0, "new_layers": 0}, "--layers, .* must be at least 1"),
        (learning, {"random_negatives": 8}, "--random-negatives must be between 0 and the 7 --negatives"),
        (learning, {"easing": 1.5}, "--easing must be in"),
        (learning, {"negatives": 0}, "`negatives` must be at least 1"),
        (learning, {"lora_alpha": 0.0}, "`lora_alpha` above 0"),
        (testing, {"tokens": None}, "--reranker and --tokens belong together"),
        (testing, {"reranker": None}, "--reranker and --tokens belong together"),
        (testing, {"reranker": None, "tokens": None, "features": False}, "leaves nothing to reorder by"),
        (testing, {"top_k": 0}, "--top-k"),
        (testing, {"memory": 0.0}, "--memory above 0"),
    ]
    for build, options, message in wrong:
        with pytest.raises(BadInput, match=message) as raised:
            build(**options)
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(BadInput, match="`batch_size` 1 counts the examples of all 8 processes"):
        learning(batch_size=1)
    assert not out.exists()


def test_unfinished_folders_name_the_script(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty"
    scripts = {
        "tokens": r"run scripts/15_convert_voken_to_seed\.sh first",
        "lists": r"run scripts/16_prepare_reranker_dataset\.sh first",
        "model": r"run scripts/17_finetune_reranker_llama\.sh first",
    }
    for name, message in scripts.items():
        some = Stages(**{**stages._asdict(), name: empty})
        with pytest.raises(BadInput, match=message):
            final.main(final_config(some, tmp_path / "test"))
        if name != "model":
            with pytest.raises(BadInput, match=message):
                train.main(train_config(some, tmp_path / "train"))
    with pytest.raises(BadInput, match=r"run scripts/09_train_retriever_t5\.sh or scripts/10.* first"):
        rank_splits.main(lists_config(stages.chain, tmp_path / "empty", tmp_path / "lists"))
    with pytest.raises(BadInput, match=r"run scripts/01_prepare_captions\.sh first"):
        convert.main(convert_config(stages.chain._replace(captions=tmp_path / "empty"), tmp_path / "tokens"))
    with pytest.raises(BadInput, match=r"was made by reranker\.convert"):
        train.main(train_config(stages._replace(lists=stages.tokens), tmp_path / "train"))
    assert not (tmp_path / "test").exists()
    assert not (tmp_path / "train").exists()


def test_other_tokens_than_those_of_the_training_are_refused(stages: Stages, tmp_path: Path) -> None:
    convert.main(convert_config(stages.chain, tmp_path / "tokens", seed=1))
    with pytest.raises(BadInput, match="was trained with other image tokens than those of"):
        final.main(final_config(stages._replace(tokens=tmp_path / "tokens"), tmp_path / "test"))
    tokenizer = tmp_path / "words"
    shutil.copytree(stages.model / "model", tokenizer)  # it knows 24 image tokens
    convert.main(convert_config(stages.chain, tmp_path / "fewer", codebook_size=10))
    other = dataclasses.replace(
        lora_config(stages._replace(tokens=tmp_path / "fewer"), tmp_path / "model"), language_model=str(tokenizer)
    )
    with pytest.raises(BadInput, match="has other image tokens than <img_00000> to <img_00019>"):
        train.main(other)


def test_lists_of_other_captions_are_refused(stages: Stages, tmp_path: Path) -> None:
    source = tmp_path / "captions.jsonl"
    lines = (stages.chain.root / "captions.jsonl").read_text().replace("a red circle", "a red ring", 1)
    source.write_text(lines)
    captions = tmp_path / "captions"
    prepare_captions.main(
        prepare_captions.Config(images=stages.chain.root / "images", source=(source,), output=captions, workers=1)
    )
    convert.main(convert_config(stages.chain._replace(captions=captions), tmp_path / "tokens"))
    with pytest.raises(BadInput, match="ranks pictures of other captions than the image tokens are of"):
        train.main(train_config(stages._replace(tokens=tmp_path / "tokens"), tmp_path / "model"))
    with pytest.raises(BadInput, match="speak of different pictures: make both from one set"):
        final.main(final_config(stages._replace(tokens=tmp_path / "tokens"), tmp_path / "test"))
    values = read_json(captions / "manifest.json")
    runs.write_manifest(captions, {**values, "facts": {**values["facts"], "pictures": 0}})
    with pytest.raises(BadInput, match=r"has changed since .*tokens was made: make it again"):
        read_tokens(tmp_path / "tokens")


def test_what_cannot_be_fitted_or_ranked_is_one_clear_line(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_captions.main(
        prepare_captions.Config(images=stages.chain.root / "images", output=tmp_path / "bare", workers=1)
    )
    with pytest.raises(BadInput, match="bare has no train pictures, which tokens of patches are fitted on"):
        convert.main(convert_config(stages.chain._replace(captions=tmp_path / "bare"), tmp_path / "tokens"))
    with pytest.raises(BadInput, match="128 patches are too few for 200 codes"):
        convert.main(convert_config(stages.chain, tmp_path / "tokens", codebook_size=200))
    old = tmp_path / "dataset"
    shutil.copytree(stages.chain.dataset, old)
    lines = (old / "val.jsonl").read_text()
    monkeypatch.setenv(runs.VERIFY_VARIABLE, "off")  # an earlier version wrote such files, and their hashes
    (old / "val.jsonl").write_text(lines.replace('"caption": ', '"row": '))
    chain = stages.chain._replace(dataset=old)
    with pytest.raises(
        BadInput, match=r"is of an earlier version: run scripts/07_prepare_retriever_dataset\.sh --overwrite"
    ):
        rank_splits.main(lists_config(chain, stages.retriever, tmp_path / "lists", train_per_picture=0))
    (old / "val.jsonl").write_text("")
    with pytest.raises(BadInput, match="has no val captions: a reranker needs all three splits"):
        rank_splits.main(lists_config(chain, stages.retriever, tmp_path / "lists", train_per_picture=0))


# Resuming, and many processes


def test_a_killed_conversion_goes_on_where_it_was(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = PatchTokenizer.encode

    def encode(self: PatchTokenizer, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(PatchTokenizer, "encode", encode)
    fits: list[int] = []
    monkeypatch.setattr(PatchTokenizer, "fit", counted(PatchTokenizer.fit, fits))
    config = convert_config(stages.chain, tmp_path / "cut")
    interrupted(monkeypatch, convert.main, config, convert, "write_array", 4)
    assert encoded == [8] * 7  # 48 pictures: the one batch that was lost twice, no other
    assert len(fits) == 1
    assert_same(config.output, stages.tokens)


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return function(*args, **options)

    return call


def test_a_killed_ranking_goes_on_where_it_was(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieve, "BLOCK_BATCHES", 1)
    calls: list[int] = []
    monkeypatch.setattr(retrieve, "beam_search", counted(beam_search, calls))
    config = lists_config(stages.chain, stages.retriever, tmp_path / "cut")
    interrupted(monkeypatch, rank_splits.main, config, retrieve, "write_json_lines", 15)  # train has 12 batches
    assert len(calls) == 12 + 3 * 3 + 1
    assert_same(config.output, stages.lists)


def test_a_killed_test_goes_on_where_it_was(
    stages: Stages, tested: final.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "BLOCK_BATCHES", 1)
    config = final_config(stages, tmp_path / "cut", pairs=2 * BEAMS)
    interrupted(monkeypatch, final.main, config, rerank, "write_array", 20)  # val has 12 blocks
    assert files_of(config.output) == files_of(tested.output)
    for name in files_of(config.output):
        if name.endswith(".npy"):
            assert np.allclose(np.load(config.output / name), np.load(tested.output / name), atol=1e-5)
    assert table_metrics(config) == table_metrics(tested)
    rows = read_json(config.summary)
    speeds = {row["pool"]: row["reranker_queries_per_second"] for row in rows}
    assert speeds["test"] is None  # some of its scores had been there
    assert speeds["all"] > 0


def test_tokens_lists_and_scores_on_two_processes(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "BLOCK_BATCHES", 1)
    monkeypatch.setattr(rerank, "BLOCK_BATCHES", 1)
    tokens = convert_config(stages.chain, tmp_path / "tokens")
    lists = lists_config(stages.chain, stages.retriever, tmp_path / "lists")
    one = final_config(stages, tmp_path / "one", pairs=2 * BEAMS, summary=tmp_path / "one.json")
    two = dataclasses.replace(one, output=tmp_path / "two", summary=tmp_path / "two.json")
    final.main(one)

    def write_late(path: Path, array: NDArray[Any]) -> None:  # the other process must not count on the file
        time.sleep(0.5 if path.name == "tokens.npy" else 0.0)
        write_array(path, array)

    monkeypatch.setattr(convert, "write_array", write_late)

    def run() -> None:
        convert.main(tokens)
        rank_splits.main(lists)
        final.main(two)

    started = start(run, tmp_path / "log")
    assert started.statuses() == [0, 0], started.log.read_text()
    assert_same(tokens.output, stages.tokens)
    assert_same(lists.output, stages.lists)
    assert files_of(two.output) == files_of(one.output)
    for name in files_of(one.output):
        if name.endswith((".npy", ".jsonl")):
            assert (two.output / name).read_bytes() == (one.output / name).read_bytes(), name
    assert table_metrics(two) == table_metrics(one)
    keys = ("system", "pool", "recall", "before", "weights", "ceiling")
    rows = [[{key: row[key] for key in keys} for row in read_json(each.summary)] for each in (one, two)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("shared", [train_anew, train_in_parts])
@pytest.mark.parametrize("build", [train_config, lora_config])
def test_training_on_two_processes(
    build: Callable[..., train.Config], shared: Callable[..., None], stages: Stages, tmp_path: Path
) -> None:
    """The same global batches and negatives, so the same scores to rounding; 96 queries do not divide by 15 times 2."""
    sums = {"optimizer": "sgd", "lr": 0.1}  # Adam would make a step of what rounding leaves of a gradient of zero
    settings: dict[str, Any] = {"batch_size": 15, "easing": 0.5, "lora_dropout": 0.0, "epochs": 2, **sums}
    one, two = build(stages, tmp_path / "one", **settings), build(stages, tmp_path / "two", **settings)
    train.main(one)
    started = start(partial(shared, train.main, two), tmp_path / "log", anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    assert files_of(one.output) == files_of(two.output)
    metrics = [runs.read_manifest(config.output, "reranker.train").metrics for config in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1])
    pictures, val = read_tokens(stages.tokens), read_ranked(stages.lists).read("val", "val")
    scores = [
        rerank.score_lists(Scorer.from_pretrained(config.output / "model"), pictures.tokens, val, quiet=True)
        for config in (one, two)
    ]
    centred = [each - each.mean(axis=1, keepdims=True) for each in scores]  # a constant changes no loss, and wanders
    assert np.allclose(centred[0], centred[1], atol=1e-4)
    assert centred[0].std() > 0.01
    weights = "adapter_model.safetensors" if build is lora_config else "model.safetensors"
    first, second = (load_file(config.output / "model" / weights) for config in (one, two))
    for key, value in first.items():
        assert torch.allclose(value, second[key], atol=1e-4), key


def test_a_training_that_broke_down_is_not_taken_for_a_perfect_one(stages: Stages, tmp_path: Path) -> None:
    """Ranks by scores that are no numbers would all be 1."""
    config = train_config(stages, tmp_path / "model", lr=1e30, max_grad_norm=1e30)
    with pytest.raises(BadInput, match="the reranker's scores are not numbers"):
        train.main(config)
    assert not (config.output / "manifest.json").exists()
