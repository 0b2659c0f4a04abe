"""Models of the published sizes with random weights, made on the device where they are measured: 7B in seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from models.scorer import CLOSE_IMAGE, OPEN_IMAGE, ImageTokens, Scorer, scoring_head
from models.voken_lm import VokenLM
from tools.vokens import VokenSpace

CAPTION_WORDS = (13.0, 2.0)  # mean and standard deviation; one token a word
PROMPT_WORDS = ("USER", "Image", "Query", "ASSISTANT", ":")
SPECIALS = ("<pad>", "</s>", "<unk>", "<s>")


class Sizes(NamedTuple):
    """How large everything is."""

    name: str
    words: int
    """Text tokens of every language model"""
    space: VokenSpace
    t5_base: dict[str, int]
    t5_large: dict[str, int]
    llama: dict[str, int]
    clip: dict[str, int]
    equality: dict[str, int]
    """LLaMA whose scores on GPU and CPU are compared"""
    images: ImageTokens
    pool: int
    large_pool: int
    """Pictures of the larger two-tower search"""
    beams: int
    batches: tuple[int, ...]
    compared: int
    """Queries that GPU and CPU both answer"""
    prompt: int
    """Tokens around a causal model's query"""
    published_length: int
    """Tokens that a source is padded to, published"""
    t5_batch: int
    llama_batch: int
    groups: tuple[int, int]
    """Queries of a reranker's step, pictures of each"""
    rerank_pool: int
    rerank_queries: int
    candidates: int
    """Pictures of a list"""
    pictures: int
    """Train pictures of the RQ-VAE"""
    features: int
    rqvae_batch: int
    kmeans_iterations: int
    matrix: int
    """Side of the matrices whose product gives the card's peak"""
    repeats: int


FULL = Sizes(
    name="full",
    words=32_000,
    space=VokenSpace(levels=4, codebook_size=1024, shared=True),
    t5_base={"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    t5_large={"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    llama={
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    clip={
        "vocab_size": 49_408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    equality={
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
    },
    images=ImageTokens(length=32, size=8192),
    pool=30_000,
    large_pool=1_000_000,
    beams=10,
    batches=(1, 64, 512),
    compared=64,
    prompt=46,
    published_length=128,
    t5_batch=128,
    llama_batch=16,
    groups=(8, 8),
    rerank_pool=1000,
    rerank_queries=100,
    candidates=50,
    pictures=29_000,
    features=768,
    rqvae_batch=16_384,
    kmeans_iterations=100,
    matrix=8192,
    repeats=5,
)
TINY = FULL._replace(
    name="tiny",
    words=300,
    space=VokenSpace(levels=4, codebook_size=32, shared=True),
    t5_base={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    t5_large={"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6},
    llama={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    clip={
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
    equality={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    images=ImageTokens(length=4, size=64),
    pool=500,
    large_pool=1000,
    beams=4,
    batches=(1, 4),
    compared=4,
    prompt=10,
    published_length=32,
    t5_batch=4,
    llama_batch=2,
    groups=(2, 3),
    rerank_pool=12,
    rerank_queries=3,
    candidates=5,
    pictures=600,
    features=32,
    rqvae_batch=256,
    kmeans_iterations=8,
    matrix=64,
    repeats=2,
)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside it new weights lie on the device, in that type: nothing is made in float32 or moved."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def t5(
    shape: dict[str, int],
    sizes: Sizes,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> VokenLM:
    """A T5 with vokens behind its words, in eval mode."""
    rows = sizes.words + len(sizes.space.tokens)
    config = T5Config(vocab_size=-(-rows // 128) * 128, dropout_rate=dropout, decoder_start_token_id=0, **shape)
    with made_on(device, dtype):
        model = T5ForConditionalGeneration(config)
    return VokenLM(model.eval(), words_tokenizer(sizes.words, closed=True), kind="seq2seq", start=0, **facts(sizes))


def llama(shape: dict[str, int], sizes: Sizes, device: torch.device, *, dtype: torch.dtype) -> VokenLM:
    """A LLaMA with vokens behind its words, which reads a query inside a prompt, in eval mode."""
    rows = sizes.words + len(sizes.space.tokens)
    with made_on(device, dtype):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape))
    tokenizer = words_tokenizer(sizes.words, closed=False)
    return VokenLM(model.eval(), tokenizer, kind="causal", start=-1, prompt=prompt(sizes), **facts(sizes))


def prompt(sizes: Sizes) -> str:
    """Words around the query, two thirds of them before it; the opening token counts too."""
    before = sizes.prompt * 2 // 3
    return " ".join([*[word(0)] * (before - 1), "{query}", *[word(1)] * (sizes.prompt - before)])


def facts(sizes: Sizes) -> dict[str, Any]:
    """What all language models here have in common."""
    return {
        "space": sizes.space,
        "first_voken": sizes.words,
        "end": SPECIALS.index("</s>"),
        "max_source": 128,
        "frozen_encoder": False,
    }


def scorer(
    shape: dict[str, int], sizes: Sizes, device: torch.device, *, dtype: torch.dtype, spread: float | None = None
) -> Scorer:
    """A reranker of SEED-LLaMA's form, in eval mode.

    Args:
        spread: of the embeddings, where it is not that of the other weights.
    """
    tokenizer = words_tokenizer(sizes.words, closed=False)
    tokenizer.add_tokens([OPEN_IMAGE, CLOSE_IMAGE])
    first = len(tokenizer)
    with made_on(device, dtype):
        config = LlamaConfig(vocab_size=first + sizes.images.size, **shape)
        if spread is not None:
            config.initializer_range = 0.8 * config.hidden_size**-0.5
        model = LlamaModel(config)
        if spread is not None:
            model.embed_tokens.weight.data.normal_(std=spread)
        head = scoring_head(config.hidden_size)
    return Scorer(model, head, tokenizer, images=sizes.images, first_image=first, max_query=64).eval()


def text_tower(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """CLIP ViT-L/14's text tower, in eval mode."""
    config = CLIPTextConfig(eos_token_id=sizes.clip["vocab_size"] - 1, **sizes.clip)
    with made_on(device, dtype):
        return CLIPTextModelWithProjection(config).eval()


def words_tokenizer(size: int, *, closed: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words; a text is closed as T5 does it, or opened as LLaMA does."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer(size, closed)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
    )
    return tokenizer


@cache
def _tokenizer(size: int, closed: bool) -> str:
    words = [*SPECIALS, *PROMPT_WORDS]
    words += [word(number) for number in range(size - len(words))]
    raw = Tokenizer(models.WordLevel({each: place for place, each in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = "</s>" if closed else "<s>"
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>" if closed else "<s> $A", special_tokens=[(special, words.index(special))]
    )
    return raw.to_str()


def word(number: int) -> str:
    """A word that is one token."""
    return f"word{number}"


def captions(count: int, sizes: Sizes, *, seed: int = 0) -> list[str]:
    """Texts of captions' lengths, shortest first."""
    generator = np.random.default_rng(seed)
    lengths = np.sort(generator.normal(*CAPTION_WORDS, size=count).round().clip(5, 23).astype(int))
    most = sizes.words - len(SPECIALS) - len(PROMPT_WORDS)
    return [" ".join(map(word, generator.integers(most, size=length).tolist())) for length in lengths]


def image_tokens(count: int, sizes: Sizes) -> NDArray[np.int64]:
    """Tokens (count, images.length) of random pictures."""
    return np.random.default_rng(0).integers(sizes.images.size, size=(count, sizes.images.length))
