"""Both stages of training: losses by hand, negatives, adapters, transductive training, resuming, many processes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.kernels import run_epoch
from models.arithmetic import weights_dtype
from models.batches import part_of
from models.compute import seed_everything
from models.decoding import make_writer
from models.pretrained import widened
from models.stepper import check_launch, gpu_compiles
from models.voken_lm import Lora, VokenLM, build_causal
from retriever import retrieve, train, train_stage2
from retriever.data import RetrieverData, read_data
from retriever.losses import Discriminative, Rivals, discriminative_loss, written_log_probabilities
from retriever.training import Training
from tests.chain import TRAIN, Chain, encoder_decoder_config
from tests.test_pipeline import interrupted, t5_config
from tests.tiny import batch_of, codebooks, llama_folder, tiny_llama, tokenizer
from tools import runs
from tools.curves import read_curves
from tools.errors import BadInput
from tools.files import hash_file, read_json, read_json_lines, write_json_lines
from tools.logs import Tracker
from tools.vokens import VokenSpace

SPACE = VokenSpace(3, 5, shared=False)


def rivals(positive: list[float], negatives: list[list[list[float]]], present: list[list[bool]]) -> Rivals:
    """One query a row; each sequence is given by its positions' log-probabilities, and parts at the second."""
    right = torch.tensor([positive] * len(negatives))
    wrong = torch.tensor(negatives)
    parted = torch.ones(wrong.shape, dtype=torch.bool)
    parted[:, :, 0] = False
    return Rivals(right, wrong, torch.tensor(present), parted, torch.zeros(len(negatives), dtype=torch.long))


def test_discriminative_losses_by_hand() -> None:
    pair = rivals([-1.0, -1.0], [[[-1.0, -2.0], [-1.0, -9.0]]], [[True, False]])
    assert loss_of(pair, "list-wise") == pytest.approx(-np.log(np.exp(-2) / (np.exp(-2) + np.exp(-3))))
    assert loss_of(pair, "list-wise", temperature=0.5) == pytest.approx(-np.log(1 / (1 + np.exp(-2))))
    right = 1 / (1 + np.exp(-1))
    assert loss_of(pair, "double-softmax") == pytest.approx(
        -np.log(np.exp(right) / (np.exp(right) + np.exp(1 - right)))
    )
    assert loss_of(pair, "margin", margin=3.0) == pytest.approx(-1.0 + 3.0)
    assert loss_of(pair, "margin", margin=0.5) == 0.0
    assert loss_of(pair, "prefix-margin", margin=3.0) == pytest.approx(2.0)  # only the second position has parted


def loss_of(pair: Rivals, form: Discriminative, *, temperature: float = 1.0, margin: float = 1.0) -> float:
    return discriminative_loss(pair, form, temperature=temperature, margin=margin).item()


def test_double_softmax_stays_between_its_bounds() -> None:
    """With nine negatives 1.461 to 2.461, however far the scores are apart."""
    for gap, bound in ((50.0, np.log(1 + 9 / np.e)), (-50.0, np.log(np.e + 9))):
        others = [[[-60.0 - 50.0 * (n > 0)] for n in range(9)]]
        pair = rivals([-60.0 + gap], others, [[True] * 9])
        assert loss_of(pair, "double-softmax") == pytest.approx(bound, abs=1e-3)


@pytest.mark.parametrize("form", ["list-wise", "double-softmax", "margin", "prefix-margin"])
def test_a_query_without_negatives_adds_nothing(form: Discriminative) -> None:
    pair = rivals([-1.0, -1.0], [[[-1.0, -2.0]], [[0.0, 0.0]]], [[True], [False]])
    pair = pair._replace(negatives=pair.negatives.requires_grad_(True))
    loss = discriminative_loss(pair, form, temperature=1.0, margin=5.0)
    alone = Rivals(*(part[:1].detach() for part in pair))
    assert loss.item() == pytest.approx(loss_of(alone, form, margin=5.0) / 2)
    loss.backward()
    assert pair.negatives.grad is not None
    assert pair.negatives.grad[0].abs().sum() > 0
    assert pair.negatives.grad[1].abs().sum() == 0
    assert pair.negatives.grad.isfinite().all()


@pytest.mark.parametrize("end", [True, False])
def test_scores_of_stage_2_are_the_searchs(end: bool, tmp_path: Path) -> None:
    lm = tiny_llama(tmp_path, SPACE)
    codes = torch.tensor([[1, 2, 3], [4, 0, 1], [0, 0, 0], [2, 2, 2]])
    tokens = lm.pad(lm.tokenize(["a red circle", "blue"]))
    with torch.no_grad():
        found = written_log_probabilities(lm(tokens, codes), codes, lm, end=end).sum(dim=1)
    writer = make_writer(lm)
    for number, row in enumerate(codes):
        session = writer.begin(writer.encode(lm.tokenize([["a red circle", "blue"][number // 2]])))
        states, score = session.open(), 0.0
        for level, code in enumerate(row):
            score += writer.head.log_probabilities(states, level, "full")[0, 0, code].item()
            states = session.advance(lm.token_ids(row[None])[:, level : level + 1], torch.zeros(1, 1, dtype=torch.long))
        score += writer.head.end_log_probability(states).item() if end else 0.0
        assert found[number].item() == pytest.approx(score, abs=1e-4)


def stage2_config(chain: Chain, start: Path, output: Path, **options: Any) -> train_stage2.Config:
    settings = {**TRAIN, "epochs": 2, "validate_every": 1, "negatives": 3, "lr": 1e-3, "label_temperature": 0.05,
                "train_end": False, **options}  # fmt: skip
    settings.pop("dropout")
    return train_stage2.Config(dataset=chain.dataset, stage1=start, output=output, **settings)


def stage2_of(config: train_stage2.Config, tmp_path: Path) -> tuple[train_stage2.Stage2, RetrieverData]:
    data = read_data(config.dataset)
    run = runs.begin("retriever.train_stage2", config, inputs={"stage1": config.stage1})
    assert run is not None
    seed_everything(0)
    return train_stage2.Stage2(config, data, run, VokenLM.from_pretrained(config.stage1 / "model")), data


def test_negatives_are_what_the_search_confuses_with_the_right_picture(
    chain: Chain, retriever: Path, tmp_path: Path
) -> None:
    training, data = stage2_of(stage2_config(chain, retriever, tmp_path / "run"), tmp_path)
    training.find_negatives()
    train_rows = set(data.rows("train").tolist())
    filled = 0
    for query, picture in enumerate(training.train_split.pictures):
        negatives = [row for row in training.negatives[query] if row >= 0]
        filled += len(negatives)
        codes = {data.codes[row].tobytes() for row in negatives}
        assert set(negatives) <= train_rows
        assert data.codes[picture].tobytes() not in codes
        assert len(codes) == len(negatives)
    assert filled > 2 * len(training.negatives)  # of 3 each


def test_pictures_under_the_same_words_are_spared(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    dataset = copy_with(chain, tmp_path, lambda rows: [{**row, "query": "a picture"} for row in rows])
    config = stage2_config(chain._replace(dataset=dataset), retriever, tmp_path / "run")
    training, _ = stage2_of(config, tmp_path)
    training.find_negatives()
    assert (training.negatives == -1).all()
    published = dataclasses.replace(config, output=tmp_path / "published", spare_same_words=False)
    training, _ = stage2_of(published, tmp_path)
    training.find_negatives()
    assert (training.negatives >= 0).any()


def copy_with(
    chain: Chain, folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], split: str = "train"
) -> Path:
    """A copy of the retriever's dataset with other lines in one split."""
    import shutil

    copy = folder / "dataset"
    shutil.copytree(chain.dataset, copy)
    lines = [row for _, row in read_json_lines(copy / f"{split}.jsonl")]
    manifest = runs.read_manifest(copy, "retriever.prepare")
    write_json_lines(copy / f"{split}.jsonl", change(lines))
    runs.replace_outputs(manifest, [copy / name for name in manifest.outputs], manifest.facts)
    return copy


def test_patience_counts_epochs_and_not_mixtures(
    chain: Chain, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of each epoch's weights, and of their two mixtures: the training stops two epochs behind the best."""
    scores = iter([0.2, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    config = stage2_config(
        chain, retriever, tmp_path / "run", mix=(0.5, 0.75), patience=2, epochs=6, queries_per_epoch=16
    )

    def validate(self: Training) -> dict[str, float]:
        figures = {"val/R@1": next(scores)}
        self.checkpoint.keep_best(figures, self.lm.save_pretrained)
        return figures

    monkeypatch.setattr(Training, "validate", validate)
    monkeypatch.setattr(train_stage2.Stage2, "find_negatives", lambda self: None)
    training, _ = stage2_of(config, tmp_path)
    checkpoint = training.checkpoint
    while not checkpoint.over:
        checkpoint.epoch_ends()
        training.validate_mixtures()
    assert (checkpoint.epoch, checkpoint.best["epoch"], checkpoint.best["new_share"]) == (5, 3, 0.5)


@pytest.mark.parametrize("form", ["list-wise", "double-softmax", "margin", "prefix-margin"])
def test_stage_2_is_never_worse_than_its_start_on_val(
    form: Discriminative, chain: Chain, retriever: Path, tmp_path: Path
) -> None:
    config = stage2_config(chain, retriever, tmp_path / "run", discriminative=form)
    train_stage2.main(config)
    start = runs.read_manifest(retriever, "retriever.train").metrics
    end = runs.read_manifest(config.output, "retriever.train_stage2")
    assert end.metrics["val/mean"] >= start["val/mean"]
    assert end.facts["setting"] == "inductive"


def test_a_start_that_nothing_beats_is_kept_and_said(
    chain: Chain, retriever: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage2_config(chain, retriever, tmp_path / "run", lr=1e-12)
    train_stage2.main(config)
    assert "no epoch beat the start on val" in capsys.readouterr().out
    assert runs.read_manifest(config.output, "retriever.train_stage2").metrics["val/epoch"] == 0
    start, kept = (load_file(folder / "model" / "model.safetensors") for folder in (retriever, config.output))
    assert all(torch.equal(value, kept[name]) for name, value in start.items())


def test_a_mixture_of_weights_is_validated_and_the_training_goes_on_unmixed(
    chain: Chain, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, _ = stage2_of(stage2_config(chain, retriever, tmp_path / "run", lr=1e-2, mix=(0.25,)), tmp_path)
    training.find_negatives()
    run_epoch(training, Tracker(training.run.folder, job="x", config={}))
    new = {name: value.detach().clone() for name, value in training.lm.named_parameters()}
    seen: list[dict[str, torch.Tensor]] = []

    def validate(self: Training) -> dict[str, float]:
        seen.append({name: value.detach().clone() for name, value in self.lm.named_parameters()})
        self.checkpoint.best = {"mean": len(seen), "epoch": 1}  # each is better than the one before
        return {"val/R@1": float(len(seen))}

    monkeypatch.setattr(Training, "validate", validate)
    assert training.validate_mixtures() == {"val/R@1": 1.0, "val/R@1 at 0.25": 2.0}
    assert training.checkpoint.best["new_share"] == 0.25
    assert training.start.keys() == {name for name, value in training.lm.named_parameters() if value.requires_grad}
    for name, start in training.start.items():
        assert torch.equal(seen[0][name], new[name])
        assert torch.allclose(seen[1][name], 0.75 * start + 0.25 * new[name], atol=1e-6)
        assert not torch.equal(start, new[name])
    assert all(torch.equal(value, new[name]) for name, value in training.lm.named_parameters())


def test_stage_2_moves_the_right_pictures_ahead(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    """The discriminative loss falls when it alone is trained, against the same negatives."""
    config = stage2_config(
        chain, retriever, tmp_path / "run", epochs=12, lr=3e-3, label_temperature=0.0, discriminative_weight=100.0
    )
    training, _ = stage2_of(config, tmp_path)
    training.find_negatives()
    tracker = Tracker(training.run.folder, job="x", config={})
    losses: list[float] = []
    tracker.log = lambda values, **_: losses.append(values["train/loss"])  # type: ignore[method-assign]
    for _ in range(config.epochs):
        run_epoch(training, tracker)
    batches = len(training.batches(0))
    assert np.mean(losses[-batches:]) < 0.7 * np.mean(losses[:batches])


def stage2_of_encoder_decoder(chain: Chain, output: Path) -> Any:
    return stage2_config(chain, chain.root / "retriever", output)


def llama_config(chain: Chain, output: Path, **options: Any) -> train.Config:
    base = chain.root / "llama"
    if not base.is_dir():
        llama_folder(base)
    settings = {**TRAIN, "lora_rank": 4, "lora_dropout": 0.1, "gradient_checkpointing": True, **options}
    return train.Config(dataset=chain.dataset, language_model=str(base), kind="causal", output=output, **settings)


@pytest.mark.parametrize(
    ("command", "build", "weights", "call"),
    [
        (train_stage2, stage2_of_encoder_decoder, "model.safetensors", 9),
        (train, llama_config, "adapter_model.safetensors", 14),
    ],
)
def test_a_killed_training_ends_with_the_same_figures(
    command: Any, build: Any, weights: str, call: int, chain: Chain, retriever: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from models import training

    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    whole, cut = build(chain, tmp_path / "whole"), build(chain, tmp_path / "cut")
    command.main(whole)
    interrupted(monkeypatch, command.main, cut, torch.nn.utils, "clip_grad_norm_", call)
    first, second = (load_file(config.output / "model" / weights) for config in (whole, cut))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-6), name
    manifests = [read_json(config.output / "manifest.json") for config in (whole, cut)]
    assert manifests[0]["metrics"] == manifests[1]["metrics"]
    assert manifests[0]["outputs"]["curves.jsonl"] == manifests[1]["outputs"]["curves.jsonl"]


@pytest.mark.parametrize("steps", [3, 100])
def test_losses_that_are_read_later_are_the_same(
    steps: int, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU losses are looked at every few steps: curves, and the curve of a killed training, do not know of it."""
    from models import training

    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    at_once = encoder_decoder_config(chain, tmp_path / "at_once", accumulate=2)
    later, cut = (dataclasses.replace(at_once, output=tmp_path / name) for name in ("later", "cut"))
    train.main(at_once)
    monkeypatch.setitem(training.STEPS_UNREAD, "cpu", steps)
    train.main(later)
    interrupted(monkeypatch, train.main, cut, torch.nn.utils, "clip_grad_norm_", 7)
    curves = [(config.output / "curves.jsonl").read_bytes() for config in (at_once, later, cut)]
    assert curves[0] == curves[1] == curves[2]
    assert len(curves[0].splitlines()) > at_once.epochs


def test_a_compiled_training_is_the_same_training(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend that traces and does not need a compiler: names of weights stay, and so do the figures."""
    from models import stepper

    monkeypatch.setattr(stepper, "COMPILER", "aot_eager")
    traced: list[dict[str, Any]] = []
    compiled = torch.nn.Module.compile

    def watched(module: torch.nn.Module, **how: Any) -> None:
        traced.append(how)
        compiled(module, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    plain = encoder_decoder_config(chain, tmp_path / "plain", epochs=2, dropout=0.0)
    train.main(plain)
    assert traced == []
    other = dataclasses.replace(plain, output=tmp_path / "compiled", compile="always")
    train.main(other)
    assert traced == [{"backend": "aot_eager", "dynamic": True}]
    first, second = (load_file(config.output / "model" / "model.safetensors") for config in (plain, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name


@pytest.mark.parametrize("most", [1, 5, 16, 100])
def test_a_batch_in_pieces_is_the_same_batch(most: int, chain: Chain, tmp_path: Path) -> None:
    sums = {"optimizer": "sgd", "lr": 0.1}  # Adam would make a step of what rounding leaves of a gradient of zero
    whole = encoder_decoder_config(chain, tmp_path / "whole", epochs=2, dropout=0.0, **sums)
    train.main(whole)
    cut = dataclasses.replace(whole, output=tmp_path / "cut", at_once=most)
    train.main(cut)
    first, second = (load_file(config.output / "model" / "model.safetensors") for config in (whole, cut))
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name
    losses = [
        [row["train/loss"] for row in read_curves(config.output) if "train/loss" in row] for config in (whole, cut)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pieces_carry_the_weight_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    part = part_of(batch_of(np.arange(15)))
    pieces = part.pieces(3)
    assert [len(piece.own) for piece in pieces] == [3, 2, 2]
    assert np.concatenate([piece.own for piece in pieces]).tolist() == part.own.tolist()
    assert sum(piece.weight for piece in pieces) == pytest.approx(part.weight)
    assert part.pieces(None) == part.pieces(8) == [part]


def test_every_process_has_as_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With five and four captions of nine, and pieces of four: DeepSpeed's processes wait for each other in each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(part_of(batch_of(np.arange(9))).pieces(4))
    assert [[len(piece.own) for piece in pieces] for pieces in parts] == [[3, 2], [2, 2]]
    monkeypatch.setenv("RANK", "1")
    first, second = part_of(batch_of(np.arange(3))).pieces(1)
    assert len(first.own) == len(second.own) == 1
    assert [first.weight, second.weight] == pytest.approx([2 / 3, 0])


def test_a_gpu_without_a_compiler_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not gpu_compiles(torch.device("cpu"))
    monkeypatch.setattr("models.stepper.find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert gpu_compiles(torch.device("cuda"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not gpu_compiles(torch.device("cuda"))
    assert capsys.readouterr().out == "note: the model is not compiled, which takes a C compiler: a step takes longer\n"


def test_other_ways_of_sharing_a_model_are_refused() -> None:
    with pytest.raises(BadInput, match="share the model by MEGATRON_LM, which is not supported: write --multi_gpu"):
        check_launch(DistributedType.MEGATRON_LM)
    for known in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        check_launch(known)


def test_llama_with_adapters_from_data_to_recall(chain: Chain, tmp_path: Path) -> None:
    config = llama_config(chain, tmp_path / "llama", precision="fp32")
    train.main(config)
    files = {path.name for path in (config.output / "model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "vokens.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files  # the base is not copied
    manifest = runs.read_manifest(config.output, "retriever.train")
    assert {"val/R@1", "val/R@5", "val/R@10"} <= manifest.metrics.keys()
    found = retrieve.Config(
        dataset=chain.dataset, retriever=config.output, output=tmp_path / "found", split="val", pools=("val",),
        beams=config.beams, precision="fp32", device="cpu",
    )  # fmt: skip
    retrieve.main(found)
    lines = [row for _, row in read_json_lines(tmp_path / "found" / "val.jsonl")]
    recall = np.mean([row["image"] in row["ranked"][:1] for row in lines])
    assert recall == pytest.approx(manifest.metrics["val/R@1"])


def test_adapters_embeddings_and_head_learn_and_the_rest_stays(tmp_path: Path) -> None:
    base = llama_folder(tmp_path / "llama")
    prompt = "a picture of {query} drawing"
    lm = build_causal(
        str(base), space=SPACE, codebooks=codebooks(SPACE, 12), max_source=16, prompt=prompt,
        lora=Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj")),
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in lm.named_parameters()}
    trained = [value for value in lm.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    codes = torch.tensor([[1, 2, 3], [4, 0, 1]])
    tokens = lm.pad(lm.tokenize(["a red circle", "blue"]))
    for _ in range(60):
        loss = -written_log_probabilities(lm(tokens, codes), codes, lm, end=True).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    for name, value in lm.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name
    moved = {name.rsplit(".", 1)[0] for name, value in lm.named_parameters() if value.requires_grad}
    assert {"model.lm_head.modules_to_save.default", "model.model.embed_tokens.modules_to_save.default"} <= moved
    assert sum("lora_A" in name for name in moved) == 2 * 3
    lm.eval()
    lm.save_pretrained(tmp_path / "saved")
    again = VokenLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(lm(tokens, codes), again(tokens, codes), atol=1e-4)
    for each in (lm, again):
        writer = make_writer(each)
        states = writer.begin(writer.encode(each.tokenize(["a red circle", "blue"]))).open()
        expected = again(tokens, codes)[:, 0].log_softmax(dim=1)[:, again.first_voken : again.first_voken + 5]
        assert torch.allclose(writer.head.log_probabilities(states, 0, "full")[:, 0], expected, atol=1e-4)


def test_adapters_are_merged_in_the_arithmetic_of_the_search(tmp_path: Path) -> None:
    """A search in bf16 over weights published in fp16 would need a second copy of all of them."""
    folder = llama_folder(tmp_path / "llama")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    lm = build_causal(
        str(folder), space=SPACE, codebooks=codebooks(SPACE, 16), max_source=8, lora=Lora(2, 4.0, 0.0, ())
    )
    lm.save_pretrained(tmp_path / "saved")
    assert {value.dtype for value in VokenLM.from_pretrained(tmp_path / "saved").parameters()} == {torch.float16}
    device = torch.device("cpu")
    again = VokenLM.from_pretrained(tmp_path / "saved", dtype=weights_dtype("bf16", device))
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert weights_dtype("int8", device) is None


def test_a_base_model_that_moved_is_one_clear_line(chain: Chain, tmp_path: Path) -> None:
    lm = build_causal(
        str(llama_folder(tmp_path / "llama")), space=SPACE, codebooks=codebooks(SPACE, 16), max_source=8,
        lora=Lora(2, 4.0, 0.0, ()),
    )  # fmt: skip
    lm.save_pretrained(tmp_path / "saved")
    (tmp_path / "llama").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"adapts .*llama, which cannot be loaded.*correct base_model_name_or_path"):
        VokenLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"`lora_targets` no_proj: .* no module of that name, .*; did you mean o_proj"):
        build_causal(
            str(tmp_path / "elsewhere"), space=SPACE, codebooks=codebooks(SPACE, 16), max_source=8,
            lora=Lora(2, 4.0, 0.0, ("no_proj",)),
        )  # fmt: skip


def test_codebooks_keep_lengths_and_angles_in_a_wider_model() -> None:
    books = codebooks(SPACE, 12)
    wide = widened(books, 16, "x")
    assert wide.shape == (3, 5, 16)
    flat, turned = books.reshape(15, 12), wide.reshape(15, 16)
    assert np.allclose(turned @ turned.T, flat @ flat.T, atol=1e-5)
    assert widened(books, 12, "x") is books


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_parts_of_a_batch_weigh_as_the_batch(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.random.default_rng(0).random(100)
    for size in (1, 4, 7):
        batch = np.random.default_rng(size).permutation(100)[:size]
        means: list[float] = []
        seen: list[int] = []
        for number in range(processes):
            monkeypatch.setenv("RANK", str(number))
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            part = part_of(batch_of(batch))
            means.append(losses[part.rows].mean() * part.weight)
            seen += part.rows.tolist() if part.weight else []
        assert np.mean(means) == pytest.approx(losses[batch].mean())
        assert sorted(seen) == sorted(batch.tolist())


def test_contradictions_are_named_before_any_work(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--lora-rank 8 is for --kind causal, not for --kind seq2seq"):
        train.Config(dataset=tmp_path, language_model="t5-base", output=tmp_path / "x", lora_rank=8)
    with pytest.raises(BadInput, match="`negatives` must be at least 1"):
        stage2_config(chain, tmp_path, tmp_path / "x", negatives=0)
    with pytest.raises(BadInput, match=r"run scripts/09_train_retriever_t5\.sh first"):
        train_stage2.main(stage2_config(chain, tmp_path, tmp_path / "x"))


def test_stage_2_of_a_causal_model_is_refused(chain: Chain, tmp_path: Path) -> None:
    config = llama_config(chain, tmp_path / "llama", epochs=1)
    train.main(config)
    with pytest.raises(BadInput, match="is a causal model: stage 2 trains seq2seq and encoder-decoder"):
        train_stage2.main(stage2_config(chain, config.output, tmp_path / "stage2"))


def test_t5_goes_through_stage_2_and_search(chain: Chain, tmp_path: Path) -> None:
    start = t5_config(chain, tmp_path / "t5")
    train.main(start)
    config = stage2_config(chain, start.output, tmp_path / "stage2", train_end=True, score_end=True, accumulate=2)
    train_stage2.main(config)
    retrieve.main(
        retrieve.Config(
            dataset=chain.dataset, retriever=config.output, output=tmp_path / "found", score_end=True, beams=8,
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    assert len(list(read_json_lines(tmp_path / "found" / "test.jsonl"))) == 24


def pseudo_folder(chain: Chain, folder: Path, lines: list[dict[str, Any]]) -> Path:
    """A finished folder of pseudo queries."""
    folder.mkdir()
    write_json_lines(folder / "pseudo.jsonl", lines)
    manifest = read_json(chain.dataset / "manifest.json")
    outputs = {"pseudo.jsonl": hash_file(folder / "pseudo.jsonl")}
    manifest.update(command="retriever.pseudo_queries.generate", outputs=outputs)
    runs.write_manifest(folder, manifest)
    return folder


def test_pseudo_queries_make_a_training_transductive(chain: Chain, tmp_path: Path) -> None:
    data = read_data(chain.dataset)
    images = [data.images[row] for row in (*data.rows("val"), *data.rows("test"))]
    lines = [{"image": image, "query": f"a {image[:-4].replace('-', ' ')}"} for image in images]
    folder = pseudo_folder(chain, tmp_path / "pseudo", lines)
    config = encoder_decoder_config(chain, tmp_path / "run", pseudo_queries=folder, epochs=1)
    other = dataclasses.replace(config, output=tmp_path / "other")
    run = runs.begin("retriever.train", other, inputs=other.inputs())
    assert run is not None
    training = Training(other, data, run, train.build_model(other, data))
    assert training.train_split.texts[-len(lines) :] == [line["query"] for line in lines]
    assert [data.images[row] for row in training.train_split.pictures[-len(lines) :]] == images
    train.main(config)
    assert runs.read_manifest(config.output, "retriever.train").facts["setting"] == "transductive"
    again = stage2_config(chain, config.output, tmp_path / "stage2", epochs=1)
    train_stage2.main(again)  # without the pseudo queries, but from a start that has seen them
    assert runs.read_manifest(again.output, "retriever.train_stage2").facts["setting"] == "transductive"
    found = retrieve.Config(dataset=chain.dataset, retriever=again.output, output=tmp_path / "found", device="cpu")
    retrieve.main(found)
    assert runs.read_manifest(found.output, "retriever.retrieve").facts["setting"] == "transductive"


def test_a_training_goes_on_from_another(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    """With a rate of nearly nothing it ends where it started, and not where it would start by itself."""
    config = encoder_decoder_config(chain, tmp_path / "more", start=retriever, epochs=1, lr=1e-12, warmup=0)
    train.main(config)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (retriever, config.output))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    manifest = runs.read_manifest(config.output, "retriever.train")
    assert manifest.inputs["start"]["fingerprint"] == runs.fingerprint(retriever)
    assert manifest.facts["setting"] == "inductive"


def test_a_start_that_does_not_fit_is_refused(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--start is for --kind seq2seq and encoder-decoder"):
        llama_config(chain, tmp_path / "run", start=retriever)
    other = dataclasses.replace(
        encoder_decoder_config(chain, tmp_path / "run", start=retriever), kind="seq2seq", language_model="t5-base"
    )
    with pytest.raises(BadInput, match="was trained with --kind encoder-decoder: do the same here"):
        train.main(other)
    for name, words in (("text_slot", "without --text-slot"), ("max_source", "with --max-source")):
        options: dict[str, Any] = {name: {"text_slot": True, "max_source": 7}[name]}
        other = encoder_decoder_config(chain, tmp_path / "run", start=retriever, **options)
        with pytest.raises(BadInput, match=f"was trained {words}.*: do the same here"):
            train.main(other)
    image = read_data(chain.dataset).images[read_data(chain.dataset).rows("test")[0]]
    told = pseudo_folder(chain, tmp_path / "pseudo", [{"image": image, "query": "round"}])
    transductive = encoder_decoder_config(chain, tmp_path / "first", pseudo_queries=told, epochs=1)
    train.main(transductive)
    with pytest.raises(BadInput, match="was trained with --pseudo-queries: give them here too"):
        train.main(encoder_decoder_config(chain, tmp_path / "run", start=transductive.output))
    assert not (tmp_path / "run").exists()


def test_pseudo_queries_from_other_captions_are_refused(chain: Chain, tmp_path: Path) -> None:
    """Where pictures have changed splits, a caption that was a train picture's may be one of test now."""
    folder = pseudo_folder(chain, tmp_path / "pseudo", [{"image": "red-circle.png", "query": "a red circle"}])
    manifest = read_json(folder / "manifest.json")
    manifest["facts"]["captions_fingerprint"] = "another"
    runs.write_manifest(folder, manifest)
    with pytest.raises(BadInput, match=r"was made from other captions.*08_generate_pseudo_query\.sh --overwrite"):
        train.main(encoder_decoder_config(chain, tmp_path / "run", pseudo_queries=folder))


def test_more_processes_than_captions_in_a_batch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(BadInput, match=r"`batch_size` 1 counts the examples of all 8 processes: raise it to 8"):
        train.Config(dataset=tmp_path, language_model="x", output=tmp_path / "x", batch_size=1, accumulate=16)


def test_pseudo_queries_of_other_pictures_are_refused(chain: Chain, tmp_path: Path) -> None:
    folder = pseudo_folder(chain, tmp_path / "pseudo", [{"image": "x.png", "query": "a red circle"}])
    with pytest.raises(BadInput, match=r"pseudo\.jsonl, line 1: .* has no picture x\.png"):
        train.main(encoder_decoder_config(chain, tmp_path / "run", pseudo_queries=folder))
    empty = pseudo_folder(chain, tmp_path / "empty", [])
    with pytest.raises(BadInput, match="holds no pseudo queries"):
        train.main(encoder_decoder_config(chain, tmp_path / "run2", pseudo_queries=empty))


LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def sharded_checkpoint(folder: Path, sizes: dict[str, int], shards: int) -> dict[str, tuple[int, ...]]:
    """The layout of a published LLaMA at full size: an index, and files whose data are holes on the disk."""
    folder.mkdir()
    config = LlamaConfig(**sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer(["<unk>", "</s>", "<pad>", "<s>"], end_only=False, size=sizes["vocab_size"]).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in sorted(shapes)[shard::shards]:
            begin, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


@pytest.mark.parametrize(("sizes", "parameters"), [(LLAMA_2_7B, 6_738_415_616), (LLAMA_3_8B, 8_030_261_248)])
def test_a_full_size_sharded_checkpoint_loads_and_takes_adapters(
    sizes: dict[str, int], parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = sharded_checkpoint(tmp_path / "llama", sizes, shards=3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    read = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **options: read(name, device_map="meta", **options)
    )
    space = VokenSpace(4, 1024, shared=True)
    books = np.zeros((1, 1024, 768), dtype=np.float32)
    lm = build_causal(
        str(tmp_path / "llama"), space=space, codebooks=books, max_source=128, dtype=torch.bfloat16,
        lora=Lora(8, 16.0, 0.1, ()),
    )  # fmt: skip
    words, width, layers = sizes["vocab_size"] + 1024, sizes["hidden_size"], sizes["num_hidden_layers"]
    trained = {name: value for name, value in lm.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    whole = [tuple(value.shape) for name, value in trained.items() if "modules_to_save" in name]
    assert whole == [(words, width)] * 2  # embeddings and head, with the vokens behind the words
    keys = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    adapters = sum(value.numel() for name, value in trained.items() if "lora_" in name)
    assert adapters == layers * 8 * (width + width + width + keys)  # of the projections of queries and values
    assert lm.first_voken == sizes["vocab_size"]


def test_a_checkpoint_with_holes_is_one_clear_line(tmp_path: Path) -> None:
    sizes = {**LLAMA_2_7B, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    sharded_checkpoint(tmp_path / "llama", sizes, shards=2)
    books = codebooks(SPACE, 16)
    build_causal(str(tmp_path / "llama"), space=SPACE, codebooks=books, max_source=8)
    index = tmp_path / "llama" / "model.safetensors.index.json"
    values = read_json(index)
    values["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    shard = tmp_path / "llama" / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="llama cannot be loaded"):
        build_causal(str(tmp_path / "llama"), space=SPACE, codebooks=books, max_source=8)
    shard.unlink()
    with pytest.raises(BadInput, match="llama cannot be loaded"):
        build_causal(str(tmp_path / "llama"), space=SPACE, codebooks=books, max_source=8)
    for name in [name for name, file in values["weight_map"].items() if file == shard.name]:
        values["weight_map"].pop(name)
    index.write_text(json.dumps(values))
    with pytest.raises(BadInput, match=r"lacks \d+ of the model's weights, .* among them"):
        build_causal(str(tmp_path / "llama"), space=SPACE, codebooks=books, max_source=8)


def test_an_epoch_of_drawn_captions_reads_no_others(chain: Chain, tmp_path: Path) -> None:
    config = encoder_decoder_config(chain, tmp_path / "run", queries_per_epoch=20, epochs=3)
    data = read_data(chain.dataset)
    run = runs.begin("retriever.train", config, inputs=config.inputs())
    assert run is not None
    training = Training(config, data, run, train.build_model(config, data))
    epochs = [np.concatenate(training.batches(epoch)) for epoch in range(3)]
    assert [len(np.unique(epoch)) for epoch in epochs] == [20] * 3
    assert len(training.train_split.texts) == len(np.unique(np.concatenate(epochs))) < len(training.pairs.texts)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3
    pairs = set(zip(training.pairs.texts, training.pairs.pictures.tolist(), strict=True))
    assert set(zip(training.train_split.texts, training.train_split.pictures.tolist(), strict=True)) < pairs
