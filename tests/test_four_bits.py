"""Adapters around weights in 4 bits: what they compute, what is saved, what is refused. All of it runs on the CPU."""

import dataclasses
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import four_bits
from models.decoding import make_writer
from models.scorer import ImageTokens, Scorer, build_scorer
from models.scorer import Lora as ScorerLora
from models.stepper import Stepper
from models.voken_lm import Lora, VokenLM, build_causal
from reranker import train as reranker_train
from retriever import train
from retriever.losses import written_log_probabilities
from tests.chain import Chain
from tests.test_pipeline import interrupted
from tests.test_processes import start, train_anew
from tests.test_training import llama_config
from tests.tiny import codebooks, llama_folder
from tools import runs
from tools.errors import BadInput
from tools.vokens import VokenSpace

SPACE = VokenSpace(3, 5, shared=False)
CPU = torch.device("cpu")
PROMPT = "a picture of {query} drawing"
CODES = torch.tensor([[1, 2, 3], [4, 0, 1]])
TEXTS = ["a red circle", "blue"]
installed = pytest.mark.skipif(find_spec(four_bits.PACKAGE) is None, reason="bitsandbytes is not installed")


def built(base: Path, *, packed: bool, dtype: torch.dtype = torch.float32) -> VokenLM:
    return build_causal(
        str(base), space=SPACE, codebooks=codebooks(SPACE, 12), max_source=16, prompt=PROMPT, dtype=dtype,
        lora=Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj")), four_bits=CPU if packed else None,
    )  # fmt: skip


def loss_of(lm: VokenLM) -> torch.Tensor:
    tokens = lm.pad(lm.tokenize(TEXTS))
    return -written_log_probabilities(lm(tokens, CODES), CODES, lm, end=True).mean()


def learned(lm: VokenLM, steps: int = 40) -> VokenLM:
    optimizer = torch.optim.AdamW([value for value in lm.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of(lm).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose rows hold several blocks of 64 weights, which are rounded together."""
    return llama_folder(tmp_path_factory.mktemp("models") / "llama", width=128, feed_forward=192)


@installed
def test_the_linear_layers_but_the_head_are_packed(base: Path) -> None:
    whole, packed = built(base, packed=False), built(base, packed=True)
    frozen = {name: value for name, value in packed.named_parameters() if value.dtype == four_bits.STORED_AS}
    of_whole = dict(whole.named_parameters())
    assert {name.split(".")[-1 - ("base_layer" in name) - 1] for name in frozen} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name, value in frozen.items():
        assert not value.requires_grad
        assert value.numel() * 2 == of_whole[name].numel()
    trained = {name for name, value in packed.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in whole.named_parameters() if value.requires_grad}
    assert all(packed.get_parameter(name).dtype == torch.float32 for name in trained)


@installed
def test_the_loss_is_that_of_the_rounded_weights(base: Path) -> None:
    whole, packed = (built(base, packed=each).eval() for each in (False, True))
    rounded = four_bits.reader("float32")(type(whole.model), str(base), dtype="auto").state_dict()
    for name, value in whole.model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in rounded and value.shape == rounded[plain].shape and "layernorm" not in plain:
            value.data.copy_(rounded[plain])
    with torch.no_grad():
        assert loss_of(packed).item() == pytest.approx(loss_of(whole).item(), rel=1e-4)
        assert loss_of(packed).item() != pytest.approx(loss_of(built(base, packed=False).eval()).item(), rel=1e-6)


@installed
def test_gradients_are_the_same_after_a_validation(base: Path) -> None:
    lm = built(base, packed=True, dtype=torch.bfloat16)
    gradients = []
    for _ in range(2):
        lm.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(lm).backward()
        gradients.append({name: value.grad.clone() for name, value in lm.named_parameters() if value.grad is not None})
        with torch.no_grad():
            loss_of(lm.eval())
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_read_as_it_was_trained(base: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    lm = learned(built(base, packed=True, dtype=dtype))
    lm.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    rows = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    tables = {name: value for name, value in rows.items() if "embed_tokens" in name or "lm_head" in name}
    assert {len(value) for value in tables.values()} == {lm.first_voken + len(SPACE.tokens)}
    again = VokenLM.from_pretrained(tmp_path / "saved")
    assert next(again.parameters()).dtype == dtype
    assert not four_bits.holds_four_bits(again)
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert loss_of(again.float()).item() == pytest.approx(loss_of(lm).item(), abs=tolerance)
    again.save_pretrained(tmp_path / "whole")  # as an export does: a plain model, without bitsandbytes
    assert "quantization_config" not in (tmp_path / "whole" / "config.json").read_text()
    plain = VokenLM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in again.named_parameters())


@installed
def test_a_search_gives_the_log_probabilities_of_the_forward_pass(base: Path) -> None:
    lm = learned(built(base, packed=True))
    writer = make_writer(lm, "fp32")
    with torch.no_grad():
        session = writer.begin(writer.encode(lm.tokenize(TEXTS)))
        states = session.open()
        expected = lm(lm.pad(lm.tokenize(TEXTS)), CODES).log_softmax(dim=-1)
        for level, start in enumerate(lm.level_starts):
            found = writer.head.log_probabilities(states, level, "full")[:, 0]
            assert torch.allclose(found, expected[:, level, start : start + 5], atol=1e-3)
            states = session.advance(lm.token_ids(CODES)[:, level : level + 1], torch.zeros(2, 1, dtype=torch.long))
    assert four_bits.holds_four_bits(lm)


@installed
def test_a_search_in_bf16_is_near(base: Path) -> None:
    lm = learned(built(base, packed=True, dtype=torch.bfloat16))
    writer = make_writer(lm, "bf16")
    with torch.no_grad():
        states = writer.begin(writer.encode(lm.tokenize(TEXTS))).open()
        found = writer.head.log_probabilities(states, 0, "full")[:, 0]
        expected = lm(lm.pad(lm.tokenize(TEXTS)), CODES)[:, 0].float().log_softmax(dim=-1)
    assert found.argmax(dim=1).tolist() == CODES[:, 0].tolist()
    assert torch.allclose(found, expected[:, lm.first_voken : lm.first_voken + 5], atol=0.3, rtol=0.05)


@installed
def test_a_reranker_scores_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    images = ImageTokens(2, 4)
    lora = ScorerLora(4, 8.0, 0.0, ("q_proj", "v_proj"), ("embed_tokens", "input_layernorm", "norm"))
    scorer = build_scorer(str(base), images=images, dtype=torch.float32, lora=lora, four_bits=CPU)
    place = torch.arange(2)
    pairs = scorer.pairs(np.array([[0, 1], [2, 3]]), scorer.query_ids(TEXTS), place, place)
    optimizer = torch.optim.AdamW([value for value in scorer.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(10):
        scores = scorer(pairs)
        (scores[1] - scores[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    scorer.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = scorer(pairs)
        assert expected[0] > expected[1]
        for dtype in (None, torch.float32):
            assert torch.allclose(Scorer.from_pretrained(tmp_path, dtype)(pairs), expected, atol=1e-3)


@installed
def test_a_killed_training_ends_with_the_same_figures(
    chain: Chain, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import training

    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    options: dict[str, Any] = {"load_in_4bit": True, "precision": "fp32", "device": "cpu"}
    whole, cut = (
        dataclasses.replace(llama_config(chain, tmp_path / name, **options), language_model=str(base))
        for name in ("whole", "cut")
    )
    train.main(whole)
    kept: list[set[str]] = []
    state_of = Stepper.state

    def noted(stepper: Stepper, shards: Path) -> dict[str, Any]:
        state = state_of(stepper, shards)
        kept.append(set(state["model"]))
        return state

    monkeypatch.setattr(Stepper, "state", noted)
    interrupted(monkeypatch, train.main, cut, torch.nn.utils, "clip_grad_norm_", 14)
    assert not any("absmax" in name or "quant_state" in name for name in kept[-1])  # of weights that never change
    first, second = (load_file(each.output / "model" / "adapter_model.safetensors") for each in (whole, cut))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-6), name
    assert runs.read_manifest(cut.output, "retriever.train").config["load_in_4bit"] is True


@installed
def test_training_on_two_processes(chain: Chain, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "load_in_4bit": True, "precision": "fp32", "device": "cpu", "lora_dropout": 0.0, "epochs": 1,
    }  # fmt: skip
    one, two = (
        dataclasses.replace(llama_config(chain, tmp_path / name, **options), language_model=str(base))
        for name in ("one", "two")
    )
    train.main(one)
    started = start(partial(train_anew, train.main, two), tmp_path / "log", anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    first, second = (load_file(each.output / "model" / "adapter_model.safetensors") for each in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-4), name


def test_it_is_for_adapters_alone(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"`load_in_4bit` is for `lora_rank` above 0"):
        train.Config(dataset=tmp_path, language_model="x", kind="causal", output=tmp_path, load_in_4bit=True)
    with pytest.raises(BadInput, match=r"--load-in-4bit is for a trained model"):
        reranker_train.Config(
            lists=tmp_path, tokens=tmp_path, language_model="x", output=tmp_path, load_in_4bit=True, new_layers=2
        )


@installed
def test_the_cpu_has_to_be_named(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"`load_in_4bit` needs a GPU, and torch sees none: .* `device` cpu"):
        train.main(llama_config(chain, tmp_path / "llama", load_in_4bit=True, device=None))
    assert not (tmp_path / "llama").exists()


def test_without_bitsandbytes_one_line_says_what_to_install(
    chain: Chain, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bits, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"`load_in_4bit` needs bitsandbytes: install it with 'pip install"):
        train.main(llama_config(chain, tmp_path / "llama", load_in_4bit=True, device="cpu"))
    assert not (tmp_path / "llama").exists()
    lm = built(base, packed=False)
    lm.rounded_in = "float32"
    lm.save_pretrained(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"trained with `load_in_4bit`, .* bitsandbytes: install it"):
        VokenLM.from_pretrained(tmp_path / "saved")


def test_a_bitsandbytes_that_does_not_fit_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires a newer one\nand more lines")

    monkeypatch.setattr(four_bits, "load_whole", refuse)
    with pytest.raises(BadInput, match=r"`load_in_4bit` cannot use bitsandbytes: Using .* a newer one$"):
        built(base, packed=True)
