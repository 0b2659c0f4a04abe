"""Texts that are longer than a model reads: which they are, how far they are read, and that the stages tell."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.clip import TextEncoder, assemble_clip, load_clip
from models.lengths import Reader, tell_overlong, unread
from models.voken_lm import VokenLM
from retriever import rank_splits, retrieve
from retriever.train import main as train_retriever
from tests.chain import Chain, encode_config, encoder_decoder_config
from tests.test_clip import WEIGHTS
from tests.test_scorer import built, folders
from tests.tiny import WORDS, bert_folder, clip_folder, prepare_emb, tiny_encoder_decoder, tiny_llama, tiny_t5
from tools import processes
from tools.files import read_json_lines, write_json_lines
from tools.vokens import VokenSpace

CPU = torch.device("cpu")
SPACE = VokenSpace(levels=3, codebook_size=8, shared=False)
MAKERS: dict[str, Callable[[Path], VokenLM]] = {
    "seq2seq": lambda folder: tiny_t5(folder, SPACE),
    "causal": lambda folder: tiny_llama(folder, SPACE),
    "encoder-decoder": lambda folder: tiny_encoder_decoder(folder, SPACE),
}
ROOM = {"seq2seq": 15, "causal": 16, "encoder-decoder": 14, "clip": 14, "sentence": 30, "reranker": 16}  # words
__all__ = ["folders"]  # a fixture


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, str]) -> dict[str, Reader]:
    root = tmp_path_factory.mktemp("readers")
    found: dict[str, Reader] = {name: make(root / name) for name, make in MAKERS.items()}
    found["clip"] = TextEncoder(load_clip(str(clip_folder(root / "clip"))), CPU)
    sentence = assemble_clip(
        image_tower="tf_efficientnet_lite0", image_weights=WEIGHTS, text_tower=bert_folder(root / "bert"), width=16,
        image_size=64,
    )  # fmt: skip
    found["sentence"] = TextEncoder(sentence, CPU)
    found["reranker"] = built(folders)
    return found


@pytest.mark.parametrize("name", ROOM)
def test_what_is_cut_is_what_changes_nothing(name: str, readers: dict[str, Reader]) -> None:
    """Words behind the place that is told change none of the ids that the model gets, the word before it does."""
    model, room = readers[name], ROOM[name]
    word = "a" if name == "reranker" else "red"  # a token each
    ids = {"clip": "tokens", "sentence": "tokens", "reranker": "query_ids"}.get(name, "tokenize")

    def read(words: list[str]) -> list[int]:
        [found] = getattr(model, ids)([" ".join(words)])
        return list(found)

    whole = [word] * room
    assert model.overlong([" ".join(whole), " ".join([*whole, word]), word]) == [False, True, False]
    assert unread(model, " ".join(whole)) is None
    assert unread(model, " ".join([*whole, word, word])) == f"words {room + 1} and on"
    assert read([*whole, word, "blue"]) == read([*whole, "green"]) == read(whole)
    assert read([*whole[:-1], "drawing"]) != read(whole)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from([*WORDS, "antidisestablishmentarianism", "!", "über"]), max_size=60))
def test_beginnings_up_to_the_place_are_read_whole(words: list[str], readers: dict[str, Reader]) -> None:
    for model in readers.values():
        text = " ".join(words)
        [cut] = model.overlong([text])
        part = unread(model, text)
        assert (part is not None) == cut
        if part is not None and (found := re.fullmatch(r"words (\d+) and on", part)):
            first = int(found[1])
            assert model.overlong([" ".join(words[: first - 1]), " ".join(words[:first])]) == [False, True]


def test_a_text_without_spaces_is_counted_in_characters(readers: dict[str, Reader]) -> None:
    part = unread(readers["clip"], "猫" * 500)
    assert part is not None
    found = re.fullmatch(r"characters (\d+) and on", part)
    assert found is not None
    first = int(found[1])
    assert 2 <= first < 16
    assert readers["clip"].overlong(["猫" * (first - 1), "猫" * first]) == [False, True]


def test_as_published_the_reranker_has_less_room(folders: dict[str, str]) -> None:
    scorer = built(folders, max_query=16, compat=24)
    room = 24 - scorer.picture_ids([[0, 1, 2, 3]]).shape[1]  # type: ignore[arg-type]
    assert scorer.most_tokens == room < 16
    assert scorer.overlong([" ".join(["a"] * room), " ".join(["a"] * (room + 1))]) == [False, True]


def test_one_line_tells_of_all_of_them(
    readers: dict[str, Reader], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(["green"] * 20)
    tell_overlong(readers["clip"], ["a red ring", long, "a blue ring", long, f"{long} ring"])
    assert capsys.readouterr().out == (
        "3 of 5 captions are longer than the text tower reads (16 tokens); of the first, "
        f'"{long[:100]}... ({len(long)} characters)", words 15 and on are not read\n'
    )
    tell_overlong(readers["clip"], ["a red ring"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(processes, "is_main", lambda: False)
    tell_overlong(readers["clip"], [long])
    assert capsys.readouterr().out == ""


def test_the_stages_tell(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """03 of the text tower, 09, 12 and 16 of the language model."""
    captions = Path(shutil.copytree(chain.captions, tmp_path / "captions"))
    rows: list[dict[str, Any]] = [row for _, row in read_json_lines(captions / "captions.jsonl")]
    rows[0]["captions"] = [" ".join(["small"] * 40), *rows[0]["captions"][1:]]
    dataset = Path(shutil.copytree(chain.dataset, tmp_path / "dataset"))
    for split in ("train", "val", "test"):
        lines: list[dict[str, Any]] = [row for _, row in read_json_lines(dataset / f"{split}.jsonl")]
        lines[0]["query"] = " ".join(["big"] * 40)
        write_json_lines(dataset / f"{split}.jsonl", lines)
    write_json_lines(captions / "captions.jsonl", rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VERIFY", "off")
        prepare_emb.main(encode_config(captions, str(chain.root / "clip"), tmp_path / "features"))
        said = capsys.readouterr().out
        assert re.search(r"1 of 144 captions are longer than the text tower reads \(16 tokens\).*words 15 and on", said)
        config = encoder_decoder_config(chain, tmp_path / "lm", max_source=16, epochs=1)
        train_retriever(type(config)(**{**vars(config), "dataset": dataset}))
        said = capsys.readouterr().out
        assert re.search(r"1 of \d+ train queries are longer than the language model reads \(16 tokens\)", said)
        assert re.search(r"1 of \d+ val queries are longer than the language model reads", said)
        fixed: dict[str, Any] = {"dataset": dataset, "retriever": tmp_path / "lm", "precision": "fp32", "device": "cpu"}
        retrieve.main(retrieve.Config(output=tmp_path / "found", **fixed))
        said = capsys.readouterr().out
        assert re.search(r"1 of \d+ test captions are longer than the language model reads.*words 15 and on", said)
        rank_splits.main(rank_splits.Config(output=tmp_path / "lists", train_per_picture=0, beams=4, **fixed))
        assert "val captions are longer than the language model reads (16 tokens)" in capsys.readouterr().out
