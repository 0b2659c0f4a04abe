"""The whole chain with the real commands on small pictures: files, figures, resuming, bad order."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import training
from models.clip import Heads, Pictures, encode_images, encode_tokens, load_clip
from retriever import prepare, retrieve, train
from retriever import test as final
from retriever.data import Queries, RetrieverData
from retriever.gallery import build as build_index
from retriever.gallery import search
from tests.chain import RQVAE, TRAIN, Chain, encode_config, encoder_decoder_config, files_of
from tests.tiny import (
    assemble_clip,
    bert_folder,
    draw_picture,
    generate_codes,
    llama_folder,
    prepare_emb,
    rqvae_train,
    t5_folder,
    train_heads,
)
from tools import prepare_captions, runs
from tools.captions import Split
from tools.errors import BadInput
from tools.features import read_features
from tools.files import read_json, read_json_lines
from tools.logs import Tracker
from tools.results import HUBS_CORRECTED


class PowerCut(Exception):
    """Stands for a killed process."""


def t5_config(chain: Chain, output: Path, **options: Any) -> train.Config:
    model = chain.root / "t5"
    if not model.is_dir():
        t5_folder(model)
    settings = {**TRAIN, "accumulate": 2, **options}
    return train.Config(dataset=chain.dataset, language_model=str(model), output=output, **settings)


def test_each_command_leaves_exactly_its_files(chain: Chain, retriever: Path) -> None:
    assert files_of(chain.captions) == ["captions.jsonl", "manifest.json"]
    assert files_of(chain.towers) == ["images.npy", "manifest.json", "texts.npy"]
    assert files_of(chain.features) == [
        "clip/open_clip_config.json", "clip/open_clip_model.safetensors", "curves.jsonl", "images.npy", "manifest.json",
        "texts.npy",
    ]  # fmt: skip
    assert files_of(chain.rqvae) == [
        "config.json", "curves.jsonl", "manifest.json", "model.safetensors", "report.json",
    ]  # fmt: skip
    assert files_of(chain.codes) == [
        "codebooks.npy", "codes.npy", "guide.safetensors", "latents.npy", "manifest.json", "report.json",
    ]  # fmt: skip
    assert files_of(chain.dataset) == [
        "codebooks.npy", "codes.npy", "guide.safetensors", "latents.npy", "manifest.json", "pool.jsonl", "test.jsonl",
        "train.jsonl", "val.jsonl",
    ]  # fmt: skip
    assert {"curves.jsonl", "manifest.json", "model/model.safetensors"} <= set(files_of(retriever))
    assert "model/vokens.json" in files_of(retriever)
    assert not any(name.startswith("resume") for name in files_of(retriever))


def test_tuned_checkpoint_gives_the_features_that_were_written(chain: Chain) -> None:
    features = read_features(chain.features)
    clip = load_clip(str(chain.features / "clip"))
    files = [record.file for record in features.records]
    pictures = Pictures(files, clip.preprocess, folder=chain.root / "images")
    texts = [caption for record in features.records for caption in record.captions][:10]
    with torch.inference_mode():
        images = encode_images(clip, torch.stack([pictures[row] for row in range(6)])).numpy()
        words = encode_tokens(clip, clip.tokenizer(texts)).numpy()
    assert np.allclose(images, features.images[:6], atol=1e-4)
    assert np.allclose(words, features.texts[:10], atol=1e-4)


def test_heads_learn(chain: Chain) -> None:
    """48 pictures of 8 colours and 6 shapes: far above chance (3 % at rank 1 on 8 pictures is 12.5 %)."""
    recall = runs.read_manifest(chain.features, "RQ-VAE.train_heads").metrics
    assert recall["5"] > 5 / 8


def test_splits_never_mix(chain: Chain) -> None:
    pool = [row for _, row in read_json_lines(chain.dataset / "pool.jsonl")]
    seen: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        rows = [row for _, row in read_json_lines(chain.dataset / f"{split}.jsonl")]
        assert {pool[row["picture"]]["split"] for row in rows} == {split}
        seen[split] = {row["picture"] for row in rows}
    assert sum(len(rows) for rows in seen.values()) == len(set().union(*seen.values())) == 48


def test_training_reads_neither_test_captions_nor_test_features(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = RetrieverData.queries

    def queries(self: RetrieverData, split: Split) -> Queries:
        opened.append(split)
        return read(self, split)

    monkeypatch.setattr(RetrieverData, "queries", queries)
    train.main(encoder_decoder_config(chain, tmp_path / "run", epochs=1))
    assert opened == ["train", "val"]


def test_training_lowers_the_loss(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(
        Tracker, "log", lambda self, values, **_: losses.extend(v for k, v in values.items() if k == "train/loss")
    )
    train.main(encoder_decoder_config(chain, tmp_path / "long", epochs=40, label_temperature=0.0, lr=1e-2))
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])


def retrieve_config(chain: Chain, retriever: Path, output: Path, **options: Any) -> retrieve.Config:
    return retrieve.Config(
        dataset=chain.dataset, retriever=retriever, output=output, precision="fp32", device="cpu", **options
    )


def test_table_summary_and_sheet(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    retrieve.main(retrieve_config(chain, retriever, tmp_path / "found", pools=("test", "all"), beams=8))
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps([{
        "system": "another", "dataset": "toy", "split": "test", "pool": "test", "level": "image", "recall": {},
    }]))  # fmt: skip
    config = final.Config(
        predictions=tmp_path / "found", output=tmp_path / "final", summary=summary, name="toy", rqvae=chain.rqvae,
        examples=3, device="cpu",
    )  # fmt: skip
    final.main(config)
    assert files_of(config.output) == ["contact_sheet.png", "manifest.json", "table.txt"]
    rows = read_json(summary)
    assert [(row["system"], row["pool"], row["level"]) for row in rows] == [("another", "test", "image")] + [
        (system, pool, level)
        for pool in ("test", "all")
        for system, level in (
            ("two-tower", "image"), (HUBS_CORRECTED, "image"), ("two-tower, quantised", "image"),
            ("retriever", "image"), ("retriever", "code"),
        )
    ]  # fmt: skip
    for row in rows[1:]:
        assert {"dataset", "split", "queries", "recall", "queries_per_second", "run", "setting"} <= set(row)
        assert row["queries"] == 24
        assert list(row["recall"]) == ["1", "5", "10"]
        assert 0 <= row["recall"]["1"] <= row["recall"]["5"] <= row["recall"]["10"] <= 1
    by_key = {(row["system"], row["pool"], row["level"]): row["recall"] for row in rows[1:]}
    assert by_key["retriever", "test", "code"]["1"] >= by_key["retriever", "test", "image"]["1"]
    assert by_key["retriever", "test", "image"]["10"] == 1.0  # 8 pictures, all found by 8 beams


def test_two_tower_row_equals_brute_force_by_hand(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    retrieve.main(retrieve_config(chain, retriever, tmp_path / "found"))
    features = read_features(chain.features)
    images, texts = features.image_rows("test"), features.text_rows("test")
    hits = 0
    for text in texts:
        vectors = features.images[images] / np.linalg.norm(features.images[images], axis=1, keepdims=True)
        hits += int(images[np.argmax(vectors @ features.texts[text])] == features.owners[text])
    config = final.Config(
        predictions=tmp_path / "found", output=tmp_path / "final", summary=tmp_path / "s.json", name="toy", device="cpu"
    )
    final.main(config)
    assert read_json(tmp_path / "s.json")[0]["recall"]["1"] == pytest.approx(hits / len(texts), abs=1e-5)


def test_search_command(
    chain: Chain, retriever: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = search.Config(
        queries=("a red circle",), index=index, retriever=retriever, sheet=tmp_path / "x.png", keep=3,
        precision="fp32", device="cpu",
    )  # fmt: skip
    search.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('"a red circle", 48 pictures, ')
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert all(Path(line.split()[-1]).is_file() for line in lines[1:4])
    assert (tmp_path / "x.png").is_file()


def test_a_bare_folder_is_searched_with_a_retriever_trained_elsewhere(
    chain: Chain, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_picture(tmp_path / "photos" / "new red circle.png", "red", "circle", 1)
    draw_picture(tmp_path / "photos" / "deep" / "blue.png", "blue", "square", 2)
    prepare_captions.main(prepare_captions.Config(images=tmp_path / "photos", output=tmp_path / "captions", workers=1))
    model = str(chain.features / "clip")
    prepare_emb.main(encode_config(tmp_path / "captions", model, tmp_path / "emb"))
    generate_codes.main(
        generate_codes.Config(features=tmp_path / "emb", rqvae=chain.rqvae, output=tmp_path / "codes", device="cpu")
    )
    prepare.main(prepare.Config(codes=tmp_path / "codes", output=tmp_path / "dataset"))
    build_index.main(build_index.Config(dataset=tmp_path / "dataset", rqvae=chain.rqvae, output=tmp_path / "index"))
    capsys.readouterr()
    search.main(
        search.Config(
            queries=("a red circle",), index=tmp_path / "index", retriever=retriever, sheet=tmp_path / "x.png",
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    found = {line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()[1:3]}
    assert found == {str(tmp_path / "photos" / name) for name in ("new red circle.png", "deep/blue.png")}


def test_another_tokenizers_pictures_are_refused(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    rqvae_train.main(rqvae_train.Config(features=chain.features, output=tmp_path / "rqvae", **{**RQVAE, "seed": 1}))
    generate_codes.main(
        generate_codes.Config(
            features=chain.features, rqvae=tmp_path / "rqvae", output=tmp_path / "codes", device="cpu"
        )
    )
    prepare.main(prepare.Config(codes=tmp_path / "codes", output=tmp_path / "dataset"))
    with pytest.raises(BadInput, match="vokens of another tokenizer"):
        retrieve.main(retrieve_config(chain._replace(dataset=tmp_path / "dataset"), retriever, tmp_path / "found"))
    config = build_index.Config(dataset=tmp_path / "dataset", rqvae=tmp_path / "rqvae", output=tmp_path / "index")
    build_index.main(config)
    with pytest.raises(BadInput, match="vokens of another tokenizer"):
        search.main(
            search.Config(queries=("a ring",), index=config.output, retriever=retriever, sheet=tmp_path / "x.png")
        )
    with pytest.raises(BadInput, match="is not the RQ-VAE that coded"):
        build_index.main(dataclasses.replace(config, rqvae=chain.rqvae))


def test_t5_runs_through_the_same_command(chain: Chain, tmp_path: Path) -> None:
    config = t5_config(chain, tmp_path / "t5")
    train.main(config)
    retrieve.main(retrieve_config(chain, config.output, tmp_path / "found", score_end=True, beams=8))
    rows = [row for _, row in read_json_lines(tmp_path / "found" / "test.jsonl")]
    assert all(sorted(set(row["ranked"])) == sorted(row["ranked"]) and len(row["ranked"]) == 8 for row in rows)


def test_llama_runs_through_the_same_commands(chain: Chain, tmp_path: Path) -> None:
    config = train.Config(
        dataset=chain.dataset, language_model=str(llama_folder(tmp_path / "base")), kind="causal",
        output=tmp_path / "llama", **TRAIN,
    )  # fmt: skip
    train.main(config)
    retrieve.main(retrieve_config(chain, config.output, tmp_path / "found", scoring="voken", beams=8))
    rows = [row for _, row in read_json_lines(tmp_path / "found" / "test.jsonl")]
    assert all(len(set(row["ranked"])) == len(row["ranked"]) == 8 for row in rows)


def test_a_score_that_does_not_exist_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--score-end needs --scoring full"):
        retrieve_config(chain, tmp_path, tmp_path / "found", scoring="voken", score_end=True)


def cut_power_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Let a function of a module raise at its n-th call."""
    calls = iter(range(1, 10**9))
    real = getattr(module, name)

    def function(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise PowerCut
        return real(*args, **options)

    monkeypatch.setattr(module, name, function)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[Any], None], config: Any, module: Any, name: str, call: int
) -> None:
    """Run until the power is cut, then run the same command again."""
    with monkeypatch.context() as patch:
        cut_power_at(patch, module, name, call)
        with pytest.raises(PowerCut):
            main(config)
    gc.collect()  # a process that died holds no lock
    assert not (config.output / "manifest.json").exists()
    resumed = []
    begin = runs.begin
    with monkeypatch.context() as patch:

        def watched(*args: Any, **options: Any) -> runs.Run | None:
            run = begin(*args, **options)
            resumed.append(any(path.is_file() for path in (config.output / "resume").rglob("*")))
            return run

        patch.setattr(runs, "begin", watched)
        main(config)
    assert resumed == [True]  # not merely repeated


@pytest.mark.parametrize("build", [encoder_decoder_config, t5_config])
def test_a_killed_training_ends_with_the_same_weights(
    build: Callable[[Chain, Path], train.Config], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    whole, cut = build(chain, tmp_path / "whole"), build(chain, tmp_path / "cut")
    train.main(whole)
    interrupted(monkeypatch, train.main, cut, torch.nn.utils, "clip_grad_norm_", 14)
    first, second = (load_file(config.output / "model" / "model.safetensors") for config in (whole, cut))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-6), name
    manifests = [runs.read_manifest(config.output, "retriever.train") for config in (whole, cut)]
    assert manifests[0].metrics == manifests[1].metrics
    assert manifests[0].outputs["curves.jsonl"] == manifests[1].outputs["curves.jsonl"]


def test_a_killed_tokenizer_ends_with_the_same_weights(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training, "MOST_SAVING", 1e9)
    config = rqvae_train.Config(features=chain.features, output=tmp_path / "cut", **RQVAE)
    interrupted(monkeypatch, rqvae_train.main, config, rqvae_train, "make_report", 3)
    first, second = (load_file(folder / "model.safetensors") for folder in (chain.rqvae, config.output))
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-6), name
    assert (config.output / "curves.jsonl").read_text() == (chain.rqvae / "curves.jsonl").read_text()


def test_a_killed_encoding_goes_on_where_it_was(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = encode_config(chain.captions, str(chain.root / "clip"), tmp_path / "cut", layer="tower")
    encoded: list[int] = []
    real = prepare_emb.encode_images

    def encode(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return real(clip, pixels)

    monkeypatch.setattr(prepare_emb, "encode_images", encode)
    interrupted(monkeypatch, prepare_emb.main, config, prepare_emb, "encode_images", 4)
    assert encoded == [8] * 6  # 48 pictures: none was encoded twice
    for name in ("images.npy", "texts.npy"):
        assert np.allclose(np.load(tmp_path / "cut" / name), np.load(chain.towers / name), atol=1e-5)


def test_killed_heads_end_with_the_same_features(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training, "MOST_SAVING", 1e9)
    config = train_heads.Config(features=chain.towers, output=tmp_path / "cut", epochs=30, device="cpu")
    interrupted(monkeypatch, train_heads.main, config, train_heads, "batches_of", 20)
    assert np.allclose(np.load(tmp_path / "cut" / "images.npy"), np.load(chain.features / "images.npy"), atol=1e-5)
    assert (tmp_path / "cut" / "curves.jsonl").read_text() == (chain.features / "curves.jsonl").read_text()


def test_killed_heads_hide_the_same_values_again(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training, "MOST_SAVING", 1e9)
    made = {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        config = train_heads.Config(features=chain.towers, output=folder, epochs=8, image_dropout=0.3, device="cpu")
        if name == "cut":
            interrupted(monkeypatch, train_heads.main, config, train_heads, "batches_of", 5)
        else:
            train_heads.main(config)
        made[name] = np.load(folder / "images.npy")
    assert np.allclose(made["cut"], made["whole"], atol=1e-5)


def test_a_share_of_the_image_towers_values_is_hidden_in_training_alone() -> None:
    torch.manual_seed(0)
    heads = Heads(torch.nn.Linear(64, 8), torch.nn.Linear(16, 8))
    model = train_heads.TwoHeads(heads, temperature=0.07, image_dropout=0.5)
    seen: list[torch.Tensor] = []
    heads.image.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, texts = torch.ones(100, 64), torch.randn(100, 16)
    model.train()(images, texts)
    model.eval()(images, texts)
    hidden = (seen[0] == 0).float().mean().item()
    assert 0.45 < hidden < 0.55
    assert (seen[0][seen[0] != 0] == 2).all()  # the mean of a value stays
    assert torch.equal(seen[1], images)


def test_assembled_towers_run_through_prepare_emb(chain: Chain, tmp_path: Path) -> None:
    from tests.test_clip import WEIGHTS

    text = bert_folder(tmp_path / "bert")
    assemble_clip.main(
        assemble_clip.Config(image_weights=WEIGHTS, text_tower=text, output=tmp_path / "clip", image_size=32, width=16)
    )
    prepare_emb.main(encode_config(chain.captions, str(tmp_path / "clip" / "clip"), tmp_path / "emb"))
    features = read_features(tmp_path / "emb")
    assert (features.images.shape, features.texts.shape) == ((48, 16), (144, 16))


def test_a_stage_out_of_order_names_the_script(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no manifest\.json: run scripts/07_prepare_retriever_dataset\.sh first"):
        train.main(train.Config(dataset=tmp_path, language_model="t5-base", output=tmp_path / "out"))
    with pytest.raises(BadInput, match=r"tower features, embedding features are needed: run scripts/04"):
        rqvae_train.main(rqvae_train.Config(features=chain.towers, output=tmp_path / "out", **RQVAE))
    settings = {**RQVAE, "codebook_size": 64, "pictures_per_code": 0}
    with pytest.raises(BadInput, match="needs as many train pictures, there are 32"):
        rqvae_train.main(rqvae_train.Config(features=chain.features, output=tmp_path / "out", **settings))


def test_changed_captions_are_noticed_downstream(chain: Chain, tmp_path: Path) -> None:
    manifest = chain.captions / "manifest.json"
    kept = manifest.read_text()
    try:
        values = read_json(manifest)
        runs.write_manifest(chain.captions, {**values, "facts": {**values["facts"], "pictures": 0}})
        with pytest.raises(BadInput, match="has changed since"):
            read_features(chain.features)
    finally:
        manifest.write_text(kept)
