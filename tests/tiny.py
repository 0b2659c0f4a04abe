"""Small real things for the tests: models with random weights, tokenizers, pictures with captions."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from models.batches import Batch
from models.clip import Clip, save_clip
from models.voken_lm import VokenLM, build_causal, build_encoder_decoder, build_seq2seq
from tools.captions import Record
from tools.files import write_json_lines
from tools.vokens import VokenSpace

COLOURS = ("red", "green", "blue", "black", "orange", "purple", "brown", "grey")
SHAPES = ("circle", "square", "triangle", "line", "cross", "ring")
WORDS = [*COLOURS, *SHAPES, "a", "an", "picture", "of", "drawing", "small", "big", "turtle", "outlined"]

rqvae_train = import_module("RQ-VAE.train")
prepare_emb = import_module("RQ-VAE.prepare_emb")
train_heads = import_module("RQ-VAE.train_heads")
generate_codes = import_module("RQ-VAE.generate_codes")
assemble_clip = import_module("RQ-VAE.assemble_clip")


def tokenizer(specials: list[str], *, end_only: bool, size: int = 0) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, and words that nobody says up to `size` in all; `end_only` closes a text as
    T5 does, else it is wrapped as BERT does."""
    words = [*specials, *WORDS]
    words += [f"unsaid{number}" for number in range(size - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[2]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"$A {specials[1]}" if end_only else f"{specials[3]} $A {specials[1]}"
    used = [(name, vocabulary[name]) for name in specials]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=specials[0], eos_token=specials[1], unk_token=specials[2]
    )


def bert_folder(folder: Path, width: int = 32) -> Path:
    """A text encoder with random weights."""
    torch.manual_seed(0)
    words = tokenizer(["[PAD]", "[SEP]", "[UNK]", "[CLS]"], end_only=False)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def hub_clip_folder(folder: Path, width: int = 32) -> Path:
    """A CLIP of two towers with random weights, as transformers saves it."""
    torch.manual_seed(0)
    words = tokenizer(["[PAD]", "<|endoftext|>", "[UNK]", "<|startoftext|>"], end_only=False)
    layers: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 64}
    text = {
        "vocab_size": len(words), "hidden_size": width, "num_hidden_layers": 2, "max_position_embeddings": 32,
        "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0, "initializer_factor": 10.0,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1}
    config = CLIPConfig(text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def t5_folder(
    folder: Path,
    width: int = 16,
    *,
    feed_forward: str = "relu",
    tied: bool = True,
    family: tuple[Any, Any] = (T5Config, T5ForConditionalGeneration),
) -> Path:
    """A T5 with random weights; "gated-gelu" and untied as T5 1.1 and Flan-T5 are."""
    torch.manual_seed(0)
    words = tokenizer(["<pad>", "</s>", "<unk>", "<x>"], end_only=True)
    config = family[0](
        vocab_size=len(words) + 3,  # T5's own embedding has spare rows too
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=1.5 if tied else 0.5,  # an untied head's logits are not scaled down
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
    )
    model = family[1](config)
    if not tied:  # the library ties all of this family, whatever the configuration says; the published weights differ
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) * 0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llama_folder(folder: Path, width: int = 16, feed_forward: int = 32) -> Path:
    """A LLaMA with random weights and grouped keys and values, as LLaMA 3 has them."""
    torch.manual_seed(0)
    words = tokenizer(["<pad>", "</s>", "<unk>", "<s>"], end_only=False)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def codebooks(space: VokenSpace, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Random codebooks (books, codebook_size, width)."""
    books = 1 if space.shared else space.levels
    return np.random.default_rng(1).normal(size=(books, space.codebook_size, width)).astype(np.float32)


def tiny_t5(folder: Path, space: VokenSpace, **options: Any) -> VokenLM:
    """A T5 with vokens, in eval mode."""
    t5_folder(folder, **options)
    return build_seq2seq(str(folder), space=space, codebooks=codebooks(space, 16), dropout=0.0, max_source=16).eval()


def tiny_llama(folder: Path, space: VokenSpace) -> VokenLM:
    """A LLaMA with vokens, in eval mode."""
    llama_folder(folder)
    prompt = "a picture of {query} drawing"
    return build_causal(str(folder), space=space, codebooks=codebooks(space, 16), max_source=16, prompt=prompt).eval()


def tiny_encoder_decoder(folder: Path, space: VokenSpace, *, clip: bool = False) -> VokenLM:
    """A frozen text encoder, BERT's or CLIP's, and a decoder, in eval mode."""
    (hub_clip_folder if clip else bert_folder)(folder)
    torch.manual_seed(0)
    return build_encoder_decoder(
        str(folder), space=space, codebooks=codebooks(space, 16), layers=2, heads=2, dropout=0.0, max_source=16
    ).eval()


def clip_folder(folder: Path) -> Path:
    """An open_clip ViT with random weights."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    model = open_clip.CustomTextCLIP(**config).eval()
    preprocess = {"size": 32, "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    open_clip.model.set_model_preprocess_cfg(model, preprocess)
    transform = open_clip.transform.image_transform(32, is_train=False)
    save_clip(folder, Clip(model, transform, open_clip.get_tokenizer("ViT-B-32"), config))
    return folder


def draw_picture(path: Path, colour: str, shape: str, seed: int) -> None:
    """One coloured shape at a random place."""
    x, y = np.random.default_rng(seed).integers(2, 14, size=2)
    picture = Image.new("RGB", (32, 32), "white")
    pen = ImageDraw.Draw(picture)
    box = (int(x), int(y), int(x) + 16, int(y) + 16)
    if shape in ("circle", "ring"):
        pen.ellipse(box, fill=colour if shape == "circle" else None, outline=colour, width=2)
    elif shape in ("square", "cross"):
        pen.rectangle(box, fill=colour if shape == "square" else None, outline=colour, width=3)
    else:
        pen.line(box, fill=colour, width=6 if shape == "line" else 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def picture_set(folder: Path) -> list[Record]:
    """48 pictures below `<folder>/images` with three captions each, and `<folder>/captions.jsonl`."""
    records = []
    for number, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        file = f"{colour}-{shape}.png"
        draw_picture(folder / "images" / file, colour, shape, number)
        captions = (f"a {colour} {shape}", f"drawing of a {colour} {shape}", f"small picture of {shape} {colour}")
        split = "test" if number % 6 == 5 else "val" if number % 6 == 4 else "train"
        records.append(Record(file, file, split, captions))  # type: ignore[arg-type]
    write_json_lines(
        folder / "captions.jsonl",
        ({"image": row.image, "captions": list(row.captions), "split": row.split} for row in records),
    )
    return records


def batch_of(rows: NDArray[np.int64], *, epoch: int = 0, number: int = 0) -> Batch:
    """A batch of a training whose seed is 0."""
    return Batch(rows, 0, epoch, number)
