"""Captions of pictures by any image-to-text model of transformers: BLIP, BLIP-2, GIT, LLaVA, Qwen-VL, ..."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from tools.errors import BadInput

from .pretrained import LOADING_ERRORS, load_tokenizer
from .weights import first_line

CHAT_PROMPT = "Write a caption for this picture: one short sentence, and nothing else."


class Sampling(NamedTuple):
    """How captions are drawn."""

    captions: int
    """Of each picture."""
    temperature: float
    top_p: float
    max_new_tokens: int
    prompt: str | None
    """What the caption goes on from, or what a chat model is asked."""


class Captioner(NamedTuple):
    """An image-to-text model ready to write."""

    model: Any
    processor: Any
    """Of pictures, and of texts where the model has a processor for both."""
    tokenizer: Any


def load_captioner(name: str, *, device: torch.device, dtype: torch.dtype) -> Captioner:
    """Load an image-to-text model in eval mode.

    Args:
        name: on the Hugging Face Hub ("Salesforce/blip2-opt-2.7b"), or a folder.

    Raises:
        BadInput: transformers cannot get it, or it is no image-to-text model.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if hasattr(processor, "image_processor"):
            tokenizer = processor.tokenizer
        else:  # an encoder and a decoder joined: each has its own
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            tokenizer = load_tokenizer(name)
    except (*LOADING_ERRORS, KeyError, ImportError) as error:
        raise BadInput(f"transformers cannot load {name} as an image-to-text model: {first_line(error)}") from None
    tokenizer.padding_side = "left"  # a text goes on at its end
    return Captioner(model.eval().to(device), processor, tokenizer)


def write_captions(
    captioner: Captioner, pictures: Sequence[Image.Image], sampling: Sampling, *, seed: int
) -> list[list[str]]:
    """Captions of each picture, drawn independently: the same for the same pictures and seed."""
    model = captioner.model
    inputs = _inputs(captioner, pictures, sampling.prompt)
    read = inputs.get("input_ids")
    read = None if read is None else read.clone()  # some models write into it
    torch.manual_seed(seed)
    with torch.inference_mode():
        written = model.generate(
            **inputs,
            do_sample=True,
            num_beams=1,
            top_k=0,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.captions,
        )
    if read is not None:
        written = _behind(written, read.repeat_interleave(sampling.captions, dim=0))
    texts = captioner.tokenizer.batch_decode(written, skip_special_tokens=True)
    if len(texts) != len(pictures) * sampling.captions:
        raise BadInput(
            f"{type(model).__name__} wrote {len(texts)} captions of {len(pictures)} pictures: it cannot sample"
        )
    texts = [_without_prompt(text, sampling.prompt) for text in texts]
    return [texts[start : start + sampling.captions] for start in range(0, len(texts), sampling.captions)]


def _inputs(captioner: Captioner, pictures: Sequence[Image.Image], prompt: str | None) -> dict[str, Any]:
    """What the model reads, on its device and in its precision."""
    processor = captioner.processor
    if getattr(processor, "chat_template", None):
        content = [{"type": "text", "text": prompt or CHAT_PROMPT}]
        asked = [[{"role": "user", "content": [{"type": "image", "image": picture}, *content]}] for picture in pictures]
        found = processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    elif prompt is not None and hasattr(processor, "image_processor"):
        found = processor(images=list(pictures), text=[prompt] * len(pictures), padding=True, return_tensors="pt")
    elif prompt is not None:
        raise BadInput(f"{type(captioner.model).__name__} reads no text beside the picture: leave `prompt` out")
    else:
        found = processor(images=list(pictures), return_tensors="pt")
    device, dtype = captioner.model.device, captioner.model.dtype
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def _behind(written: Tensor, read: Tensor) -> Tensor:
    """What was written behind the prompt, for models that return both."""
    length = read.shape[1]
    if written.shape[1] >= length and torch.equal(written[:, :length], read):
        return written[:, length:]
    return written


def _without_prompt(text: str, prompt: str | None) -> str:
    text = text.strip()
    if prompt and text.lower().startswith(prompt.strip().lower()):
        return text[len(prompt.strip()) :].strip()
    return text
