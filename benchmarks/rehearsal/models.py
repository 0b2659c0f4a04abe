"""Stand-ins for the published models: their files, names, widths and special tokens, with random weights.

What is smaller than the published model is the depth of LLaMA, SEED-LLaMA and BLIP-2 (`Sizes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.utils import logging

from models.seed_tokenizer import SeedConfig
from tests.seed_files import decoder_shapes, quantizer_shapes, vision_shapes

from .hub import into_cache, once
from .vocabularies import sentence_pieces, write_json, write_llama3, write_opt
from .weights import RandomWeights, Shapes, fan_in, model_shapes, write_archive, write_sharded
from .words import captions

CLIP = "timm/vit_large_patch14_clip_336.openai"  # what open_clip asks the hub for at ViT-L-14-336, openai
T5_BASE, T5_LARGE = "t5-base", "t5-large"
LLAMA2, LLAMA3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
SEED_LLAMA, SEED_WORDS = "AILab-CVC/seed-llama-8b-sft", "AILab-CVC/seed-tokenizer-2"
BLIP2 = "Salesforce/blip2-opt-2.7b"
CLIP_WEIGHTS, ARCHIVE = "open_clip_model.safetensors", "ViT-L-14-336px.pt"
QUANTIZER, VISION = "seed_quantizer.pt", "eva_vit_g.pth"
EVA_BLOCKS, UNKNOWN_KEYS, QUANTIZER_PARAMETERS = 40, 146, 307_500_000  # of the published files: 1.23 GB in fp32
OPENAI_MEAN, OPENAI_DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
VERSION = 2  # of what this file writes: earlier stand-ins are made again
SENTENCES = 20_000  # that tokenizers learn from


@dataclass(frozen=True)
class Sizes:
    """How large the stand-ins are; the defaults are the published sizes, but for depths."""

    clip: dict[str, Any] = field(default_factory=dict)
    """Settings of an open_clip model in place of ViT-L-14-336's."""
    t5: dict[str, Any] = field(default_factory=dict)
    """Settings in place of T5-base's and T5-large's."""
    llama: dict[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 2})
    """Settings in place of those of the LLaMAs."""
    blip2: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            part: {"num_hidden_layers": 2} for part in ("vision_config", "qformer_config", "text_config")
        }
    )
    """Settings in place of BLIP-2's, for each of its parts."""
    seed: SeedConfig | None = field(default_factory=SeedConfig)
    """Sizes of SEED's tokenizer; None: it is not made."""
    words: int = 32_000
    """Pieces of T5's and LLaMA-2's tokenizers."""
    words_llama3: int = 128_000
    words_opt: int = 50_265
    learnt: int = 4_000
    """Pieces that tokenizers learn, at most; the others are fillers."""
    images: int = 8_192
    """Image tokens of SEED-LLaMA."""
    shards: int = 2
    """Files of a large model's weights."""


class Models:
    """Makes stand-ins below a folder: a cache of the hub, and SEED's two files."""

    def __init__(self, folder: Path, sizes: Sizes, *, seed: int) -> None:
        logging.set_verbosity_error()  # of configurations that are only looked at
        self.folder, self.sizes, self.seed = folder, sizes, seed
        self.cache = folder / "huggingface" / "hub"

    @property
    def _what(self) -> tuple[object, ...]:
        """What the files depend on."""
        return VERSION, self.sizes, self.seed

    @property
    def home(self) -> Path:
        """What HF_HOME is to name."""
        return self.cache.parent

    @property
    def seed_weights(self) -> Path:
        """What SEED_WEIGHTS is to name."""
        return self.folder / "seed"

    def make(self, names: Sequence[str]) -> None:
        """Make what is missing of the models of these names; "seed" stands for SEED's two files, "openai" for the
        archive of CLIP, which must be there."""
        writers: dict[str, Callable[[Path], None]] = {
            CLIP: self.clip,
            T5_BASE: lambda folder: self.t5(folder, width=768, hidden=3072, layers=12, heads=12),
            T5_LARGE: lambda folder: self.t5(folder, width=1024, hidden=4096, layers=24, heads=16),
            LLAMA2: self.llama2,
            LLAMA3: self.llama3,
            SEED_LLAMA: self.seed_llama,
            SEED_WORDS: self.seed_words,
            BLIP2: self.blip2,
        }
        for name in names:
            if name == "openai":
                once(self.folder / "openai", self._what, self.openai)
            elif name != "seed":
                into_cache(self.cache, name, self._what, writers[name])
            elif self.sizes.seed is not None:
                once(self.seed_weights, self._what, self.seed_files)

    def snapshot(self, name: str) -> Path:
        """Folder of a model in the cache."""
        return next((self.cache / ("models--" + name.replace("/", "--")) / "snapshots").iterdir())

    def clip(self, folder: Path) -> None:
        """A two-tower model as open_clip's authors keep them on the hub, with OpenAI's activation."""
        config = {**open_clip.get_model_config("ViT-L-14-336"), **self.sizes.clip, "quick_gelu": True}
        size = config["vision_cfg"]["image_size"]
        shapes = model_shapes(lambda: open_clip.CLIP(**config))
        weights = RandomWeights(self.seed, scale=_clip_scale).state(shapes, torch.float16)
        save_file({name: value.float() for name, value in weights.items()}, folder / CLIP_WEIGHTS, {"format": "pt"})
        preprocess = {"mean": OPENAI_MEAN, "std": OPENAI_DEVIATION, "interpolation": "bicubic"}
        preprocess |= {"resize_mode": "shortest", "size": [size, size]}
        write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})

    def openai(self, folder: Path) -> None:
        """The same weights in the TorchScript archive that OpenAI published."""
        with safe_open(self.snapshot(CLIP) / CLIP_WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
        write_archive(folder / ARCHIVE, weights, {"input_resolution": 336, "context_length": 77, "vocab_size": 49408})

    def t5(self, folder: Path, *, width: int, hidden: int, layers: int, heads: int) -> None:
        """T5 1.0: one file of safetensors, spiece.model beside tokenizer.json, more rows than tokens."""
        config = {
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": hidden,
            "d_kv": 64,
            "d_model": width,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "n_positions": 512,
            "num_heads": heads,
            "num_layers": layers,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 32,
            "vocab_size": self.sizes.words + 128,
            **self.sizes.t5,
        }
        shapes = _shapes(AutoModelForSeq2SeqLM, config)
        more = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # of T5's first code
        shapes[more] = (32, config["num_heads"])
        write_json(folder / "config.json", config)
        ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        weights = RandomWeights(self.seed, scale=_t5_scale(config["d_kv"]))
        write_sharded(folder, shapes, weights, torch.float32, shards=1)
        size = self.sizes.words
        sentence_pieces(folder / "spiece.model", self._texts(), kind="unigram", size=size, learnt=self.sizes.learnt)
        _save_fast(folder)
        write_json(folder / "tokenizer_config.json", {"model_max_length": 512})

    def llama2(self, folder: Path) -> None:
        """LLaMA-2: shards of fp16, tokenizer.model beside tokenizer.json, a sampling generation_config."""
        config = {
            **_llama_config(vocab_size=self.sizes.words, max_position_embeddings=4096, rms_norm_eps=1e-05),
            "torch_dtype": "float16",
            **self.sizes.llama,
        }
        self._llama(folder, config, torch.float16)
        sampling = {"do_sample": True, "max_length": 4096, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9}
        write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, **sampling})
        self._llama_words(folder)
        _save_fast(folder)
        write_json(folder / "tokenizer_config.json", _llama_words_config(pad_token=None))

    def llama3(self, folder: Path) -> None:
        """LLaMA-3: shards of bf16, grouped keys and values, 256 special tokens, none of them for padding."""
        begin = self.sizes.words_llama3
        config = {
            **_llama_config(vocab_size=begin + 256, max_position_embeddings=8192, rms_norm_eps=1e-05),
            "bos_token_id": begin,
            "eos_token_id": begin + 1,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            **self.sizes.llama,
        }
        self._llama(folder, config, torch.bfloat16)
        ends = {"bos_token_id": begin, "eos_token_id": begin + 1}
        sampling = {"do_sample": True, "max_length": 4096, "temperature": 0.6, "top_p": 0.9}
        write_json(folder / "generation_config.json", {**ends, **sampling})
        write_llama3(folder, self._texts(), size=begin, specials=256, learnt=self.sizes.learnt)

    def seed_llama(self, folder: Path) -> None:
        """SEED-LLaMA: shards of torch's `.bin` in fp32, image tokens behind the words, no tokenizer of its own."""
        config = {
            **_llama_config(vocab_size=self.sizes.words + self.sizes.images + 2, max_position_embeddings=2048),
            "torch_dtype": "float32",
            **self.sizes.llama,
        }
        self._llama(folder, config, torch.float32, pickled=True, more=_rotary_buffers(config))
        write_json(
            folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        )

    def seed_words(self, folder: Path) -> None:
        """SEED-LLaMA's tokenizer: LLaMA's tokenizer.model and the image tokens in added_tokens.json."""
        self._llama_words(folder)
        words, images = self.sizes.words, self.sizes.images
        added = {f"<img_{number:05d}>": words + number for number in range(images)}
        write_json(folder / "added_tokens.json", {**added, "<img>": words + images, "</img>": words + images + 1})
        write_json(folder / "tokenizer_config.json", _llama_words_config(pad_token="<unk>"))

    def blip2(self, folder: Path) -> None:
        """BLIP-2 with OPT: shards of fp32, a processor, GPT-2's kind of tokenizer."""
        words = self.sizes.words_opt
        text = {
            "architectures": ["OPTForCausalLM"],
            "eos_token_id": 2,  # as its tokenizer's; the published file says 50118, a line feed
            "ffn_dim": 10240,
            "hidden_size": 2560,
            "model_type": "opt",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "prefix": "</s>",
            "vocab_size": -(-(words + 1) // 64) * 64,
            "word_embed_proj_dim": 2560,
        }
        parts: dict[str, dict[str, Any]] = {
            "vision_config": {"model_type": "blip_2_vision_model"},
            "qformer_config": {"model_type": "blip_2_qformer"},
            "text_config": text,
        }
        config = {
            "architectures": ["Blip2ForConditionalGeneration"],
            "image_token_index": words,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "model_type": "blip-2",
            "num_query_tokens": 32,
            "torch_dtype": "float32",
            "use_decoder_only_language_model": True,
            **{name: {**part, **self.sizes.blip2.get(name, {})} for name, part in parts.items()},
        }
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 50118, "pad_token_id": 1})
        shapes = _shapes(AutoModelForImageTextToText, config)
        write_sharded(folder, shapes, RandomWeights(self.seed), torch.float32, shards=self.sizes.shards)
        side = AutoConfig.for_model(**config).vision_config.image_size
        pictures = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": OPENAI_MEAN,
            "image_processor_type": "BlipImageProcessor",
            "image_std": OPENAI_DEVIATION,
            "processor_class": "Blip2Processor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        }
        write_json(folder / "preprocessor_config.json", pictures)
        write_json(folder / "processor_config.json", {"num_query_tokens": 32, "processor_class": "Blip2Processor"})
        write_opt(folder, self._texts(), size=words, learnt=self.sizes.learnt)

    def seed_files(self, folder: Path) -> None:
        """SEED's own file, with what is not needed and what nobody knows, and EVA's file with its 40 blocks."""
        config = self.sizes.seed
        assert config is not None
        weights = RandomWeights(self.seed, scale=_seed_scale)
        shapes = {**quantizer_shapes(config), **decoder_shapes(config)}
        shapes |= _unknown(shapes) if config == SeedConfig() else {}
        state = weights.state(
            {name: shape for name, shape in shapes.items() if "position_ids" not in name}, torch.float32
        )
        position_ids = next(name for name in shapes if "position_ids" in name)
        state[position_ids] = torch.arange(shapes[position_ids][1])[None]
        torch.save(state, folder / QUANTIZER)
        blocks = EVA_BLOCKS if config == SeedConfig() else config.vision_depth + 1
        torch.save(weights.state(vision_shapes(config, blocks), torch.float16), folder / VISION)

    def _llama(
        self,
        folder: Path,
        config: dict[str, Any],
        dtype: torch.dtype,
        *,
        pickled: bool = False,
        more: Shapes | None = None,
    ) -> None:
        """Configuration and weights of a LLaMA."""
        write_json(folder / "config.json", config)
        shapes = {**_shapes(AutoModelForCausalLM, config), **(more or {})}
        weights = RandomWeights(self.seed, scale=lambda name, shape: 0.02 if "embed" in name else fan_in(name, shape))
        write_sharded(folder, shapes, weights, dtype, shards=self.sizes.shards, pickled=pickled)

    def _llama_words(self, folder: Path) -> None:
        """LLaMA's tokenizer.model and its names of special tokens."""
        size = self.sizes.words
        learnt = min(self.sizes.learnt, size)
        sentence_pieces(folder / "tokenizer.model", self._texts(), kind="bpe", size=size, learnt=learnt)
        write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})

    def _texts(self) -> list[str]:
        return list(captions(SENTENCES, np.random.default_rng(self.seed)))


TINY = replace(
    Sizes(),
    clip={
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    t5={"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    llama={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    blip2={
        "vision_config": {
            "hidden_size": 32,
            "image_size": 28,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        },
        "qformer_config": {
            "encoder_hidden_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        },
        "text_config": {
            "ffn_dim": 48,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "word_embed_proj_dim": 32,
        },
    },
    seed=None,
    words=1_000,
    words_llama3=1_200,
    words_opt=1_100,
    learnt=600,
    images=8,
)
"""Models of a few thousand weights, for tests."""


def _shapes(loader: Any, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face model's weights."""
    settings = AutoConfig.for_model(**config)
    return model_shapes(lambda: loader.from_config(settings))


def _llama_config(**settings: Any) -> dict[str, Any]:
    """What the LLaMAs have in common."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "use_cache": True,
        **settings,
    }


def _rotary_buffers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Buffers that checkpoints of earlier versions have beside the weights."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    return {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (half,) for n in range(config["num_hidden_layers"])}


def _llama_words_config(*, pad_token: str | None) -> dict[str, Any]:
    """LLaMA's tokenizer_config.json, as transformers 4 wrote it."""
    plain = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {**plain, "content": "<s>"},
        "clean_up_tokenization_spaces": False,
        "eos_token": {**plain, "content": "</s>"},
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": pad_token,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {**plain, "content": "<unk>"},
    }


def _save_fast(folder: Path) -> None:
    """tokenizer.json, as transformers makes it of a sentencepiece model."""
    from transformers import LlamaTokenizer, T5Tokenizer

    kind = T5Tokenizer if (folder / "spiece.model").is_file() else LlamaTokenizer
    kind.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def _clip_scale(name: str, shape: Sequence[int]) -> float:
    if "embedding" in name:
        return 0.02
    return fan_in(name, shape)


def _t5_scale(head: int) -> Callable[[str, Sequence[int]], float]:
    """T5's own start: its attention is not scaled, so its queries are."""

    def scale(name: str, shape: Sequence[int]) -> float:
        if name.startswith("shared"):
            return 1.0
        return fan_in(name, shape) * (head**-0.5 if ".q.weight" in name else 1.0)

    return scale


def _seed_scale(name: str, shape: Sequence[int]) -> float:
    """Large enough that pictures differ in their tokens."""
    if name in ("query_tokens", "pos_embed", "cls_token", "quantize.embedding.weight"):
        return 0.5
    return fan_in(name, shape) * (3.0 if ".query.weight" in name or name.startswith("encode_task_layer") else 1.0)


def _unknown(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Tensors below names that mean nothing here, as many and as large as the published file has."""
    left = QUANTIZER_PARAMETERS - sum(int(np.prod(shape)) for shape in shapes.values())
    return {f"unknown.{number}.weight": (left // UNKNOWN_KEYS // 768, 768) for number in range(UNKNOWN_KEYS)}
