"""Language models with vokens: tokens, starts, losses, learning, saving."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from models.batches import bucketed_batches
from models.compute import make_optimizer
from models.decoding import make_writer
from models.voken_lm import (
    DECODER_SPECIALS,
    VokenLM,
    build_causal,
    build_encoder_decoder,
    build_seq2seq,
    refuse_unsearchable,
)
from retriever.losses import Targets, generative_loss, soft_targets
from retriever.queries import LiveQueries, StoredQueries
from tests.tiny import (
    COLOURS,
    bert_folder,
    codebooks,
    llama_folder,
    t5_folder,
    tiny_encoder_decoder,
    tiny_llama,
    tiny_t5,
)
from tools.errors import BadInput
from tools.vokens import VokenSpace

SPACE = VokenSpace(3, 5, shared=False)
clip_decoder = partial(tiny_encoder_decoder, clip=True)
SHARED = VokenSpace(3, 5, shared=True)


def test_voken_names_and_rows() -> None:
    assert SPACE.tokens[:2] == ["<v0_0>", "<v0_1>"]
    assert len(SPACE.tokens) == 15
    assert SPACE.rows(np.array([[0, 0, 4]])).tolist() == [[0, 5, 14]]
    assert SHARED.tokens == [f"<v_{code}>" for code in range(5)]
    assert SHARED.rows(np.array([[0, 0, 4]])).tolist() == [[0, 0, 4]]
    assert (SPACE.level_rows(2), SHARED.level_rows(2)) == (slice(10, 15), slice(0, 5))


@pytest.mark.parametrize("space", [SPACE, SHARED])
def test_t5_vokens_follow_the_tokenizer_and_start_from_the_codebooks(space: VokenSpace, tmp_path: Path) -> None:
    lm = tiny_t5(tmp_path, space)
    books = codebooks(space, 16)
    codes = torch.tensor([[1, 2, 4]])
    ids = lm.token_ids(codes)[0]
    names = [space.tokens[row] for row in space.rows(codes.numpy())[0]]
    assert lm.tokenizer.convert_tokens_to_ids(names) == ids.tolist()
    for level, code in enumerate(codes[0]):
        book = books[0 if space.shared else level]
        assert torch.equal(lm.model.get_input_embeddings().weight[ids[level]], torch.from_numpy(book[code]))


@pytest.mark.parametrize("family", [(T5Config, T5ForConditionalGeneration), (MT5Config, MT5ForConditionalGeneration)])
def test_a_head_of_its_own_is_kept(family: tuple[Any, Any], tmp_path: Path) -> None:
    """T5 1.1, Flan-T5 and mT5: the trained head differs from the input embeddings."""
    folder = t5_folder(tmp_path / "t5", feed_forward="gated-gelu", tied=False, family=family)
    published = load_file(folder / "model.safetensors")
    assert not torch.equal(published["lm_head.weight"], published["shared.weight"])
    lm = build_seq2seq(
        str(folder), space=VokenSpace(3, 64, shared=False), codebooks=codebooks(VokenSpace(3, 64, shared=False), 16),
        dropout=0.0, max_source=16,
    )  # fmt: skip
    lm.save_pretrained(tmp_path / "saved")
    for each in (lm, VokenLM.from_pretrained(tmp_path / "saved")):
        head, inputs = each.model.get_output_embeddings().weight, each.model.get_input_embeddings().weight
        words = len(published["lm_head.weight"])
        assert len(head) > words
        assert torch.equal(head[: lm.first_voken], published["lm_head.weight"][: lm.first_voken])
        assert torch.equal(inputs[: lm.first_voken], published["shared.weight"][: lm.first_voken])
        assert torch.equal(head[lm.first_voken :], inputs[lm.first_voken :])  # both start from the codebooks


def test_a_new_decoder_starts_from_the_scaled_codebooks(tmp_path: Path) -> None:
    lm = tiny_encoder_decoder(tmp_path, SPACE)
    rows = lm.model.decoder.get_input_embeddings().weight[DECODER_SPECIALS:].detach().numpy()
    books = codebooks(SPACE, 16).reshape(-1, 16)
    scale = rows[0, 0] / books[0, 0]
    assert np.allclose(rows, books * scale, atol=1e-6)
    assert rows.std() == pytest.approx(4 / 16**0.5, rel=1e-3)


@pytest.mark.parametrize("build", [tiny_t5, tiny_encoder_decoder, clip_decoder, tiny_llama])
def test_save_and_load_give_equal_logits(build: type, tmp_path: Path) -> None:
    lm: VokenLM = build(tmp_path / "base", SPACE)
    lm.save_pretrained(tmp_path / "saved")
    again = VokenLM.from_pretrained(tmp_path / "saved")
    assert again.space == SPACE
    codes = torch.tensor([[1, 2, 3], [0, 0, 0]])
    texts = ["a red circle", "blue"]
    with torch.inference_mode():
        first = lm(lm.encode(lm.tokenize(texts)), codes)
        second = again(again.encode(again.tokenize(texts)), codes)
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_t5, tiny_encoder_decoder, clip_decoder, tiny_llama])
def test_padding_is_masked(build: type, tmp_path: Path) -> None:
    lm: VokenLM = build(tmp_path, SPACE)
    codes = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        alone = lm(lm.encode(lm.tokenize(["blue"])), codes)
        padded = lm(lm.encode(lm.tokenize(["blue", "a small drawing of a red circle"])), codes.repeat(2, 1))
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


@pytest.mark.parametrize("build", [tiny_t5, tiny_encoder_decoder, clip_decoder, tiny_llama])
def test_overfits_eight_pairs_and_moves_every_trainable_parameter(build: type, tmp_path: Path) -> None:
    lm: VokenLM = build(tmp_path, SPACE)
    before = {name: value.clone() for name, value in lm.named_parameters()}
    torch.manual_seed(0)
    codes = torch.randint(0, 5, (8, 3))
    tokens = lm.tokenize([f"a {colour} circle" for colour in COLOURS])
    optimizer = make_optimizer("adam", lm, lr=0.01, weight_decay=0.0)
    for _ in range(300):
        loss = generative_loss(lm(lm.encode(tokens), codes), Targets(codes, None), lm, temperature=1.0, end=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    lm.eval()
    with torch.inference_mode():
        logits = lm(lm.encode(tokens), codes)
    assert torch.equal(logits[:, :3].argmax(dim=-1), lm.token_ids(codes))
    for name, value in lm.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name


@pytest.mark.parametrize("build", [tiny_t5, tiny_encoder_decoder, clip_decoder, tiny_llama])
def test_a_writer_gives_the_log_probabilities_of_a_forward_pass(build: type, tmp_path: Path) -> None:
    lm: VokenLM = build(tmp_path, SPACE)
    codes = torch.tensor([[1, 2, 3], [4, 0, 2]])
    writer = make_writer(lm)
    with torch.inference_mode():
        memory = lm.encode(lm.tokenize(["a red circle", "blue"]))
        expected = lm(memory, codes).log_softmax(dim=-1)
        session = writer.begin(memory)
        states = session.open()
        for level, start in enumerate(lm.level_offsets.tolist()):
            own = expected[:, level, start : start + SPACE.codebook_size]
            assert torch.allclose(writer.head.log_probabilities(states, level, "full")[:, 0], own, atol=1e-4)
            renormalized = own - own.logsumexp(dim=-1, keepdim=True)
            assert torch.allclose(writer.head.log_probabilities(states, level, "voken")[:, 0], renormalized, atol=1e-4)
            assert torch.allclose(writer.head.voken_probability(states, level)[:, 0], own.exp().sum(-1), atol=1e-4)
            states = session.advance(lm.token_ids(codes)[:, level : level + 1], torch.zeros(2, 1, dtype=torch.long))
        assert torch.allclose(writer.head.end_log_probability(states)[:, 0], expected[:, -1, lm.end], atol=1e-4)


def test_a_prompt_is_never_cut_and_stands_around_the_query(tmp_path: Path) -> None:
    lm = tiny_llama(tmp_path, SPACE)
    lm.max_source = 2
    (ids,) = lm.tokenize(["red circle blue blue blue"])
    words = lm.tokenizer.convert_ids_to_tokens(ids)
    assert [word for word in words if word != "</s>"] == ["<s>", *["a", "picture", "of", "red", "circle", "drawing"]]


def test_a_frozen_encoder_stays_in_eval_mode(tmp_path: Path) -> None:
    lm = tiny_encoder_decoder(tmp_path, SPACE).train()
    assert lm.model.decoder.training
    assert not lm.model.encoder.training
    assert not any(value.requires_grad for value in lm.model.encoder.parameters())


def test_hard_loss_by_hand(tmp_path: Path) -> None:
    lm = tiny_encoder_decoder(tmp_path, SPACE)
    codes = torch.tensor([[0, 1, 2]])
    logits = torch.zeros(1, 4, 18)
    logits[0, 0, DECODER_SPECIALS + 0] = 2.0
    log_uniform = np.log(18)
    first = -(4.0 - np.log(np.exp(4.0) + 17))  # temperature 0.5 doubles the logit
    loss = generative_loss(logits, Targets(codes, None), lm, temperature=0.5, end=False)
    assert loss.item() == pytest.approx((first + 2 * log_uniform) / 3, rel=1e-5)
    loss = generative_loss(logits, Targets(codes, None), lm, temperature=0.5, end=True)
    assert loss.item() == pytest.approx((first + 3 * log_uniform) / 4, rel=1e-5)


@pytest.mark.parametrize("space", [SPACE, SHARED])
def test_soft_targets_at_low_temperature_are_the_codes(space: VokenSpace, tmp_path: Path) -> None:
    lm = tiny_encoder_decoder(tmp_path, space)
    books = torch.from_numpy(codebooks(space, 16))
    codes = torch.tensor([[0, 1, 2], [4, 4, 4]])
    latents = torch.stack([books[level % len(books)][codes[:, level]] for level in range(3)]).sum(0)
    targets = soft_targets(latents, books, 3, 1e-6)
    residual = latents
    for level in range(3):  # the greedy codes of the latents, not always the ones they were made of
        book = books[level % len(books)]
        chosen = torch.cdist(residual, book).argmin(dim=1)
        assert torch.equal(targets.codes[:, level], chosen)
        residual = residual - book[chosen]
    assert targets.shares is not None
    logits = torch.randn(2, 4, DECODER_SPECIALS + len(space.tokens))
    hard = generative_loss(logits, Targets(targets.codes, None), lm, temperature=1.0, end=True)
    soft = generative_loss(logits, targets, lm, temperature=1.0, end=True)
    assert soft.item() == pytest.approx(hard.item(), rel=1e-5)


def test_soft_targets_are_drawn_as_often_as_they_say() -> None:
    torch.manual_seed(0)
    books = torch.tensor([[[0.0], [1.0]]])
    targets = soft_targets(torch.full((4000, 1), 0.4), books, 1, 0.5)
    expected = np.exp(-0.16 / 0.5) / (np.exp(-0.16 / 0.5) + np.exp(-0.36 / 0.5))
    assert targets.shares is not None
    assert targets.shares[0, 0, 0].item() == pytest.approx(expected, rel=1e-4)
    assert (targets.codes == 0).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_stored_states_equal_live_ones(tmp_path: Path) -> None:
    lm = tiny_encoder_decoder(tmp_path / "lm", SPACE)
    texts = ["a red circle", "blue", "drawing of a small green square"]
    live = LiveQueries(lm, texts)
    stored = StoredQueries(lm, texts, folder=tmp_path, name="val", dtype=torch.float32)
    again = StoredQueries(lm, texts, folder=tmp_path, name="val", dtype=torch.float32)  # finds the file
    chosen = np.array([2, 0])
    with torch.inference_mode():
        expected = live.memory(chosen)
    for memory in (stored.memory(chosen), again.memory(chosen)):
        assert torch.equal(memory.mask, expected.mask)
        assert torch.allclose(memory.states, expected.states * expected.mask[:, :, None], atol=2e-3)  # float16


def test_bucketed_batches_hold_every_text_once_with_little_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 30, size=1000)
    batches = bucketed_batches(lengths, 16, generator)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert [batch.tolist() for batch in batches] != [
        batch.tolist() for batch in bucketed_batches(lengths, 16, generator)
    ]


def test_a_clips_text_tower_is_read_and_stays_as_it_was(tmp_path: Path) -> None:
    lm = clip_decoder(tmp_path / "clip", SPACE)
    tokens = lm.pad(lm.tokenize(["a red circle", "blue"]))
    tower = CLIPModel.from_pretrained(tmp_path / "clip").text_model.eval()
    with torch.inference_mode():
        expected = tower(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        assert torch.allclose(lm.read(tokens).states, expected, atol=1e-6)
    assert not any(value.requires_grad for value in lm.model.get_encoder().parameters())
    assert (lm.state_width, lm.most_tokens) == (32, 16)


def test_models_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    books = codebooks(SPACE, 24)
    with pytest.raises(BadInput, match=r"codebooks are 24 wide.*with a width of 16"):
        build_seq2seq(str(t5_folder(tmp_path / "t5")), space=SPACE, codebooks=books, dropout=0.0, max_source=8)
    with pytest.raises(BadInput, match="cannot be loaded"):
        build_seq2seq(str(tmp_path / "none"), space=SPACE, codebooks=books, dropout=0.0, max_source=8)
    with pytest.raises(BadInput, match="`decoder_heads` 5 does not divide"):
        build_encoder_decoder(
            str(bert_folder(tmp_path / "bert")),
            space=SPACE, codebooks=books, layers=1, heads=5, dropout=0.0, max_source=8,
        )  # fmt: skip
    with pytest.raises(BadInput, match="is a bert, seq2seq takes t5"):
        build_seq2seq(str(tmp_path / "bert"), space=SPACE, codebooks=books, dropout=0.0, max_source=8)
    llama = str(llama_folder(tmp_path / "llama"))
    with pytest.raises(BadInput, match=r"codebooks are 24 wide.*with a width of 16"):
        build_causal(llama, space=SPACE, codebooks=books, max_source=8)
    for change, reason in (
        ({"final_logit_softcapping": 30.0}, "scales its logits"),
        ({"sliding_window": 8}, "sees 8 tokens back"),
        ({"model_type": "bloom"}, "cannot share"),
    ):
        with pytest.raises(BadInput, match=reason):
            refuse_unsearchable("x", SimpleNamespace(**{"model_type": "llama", **change}), 20)
    refuse_unsearchable("x", SimpleNamespace(model_type="qwen2", sliding_window=8, use_sliding_window=False), 20)
    with pytest.raises(BadInput, match=r"must have \{query\} in it once"):
        build_causal(llama, space=SPACE, codebooks=codebooks(SPACE, 16), max_source=8, prompt="a picture")


def test_a_causal_models_vokens_are_as_long_as_its_words(tmp_path: Path) -> None:
    """Codebooks may be many times as long: the untrained model then is not sure of anything, and guesses."""
    llama_folder(tmp_path / "llama")
    books = 50 * codebooks(SPACE, 16)
    lm = build_causal(str(tmp_path / "llama"), space=SPACE, codebooks=books, max_source=8, prompt="a {query}").eval()
    for matrix in (lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight):
        words, vokens = matrix[: lm.first_voken].norm(dim=1), matrix[lm.first_voken :].norm(dim=1)
        assert vokens.mean().item() == pytest.approx(words.mean().item(), rel=1e-4)
        directions = torch.from_numpy(books.reshape(-1, 16))
        cosines = torch.nn.functional.cosine_similarity(matrix[lm.first_voken :], directions)
        assert cosines.min() > 0.999
    codes = torch.zeros(1, SPACE.levels, dtype=torch.long)
    logits = lm(lm.pad(lm.tokenize(["a red circle"])), codes)
    losses = -logits.log_softmax(dim=-1)[0, : SPACE.levels].gather(1, lm.token_ids(codes).T)
    assert losses.mean().item() < 2 * np.log(logits.shape[-1])


@pytest.mark.parametrize("build", [tiny_t5, tiny_encoder_decoder, clip_decoder, tiny_llama])
def test_more_padding_changes_nothing(build: Any, tmp_path: Path) -> None:
    lm = build(tmp_path, SPACE)
    tokens, codes = lm.tokenize(["a red circle", "blue"]), torch.zeros(2, SPACE.levels, dtype=torch.long)
    short, long = lm.pad(tokens), lm.pad(tokens, multiple=8)
    assert long.ids.shape[1] % 8 == 0
    assert long.ids.shape[1] > short.ids.shape[1]
    assert torch.allclose(lm(short, codes), lm(long, codes), atol=1e-4)
