"""SEED-2's image tokenizer: the original's own figures, an independent forward, every key, causality, files."""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from models.seed_tokenizer import (
    Attention,
    KeyAccount,
    Preprocess,
    SeedConfig,
    SeedTokenizer,
    convert_state,
)
from tests.seed_files import QFORMER, VISUAL, decoder_shapes, quantizer_shapes, text_keys, vision_shapes
from tools.errors import BadInput

State = dict[str, Tensor]
FULL = SeedConfig()
GOLDEN = SeedConfig(
    image_size=28,
    patch_size=14,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    vision_hidden=139,
    width=48,
    layers=2,
    heads=4,
    hidden=96,
    queries=32,
    codebook_size=64,
    code_width=8,
)
SMALL = dataclasses.replace(  # 9 patches; odd depths; no two widths alike
    GOLDEN, image_size=42, vision_depth=3, width=40, layers=3, hidden=56, queries=7, codebook_size=50, code_width=6
)
# Of the original modules on the weights that `golden_values` gives, float32 on a CPU.
GOLDEN_IDS = [
    [int(number) for number in row.split()]
    for row in (
        "9 18 11 34 33 34 52 52 9 34 34 37 37 22 9 52 6 37 34 37 34 11 34 34 58 6 35 34 34 11 34 37",
        "45 18 50 58 57 34 45 45 9 37 34 50 56 22 9 22 34 34 8 8 34 40 45 34 34 6 34 34 34 45 9 18",
    )
]
GOLDEN_STATES = {(0, 0): [-1.22569, -0.60170, 0.29477, 0.28400], (0, 4): [0.68752, -0.81545, 0.18115, 1.87434]}
GOLDEN_QUERIES = {(0, 31): [0.44496, -0.19978, 0.20339, 0.04265]}
GOLDEN_VECTORS = {
    (0, 0): [2.6405, 2.4154, 1.7808, 1.0211, -2.4083, 1.4496, -0.6098, 0.2598],
    (0, 16): [1.3912, 0.8138, -1.0875, 5.0257, 2.0288, 1.5277, 2.3818, -1.6425],
    (0, 31): [2.1398, -1.8434, 0.1759, 3.1508, -0.7120, -0.9510, 3.0616, -3.6180],
    (1, 31): [2.4200, -0.5122, 0.4918, -0.7072, -3.0506, -2.8348, -0.1035, 0.9788],
}


def golden_values(name: str, *shape: int) -> Tensor:
    """Pseudo-random numbers in [-1, 1) that follow from a name, in float64."""
    seed = zlib.crc32(name.encode()) % 10007
    positions = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64)
    waves = 43758.5453 * torch.sin(12.9898 * positions + 78.233 * (seed + 1))
    return (2 * (waves - waves.floor()) - 1).reshape(shape)


def golden_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The golden weights of one tensor, by its full name in SEED."""
    values = golden_values(name, *shape)
    if len(shape) == 1:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)
    elif name in ("query_tokens", f"{VISUAL}pos_embed", f"{VISUAL}cls_token"):
        values = 0.5 * values
    elif name != "quantize.embedding.weight":
        values = values * (3 / math.prod(shape[1:])) ** 0.5
        if name.startswith("encode_task_layer.") or ".query.weight" in name:
            values = 3 * values
    return values.float()


def golden_states(config: SeedConfig = GOLDEN, *, blocks: int | None = None) -> tuple[State, State]:
    """State dicts of SEED's own file and of the EVA file, whose names have no prefix."""
    vision = vision_shapes(config, blocks or config.vision_depth)
    return (
        {key: golden_tensor(key, shape) for key, shape in quantizer_shapes(config).items()},
        {key: golden_tensor(f"{VISUAL}{key}", shape) for key, shape in vision.items()},
    )


def tokenizer_of(quantizer: State, vision: State, config: SeedConfig, *, attention: Attention) -> SeedTokenizer:
    state, _ = convert_state(quantizer, vision, config)
    model = SeedTokenizer(config, attention=attention)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def golden_pixels() -> Tensor:
    return (1.7 * golden_values("image", 2, 3, 28, 28)).float()


@pytest.fixture(params=["sdpa", "eager"])
def golden(request: pytest.FixtureRequest) -> SeedTokenizer:
    return tokenizer_of(*golden_states(), GOLDEN, attention=request.param)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The golden weights as the two published files have them."""
    quantizer, vision = golden_states()
    torch.save(quantizer, tmp_path / "seed_quantizer.pt")
    torch.save(vision, tmp_path / "eva_vit_g.pth")
    return tmp_path / "seed_quantizer.pt", tmp_path / "eva_vit_g.pth"


def naive_forward(weights: dict[str, NDArray[np.float64]], pixels: Tensor, config: SeedConfig) -> dict[str, Tensor]:
    """The tokenizer written out on SEED's names, in float64."""
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = ((centred**2).mean(dim=-1, keepdim=True) + eps).sqrt()
        return centred / deviation * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, *, causal: bool = False) -> Tensor:
        split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
        scores = split[0] @ split[1].transpose(2, 3) / split[0].shape[-1] ** 0.5
        if causal:
            later = torch.arange(scores.shape[3])[None, :] > torch.arange(scores.shape[2])[:, None]
            scores = scores.masked_fill(later, -torch.inf)
        return (scores.softmax(dim=-1) @ split[2]).transpose(1, 2).flatten(2)

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    patches = pixels.double().unfold(2, config.patch_size, config.patch_size)
    patches = patches.unfold(3, config.patch_size, config.patch_size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    kernel = tensors[f"{VISUAL}patch_embed.proj.weight"].flatten(1)
    x = patches @ kernel.T + tensors[f"{VISUAL}patch_embed.proj.bias"]
    x = torch.cat([tensors[f"{VISUAL}cls_token"].expand(len(x), -1, -1), x], dim=1) + tensors[f"{VISUAL}pos_embed"]
    for block in (f"{VISUAL}blocks.{number}." for number in range(config.vision_depth)):
        query, key, value = (norm(x, f"{block}norm1", 1e-6) @ tensors[f"{block}attn.qkv.weight"].T).chunk(3, dim=-1)
        query, value = query + tensors[f"{block}attn.q_bias"], value + tensors[f"{block}attn.v_bias"]
        x = x + linear(attend(query, key, value, config.vision_heads), f"{block}attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    states = norm(x, "ln_vision", 1e-5)

    y = norm(tensors["query_tokens"].expand(len(x), -1, -1), f"{QFORMER}embeddings.LayerNorm", 1e-12)
    for number in range(config.layers):
        layer = f"{QFORMER}encoder.layer.{number}."
        for kind in ("attention", "crossattention")[: 1 + (number % 2 == 0)]:
            name, read = f"{layer}{kind}", y if kind == "attention" else states
            parts = (
                linear(y, f"{name}.self.query"),
                linear(read, f"{name}.self.key"),
                linear(read, f"{name}.self.value"),
            )
            seen = attend(*parts, config.heads, causal=kind == "attention")
            y = norm(linear(seen, f"{name}.output.dense") + y, f"{name}.output.LayerNorm", 1e-12)
        hidden = linear(gelu(linear(y, f"{layer}intermediate_query.dense")), f"{layer}output_query.dense")
        y = norm(hidden + y, f"{layer}output_query.LayerNorm", 1e-12)
    vectors = linear(torch.tanh(linear(y, "encode_task_layer.0")), "encode_task_layer.2")
    distances = ((vectors[:, :, None] - tensors["quantize.embedding.weight"]) ** 2).sum(dim=-1)
    return {"states": states, "queries": y, "vectors": vectors, "ids": distances.argmin(dim=-1)}


def test_the_golden_rule_gives_the_weights_that_the_figures_are_of() -> None:
    quantizer, vision = golden_states()
    expected = {
        "image": (golden_pixels()[0, 0, 0, :4], [-0.971665, 1.258812, 1.409619, -0.478325]),
        "queries": (quantizer["query_tokens"][0, 0, :3], [0.109448, -0.004745, 0.010854]),
        "qkv": (vision["blocks.0.attn.qkv.weight"][0, :3], [-0.215237, 0.221341, 0.172856]),
        "norm": (quantizer["ln_vision.weight"][:3], [0.991058, 0.973909, 1.049358]),
        "query": (
            quantizer[f"{QFORMER}encoder.layer.0.attention.self.query.weight"][0, :3],
            [-0.357854, 0.245009, 0.673517],
        ),
        "codebook": (quantizer["quantize.embedding.weight"][9, :3], [0.917193, 0.455843, -0.045213]),
    }
    for name, (found, values) in expected.items():
        assert found.tolist() == pytest.approx(values, abs=1e-6), name


def test_equals_the_original_on_golden_weights(golden: SeedTokenizer) -> None:
    pixels = golden_pixels()
    states = golden.states(pixels)
    queries, vectors = golden.queries(states), golden.code_vectors(pixels)
    for place, values in GOLDEN_STATES.items():
        assert states[place][:4].tolist() == pytest.approx(values, abs=1e-4)
    for place, values in GOLDEN_QUERIES.items():
        assert queries[place][:4].tolist() == pytest.approx(values, abs=1e-4)
    for place, values in GOLDEN_VECTORS.items():
        assert vectors[place].tolist() == pytest.approx(values, abs=1e-3)
    assert vectors.sum().item() == pytest.approx(157.1120, abs=1e-2)
    assert vectors.abs().sum().item() == pytest.approx(953.4900, abs=1e-2)
    ids = golden.encode(pixels)
    assert ids.dtype == torch.int64
    assert ids.tolist() == GOLDEN_IDS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_equals_an_independent_forward(attention: Attention, scale: float) -> None:
    """At the small scale the layer norms' epsilons count: what goes into them is small."""
    quantizer, vision = golden_states(SMALL)
    written = re.compile(r"cls_token|pos_embed|patch_embed\.proj\..*|blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*")
    vision = {key: value * scale if written.fullmatch(key) else value for key, value in vision.items()}
    quantizer["query_tokens"] *= scale**2
    model = tokenizer_of(quantizer, vision, SMALL, attention=attention)
    pixels = (1.7 * golden_values("pixels", 3, 3, 42, 42)).float()
    names = {**quantizer, **{f"{VISUAL}{key}": value for key, value in vision.items()}}
    expected = naive_forward({key: value.double().numpy() for key, value in names.items()}, pixels, SMALL)
    states = model.states(pixels)
    found = {"states": states, "queries": model.queries(states), "vectors": model.code_vectors(pixels)}
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-5), name
    assert torch.equal(model.encode(pixels), expected["ids"])
    assert len(expected["ids"].unique()) > 4


def expected_state(quantizer: State, vision: State) -> State:
    """What converting must give: names by hand, for two layers each."""
    state = {"query_tokens": quantizer["query_tokens"], "codebook": quantizer["quantize.embedding.weight"]}
    for kind in ("weight", "bias"):
        state |= {f"projection.{layer}.{kind}": quantizer[f"encode_task_layer.{layer}.{kind}"] for layer in (0, 2)}
        state[f"vision.post_layernorm.{kind}"] = quantizer[f"ln_vision.{kind}"]
        state[f"vision.embeddings.patch_embedding.{kind}"] = vision[f"patch_embed.proj.{kind}"]
        state[f"qformer.layernorm.{kind}"] = quantizer[f"{QFORMER}embeddings.LayerNorm.{kind}"]
        for number in range(2):
            ours, theirs = f"vision.encoder.layers.{number}.", f"blocks.{number}."
            renamed = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.projection": "attn.proj"}
            renamed |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
            state |= {f"{ours}{new}.{kind}": vision[f"{theirs}{old}.{kind}"] for new, old in renamed.items()}
            ours, theirs = f"qformer.encoder.layer.{number}.", f"{QFORMER}encoder.layer.{number}."
            same = ["intermediate_query.dense", "output_query.dense", "output_query.LayerNorm"]
            for block in ("attention", "crossattention")[: 2 - number]:
                same += [f"{block}.output.dense", f"{block}.output.LayerNorm"]
                for part in ("query", "key", "value"):
                    source = f"{theirs}{block}.self.{part}.{kind}"
                    state[f"{ours}{block}.attention.{part}.{kind}"] = quantizer[source]
            state |= {f"{ours}{name}.{kind}": quantizer[f"{theirs}{name}.{kind}"] for name in same}
    state["vision.embeddings.class_embedding"] = vision["cls_token"]
    state["vision.embeddings.position_embedding"] = vision["pos_embed"]
    for number in range(2):
        ours, theirs = f"vision.encoder.layers.{number}.self_attn.qkv.", f"blocks.{number}.attn."
        state[f"{ours}weight"] = vision[f"{theirs}qkv.weight"]
        zeros = torch.zeros(GOLDEN.vision_width)
        state[f"{ours}bias"] = torch.cat([vision[f"{theirs}q_bias"], zeros, vision[f"{theirs}v_bias"]])
    return state


def test_every_tensor_finds_its_place() -> None:
    quantizer, vision = golden_states()
    assert len(quantizer) + len(vision) == 82
    state, account = convert_state(quantizer, vision, GOLDEN)
    expected = expected_state(quantizer, vision)
    assert state.keys() == expected.keys() == SeedTokenizer(GOLDEN).state_dict().keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    assert len({value.flatten()[0].item() for value in expected.values()}) == len(expected)  # no two tensors alike
    assert account == KeyAccount((*quantizer, *(f"{VISUAL}{key}" for key in vision)), (), ())


def test_every_key_of_the_full_size_is_accounted_for() -> None:
    shapes = {
        "quantizer": quantizer_shapes(FULL),
        "decoder": decoder_shapes(FULL),
        "vision": vision_shapes(FULL, 39),
        "with spare": vision_shapes(FULL, 40),
    }
    counts = [len(shapes[name]) for name in ("quantizer", "decoder", "vision")]
    assert (sum(counts), counts) == (881, [262, 108, 511])
    with torch.device("meta"):
        meta = {name: {key: torch.empty(shape) for key, shape in part.items()} for name, part in shapes.items()}
        model = SeedTokenizer(FULL)
        extra = {key: torch.empty(1) for key in ("norm.weight", "fc_norm.bias", "head.weight", "mask_token")}
        text = {key: torch.empty(1) for key in text_keys(FULL)}
        strange = {f"other.{number}": torch.empty(1) for number in range(146)}
    quantizer = meta["quantizer"] | meta["decoder"] | text | strange
    state, account = convert_state(quantizer, meta["with spare"] | extra, FULL)
    assert len([key for key in state if key.startswith("vision.")]) == 474
    assert len([key for key in state if key.startswith("qformer.")]) == 254
    assert len(state) == 474 + 254 + 6
    model.load_state_dict(state, assign=True)  # raises at a missing, unexpected or misshaped one
    assert set(account.used) == shapes["quantizer"].keys() | {f"{VISUAL}{key}" for key in shapes["vision"]}
    spare = [key for key in (*shapes["with spare"], *extra) if key not in shapes["vision"] and key != "mask_token"]
    assert set(account.ignored) == {*shapes["decoder"], *text, *(f"{VISUAL}{key}" for key in spare)}
    assert account.unknown == (*strange, f"{VISUAL}mask_token")
    assert account.summary == (
        f"773 tensors used, {108 + len(text) + 13 + 3} known and not needed, 147 unknown (the first is other.0)"
    )


def test_blocks_past_the_depth_are_left_out() -> None:
    quantizer, vision = golden_states(blocks=3)
    state, account = convert_state(quantizer, vision, GOLDEN)
    expected, _ = convert_state(*golden_states(), GOLDEN)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert state.keys() == expected.keys()
    assert set(account.ignored) == {f"{VISUAL}{key}" for key in vision if key.startswith("blocks.2.")}


@pytest.mark.parametrize(
    ("file", "key"),
    [(0, key) for key in quantizer_shapes(GOLDEN)] + [(1, key) for key in vision_shapes(GOLDEN, 2)],
)
def test_every_key_is_missed_and_measured(file: int, key: str) -> None:
    states = golden_states()
    name = ("seed_quantizer.pt", "eva_vit_g.pth")[file]
    shape = tuple(states[file][key].shape)
    states[file][key] = states[file][key][..., :-1]
    found = tuple(states[file][key].shape)
    message = f"{name}: {key} has the shape {found}, expected {shape}"
    with pytest.raises(BadInput, match=re.escape(message)):
        convert_state(*states, GOLDEN)
    del states[file][key]
    with pytest.raises(BadInput, match=re.escape(f"{name} has no {key} of shape {shape}")):
        convert_state(*states, GOLDEN)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (0, f"{QFORMER}encoder.layer.2.attention.self.query.weight"),
        (0, f"{QFORMER}encoder.layer.1.crossattention.self.query.weight"),
        (0, f"{QFORMER}pooler.dense.weight"),
        (0, "encode_task_layer.5.weight"),
        (0, "quantize.running_mean"),
        (0, "ln_vision.scale"),
        (0, "query_tokens.weight"),
        (0, "visual_encoder.cls_token"),
        (1, "blocks.1.attn.qkv.bias"),
        (1, "blocks.0.gamma_1"),
        (1, "patch_embed.norm.weight"),
        (1, "pos_embed.scale"),
    ],
)
def test_unexpected_keys_are_named(file: int, key: str) -> None:
    states = golden_states()
    states[file][key] = torch.zeros(2)
    name = ("seed_quantizer.pt", "eva_vit_g.pth")[file]
    with pytest.raises(BadInput, match=re.escape(f"{name} has {key}, which nothing here would use")):
        convert_state(*states, GOLDEN)


@pytest.mark.parametrize(("value", "found"), [(torch.zeros(1, 32, 48, dtype=torch.int8), "torch.int8"), (3, "int")])
def test_tensors_that_are_no_numbers_are_named(value: Any, found: str) -> None:
    quantizer, vision = golden_states()
    quantizer["query_tokens"] = value
    with pytest.raises(BadInput, match=f"query_tokens is {found}"):
        convert_state(quantizer, vision, GOLDEN)


def test_half_precision_weights_become_float32() -> None:
    quantizer, vision = golden_states()
    halves = [{key: value.half() for key, value in part.items()} for part in (quantizer, vision)]
    state, _ = convert_state(halves[0], halves[1], GOLDEN)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["vision.embeddings.class_embedding"], vision["cls_token"].half().float())


def test_a_query_sees_none_behind_it(golden: SeedTokenizer) -> None:
    pixels = golden_pixels()
    states, tokens = golden.states(pixels), golden.query_tokens.clone()
    before, ids = golden.queries(states), golden.encode(pixels)
    changed_ids = 0
    for position in range(GOLDEN.queries):
        change = torch.linspace(-1, 1, GOLDEN.width) ** 3  # not constant: the first layer norm would remove it
        golden.query_tokens[0, position] = tokens[0, position] + change
        after, ids_after = golden.queries(states), golden.encode(pixels)
        golden.query_tokens.copy_(tokens)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after - before)[:, position:].abs().amax(dim=2).min() > 1e-4
        assert torch.equal(ids_after[:, :position], ids[:, :position])
        changed_ids += int((ids_after != ids).sum())
    assert changed_ids > GOLDEN.queries  # the ids are not insensitive to all this


@pytest.mark.parametrize("count", [1, 5, 16, 31])
def test_first_queries_alone_give_the_first_outputs(golden: SeedTokenizer, count: int) -> None:
    states = golden.states(golden_pixels())
    whole = golden.queries(states)
    golden.query_tokens = torch.nn.Parameter(golden.query_tokens[:, :count])
    assert torch.allclose(golden.queries(states), whole[:, :count], rtol=0, atol=1e-5)


def test_pictures_differ_in_states_and_ids(golden: SeedTokenizer) -> None:
    ids = golden.encode(golden_pixels())
    assert (ids[0] != ids[1]).sum() > 16
    torch.manual_seed(0)
    states = SeedTokenizer(GOLDEN).states(golden_pixels())  # untrained
    assert (states[0] - states[1]).abs().mean() > 0.1


def test_pictures_do_not_see_each_other(golden: SeedTokenizer) -> None:
    pixels = torch.cat([golden_pixels(), (1.7 * golden_values("more", 3, 3, 28, 28)).float()])
    together = golden.code_vectors(pixels)
    alone = torch.cat([golden.code_vectors(picture[None]) for picture in pixels])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(golden.encode(pixels), torch.cat([golden.encode(picture[None]) for picture in pixels]))
    assert torch.equal(golden.encode(pixels.flip(0)), golden.encode(pixels).flip(0))


def test_the_first_of_equal_codes_is_taken(golden: SeedTokenizer) -> None:
    ids = golden.encode(golden_pixels())
    golden.codebook[-1] = golden.codebook[34]
    assert torch.equal(golden.encode(golden_pixels()), ids)
    golden.codebook[2] = golden.codebook[34]
    assert torch.equal(golden.encode(golden_pixels()), ids.where(ids != 34, 2))


def test_training_mode_changes_nothing(golden: SeedTokenizer) -> None:
    assert torch.equal(golden.train().code_vectors(golden_pixels()), golden.eval().code_vectors(golden_pixels()))


@pytest.mark.parametrize("shape", [(1, 3, 14, 14), (1, 3, 28, 30), (1, 3, 42, 42), (1, 1, 28, 28), (3, 28, 28)])
def test_pixels_of_another_size_are_refused(golden: SeedTokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=re.escape(f"pixels of shape {shape}, the tokenizer reads (batch, 3, 28, 28)")):
        golden.encode(torch.zeros(shape))


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.bfloat16, 8), (torch.float16, 2)])
def test_the_vit_runs_in_half_precision_alone(dtype: torch.dtype, wrong: int) -> None:
    model = tokenizer_of(*golden_states(), GOLDEN, attention="sdpa")
    full = model.code_vectors(golden_pixels())
    half = model.to_precision(dtype).code_vectors(golden_pixels())
    assert {value.dtype for key, value in model.state_dict().items() if key.startswith("vision.")} == {dtype}
    others = {value.dtype for key, value in model.state_dict().items() if not key.startswith("vision.")}
    assert others == {model.states(golden_pixels()).dtype} == {half.dtype} == {torch.float32}
    assert 0 < (half - full).abs().max() < 1
    assert (model.encode(golden_pixels()) != torch.tensor(GOLDEN_IDS)).sum() <= wrong


def noise(mode: str, size: tuple[int, int] = (97, 60)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(levels, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(levels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_preprocess_squeezes_any_picture_to_the_square(mode: str) -> None:
    pixels = Preprocess(28)(noise(mode))
    assert (pixels.shape, pixels.dtype) == ((3, 28, 28), torch.float32)
    assert pixels.std() > 0.1
    assert torch.equal(pixels, Preprocess(28)(noise(mode).convert("RGB")))


def test_preprocess_takes_clips_mean_and_deviation_out() -> None:
    pixels = Preprocess(14)(Image.new("RGB", (5, 9), (255, 0, 51)))
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert torch.allclose(pixels, torch.tensor(expected)[:, None, None].expand(3, 14, 14))


def test_preprocess_keeps_every_part_of_the_picture_in_its_place() -> None:
    levels = np.zeros((20, 80, 3), dtype=np.uint8)
    levels[:, 40:, 0] = 255  # red on the right: a crop of the middle would do too, so the left end is blue
    levels[:, :10, 2] = 255
    pixels = Preprocess(28)(Image.fromarray(levels))
    assert (pixels[0, :, 20:] > 1).all()
    assert (pixels[0, :, :8] < 0).all()
    assert (pixels[2, :, :2] > 1).all()


def test_bilinear_is_the_default_and_bicubic_differs() -> None:
    picture = noise("RGB", (300, 200))
    for preprocess, resampling in (
        (Preprocess(28, "bilinear"), Image.Resampling.BILINEAR),
        (Preprocess(28, "bicubic"), Image.Resampling.BICUBIC),
    ):
        found = preprocess(picture)[0] * 0.26862954 + 0.48145466
        expected = np.asarray(picture.resize((28, 28), resampling))[:, :, 0] / 255
        assert np.allclose(found.numpy(), expected, atol=1e-6)
    assert torch.equal(Preprocess(28)(picture), Preprocess(28, "bilinear")(picture))
    assert (Preprocess(28, "bicubic")(picture) - Preprocess(28)(picture)).abs().mean() > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_that_is_asked_for_runs(
    files: tuple[Path, Path], tmp_path: Path, attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SeedTokenizer.from_checkpoints(*files, config=GOLDEN, attention=attention)
    model.save_pretrained(tmp_path / "saved")
    again = SeedTokenizer.from_pretrained(tmp_path / "saved", attention=attention)
    calls: list[Tensor] = []
    run = torch.nn.functional.scaled_dot_product_attention

    def count(query: Tensor, *others: Any, **options: Any) -> Tensor:
        calls.append(query)
        return run(query, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    for tokenizer in (model, again):
        tokenizer.encode(golden_pixels())
    assert len(calls) == (2 * (2 + 3) if attention == "sdpa" else 0)  # two blocks; two layers, one of which looks twice


def test_published_files_are_converted(files: tuple[Path, Path]) -> None:
    model = SeedTokenizer.from_checkpoints(*files, config=GOLDEN)
    assert model.encode(golden_pixels()).tolist() == GOLDEN_IDS
    assert (model.length, model.codebook_size, model.image_size) == (32, 64, 28)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.account is not None
    assert model.account.summary == "82 tensors used, 0 known and not needed, 0 unknown"


def test_other_formats_of_the_files_are_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    quantizer, vision = golden_states()
    save_file(quantizer, tmp_path / "quantizer.safetensors")
    torch.save(vision, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = SeedTokenizer.from_checkpoints(tmp_path / "quantizer.safetensors", tmp_path / "old.pth", config=GOLDEN)
    assert model.encode(golden_pixels()).tolist() == GOLDEN_IDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_read_again_it_is_the_same(files: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    model = SeedTokenizer.from_checkpoints(*files, config=GOLDEN, interpolation="bicubic").to_precision(dtype)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    again = SeedTokenizer.from_pretrained(tmp_path / "saved", attention="eager")
    assert (again.config, again.interpolation, again.training) == (GOLDEN, "bicubic", False)
    assert again.preprocess == Preprocess(28, "bicubic")
    for key, value in model.state_dict().items():
        assert value.dtype == again.state_dict()[key].dtype
        assert torch.equal(value, again.state_dict()[key])
    assert torch.allclose(again.code_vectors(golden_pixels()), model.code_vectors(golden_pixels()), atol=0.1)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def saved_with(folder: Path, **changes: Any) -> Path:
    """A saved tokenizer whose configuration is changed afterwards; None removes a field."""
    tokenizer_of(*golden_states(), GOLDEN, attention="sdpa").save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": None}, "config.json is not a SEED tokenizer's"),
        ({"interpolation": "lanczos"}, "config.json is not a SEED tokenizer's"),
        ({"levels": 4}, "config.json is not a SEED tokenizer's"),
        ({"width": 44}, "query_tokens has the shape (1, 32, 48), expected (1, 32, 44)"),
        ({"layers": 3}, "model.safetensors has no qformer.encoder.layer.2"),
        ({"layers": 1}, "model.safetensors has qformer.encoder.layer.1.attention.attention.key.bias and 15 more"),
        ({"width": 49}, "width 49 must be a multiple of heads 4"),
    ],
)
def test_saved_folders_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        SeedTokenizer.from_pretrained(saved_with(tmp_path / "saved", **changes))


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("ran"),))


def write_bad_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Files that cannot be used, and what must be said of each."""
    (folder / "empty.pt").touch()
    yield "empty.pt", "is not a readable file of tensors"
    (folder / "page.pt").write_text("<html>not found</html>")
    yield "page.pt", "is damaged or holds more than tensors"
    (folder / "page.safetensors").write_text("<html>not found</html>")
    yield "page.safetensors", "is not a readable file of tensors"
    torch.save({"query_tokens": Code()}, folder / "code.pt")
    yield "code.pt", "pickled code is not run"
    torch.save(torch.zeros(3), folder / "bare.pt")
    yield "bare.pt", "holds one Tensor, expected tensors by name"
    torch.save({"a": torch.zeros(1000)}, folder / "half.pt")
    (folder / "half.pt").write_bytes((folder / "half.pt").read_bytes()[:2000])
    yield "half.pt", "is not a readable file of tensors"
    yield "absent.pt", "does not exist"
    yield "absent.safetensors", "does not exist"


def test_files_that_cannot_be_used_are_named(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in write_bad_files(tmp_path):
        for pair in ((tmp_path / name, files[1]), (files[0], tmp_path / name)):
            with pytest.raises(BadInput, match=f"{name} .*{message}") as caught:
                SeedTokenizer.from_checkpoints(*pair, config=GOLDEN)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_swapped_files_and_other_sizes_are_named(files: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match=re.escape("eva_vit_g.pth has no query_tokens of shape (1, 32, 48): it must be")):
        SeedTokenizer.from_checkpoints(files[1], files[0], config=GOLDEN)
    with pytest.raises(BadInput, match=re.escape("has the shape (1, 32, 48), expected (1, 32, 768)")):
        SeedTokenizer.from_checkpoints(*files)
    with pytest.raises(BadInput, match="image_size 30 must be a multiple of patch_size 14"):
        SeedConfig(image_size=30)


def blip2() -> Blip2ForConditionalGeneration:
    """A BLIP-2 model whose ViT is the golden one but for its last layer norm, which SEED does not take."""
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(
                hidden_size=32,
                intermediate_size=139,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            qformer_config=Blip2QFormerConfig(
                hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
            ),
            text_config=OPTConfig(
                vocab_size=60,
                hidden_size=16,
                num_hidden_layers=1,
                ffn_dim=16,
                num_attention_heads=2,
                word_embed_proj_dim=16,
            ),
        )
    )
    state, _ = convert_state(*golden_states(), GOLDEN)
    vision = {key.removeprefix("vision."): value for key, value in state.items() if key.startswith("vision.")}
    model.vision_model.load_state_dict(vision)
    model.vision_model.post_layernorm.weight.data.fill_(7)
    return model


@pytest.fixture(scope="module")
def blip2_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in the four ways in which models are stored."""
    root, model = tmp_path_factory.mktemp("blip2"), blip2()
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    state = model.state_dict()
    for name in ("pickled", "pickled shards"):
        (root / name).mkdir()
    torch.save(state, root / "pickled" / "pytorch_model.bin")
    shards: dict[str, State] = {"vision.bin": {}, "text.bin": {}}
    for number, (key, value) in enumerate(state.items()):
        shards["vision.bin" if key.startswith("vision_model.") or number % 3 == 0 else "text.bin"][key] = value
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (root / "pickled shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(shards["vision.bin"], root / "pickled shards" / "vision.bin")  # the other one is never asked for
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("kind", ["whole", "sharded", "pickled", "pickled shards", "file"])
def test_the_vit_may_come_from_blip2(files: tuple[Path, Path], blip2_folders: dict[str, Path], kind: str) -> None:
    if kind == "file":
        source: Path | str = blip2_folders["whole"] / "model.safetensors"
    else:
        source = str(blip2_folders[kind])
    if kind == "sharded":
        assert len(list(blip2_folders[kind].glob("model-*.safetensors"))) > 3
    model = SeedTokenizer.from_checkpoints(files[0], source, config=GOLDEN)
    assert model.encode(golden_pixels()).tolist() == GOLDEN_IDS
    account = model.account
    assert account is not None
    assert {key for key in account.used if key.startswith("vision_model.")} == {
        f"vision_model.{key}" for key in blip2().vision_model.state_dict() if not key.startswith("post_layernorm.")
    }
    assert {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"} <= set(account.ignored)
    assert not account.unknown


def test_a_blip2_that_does_not_fit_is_named(blip2_folders: dict[str, Path]) -> None:
    quantizer, _ = golden_states()
    state = torch.load(blip2_folders["pickled"] / "pytorch_model.bin", weights_only=True)
    key = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    with pytest.raises(BadInput, match=re.escape(f"eva_vit_g.pth: {key} has the shape (95,), expected (96,)")):
        convert_state(quantizer, state | {key: torch.zeros(95)}, GOLDEN)
    with pytest.raises(BadInput, match=re.escape("has vision_model.encoder.layers.2.mlp.fc1.bias, which nothing")):
        convert_state(quantizer, state | {"vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(139)}, GOLDEN)
    del state[key]
    with pytest.raises(BadInput, match=re.escape(f"eva_vit_g.pth has no {key} of shape (96,)")):
        convert_state(quantizer, state, GOLDEN)


def test_sources_of_the_vit_that_have_none_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(BadInput, match=f"{folder} has no model.safetensors: it must be eva_vit_g.pth or a BLIP-2"):
        SeedTokenizer.from_checkpoints(files[0], folder, config=GOLDEN)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("[]", f"{index} has no weight_map"),
        ('{"weight_map": {"lm_head.weight": "a.safetensors"}}', f"{folder} has no vision_model.* tensors"),
        ('{"weight_map": {"vision_model.x": "a.safetensors"}}', f"{folder} has no a.safetensors"),
    ):
        index.write_text(text)
        with pytest.raises(BadInput, match=re.escape(message)):
            SeedTokenizer.from_checkpoints(files[0], folder, config=GOLDEN)


def test_a_model_is_asked_of_the_hub(
    files: tuple[Path, Path], blip2_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(source: str, name: str) -> str:
        asked.append(name)
        file = blip2_folders["pickled shards"] / name
        if source != "some/model" or not file.is_file():
            raise OSError("no such file\nand more")
        return str(file)

    names = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    monkeypatch.setattr("models.seed_tokenizer.cached_file", answer)
    model = SeedTokenizer.from_checkpoints(files[0], "some/model", config=GOLDEN)
    assert model.encode(golden_pixels()).tolist() == GOLDEN_IDS
    assert asked == [*names, "vision.bin"]
    asked.clear()
    with pytest.raises(BadInput, match=r"other/model is no file or folder.*no model\.safetensors .*\(no such file\)"):
        SeedTokenizer.from_checkpoints(files[0], "other/model", config=GOLDEN)
    assert asked == names
