"""Pictures as tokens of their patches: range, repetition, files, what the tokens say, towers that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from models.clip import Clip, load_clip, patch_map, save_clip, with_image_size
from models.patch_tokenizer import CONFIG_NAME, WEIGHTS_NAME, PatchConfig, PatchTokenizer
from tests.tiny import clip_folder
from tools.errors import BadInput
from tools.files import read_json

CNN = "test_efficientnet"  # of timm, for tests


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An open_clip ViT of 2 x 2 patches with random weights."""
    return str(clip_folder(tmp_path_factory.mktemp("vit")))


def timm_folder(folder: Path, tower: str, side: int) -> str:
    """A timm image tower with random weights, beside a small text tower."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "avg",
                       "timm_proj": "linear", "image_size": side},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    model = open_clip.CustomTextCLIP(**config).eval()
    preprocess = {"size": side, "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    open_clip.model.set_model_preprocess_cfg(model, {**preprocess, "resize_mode": "squash"})
    transform = open_clip.transform.image_transform(side, is_train=False)
    save_clip(folder, Clip(model, transform, open_clip.get_tokenizer("ViT-B-32"), config))
    return str(folder)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return timm_folder(tmp_path_factory.mktemp("cnn"), CNN, 64)


def pixels_of(tokenizer: PatchTokenizer, count: int = 20) -> Tensor:
    """Pictures of coloured tiles as the tower takes them."""
    generator = np.random.default_rng(0)
    tiles = generator.integers(0, 256, size=(count, 4, 4, 3)).astype(np.uint8)
    return torch.stack([tokenizer.preprocess(Image.fromarray(each).resize((80, 60), 0)) for each in tiles])


def fitted(model: str, **options: Any) -> tuple[PatchTokenizer, Tensor]:
    """A tokenizer fitted on pictures, and their pixels."""
    settings: dict[str, Any] = {"grid": 2, "width": 8, "levels": 3, "codebook_size": 10, **options}
    tokenizer = PatchTokenizer(PatchConfig(model, **settings)).eval()
    pixels = pixels_of(tokenizer)
    tokenizer.fit(tokenizer.patches(pixels).flatten(0, 1), seed=0)
    return tokenizer, pixels


@pytest.mark.parametrize("options", [{}, {"grid": 1, "levels": 1}, {"grid": 3, "levels": 2, "codebook_size": 6}])
def test_every_patch_has_a_token_of_each_level(options: dict[str, int], vit: str) -> None:
    tokenizer, pixels = fitted(vit, **options)
    config = tokenizer.config
    ids = tokenizer.encode(pixels)
    assert ids.dtype == torch.int64
    assert ids.shape == (20, config.grid**2 * config.levels) == (20, tokenizer.length)
    assert tokenizer.codebook_size == config.levels * config.codebook_size == len(tokenizer.codebook)
    levels = ids.view(20, config.grid**2, config.levels) // config.codebook_size
    assert (levels == torch.arange(config.levels)).all()
    if config.grid > 1:
        assert len(ids.unique(dim=0)) == 20
    assert len(ids.unique()) > tokenizer.codebook_size // 2


def test_tokens_are_the_nearest_codes_of_what_is_left_of_a_patch(vit: str) -> None:
    tokenizer, pixels = fitted(vit)
    patches = tokenizer.patches(pixels)
    assert patches.shape == (20, 4, 32)
    ids = tokenizer.encode(pixels).view(20, 4, 3)
    directions = tokenizer.directions
    assert torch.allclose(directions.T @ directions, torch.eye(8), atol=1e-4)
    spread = ((patches.flatten(0, 1) - tokenizer.mean) @ directions).var(dim=0)
    assert (spread[:-1] >= spread[1:] - 1e-5).all()  # the main ones first
    assert spread.sum() > 0.8 * patches.flatten(0, 1).var(dim=0).sum()
    left = (patches - tokenizer.mean) @ directions
    for level in range(3):
        books = tokenizer.codebook[10 * level : 10 * (level + 1)]
        nearest = torch.cdist(left, books.expand(20, -1, -1)).argmin(dim=2)
        assert torch.equal(ids[:, :, level], nearest + 10 * level)
        before, left = left, left - books[nearest]
        assert left.norm() < before.norm()


def test_a_picture_has_its_tokens_in_any_batch_and_row_by_row(vit: str) -> None:
    tokenizer, pixels = fitted(vit)
    ids = tokenizer.encode(pixels)
    assert torch.equal(tokenizer.encode(pixels), ids)
    assert torch.equal(torch.cat([tokenizer.encode(each[None]) for each in pixels]), ids)
    again, _ = fitted(vit)
    assert torch.equal(again.encode(pixels), ids)
    other = PatchTokenizer(tokenizer.config).eval()
    other.fit(other.patches(pixels).flatten(0, 1), seed=1)
    assert not torch.equal(other.encode(pixels), ids)
    visual: Any = tokenizer.visual
    visual.output_tokens = True  # open_clip's own way to ask for them
    with torch.no_grad():
        features = visual(pixels)[1].transpose(1, 2).unflatten(2, (2, 2))  # the tower's own grid is as wide here
    visual.output_tokens = False
    assert torch.allclose(patch_map(tokenizer.clip, pixels), features, atol=1e-6)
    assert torch.allclose(tokenizer.patches(pixels)[:, 1], features[:, :, 0, 1], atol=1e-6)
    assert torch.allclose(tokenizer.patches(pixels)[:, 2], features[:, :, 1, 0], atol=1e-6)


def test_a_fitted_tokenizer_is_written_and_read_back(vit: str, cnn: str, tmp_path: Path) -> None:
    for name, model, options in (("vit", vit, {}), ("cnn", cnn, {"image_size": 96})):
        tokenizer, pixels = fitted(model, **options)
        tokenizer.save_pretrained(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
        assert read_json(tmp_path / name / CONFIG_NAME)["levels"] == 3
        again = PatchTokenizer.from_pretrained(tmp_path / name)
        assert not again.training
        assert again.config == tokenizer.config
        assert torch.equal(again.encode(pixels), tokenizer.encode(pixels))
        assert torch.equal(again.codebook, tokenizer.codebook)
        assert torch.equal(pixels_of(again, 2), pixels[:2])


def test_a_convolutional_tower_takes_pictures_of_another_size(cnn: str) -> None:
    for side in (None, 64, 128):
        tokenizer, pixels = fitted(cnn, image_size=side, grid=2)
        assert pixels.shape[2:] == (side or 64, side or 64)
        features = timm_features(tokenizer, pixels)
        assert features.shape[2:] == (pixels.shape[2] // 32,) * 2
        assert tokenizer.patches(pixels).shape == (20, 4, features.shape[1])
        rows = features.shape[2] // 2
        corner = features[:, :, :rows, rows:].mean(dim=(2, 3))  # averaged over the upper right quarter
        assert torch.allclose(tokenizer.patches(pixels)[:, 1], corner, atol=1e-4)
        assert tokenizer.encode(pixels).shape == (20, 12)


def timm_features(tokenizer: PatchTokenizer, pixels: Tensor) -> Tensor:
    """The features by timm itself."""
    visual: Any = tokenizer.visual
    plain = timm.create_model(CNN, num_classes=0, global_pool="").eval()
    plain.load_state_dict({key: value for key, value in visual.trunk.state_dict().items() if key in plain.state_dict()})
    with torch.no_grad():
        features: Tensor = plain(pixels)
    return features


def test_a_transformer_takes_its_own_size_alone(vit: str, tmp_path: Path) -> None:
    clip = load_clip(vit)
    assert with_image_size(clip, 32) is clip
    with pytest.raises(BadInput, match="`image_size` 64: the image tower takes pictures of 32 pixels alone"):
        PatchTokenizer(PatchConfig(vit, image_size=64))
    timm_vit = timm_folder(tmp_path / "vit", "test_vit", 160)
    with pytest.raises(BadInput, match="`image_size` 64: the image tower takes pictures of 160 pixels alone"):
        PatchTokenizer(PatchConfig(timm_vit, image_size=64))
    tokenizer = PatchTokenizer(PatchConfig(timm_vit, grid=10, width=8)).eval()
    pixels = pixels_of(tokenizer, 2)
    visual: Any = tokenizer.visual
    with torch.no_grad():
        tokens = visual.trunk.forward_features(pixels)[:, visual.trunk.num_prefix_tokens :]
    assert torch.allclose(tokenizer.patches(pixels), tokens, atol=1e-5)  # 10 x 10 patches of 16 pixels


def test_too_little_to_fit_on_is_one_clear_line(vit: str) -> None:
    tokenizer = PatchTokenizer(PatchConfig(vit, grid=2, width=8, levels=1, codebook_size=81)).eval()
    patches = tokenizer.patches(pixels_of(tokenizer)).flatten(0, 1)
    with pytest.raises(BadInput, match="80 patches are too few for 81 codes of width 8: lower `codebook_size` and"):
        tokenizer.fit(patches, seed=0)
    wide = PatchTokenizer(PatchConfig(vit, grid=2, width=33, levels=1, codebook_size=4))
    with pytest.raises(BadInput, match="`patch_width` 33: the image tower's features are 32 wide"):
        wide.fit(patches, seed=0)
    few = PatchTokenizer(PatchConfig(vit, grid=2, width=30, levels=1, codebook_size=4))
    with pytest.raises(BadInput, match="20 patches are too few for 4 codes of width 30"):
        few.fit(patches[:20], seed=0)


def test_lower_precision_keeps_what_follows_the_tower_exact(vit: str) -> None:
    tokenizer, pixels = fitted(vit)
    exact = tokenizer.patches(pixels)
    tokenizer.to_precision(torch.bfloat16)
    rough = tokenizer.patches(pixels)
    assert rough.dtype == tokenizer.codebook.dtype == tokenizer.directions.dtype == torch.float32
    assert next(tokenizer.visual.parameters()).dtype == torch.bfloat16
    assert 0 < (rough - exact).abs().max() < 0.5
    assert tokenizer.encode(pixels).shape == (20, 12)
