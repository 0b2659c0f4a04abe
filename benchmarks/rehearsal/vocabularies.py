"""Tokenizers of the published kinds, sizes and special tokens, learnt from made-up captions and filled up.

What is added up to the published size are signs that no caption holds: the tokenizer files and the tables of embeddings
are as large as the real ones, and texts become about as many tokens.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Chinese characters, Korean syllables, rare and very rare Chinese characters: each one piece of a text.
FILLERS = ((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B739))
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of pieces
LEAST = -100.0  # a filler's score


def sentence_pieces(path: Path, texts: Sequence[str], *, kind: str, size: int, learnt: int) -> None:
    """Write a sentencepiece model: T5's unigram (`<pad>`, `</s>`, `<unk>` first) or LLaMA's BPE (`<unk>`, `<s>`,
    `</s>` and 256 bytes first).

    Args:
        size: pieces in all.
        learnt: pieces that are learnt, at most.
    """
    written = io.BytesIO()
    ids: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if kind == "bpe":
        ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True, "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type=kind,
        vocab_size=learnt,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
        remove_extra_whitespaces=kind != "bpe",
        required_chars="".join(map(chr, range(33, 127))),
        minloglevel=2,
        **ids,
    )
    model: Any = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())  # type: ignore[attr-defined]
    there = {piece.piece for piece in model.pieces}
    for sign in fillers():
        if len(model.pieces) == size:
            break
        if sign not in there:
            model.pieces.add(piece=sign, score=LEAST - len(model.pieces) if kind == "bpe" else LEAST, type=NORMAL)
    path.write_bytes(model.SerializeToString())


def fillers() -> Iterator[str]:
    for first, last in FILLERS:
        yield from map(chr, range(first, last + 1))


def byte_pairs(texts: Sequence[str], *, size: int, learnt: int, first: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE as GPT-2's, OPT's and LLaMA-3's.

    Args:
        first: special tokens with the first ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learnt,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for sign in fillers():
        if len(vocabulary) == size:
            break
        vocabulary.setdefault(as_bytes.pre_tokenize_str(sign)[0][0], len(vocabulary))
    for number in range(len(vocabulary), size):  # there are no more signs
        vocabulary[f"Ġunsaid{number}"] = number
    return Tokenizer.from_str(json.dumps(raw))


def write_llama3(folder: Path, texts: Sequence[str], *, size: int, specials: int, learnt: int) -> None:
    """LLaMA-3's tokenizer.json: `size` tokens, and special ones behind them; there is no padding token."""
    tokenizer = byte_pairs(texts, size=size, learnt=learnt)
    named = ["<|begin_of_text|>", "<|end_of_text|>"]
    named += [f"<|reserved_special_token_{number}|>" for number in range(specials - len(named))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])
    begin = named[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, size)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": begin,
        "clean_up_tokenization_spaces": True,
        "eos_token": named[1],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {"bos_token": begin, "eos_token": named[1]})


def write_opt(folder: Path, texts: Sequence[str], *, size: int, learnt: int) -> None:
    """OPT's tokenizer as BLIP-2 has it: tokenizer.json beside vocab.json and merges.txt, and `<image>` behind it."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = byte_pairs(texts, size=size, learnt=learnt, first=first)
    tokenizer.model.save(str(folder))
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>") | {"pad_token": "<pad>"}
    settings = {"add_bos_token": True, "add_prefix_space": False, "errors": "replace", "model_max_length": 1e30}
    write_json(folder / "tokenizer_config.json", settings | ends | {"tokenizer_class": "GPT2Tokenizer"})
    write_json(folder / "special_tokens_map.json", ends)
    write_json(folder / "added_tokens.json", {"<image>": size})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
