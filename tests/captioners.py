"""Image-to-text models with random weights, one of each family."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from tests.tiny import tokenizer

SIZE = {"height": 32, "width": 32}
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
VISION: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 16}
SPECIALS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def words_for(folder: Path) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, with all its special tokens known as such."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    words = tokenizer(["[PAD]", "[SEP]", "[UNK]", "[CLS]"], end_only=False)
    words.add_special_tokens({"bos_token": "[CLS]"})
    return words


def blip_folder(folder: Path) -> Path:
    words = words_for(folder)
    text = {**SMALL, **SPECIALS, "sep_token_id": 1, "vocab_size": len(words), "encoder_hidden_size": 16}
    config = BlipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=VISION)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=SIZE), words).save_pretrained(folder)
    return folder


def blip2_folder(folder: Path) -> Path:
    words = words_for(folder)
    processor = Blip2Processor(BlipImageProcessor(size=SIZE), words, num_query_tokens=4)  # adds "<image>" to the words
    text = {
        **SMALL,
        **SPECIALS,
        "model_type": "opt",
        "vocab_size": len(words),
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
    }
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**SMALL, "vocab_size": len(words), "encoder_hidden_size": 16},
        text_config={**text, "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def encoder_decoder_folder(folder: Path) -> Path:
    """A ViT and a GPT-2 joined: there is no processor for both."""
    words = words_for(folder)
    decoder = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=64, **SPECIALS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 0, 1
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    ViTImageProcessor(size=SIZE).save_pretrained(folder)
    return folder


def llava_folder(folder: Path) -> Path:
    """A chat model."""
    words = words_for(folder)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **SMALL, **SPECIALS)
    vision = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 2})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE), words, patch_size=16,
        vision_feature_select_strategy="default", chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder
