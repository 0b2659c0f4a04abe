"""Language models and towers of the sizes people use, with random weights: speed does not depend on weights."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

if TYPE_CHECKING:
    from models.clip import Clip  # elsewhere where towers are, and not above: open_clip is not everywhere

from models.arithmetic import choose_linear, with_linears
from models.compute import Precision
from models.voken_lm import DECODER_SPECIALS, END, START, Kind, VokenLM, decoder_config
from tools.vokens import VokenSpace

SPACE = VokenSpace(levels=4, codebook_size=1024, shared=True)
TEXT_VOCABULARY = 32100  # T5's tokenizer
CAPTION_TOKENS = (14.0, 2.0)  # mean and standard deviation; longest 16 in a batch of 8, as Flickr30k's captions have it
CONTEXT = 77  # CLIP's
CLIP_VOCABULARY, CLIP_END = 49408, 49407


def t5_base(dtype: torch.dtype = torch.float32) -> VokenLM:
    """220M parameters: 12 + 12 layers, 768 wide; the vocabulary padded to 33,152 rows."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=33152,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    )
    return _voken_lm(T5ForConditionalGeneration(config).to(dtype), "seq2seq", first=TEXT_VOCABULARY, start=0, end=1)


def llama() -> VokenLM:
    """135M parameters: LLaMA's architecture at 12 layers, 768 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=33024,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    return _voken_lm(LlamaForCausalLM(config), "causal", first=32000, start=-1, end=2)


def encoder_decoder(layers: int, *, width: int = 512) -> VokenLM:
    """A text encoder of BERT-base's size (12 layers, 768 wide) with a voken decoder of some layers."""
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=TEXT_VOCABULARY), add_pooling_layer=False)
    config = decoder_config(SPACE, width=width, layers=layers, heads=8, dropout=0.0)
    joint = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, config)
    model = EncoderDecoderModel(config=joint, encoder=encoder, decoder=GPT2LMHeadModel(config))
    return _voken_lm(model, "encoder-decoder", first=DECODER_SPECIALS, start=START, end=END)


def captions(count: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids of random captions, of captions' lengths, shortest first."""
    generator = np.random.default_rng(seed)
    lengths = np.sort(generator.normal(*CAPTION_TOKENS, size=count).round().clip(6, 24).astype(int))
    return [generator.integers(3, 32000, size=length).tolist() for length in lengths]


def prompts(count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of one length."""
    return np.random.default_rng(seed).integers(3, 32000, size=(count, length)).tolist()


class TextTower(NamedTuple):
    """CLIP ViT-L/14's text tower: 12 layers, 768 wide, causal, read at the end token."""

    clip: "Clip"
    trimmed: bool
    """Cut the padding behind the longest text, which is exact here."""

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids (queries, 77) to features (queries, 768)."""
        from models.clip import encode_tokens, trim_padding

        with torch.inference_mode():
            return encode_tokens(self.clip, trim_padding(self.clip, tokens) if self.trimmed else tokens)


def text_tower(precision: Precision, device: torch.device, *, tuned: bool = False) -> "Clip":
    """CLIP ViT-L/14's text tower with random weights.

    Args:
        tuned: its linear layers run as the language models' do (models/arithmetic.py).
    """
    from open_clip.transformer import TextTransformer

    from models.clip import Clip

    torch.manual_seed(0)
    make, dtype = choose_linear(precision, device)
    text: Any = TextTransformer(
        context_length=CONTEXT, vocab_size=CLIP_VOCABULARY, width=768, heads=12, layers=12, output_dim=768
    )
    text = text.eval().to(device, dtype)
    if tuned:
        text = with_linears(text, make)
    unused: Any = None
    return Clip(SimpleNamespace(text=text), unused, unused, {})


def clip_tokens(token_ids: list[list[int]]) -> Tensor:
    """Captions as CLIP's tokenizer lays them out: padded to 77, closed by the end token."""
    tokens = torch.zeros(len(token_ids), CONTEXT, dtype=torch.long)
    for row, ids in enumerate(token_ids):
        tokens[row, : len(ids)] = torch.tensor(ids)
        tokens[row, len(ids)] = CLIP_END
    return tokens


def _voken_lm(model: Any, kind: Kind, *, first: int, start: int, end: int) -> VokenLM:
    words = SimpleNamespace(pad_token_id=0)
    return VokenLM(
        model.eval(),
        words,
        kind=kind,
        space=SPACE,
        first_voken=first,
        start=start,
        end=end,
        max_source=128,
        frozen_encoder=False,
    )
