"""SEED-2's image tokenizer: a picture to 32 ids of one codebook, written in causal order.

A ViT-g/14 of EVA-CLIP reads the picture, a causal Q-Former reads the ViT, and each of its outputs takes the nearest
code (Ge et al. 2024, "Making LLaMA SEE and Draw with SEED Tokenizer"). Here transformers' `Blip2VisionModel` and
`Blip2QFormerModel` run the published weights: this file renames them, counts every key, and makes the Q-Former causal.

Sizes, names and formulas are facts of the SEED project (AILab-CVC/SEED, Apache-2.0); its ViT and Q-Former are those of
BLIP-2 in LAVIS (Salesforce, BSD-3-Clause). None of their code is in here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from tools.errors import BadInput
from tools.files import read_json, replacing, write_json

from .quantizer import nearest
from .weights import read_state

Attention = Literal["sdpa", "eager"]
Interpolation = Literal["bilinear", "bicubic"]
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
CHANNELS = 3
VISION_EPS, VISION_END_EPS, QFORMER_EPS = 1e-6, 1e-5, 1e-12  # of layer norms: the ViT's, `ln_vision`, the Q-Former's
CROSS_ATTENTION_EVERY = 2  # layers of the Q-Former; the first one has it
START_SPREAD = 0.02  # standard deviation of untrained weights

# Names of this model's tensors -> names in the checkpoints: all replacements, in this order.
QUANTIZER_NAMES = (
    ("vision.post_layernorm.", "ln_vision."),
    ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    ("qformer.encoder.", "Qformer.bert.encoder."),
    ("attention.attention.", "attention.self."),
    ("projection.", "encode_task_layer."),
    ("codebook", "quantize.embedding.weight"),
)
EVA_NAMES = (
    ("vision.embeddings.class_embedding", "cls_token"),
    ("vision.embeddings.position_embedding", "pos_embed"),
    ("vision.embeddings.patch_embedding.", "patch_embed.proj."),
    ("vision.encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
BLIP2_NAMES = (("vision.", "vision_model."),)
BLIP2_PREFIX = "vision_model."
EVA_ACCOUNT_PREFIX = "visual_encoder."  # SEED's name of the ViT: both files have keys blocks.* and pos_embed
# Tensors below these names belong to what is used here: one that is not known there is an error.
QUANTIZER_OWNS = frozenset({"query_tokens", "ln_vision", "Qformer", "encode_task_layer", "quantize", "visual_encoder"})
EVA_OWNS = frozenset({"cls_token", "pos_embed", "patch_embed", "blocks"})
BLIP2_OWNS = frozenset({"vision_model"})
# What only SEED's decoder and its training need, and what BERT has for texts.
QUANTIZER_IGNORED = re.compile(
    r"decode_task_layer\.[02]\.(weight|bias)"
    r"|blocks(_image)?\.[0-3]\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
    r"|pos_embed(_image)?|image_down\.[024]\.weight|distill_image_proj\.(weight|bias)"
    r"|Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate\.dense|output\.dense|output\.LayerNorm)\.(weight|bias)"
    r"|Qformer\.cls\..+"
)
EVA_IGNORED = re.compile(r"(norm|fc_norm|head)\..+")
QUANTIZER_HINT = "it must be seed_quantizer.pt of SEED-2"
VISION_HINT = "it must be eva_vit_g.pth or a BLIP-2 model"
SAVED_HINT = "convert the published checkpoints again"
WEIGHT_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".safetensors"})
BLIP2_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class SeedConfig:
    """Sizes; the defaults are SEED-2's."""

    image_size: int = 224
    """Side of a picture, in pixels."""
    patch_size: int = 14
    vision_width: int = 1408
    vision_depth: int = 39
    """Blocks of the ViT: EVA's 40 without the last."""
    vision_heads: int = 16
    vision_hidden: int = 6144
    """Hidden width of the ViT's MLPs."""
    width: int = 768
    """Of the Q-Former."""
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    queries: int = 32
    """Ids of a picture."""
    codebook_size: int = 8192
    code_width: int = 32

    def __post_init__(self) -> None:
        for whole, part in (("image_size", "patch_size"), ("vision_width", "vision_heads"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise BadInput(
                    f"{whole} {getattr(self, whole)} must be a multiple of {part} {getattr(self, part)}: correct one"
                )


class KeyAccount(NamedTuple):
    """Every key of the checkpoints, once; the EVA file's keys stand below "visual_encoder."."""

    used: tuple[str, ...]
    ignored: tuple[str, ...]
    """Known, and not needed to encode."""
    unknown: tuple[str, ...]
    """Not known, and not below a name that is used."""

    @property
    def summary(self) -> str:
        """One line for the log."""
        line = f"{len(self.used)} tensors used, {len(self.ignored)} known and not needed, {len(self.unknown)} unknown"
        return f"{line} (the first is {self.unknown[0]})" if self.unknown else line


@dataclass(frozen=True)
class Preprocess:
    """A picture to pixels (3, size, size), float32: squeezed to the square, never cropped, with CLIP's mean and
    deviation taken out. SEED's scripts resize bilinearly; its tokenizer does bicubically when given a PIL picture."""

    size: int
    interpolation: Interpolation = "bilinear"

    def __call__(self, picture: Image.Image) -> Tensor:
        resized = picture.convert("RGB").resize((self.size, self.size), RESAMPLING[self.interpolation])
        levels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return (levels - mean) / deviation


class SeedTokenizer(nn.Module):
    """Pixels (batch, 3, image_size, image_size) to ids (batch, queries).

    Attributes:
        interpolation: how `preprocess` resizes.
        account: what became of the checkpoints' keys; None unless it was just converted.
    """

    def __init__(
        self, config: SeedConfig, *, interpolation: Interpolation = "bilinear", attention: Attention = "sdpa"
    ) -> None:
        super().__init__()
        self.config, self.interpolation = config, interpolation
        self.account: KeyAccount | None = None
        self.vision = Blip2VisionModel(_vision_config(config, attention))
        self.vision.post_layernorm.eps = VISION_END_EPS  # it is SEED's ln_vision; transformers gives it the ViT's
        self.qformer = Blip2QFormerModel(_qformer_config(config, attention))
        self.query_tokens = nn.Parameter(START_SPREAD * torch.randn(1, config.queries, config.width))
        self.projection = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, config.code_width)
        )
        self.codebook = nn.Parameter(START_SPREAD * torch.randn(config.codebook_size, config.code_width))

    @property
    def length(self) -> int:
        """Ids of a picture."""
        return self.config.queries

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def preprocess(self) -> Preprocess:
        """Pictures to pixels; without the model, so that other processes can do it."""
        return Preprocess(self.config.image_size, self.interpolation)

    def to_precision(self, dtype: torch.dtype) -> "SeedTokenizer":
        """Run the ViT, nearly all of the work, in `dtype`; Q-Former, projection and distances stay in float32."""
        self.vision.to(dtype)
        return self

    def states(self, pixels: Tensor) -> Tensor:
        """Pixels, on any device, to the ViT's states behind `ln_vision` (batch, patches + 1, vision_width), float32.

        Raises:
            BadInput: the pixels have another size; transformers would take them, and give them wrong positions.
        """
        expected = (CHANNELS, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise BadInput(
                f"pixels of shape {tuple(pixels.shape)}, the tokenizer reads (batch, {', '.join(map(str, expected))}): "
                "make them with its preprocess"
            )
        states: Tensor = self.vision(pixel_values=pixels.to(self.query_tokens.device)).last_hidden_state
        return states.float()

    def queries(self, states: Tensor) -> Tensor:
        """States (batch, patches + 1, vision_width) to the Q-Former's outputs (batch, queries, width)."""
        tokens = self.query_tokens
        output: Tensor = self.qformer(
            query_embeds=tokens.expand(len(states), -1, -1),
            encoder_hidden_states=states,
            attention_mask=causal_mask(tokens.shape[1], like=tokens),
        ).last_hidden_state
        return output

    def code_vectors(self, pixels: Tensor) -> Tensor:
        """Pixels to the vectors that are quantised (batch, queries, code_width)."""
        vectors: Tensor = self.projection(self.queries(self.states(pixels)))
        return vectors

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to ids (batch, queries), int64: the nearest code by Euclidean distance, the first among equals."""
        vectors = self.code_vectors(pixels)
        return nearest(vectors.flatten(0, 1), self.codebook).view(vectors.shape[:2])

    @classmethod
    def from_checkpoints(
        cls,
        quantizer: Path,
        vision: Path | str,
        *,
        config: SeedConfig | None = None,
        interpolation: Interpolation = "bilinear",
        attention: Attention = "sdpa",
    ) -> "SeedTokenizer":
        """Convert the published weights; frozen, in eval mode, in float32, with `account` filled.

        Args:
            quantizer: `seed_quantizer.pt` of SEED-2, or the same as safetensors. It has all but the ViT.
            vision: `eva_vit_g.pth`, or the folder or Hugging Face name of a BLIP-2 model, whose ViT is taken.
            config: sizes; None for SEED-2's.

        Raises:
            BadInput: a file is missing or damaged, lacks a tensor that is used, has one of another shape, or has an
                unknown one below a name that is used.
        """
        config = config or SeedConfig()
        quantizer_state, vision_state = read_state(quantizer), _read_vision(vision)
        state, account = convert_state(quantizer_state, vision_state, config, files=(str(quantizer), str(vision)))
        model = cls._of_state(state, config, interpolation=interpolation, attention=attention)
        model.account = account
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Write model.safetensors and config.json, last; the ViT in the precision that it has."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS_NAME) as temporary:
            save_file({key: value.contiguous().cpu() for key, value in self.state_dict().items()}, temporary)
        write_json(folder / CONFIG_NAME, {**dataclasses.asdict(self.config), "interpolation": self.interpolation})

    @classmethod
    def from_pretrained(cls, folder: Path, *, attention: Attention = "sdpa") -> "SeedTokenizer":
        """Read what `save_pretrained` wrote; frozen, in eval mode.

        Raises:
            BadInput: the folder is not one of a SEED tokenizer, or its files do not belong together.
        """
        config, interpolation = _read_config(folder / CONFIG_NAME)
        saved = _Checkpoint(read_state(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME), SAVED_HINT)
        shapes = _shapes(config)
        state = {key: saved.tensor(key, shape) for key, shape in shapes.items()}
        saved.account(shapes, owns=frozenset(key.split(".")[0] for key in shapes), ignorable=lambda _: False)
        return cls._of_state(state, config, interpolation=interpolation, attention=attention)

    @classmethod
    def _of_state(cls, state: Mapping[str, Tensor], config: SeedConfig, **options: Any) -> "SeedTokenizer":
        """A model around tensors that are there already: they are not copied."""
        with torch.device("meta"):
            model = cls(config, **options)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()


def causal_mask(length: int, *, like: Tensor) -> Tensor:
    """What is added to attention scores (1, 1, length, length): 0 up to the diagonal, the lowest number behind it.

    Numbers, and four dimensions: eager attention would add a mask of booleans as 0 and 1, and transformers reads one
    of two dimensions as padding. With both every query would see all the others, and no error would say so.
    """
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=like.dtype, device=like.device).triu(diagonal=1)


def convert_state(
    quantizer_state: Mapping[str, Any],
    vision_state: Mapping[str, Any],
    config: SeedConfig,
    *,
    files: tuple[str, str] = ("seed_quantizer.pt", "eva_vit_g.pth"),
) -> tuple[dict[str, Tensor], KeyAccount]:
    """Rename the published tensors to a `SeedTokenizer`'s, in float32; meta tensors do.

    Args:
        quantizer_state: of `seed_quantizer.pt`: `ln_vision`, Q-Former, projection and codebook.
        vision_state: of `eva_vit_g.pth`, whose blocks past `vision_depth` are left out, or of a BLIP-2 model, whose
            last layer norm gives way to `ln_vision`.
        files: what errors call the two.

    Returns:
        The state, which loads strictly, and what became of each key.

    Raises:
        BadInput: a tensor that is used is missing or has another shape, or there is an unknown one below a name that
            is used.
    """
    shapes = _shapes(config)
    in_vision = {
        key: shape
        for key, shape in shapes.items()
        if key.startswith("vision.") and not key.startswith("vision.post_layernorm.")
    }
    quantizer = _Checkpoint(quantizer_state, files[0], QUANTIZER_HINT)
    vision = _Checkpoint(vision_state, files[1], VISION_HINT)

    names = {key: _renamed(key, QUANTIZER_NAMES) for key in shapes if key not in in_vision}
    state = {key: quantizer.tensor(name, shapes[key]).float() for key, name in names.items()}
    account = quantizer.account(
        names.values(), owns=QUANTIZER_OWNS, ignorable=lambda key: bool(QUANTIZER_IGNORED.fullmatch(key))
    )
    if any(key.startswith(BLIP2_PREFIX) for key in vision_state):
        taken, vision_account = _from_blip2(vision, in_vision)
    else:
        taken, vision_account = _from_eva(vision, in_vision, depth=config.vision_depth)
    joined = KeyAccount(*(ours + theirs for ours, theirs in zip(account, vision_account, strict=True)))
    return state | {key: value.float() for key, value in taken.items()}, joined


class _Checkpoint(NamedTuple):
    """Tensors by name, what errors call their file, and what it should be."""

    state: Mapping[str, Any]
    file: str
    hint: str

    def tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name, if it is there, has that shape and holds floating point numbers."""
        if key not in self.state:
            raise BadInput(f"{self.file} has no {key} of shape {shape}: {self.hint}")
        value = self.state[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise BadInput(f"{self.file}: {key} is {found}, expected floating point numbers {shape}: {self.hint}")
        if tuple(value.shape) != shape:
            raise BadInput(f"{self.file}: {key} has the shape {tuple(value.shape)}, expected {shape}: {self.hint}")
        return value

    def account(
        self, used: Iterable[str], *, owns: frozenset[str], ignorable: Callable[[str], bool], prefix: str = ""
    ) -> KeyAccount:
        """Sort the keys.

        Args:
            owns: first parts of names below which every key must be used or ignorable.
            prefix: before the keys in the account.
        """
        used = set(used)
        left = [key for key in self.state if key not in used]
        ignored = [key for key in left if ignorable(key)]
        unknown = [key for key in left if not ignorable(key)]
        unexpected = [key for key in unknown if key.split(".")[0] in owns]
        if unexpected:
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise BadInput(f"{self.file} has {unexpected[0]}{more}, which nothing here would use: {self.hint}")
        known = [key for key in self.state if key in used]
        return KeyAccount(*(tuple(prefix + key for key in keys) for keys in (known, ignored, unknown)))


def _from_eva(
    vision: _Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, depth: int
) -> tuple[dict[str, Tensor], KeyAccount]:
    """The ViT's tensors by this model's names, out of the EVA file's."""
    state, used = {}, []
    for key, shape in shapes.items():
        name = _renamed(key, EVA_NAMES)
        if not name.endswith(".qkv.bias"):
            state[key] = vision.tensor(name, shape)
            used.append(name)
            continue
        block = name.removesuffix("qkv.bias")
        query, value = (vision.tensor(f"{block}{part}_bias", (shape[0] // 3,)) for part in "qv")
        state[key] = torch.cat([query, torch.zeros_like(query), value])  # EVA's keys have no bias
        used += [f"{block}q_bias", f"{block}v_bias"]

    def ignorable(key: str) -> bool:
        block = re.match(r"blocks\.(\d+)\.", key)
        return bool(EVA_IGNORED.fullmatch(key)) or (block is not None and int(block[1]) >= depth)

    return state, vision.account(used, owns=EVA_OWNS, ignorable=ignorable, prefix=EVA_ACCOUNT_PREFIX)


def _from_blip2(vision: _Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], KeyAccount]:
    """The ViT's tensors by this model's names, out of a BLIP-2 model's."""
    names = {key: _renamed(key, BLIP2_NAMES) for key in shapes}
    state = {key: vision.tensor(name, shapes[key]) for key, name in names.items()}
    account = vision.account(
        names.values(),
        owns=BLIP2_OWNS,
        ignorable=lambda key: not key.startswith(BLIP2_PREFIX) or key.startswith(f"{BLIP2_PREFIX}post_layernorm."),
    )
    return state, account


def _renamed(key: str, names: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in names:
        key = key.replace(ours, theirs)
    return key


def _shapes(config: SeedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tokenizer's tensors; none is allocated."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in SeedTokenizer(config).state_dict().items()}


def _vision_config(config: SeedConfig, attention: Attention) -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_hidden,
        num_hidden_layers=config.vision_depth,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu",
        layer_norm_eps=VISION_EPS,
        qkv_bias=True,
        initializer_range=START_SPREAD,  # by default 1e-10: an untrained ViT would give one answer to all pictures
        attn_implementation=attention,
    )


def _qformer_config(config: SeedConfig, attention: Attention) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,  # nothing is trained here
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=QFORMER_EPS,
        initializer_range=START_SPREAD,
        cross_attention_frequency=CROSS_ATTENTION_EVERY,
        encoder_hidden_size=config.vision_width,
        use_qformer_text_input=False,
        attn_implementation=attention,
    )


def _read_config(path: Path) -> tuple[SeedConfig, Interpolation]:
    values = read_json(path)
    try:
        interpolation: Interpolation = values.pop("interpolation")
        if interpolation in RESAMPLING:
            return SeedConfig(**values), interpolation
    except (AttributeError, KeyError, TypeError):
        pass
    raise BadInput(f"{path} is not a SEED tokenizer's: {SAVED_HINT}")


def _read_vision(source: Path | str) -> dict[str, Any]:
    """Tensors of an EVA file, or the ViT's of a BLIP-2 model: of the files that have them alone."""
    path = Path(source)
    if path.is_file() or (path.suffix in WEIGHT_SUFFIXES and not path.is_dir()):
        return read_state(path)
    state: dict[str, Any] = {}
    for file in _blip2_files(str(source)):
        state |= read_state(file, prefix=BLIP2_PREFIX)
    if not state:
        raise BadInput(f"{source} has no {BLIP2_PREFIX}* tensors: {VISION_HINT}")
    return state


def _blip2_files(source: str) -> list[Path]:
    """The weight files of a model folder or Hugging Face name that have tensors of the ViT."""
    reasons = []
    for name in BLIP2_FILES:
        try:
            file = _model_file(source, name)
        except BadInput as error:
            reasons.append(str(error))
            continue
        if file.suffix != ".json":
            return [file]
        try:
            shards = {shard for key, shard in read_json(file)["weight_map"].items() if key.startswith(BLIP2_PREFIX)}
        except (AttributeError, KeyError, TypeError):
            raise BadInput(f"{file} has no weight_map from tensors to files: download it again") from None
        return [_model_file(source, shard) for shard in sorted(shards)]
    raise BadInput(reasons[0])


def _model_file(source: str, name: str) -> Path:
    """One file of a folder, or of a model on the Hub, which is then asked for it."""
    if Path(source).is_dir():
        if not (file := Path(source) / name).is_file():
            raise BadInput(f"{source} has no {name}: {VISION_HINT}")
        return file
    try:
        return Path(cached_file(source, name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"{source} is no file or folder, and the Hub gives no {name} of it ({reason}): {VISION_HINT}"
        ) from None
