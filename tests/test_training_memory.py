"""The memory of a training: weights as the models have them, activations as autograd keeps them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.kernels import as_on_a_gpu
from models.scorer import LORA_TARGETS
from tools.training_memory import SHAPES, Shape, Training, layer_bytes, need, read_shape, shape_from

TEXTS, TOKENS = 3, 12


def kept_bytes(forward: Callable[[], object], weights: Iterable[nn.Parameter]) -> int:
    """What the backward pass of a forward pass in bf16 keeps, without weights and their copies."""
    shapes = {shape for each in weights for shape in (tuple(each.shape), tuple(each.shape[::-1]))}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, as_on_a_gpu(), torch.autocast("cpu", torch.bfloat16):
        forward()
    return sum(each.untyped_storage().nbytes() for each in kept.values())


def a_layer(kept: Callable[[int], int]) -> float:
    """Bytes of one layer, from models of two and of four."""
    return (kept(4) - kept(2)) / 2


@pytest.mark.parametrize("written", [1, 4])
def test_a_layer_of_t5(written: int) -> None:
    sizes: dict[str, Any] = {"d_model": 96, "d_ff": 320, "num_heads": 4, "d_kv": 24}

    def kept(layers: int) -> int:
        config = T5Config(vocab_size=50, num_layers=layers, decoder_start_token_id=0, dropout_rate=0.2, **sizes)
        model = T5ForConditionalGeneration(config).train()
        ids = torch.randint(1, 50, (TEXTS, TOKENS))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        answers = torch.randint(1, 50, (TEXTS * written, 5))

        def forward() -> object:
            states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat_interleave(written, dim=0)),
                attention_mask=mask.repeat_interleave(written, dim=0),
                decoder_input_ids=answers,
                use_cache=False,
            ).logits

        return kept_bytes(forward, model.parameters())

    shape = Shape(2, 96, 320, 50, 4, 96, gated=False, encoder=True, tied=True)
    assert layer_bytes(Training(shape, TEXTS, TOKENS, written)) == pytest.approx(a_layer(kept), rel=0.1)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LORA_TARGETS])
def test_a_layer_of_llama_with_adapters(targets: tuple[str, ...]) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4}

    def kept(layers: int) -> int:
        model = LlamaModel(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes)).to(torch.bfloat16)
        adapters = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, lora_dropout=0.1, target_modules=list(targets))
        adapted = get_peft_model(model, adapters).train()
        states = torch.randn(TEXTS, TOKENS, 192, requires_grad=True)
        mask = torch.ones(TEXTS, TOKENS, dtype=torch.long)
        mask[0, -2:] = 0
        return kept_bytes(
            lambda: model(inputs_embeds=states, attention_mask=mask, use_cache=False), adapted.parameters()
        )

    shape = Shape(2, 192, 512, 50, 4, 192, gated=True, encoder=False, tied=False)
    training = Training(shape, TEXTS, TOKENS, rank=2, adapted=len(targets))
    assert layer_bytes(training) == pytest.approx(a_layer(kept), rel=0.15)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("t5-base", 222.9), ("t5-large", 737.7), ("meta-llama/Llama-2-7b-hf", 6738), ("meta-llama/Meta-Llama-3-8B", 8030)],
)
def test_the_models_of_the_recipes_have_their_published_sizes(name: str, millions: float) -> None:
    assert SHAPES[name].parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_frozen_weights_in_4_bits_take_what_a_llama_of_7b_has() -> None:
    shape = SHAPES["meta-llama/Llama-2-7b-hf"]
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    linear = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]
    scales = sum(-(-size // 64) + 4 * -(-size // (64 * 256)) for size in linear)
    packed = Training(shape, 1, 1, rank=8, four_bits=True)
    assert packed.frozen_bytes == pytest.approx(sum(linear) // 2 + scales + 2 * 2 * 32000 * 4096, rel=1e-6)
    assert packed.frozen_bytes / packed._replace(four_bits=False).frozen_bytes == pytest.approx(0.287, abs=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
        ),
        lambda: LlamaModel(
            LlamaConfig(
                vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=True,
            )
        ),
    ],
)  # fmt: skip
def test_sizes_are_read_from_a_models_configuration(model: Callable[[], Any], tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    shape = read_shape(tmp_path / "config.json")
    assert shape is not None
    matrices = sum(each.numel() for each in made.parameters() if each.ndim > 1)
    assert shape.parameters == pytest.approx(matrices, rel=0.01)  # and tables of relative positions


def test_what_is_no_language_model_has_no_sizes(tmp_path: Path) -> None:
    assert shape_from({"model_type": "blip-2", "vision_config": {}}) is None
    assert read_shape(tmp_path / "not.json") is None
    (tmp_path / "broken.json").write_text("{")
    assert read_shape(tmp_path / "broken.json") is None


def test_memory_by_hand() -> None:
    shape = Shape(2, 8, 16, 100, 2, 8, gated=False, encoder=True, tied=True)
    weights = 2 * (2 * (4 * 64 + 2 * 128) + 4 * 64) + 800
    assert shape.parameters == weights
    assert need(Training(shape, 4, 10)).fixed == 16 * weights
    assert need(Training(shape, 4, 10, copies=1)).fixed == 20 * weights
    causal = Shape(2, 8, 16, 100, 2, 8, gated=True, encoder=False, tied=False)
    adapted = Training(causal, 4, 10, rank=2, new_tokens=20)
    trained = 2 * 2 * 2 * 2 * 8 + 2 * 120 * 8
    assert need(adapted).fixed == 16 * trained + 2 * causal.parameters
    assert need(adapted._replace(checkpointing=True)).activations < need(adapted).activations
    assert (
        need(adapted._replace(searched=True, sequences=1, tokens=1, scored=0)).activations
        == 2 * causal.parameters + 4 * trained
    )
    assert need(adapted).peak > need(adapted).fixed + need(adapted).activations
