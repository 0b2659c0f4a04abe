"""The reranker's model: prompt, image tokens, scores by every path, head, adapters, and where a new model starts."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AddedToken,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2Config,
    Qwen2Model,
)

from models import cooccurrence
from models.cooccurrence import LEAST, MOST, PRIOR, factorise
from models.live_bytes import LiveBytes
from models.opened_pictures import OpenedPictures
from models.scorer import (
    CLOSE_IMAGE,
    HEAD_NAME,
    IMAGE_TOKEN,
    LORA_TARGETS,
    OPEN_IMAGE,
    SCORER_NAME,
    START_SPREAD,
    TRAINED_WHOLE,
    ImageTokens,
    Lora,
    Pairs,
    Scorer,
    build_new_scorer,
    build_scorer,
    scoring_head,
)
from reranker.memory import GIB, NUMBERS, costs_of
from reranker.rerank import score_lists
from reranker.train import listwise_loss
from tests.tiny import t5_folder, tokenizer
from tools.errors import BadInput
from tools.files import read_json
from tools.ranked import NO_PICTURE, RankedLists

IMAGES = ImageTokens(length=4, size=12)
LORA = Lora(4, 8.0, 0.0, LORA_TARGETS, TRAINED_WHOLE)
TEXTS = ["a red ball", "blue", "a small green square, drawn twice"]
PICTURES = np.random.default_rng(0).integers(0, IMAGES.size, size=(6, IMAGES.length))


def llama_tokenizer(images: Sequence[str] = ()) -> Any:
    """Characters and some longer pieces, as LLaMA's tokenizer has them; image tokens behind them, if any."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, *":.,!?é"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    merges: list[tuple[str, str]] = []
    for word in ("▁USER", "▁Image", "▁Query", "▁A", "SS", "IST", "ANT", "▁a", "▁red", "▁ball"):
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    made.add_tokens([AddedToken(image, normalized=False) for image in images])
    return made


def seed_names(size: int) -> list[str]:
    """Image tokens in the order of SEED's tokenizer."""
    return [*(IMAGE_TOKEN.format(number) for number in range(size)), OPEN_IMAGE, CLOSE_IMAGE]


def seed_tokenizer(size: int) -> Any:
    made = llama_tokenizer(seed_names(size))
    made.pad_token = made.unk_token
    return made


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, {"num_key_value_heads": 2, "intermediate_size": 32}),
    "qwen2": (Qwen2Model, Qwen2Config, {"num_key_value_heads": 2, "intermediate_size": 32}),
    "gpt2": (GPT2Model, GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "bert": (
        BertModel,
        BertConfig,
        {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "distilbert": (DistilBertModel, DistilBertConfig, {"hidden_dim": 32}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small models with random weights, a tokenizer without image tokens ("words"), and SEED's ("seed")."""
    root = tmp_path_factory.mktemp("models")
    words, seed = llama_tokenizer(), seed_tokenizer(IMAGES.size)
    words.save_pretrained(root / "words")
    seed.save_pretrained(root / "seed")
    for name, (model, config, options) in MODELS.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
        made = config(vocab_size=len(words), initializer_range=0.3, **sizes, **options)
        model(made).save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


def built(folders: dict[str, str], name: str = "llama", **options: Any) -> Scorer:
    """A scorer on a small model, in eval mode; its head's scores are about as far apart as a trained one's."""
    options = {"tokenizer_name": folders["words"], "images": IMAGES, "max_query": 16, **options}
    torch.manual_seed(0)
    scorer = build_scorer(folders[name], **options).eval()
    with torch.no_grad():
        for parameter in scorer.head.parameters():
            parameter.mul_(5)
    return scorer


def bare(made: Any, images: ImageTokens = IMAGES, max_query: int = 16) -> Scorer:
    """Prompts without a model."""
    first = made.convert_tokens_to_ids(IMAGE_TOKEN.format(0))
    return Scorer(nn.Identity(), scoring_head(4), made, images=images, first_image=first, max_query=max_query)


def some_pairs(scorer: Scorer) -> Pairs:
    """Every picture with every text, in no order."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(PICTURES) * len(TEXTS)))
    return scorer.pairs(PICTURES, scorer.query_ids(TEXTS), order % len(PICTURES), order // len(PICTURES))


def one_at_a_time(scorer: Scorer, pairs: Pairs) -> Tensor:
    """Scores without padding, masks, caches or batches."""
    scores = []
    for picture, query in zip(pairs.of_picture, pairs.of_query, strict=True):
        ids = torch.cat([pairs.pictures[picture], pairs.queries[query, : pairs.lengths[query]]])
        states = scorer.model(input_ids=ids[None]).last_hidden_state
        scores.append(scorer.head(states[0, -1])[0])
    return torch.stack(scores)


# The prompt


@pytest.mark.parametrize("length", [32, 4])
def test_a_prompt_is_the_published_text_with_a_token_for_each_code(length: int) -> None:
    made, images = seed_tokenizer(64), ImageTokens(length, 64)
    scorer = bare(made, images)
    codes = np.random.default_rng(0).integers(0, 64, size=(2, length))
    opening = scorer.picture_ids(codes)
    for row, ids in zip(codes, opening, strict=True):
        picture = "".join(IMAGE_TOKEN.format(code) for code in row)
        whole = f"USER: Image:<img>{picture}</img> Query: a red ball ASSISTANT:"
        assert [*ids.tolist(), *scorer.query_ids(["a red ball"])[0]] == made(whole)["input_ids"]
        begin, end = (ids.tolist().index(made.convert_tokens_to_ids(mark)) for mark in ("<img>", "</img>"))
        assert end - begin + 1 == length + 2
        assert ids[begin + 1 : end].tolist() == [scorer.first_image + code for code in row]
    assert opening[0, 0] == made.bos_token_id
    assert made.convert_ids_to_tokens(opening[0, :5].tolist()) == ["<s>", "▁USER", ":", "▁Image", ":"]


def test_a_long_query_is_cut_and_the_prompts_end_stays() -> None:
    made = seed_tokenizer(12)
    end = ["▁A", "SS", "IST", "ANT", ":"]
    for max_query, kept in ((1, ["▁a"]), (3, ["▁a", "▁red", "▁ball"]), (16, ["▁a", "▁red", "▁ball", "▁a"])):
        scorer = bare(made, max_query=max_query)
        (ids,) = scorer.query_ids(["a red ball a"])
        assert made.convert_ids_to_tokens(ids) == [*kept, *end]
    assert made.convert_ids_to_tokens(bare(made).query_ids([""])[0])[-5:] == end


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.integers(1, 12))
def test_any_query_keeps_its_beginning_and_the_prompts_end(text: str, max_query: int) -> None:
    made = SEED
    ids = bare(made, max_query=max_query).query_ids([text, "a"])[0]
    whole = bare(made, max_query=1000).query_ids([text])[0]
    end = bare(made).query_ids(["a"])[0][1:]
    assert made.convert_ids_to_tokens(end) == ["▁A", "SS", "IST", "ANT", ":"]
    assert ids[-5:] == whole[-5:] == end
    assert ids[:-5] == whole[:-5][:max_query]
    prompt = f"</img> Query: {' '.join(text.split())} ASSISTANT:"
    assert whole == made(prompt, add_special_tokens=False)["input_ids"][3:]  # </img>, ▁Query and : go with the picture


SEED = seed_tokenizer(12)


def test_white_space_counts_as_one_space() -> None:
    scorer = bare(SEED)
    plain, *others = scorer.query_ids(["a red ball", "a\n\tred  ball", "  a red ball  ", "a red\u00a0ball"])
    assert others == [plain] * 3
    assert scorer.query_ids(["a redball"]) != [plain]


def test_what_closes_a_text_does_not_stand_in_the_prompts_middle() -> None:
    for specials, kind in ((["[PAD]", "[SEP]", "[UNK]", "[CLS]"], "sep"), (["<pad>", "</s>", "<unk>", "<x>"], "eos")):
        end_only = kind == "eos"
        made = tokenizer(specials, end_only=end_only)
        made.add_tokens([AddedToken(name, normalized=False) for name in seed_names(12)])
        made.eos_token = None
        setattr(made, f"{kind}_token", specials[1])
        assert made("a")["input_ids"][-1] == made.convert_tokens_to_ids(specials[1])
        scorer = bare(made)
        ids = [*scorer.picture_ids(PICTURES)[0].tolist(), *scorer.query_ids(["a red circle"])[0]]
        assert made.convert_tokens_to_ids(specials[1]) not in ids
        assert scorer.before[-1] == made.convert_tokens_to_ids("<img>")
        assert (ids[0] == made.convert_tokens_to_ids(specials[3])) == (not end_only)


# Image tokens


def test_image_tokens_that_are_there_are_taken(folders: dict[str, str], tmp_path: Path) -> None:
    """SEED's: `<img>` and `</img>` behind the codes."""
    made = AutoTokenizer.from_pretrained(folders["seed"])
    first = len(llama_tokenizer())
    assert made.convert_tokens_to_ids(seed_names(12)) == list(range(first, first + 14))
    scorer = built(folders, tokenizer_name=folders["seed"])
    assert scorer.first_image == first
    assert len(scorer.tokenizer) == scorer.model.embed_tokens.num_embeddings == first + 14
    scorer.save_pretrained(tmp_path / "saved")
    again = Scorer.from_pretrained(tmp_path / "saved")
    assert again.tokenizer.convert_tokens_to_ids(seed_names(12)) == list(range(first, first + 14))
    assert torch.equal(again.picture_ids(PICTURES), scorer.picture_ids(PICTURES))
    assert again.query_ids(TEXTS) == scorer.query_ids(TEXTS)
    assert again.padding == scorer.padding == made.unk_token_id


def test_image_tokens_that_are_missing_are_added(folders: dict[str, str], tmp_path: Path) -> None:
    words = len(llama_tokenizer())
    before = load_file(f"{folders['llama']}/model.safetensors")["embed_tokens.weight"]
    starts = np.random.default_rng(0).normal(size=(IMAGES.size, 10)).astype(np.float32) + 3.0
    scorer = built(folders, starts=starts)
    table = scorer.model.embed_tokens.weight.detach()
    assert (scorer.first_image, len(table)) == (words, words + IMAGES.size + 2)
    assert torch.equal(table[:words], before)
    rows = table[words : words + IMAGES.size] - before.mean(dim=0)
    centred = torch.from_numpy(starts - starts.mean(axis=0))
    scale = rows.norm() / centred.norm()
    assert torch.allclose(rows @ rows.T, scale**2 * (centred @ centred.T), atol=1e-2)  # angles stay
    assert rows.std().item() == pytest.approx(before.std(dim=0).mean().item(), rel=0.05)  # as long as words are
    scorer.save_pretrained(tmp_path / "saved")
    again = Scorer.from_pretrained(tmp_path / "saved")
    assert again.tokenizer.convert_tokens_to_ids(seed_names(12)) == list(range(words, words + 14))
    assert again.first_image == words


def test_other_image_tokens_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    names = seed_names(12)
    wrong = {"fewer": seed_names(11), "more": seed_names(13), "no end": names[:-1], "in disorder": [names[1], *names]}
    for name, tokens in wrong.items():
        folder = tmp_path / name
        llama_tokenizer(tokens).save_pretrained(folder)
        with pytest.raises(BadInput, match=r"has other image tokens than <img_00000> to <img_00011>, <img> and </img>"):
            built(folders, tokenizer_name=str(folder))
    with pytest.raises(BadInput, match=r"codebook is 17 wide, .*llama is 16: make the tokens with a patch width of 16"):
        built(folders, starts=np.zeros((12, 17), dtype=np.float32))


# Scores


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "qwen2"])
def test_all_paths_give_one_score(name: str, folders: dict[str, str]) -> None:
    scorer = built(folders, name)
    pairs = some_pairs(scorer)
    assert len(set(pairs.lengths.tolist())) == 3  # there is padding
    with torch.no_grad():
        expected = one_at_a_time(scorer, pairs)
        shared, plain = scorer(pairs), scorer(pairs, share_pictures=False)
        longer = pairs._replace(queries=functional.pad(pairs.queries, (0, 9), value=5))
        for found in (shared, plain, scorer(longer), scorer(longer, share_pictures=False)):
            assert torch.allclose(found, expected, atol=1e-5)
    assert shared.dtype == torch.float32
    assert expected.std() > 0.05
    others = expected.view(1, -1) - expected.view(-1, 1)
    assert others.abs().fill_diagonal_(1).min() > 1e-5  # all differ: none read the wrong picture, query or place


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_all_paths_give_one_gradient(name: str, folders: dict[str, str]) -> None:
    scorer = built(folders, name)
    pairs = some_pairs(scorer)
    weights = torch.from_numpy(np.random.default_rng(2).normal(size=len(pairs.of_query))).float()
    gradients = []
    for score in (one_at_a_time, Scorer.forward, lambda *given: Scorer.forward(*given, share_pictures=False)):
        scorer.zero_grad()
        (score(scorer, pairs) * weights).sum().backward()
        gradients.append({key: value.grad for key, value in scorer.named_parameters()})
    for key, value in gradients[0].items():
        assert value is not None, key
        assert (value != 0).any() or ".key.bias" in key, key  # of keys' bias the softmax takes none
        for other in gradients[1:]:
            found = other[key]
            assert found is not None
            assert torch.allclose(value, found, atol=1e-4), key


class Counted(OpenedPictures):
    """Notes which pictures are opened."""

    opened: list[list[int]]

    def _open(self, missing: list[int]) -> None:
        self.opened.append(missing)
        super()._open(missing)


def test_pictures_are_kept_while_there_is_room(folders: dict[str, str]) -> None:
    scorer = built(folders)
    store = Counted(scorer, PICTURES, room=3)
    store.opened = []
    queries = scorer.query_ids(TEXTS)
    for batch in ([0, 1, 1, 2], [2, 3], [0, 0, 4], [5, 4, 3], [3], [1, 2, 0]):
        of_query = torch.arange(len(batch)) % len(queries)
        pairs = scorer.pairs(PICTURES, queries, torch.tensor(batch), of_query)
        with torch.no_grad():
            places = store.places(np.array(batch))
            found = scorer.close(store.layers, places, pairs)
            assert torch.allclose(found, one_at_a_time(scorer, pairs), atol=1e-5)
        assert len(store.place) <= 3
        assert len(set(store.place.values())) == len(store.place)
    assert store.opened == [[0, 1, 2], [3], [0, 4], [5], [1, 2, 0]]  # the third time 0 has gone, the fourth 4 has not
    assert len(store.layers[0][0]) == 3


def test_costs_are_those_of_the_model(folders: dict[str, str]) -> None:
    scorer = built(folders)
    opening = len(scorer.picture_ids(PICTURES)[0])
    queries = scorer.query_ids(TEXTS)
    with torch.inference_mode():
        costs = costs_of(scorer, PICTURES, queries)
    assert costs.picture == 2 * 2 * 2 * opening * 4 * 4  # kinds, layers, heads, width
    assert costs.lengths == (min(map(len, queries)), max(map(len, queries)))
    short, long = costs.lengths
    layer = 2 * 2 * (opening + short) * 4 * 4  # keys and values of one layer, in which a pair's query stands behind
    assert layer < costs.pair(short) < costs.pair(long)
    assert costs.pair(short) < costs.pair(short + 1) < costs.pair(long)


def random_lists(queries: int, longest: int, pictures: int) -> RankedLists:
    """Lists of every length from none to `longest`."""
    generator = np.random.default_rng(3)
    rows = np.stack([generator.permutation(pictures)[:longest] for _ in range(queries)])
    rows[np.arange(longest) >= (np.arange(queries) % (longest + 1))[:, None]] = NO_PICTURE
    texts = [TEXTS[number % len(TEXTS)] + " a" * (number % 4) for number in range(queries)]
    zeros = np.zeros(queries, dtype=np.int64)
    return RankedLists(texts, zeros, zeros, rows, np.where(rows == NO_PICTURE, -np.inf, 0.0).astype(np.float32))


def least_memory(scorer: Scorer, lists: RankedLists) -> float:
    """GiB of one picture and one pair."""
    with torch.inference_mode():
        costs = costs_of(scorer, PICTURES, scorer.query_ids(lists.texts))
    return (costs.picture + max(costs.reading, *costs.pairs)) / GIB


@pytest.mark.parametrize(("pairs", "times"), [(2048, 1e6), (7, 1e6), (1, 1e6), (2048, 1.0), (9, 3.5), (9, 5.0)])
def test_lists_are_scored_alike_in_any_memory(pairs: int, times: float, folders: dict[str, str]) -> None:
    scorer = built(folders, max_query=64)
    lists = random_lists(13, 4, len(PICTURES))
    memory = times * (least_memory(scorer, lists) + 4 * 13 * NUMBERS / GIB)
    with LiveBytes() as live:
        scores = score_lists(scorer, PICTURES, lists, pairs=pairs, memory=memory, quiet=True)
    assert live.peak <= memory * GIB
    assert np.array_equal(scores == -np.inf, lists.rows == NO_PICTURE)
    of_query, place = np.nonzero(lists.present)
    batch = scorer.pairs(
        PICTURES, scorer.query_ids(lists.texts), torch.from_numpy(lists.rows[of_query, place]), torch.tensor(of_query)
    )
    with torch.no_grad():
        assert np.allclose(scores[lists.present], one_at_a_time(scorer, batch), atol=1e-5)


def random_scorer(folder: Path, kind: str, **options: Any) -> Scorer:
    """A model of many heads and layers, in which all that a layer makes is small beside what all layers keep."""
    words = llama_tokenizer(seed_names(64))
    words.save_pretrained(folder / "words")
    model, config, more = MODELS[kind]
    more = {**more, "intermediate_size": 160} if "intermediate_size" in more else more
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 192}
    model(config(vocab_size=len(words), initializer_range=0.2, **sizes, **more)).save_pretrained(folder / kind)
    names: dict[str, Any] = {"tokenizer_name": str(folder / "words"), "images": ImageTokens(32, 64), "max_query": 64}
    return build_scorer(str(folder / kind), **names, **options).eval()


@pytest.mark.parametrize(("kind", "compat"), [("llama", None), ("bert", None), ("gpt2", None), ("llama", 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_bounds_all_that_scoring_keeps(
    kind: str, compat: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The pictures' keys and values, the batch's copies and its forward passes; and what there is, is used."""
    scorer = random_scorer(tmp_path, kind, compat=compat).in_precision(dtype)
    tokens = np.random.default_rng(0).integers(0, 64, size=(40, 32))
    lists = random_lists(8, 10, len(tokens))
    ample = score_lists(scorer, tokens, lists, pairs=200, dtype=dtype, quiet=True)
    for mib in (2, 4):
        with LiveBytes() as live:
            scores = score_lists(scorer, tokens, lists, pairs=200, memory=mib / 1024, dtype=dtype, quiet=True)
        assert live.peak <= mib << 20
        assert np.allclose(scores, ample, atol=1e-5 if dtype == torch.float32 else 0.1)
    with LiveBytes() as live:
        score_lists(scorer, tokens, lists, pairs=200, memory=4 / 1024, dtype=dtype, quiet=True)
    assert live.peak > 2 << 20


def test_memory_for_less_than_one_pair_is_refused(folders: dict[str, str]) -> None:
    scorer, lists = built(folders), random_lists(5, 3, len(PICTURES))
    least = least_memory(scorer, lists)
    with pytest.raises(BadInput, match=r"--memory 1e-09: one picture with one query takes (.*) GiB: give more") as told:
        score_lists(scorer, PICTURES, lists, memory=1e-9, quiet=True)
    advised = float(str(told.value).split(" takes ")[1].split()[0])
    assert least <= advised <= 1.1 * least
    assert np.isfinite(score_lists(scorer, PICTURES, lists, memory=advised, quiet=True)[lists.present]).all()


def test_scores_in_blocks_are_in_the_same_arithmetic(folders: dict[str, str], tmp_path: Path) -> None:
    scorer, lists = built(folders), random_lists(9, 4, len(PICTURES))
    exact, rough = (
        score_lists(scorer, PICTURES, lists, pairs=8, dtype=dtype, quiet=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert np.abs(exact - rough)[lists.present].max() > 1e-3
    blocks = score_lists(
        scorer, PICTURES, lists, pairs=8, dtype=torch.bfloat16, blocks_folder=tmp_path / "blocks", quiet=True
    )
    assert np.array_equal(blocks, rough)


def test_blocks_of_another_cut_are_not_taken_for_these(folders: dict[str, str], tmp_path: Path) -> None:
    """A killed run may go on on a device with another number of pairs in a batch."""
    scorer, lists = built(folders), random_lists(9, 4, len(PICTURES))
    for pairs in (36, 8, 36):  # one batch, five, and one again
        blocks = score_lists(scorer, PICTURES, lists, pairs=pairs, blocks_folder=tmp_path / "blocks", quiet=True)
        assert np.allclose(blocks, score_lists(scorer, PICTURES, lists, pairs=pairs, quiet=True), atol=1e-6)


def test_scores_that_are_no_numbers_are_refused(folders: dict[str, str]) -> None:
    scorer = built(folders)
    with torch.no_grad():
        next(scorer.head.parameters()).fill_(torch.nan)
    with pytest.raises(BadInput, match="the reranker's scores are not numbers"):
        score_lists(scorer, PICTURES, random_lists(5, 3, len(PICTURES)), quiet=True)


def test_compat_reads_as_published(folders: dict[str, str]) -> None:
    """Cut and padded on the right to a fixed length, no mask, scored at the last position."""
    ours = built(folders)
    opening = len(ours.picture_ids(PICTURES)[0])
    for length in (opening + 4, opening + 12, 64):
        scorer = built(folders, compat=length)
        assert scorer.padding == scorer.tokenizer.unk_token_id  # there is no padding token, as in SEED's
        if length == 64:
            scorer.tokenizer.pad_token = "!"
            assert scorer.padding == scorer.tokenizer.convert_tokens_to_ids("!")
        pairs = some_pairs(scorer)
        expected = []
        for picture, query in zip(pairs.of_picture, pairs.of_query, strict=True):
            ids = [*pairs.pictures[picture].tolist(), *pairs.queries[query, : pairs.lengths[query]].tolist()]
            ids = (ids + [scorer.padding] * 64)[:length]
            expected.append(scorer.head(scorer.model(input_ids=torch.tensor([ids])).last_hidden_state[0, length - 1]))
        with torch.no_grad():
            found, own = scorer(pairs), ours(pairs)
            assert torch.allclose(found, torch.cat(expected), atol=1e-5)
            assert not torch.allclose(found, own, atol=1e-2)
            lists = random_lists(5, 3, len(PICTURES))
            scores = score_lists(scorer, PICTURES, lists, quiet=True)
        assert np.isfinite(scores[lists.present]).all()


def test_a_model_that_reads_both_ways_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    for name in (folders["distilbert"], str(t5_folder(tmp_path / "t5"))):
        with pytest.raises(BadInput, match=f"`language_model` {name} does not read from left to right: give a causal"):
            build_scorer(name, images=IMAGES, tokenizer_name=folders["words"])
    with pytest.raises(BadInput, match=r"`language_model` .*nowhere cannot be loaded"):
        build_scorer(str(tmp_path / "nowhere"), images=IMAGES)


def test_what_follows_a_picture_does_not_change_how_it_is_read(folders: dict[str, str]) -> None:
    """A BERT that has been made causal: the property that sharing pictures rests on."""
    scorer = built(folders, "bert")
    pairs = some_pairs(scorer)
    ids = torch.cat([pairs.pictures[:1], pairs.queries[:1]], dim=1)
    other = ids.clone()
    other[0, pairs.pictures.shape[1] :] = 7
    with torch.no_grad():
        states = [scorer.model(input_ids=each).last_hidden_state[0] for each in (ids, other)]
    opening = pairs.pictures.shape[1]
    assert torch.allclose(states[0][:opening], states[1][:opening], atol=1e-6)
    assert not torch.allclose(states[0][opening:], states[1][opening:], atol=1e-2)


# The head and the loss


def test_the_head_by_hand() -> None:
    with torch.device("meta"):
        assert sum(value.numel() for value in scoring_head(4096).parameters()) == 8_392_705  # SEED-LLaMA 8B's
    head = scoring_head(6)
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    first, shift, last, end = head.parameters()
    hidden = (states @ first.T + shift).clamp_min(0)
    assert hidden.shape == (5, 3)
    assert (hidden == 0).any()
    assert torch.allclose(head(states), hidden @ last.T + end)
    assert 0.3 < first.abs().max() * 6**0.5 <= 1  # torch's own start, uniform


def test_the_loss_is_cross_entropy_with_the_right_picture_first() -> None:
    scores = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 0.0]])
    right = [np.exp(2) / (np.exp(2) + np.exp(1) + np.exp(-1)), 1 / (2 + np.exp(3))]
    assert listwise_loss(scores).item() == pytest.approx(-np.mean(np.log(right)))
    many = 10 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(listwise_loss(many), functional.cross_entropy(many, torch.zeros(50, dtype=torch.long)))
    large = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    loss = listwise_loss(large)
    assert loss.item() == pytest.approx(1e4)
    loss.backward()
    assert large.grad is not None
    assert torch.allclose(large.grad, torch.tensor([[0.0, 0, 0], [-0.5, 0.5, 0]]))
    assert listwise_loss(many + 100.0).item() == pytest.approx(listwise_loss(many).item(), rel=1e-4)


# Learning, and what is written


def overfit(scorer: Scorer, *, lr: float, steps: int) -> Tensor:
    """Eight pictures, a query each, every other picture wrong; the scores (queries, pictures) at the end."""
    codes = np.random.default_rng(0).integers(0, IMAGES.size, size=(8, IMAGES.length))
    texts = ["a red ball", "blue", "a small square", "two lines", "red ring", "no", "a ball a ball", "grey"]
    everything = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    pairs = scorer.pairs(codes, scorer.query_ids(texts), everything[:, 1], everything[:, 0])
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    scorer.train()
    for _ in range(steps):
        loss = functional.cross_entropy(scorer(pairs).view(8, 8), torch.arange(8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scorer.eval()
    with torch.no_grad():
        return scorer(pairs).view(8, 8)


def frozen_and_trained(scorer: Scorer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in scorer.named_parameters()}


def assert_learned(scorer: Scorer, before: dict[str, Tensor], scores: Tensor) -> None:
    assert functional.cross_entropy(scores, torch.arange(8)).item() < 0.05
    assert torch.equal(scores.argmax(dim=1), torch.arange(8))
    for name, value in scorer.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name


def new_scorer(folders: dict[str, str], **options: Any) -> Scorer:
    captions = [["a red ball", "red"], ["blue ball"], ["a ball"], ["red"], ["blue", "a blue ball"], ["a red line"]]
    torch.manual_seed(0)
    return build_new_scorer(
        folders["bert"],
        **{"images": IMAGES, "pictures": PICTURES, "captions": captions, "layers": 2, "width": 16, "heads": 2,
           "max_query": 16, **options},
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def lender(folders: dict[str, str]) -> dict[str, str]:
    """The folders, whose BERT has its tokenizer beside it."""
    llama_tokenizer().save_pretrained(folders["bert"])
    return folders


def test_a_new_model_learns_and_is_read_back(lender: dict[str, str], tmp_path: Path) -> None:
    scorer = new_scorer(lender)
    before = frozen_and_trained(scorer)
    assert all(value.requires_grad for value in scorer.parameters())
    assert_learned(scorer, before, overfit(scorer, lr=3e-3, steps=60))
    scorer.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json", "head.safetensors", "model.safetensors", "scorer.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert read_json(tmp_path / "saved" / SCORER_NAME) == {
        "images": {"length": 4, "size": 12}, "first_image": scorer.first_image, "max_query": 16, "compat": None,
        "layers": 2,
    }  # fmt: skip
    assert_same_scores(scorer, Scorer.from_pretrained(tmp_path / "saved"))


def assert_same_scores(scorer: Scorer, again: Scorer) -> None:
    assert not again.training
    with torch.no_grad():
        scores, read = scorer(some_pairs(scorer)), again(some_pairs(again))
        plain = again(some_pairs(again), share_pictures=False)
    assert scores.std() > 0.02
    assert torch.allclose(scores, read, atol=1e-4)
    assert torch.allclose(scores, plain, atol=1e-4)


def test_adapters_learn_and_are_merged_when_read_back(folders: dict[str, str], tmp_path: Path) -> None:
    scorer = built(folders, lora=LORA)
    before = frozen_and_trained(scorer)
    assert_learned(scorer, before, overfit(scorer, lr=1e-2, steps=60))
    trained = {name for name, value in scorer.named_parameters() if value.requires_grad}
    assert sum("lora_A" in name for name in trained) == 7 * 2
    whole = {name.partition(".modules_to_save")[0] for name in trained if "modules_to_save" in name}
    norms = {f"model.layers.{layer}.{each}" for layer in range(2) for each in TRAINED_WHOLE if "layernorm" in each}
    assert whole == {"model.embed_tokens", "model.norm", *norms}
    assert {name for name in trained if name.startswith("head.")} == {
        f"head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    scorer.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "scorer.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert load_file(tmp_path / "saved" / HEAD_NAME).keys() == scorer.head.state_dict().keys()
    again = Scorer.from_pretrained(tmp_path / "saved")
    assert not any("lora" in name or "modules_to_save" in name for name, _ in again.named_parameters())
    assert_same_scores(scorer, again)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_merging_rounds_once(size: float, folders: dict[str, str], tmp_path: Path) -> None:
    """The weights are the sums in float32, cast at the end; with small updates too, of which 16 bits hold few."""
    scorer = built(folders, lora=LORA, dtype=torch.bfloat16)
    with torch.no_grad():
        for key, value in scorer.named_parameters():
            if "lora_B" in key:
                value.normal_(0, size, generator=torch.Generator().manual_seed(0))
    scorer.save_pretrained(tmp_path / "saved")
    exact = dict(Scorer.from_pretrained(tmp_path / "saved", torch.float32).model.named_parameters())
    base = LlamaModel.from_pretrained(folders["llama"], dtype=torch.float32).state_dict()
    found = dict(Scorer.from_pretrained(tmp_path / "saved", torch.bfloat16).model.named_parameters())
    for key in [key for key in found if key.endswith("proj.weight")]:
        assert found[key].dtype == torch.bfloat16
        update = exact[key] - base[key]
        assert 0.01 * size < update.std() < 10 * size
        assert torch.equal(found[key], (base[key].bfloat16().float() + update).bfloat16()) or torch.allclose(
            found[key].float(), base[key].bfloat16().float() + update, rtol=2**-8, atol=0
        )


@pytest.mark.parametrize("lora", [None, LORA])
def test_weights_are_read_in_the_arithmetic_of_the_scores(
    lora: Lora | None, folders: dict[str, str], tmp_path: Path
) -> None:
    """No matrix stays wider than its products need it; a model that was trained whole gives the same scores so."""
    built(folders, lora=lora).save_pretrained(tmp_path / "saved")
    plain, cast = (Scorer.from_pretrained(tmp_path / "saved", dtype) for dtype in (None, torch.bfloat16))
    matrices = [value for key, value in cast.named_parameters() if value.ndim == 2 and "embed" not in key]
    assert {value.dtype for value in matrices} == {torch.bfloat16}
    lists = random_lists(9, 4, len(PICTURES))
    before, after = (score_lists(each, PICTURES, lists, dtype=torch.bfloat16, quiet=True) for each in (plain, cast))
    if lora is None:
        assert np.array_equal(before, after)
    assert np.allclose(before, after, rtol=0.05, atol=0.3)
    exact = Scorer.from_pretrained(tmp_path / "saved", torch.float32)
    assert {value.dtype for value in exact.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "targets", "whole", "layers"),
    [
        ("llama", LORA_TARGETS, TRAINED_WHOLE, 1),  # the base has two
        ("llama", ("q_proj",), (), None),  # the new embeddings are frozen, and in no file but the adapters'
        ("bert", ("query", "value"), ("LayerNorm",), None),  # the base reads both ways
        ("gpt2", ("c_attn",), (), 1),
    ],
)
def test_adapters_are_read_back_on_the_model_that_they_were_trained_in(
    name: str, targets: tuple[str, ...], whole: tuple[str, ...], layers: int | None, folders: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    scorer = built(folders, name, lora=LORA._replace(targets=targets, whole=whole), layers=layers)
    with torch.no_grad():
        for key, value in scorer.named_parameters():
            if "lora_B" in key:
                value.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    scorer.save_pretrained(tmp_path / "saved")
    assert_same_scores(scorer, Scorer.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize(("name", "compat"), [("llama", None), ("bert", None), ("gpt2", None), ("llama", 40)])
def test_all_weights_are_written_and_read_back(
    name: str, compat: int | None, folders: dict[str, str], tmp_path: Path
) -> None:
    scorer = built(folders, name, layers=1, compat=compat)
    assert all(value.requires_grad and value.dtype == torch.float32 for value in scorer.parameters())
    scorer.save_pretrained(tmp_path / "saved")
    again = Scorer.from_pretrained(tmp_path / "saved")
    assert (again.compat, again.max_query, again.images) == (compat, 16, IMAGES)
    assert_same_scores(scorer, again)


def test_what_is_trained_is_kept_in_full_precision(folders: dict[str, str]) -> None:
    scorer = built(folders, dtype=torch.bfloat16, lora=LORA._replace(whole=("norm",)))
    dtypes = {True: torch.float32, False: torch.bfloat16}
    for name, value in scorer.named_parameters():
        assert value.dtype == dtypes[value.requires_grad], name
    assert {value.requires_grad for value in scorer.parameters()} == {True, False}


def test_the_first_layers_alone_are_used(folders: dict[str, str]) -> None:
    both, first = built(folders), built(folders, layers=1)
    assert (len(both.model.layers), len(first.model.layers)) == (2, 1)
    for key, value in first.model.layers[0].state_dict().items():
        assert torch.equal(value, both.model.layers[0].state_dict()[key])
    assert len(built(folders, layers=9).model.layers) == 2


def test_adapters_that_do_not_fit_are_one_clear_line(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"`lora_targets` no_proj: .*llama has no module of that name") as raised:
        built(folders, lora=LORA._replace(targets=("no_proj",)))
    assert "\n" not in str(raised.value)
    scorer = built(folders, lora=LORA)
    scorer.save_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "adapter_config.json")
    assert config["base_model_name_or_path"] == folders["llama"]
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"adapts .*moved, which cannot be loaded.*correct base_model_name_or_path"):
        Scorer.from_pretrained(tmp_path / "saved")


# Where a new model starts


def test_a_new_model_starts_with_what_occurs_together(lender: dict[str, str]) -> None:
    scorer = new_scorer(lender)
    table = scorer.model.embed_tokens.weight.detach()
    made = scorer.tokenizer
    first, width, rank = scorer.first_image, 16, 12
    red, never = (made.convert_tokens_to_ids(piece) for piece in ("▁red", "z"))
    captions = [["a red ball", "red"], ["blue ball"], ["a ball"], ["red"], ["blue", "a blue ball"], ["a red line"]]
    words = [{one for text in own for one in made(text, add_special_tokens=False)["input_ids"]} for own in captions]
    expected = information_by_hand(words, PICTURES, IMAGES.size)
    products = table[:first, :rank] @ table[first : first + IMAGES.size, :rank].T
    scale = products[red] @ torch.tensor(expected[red]) / (torch.tensor(expected[red]) ** 2).sum()
    for word, row in expected.items():
        assert torch.allclose(products[word] / scale, torch.tensor(row), atol=1e-3)
    assert (table[never, :rank] == 0).all()
    lent = BertModel.from_pretrained(lender["bert"], add_pooling_layer=False).embeddings.word_embeddings.weight.detach()
    lent = lent[:first] - lent[:first].mean(dim=0)
    found = table[:first, rank:]
    factor = (found.norm() / (lent @ torch.linalg.svd(lent).Vh[: width - rank].T).norm()).item()
    angles = (lent @ torch.linalg.svd(lent).Vh[: width - rank].T) * factor
    assert torch.allclose(found @ found.T, angles @ angles.T, atol=1e-3)  # its main directions
    assert (table[first:, rank:] == 0).all()
    lengths = table[list(expected), :rank].norm(dim=1)
    assert lengths.mean().item() == pytest.approx(START_SPREAD * width**0.5, rel=1e-4)
    assert found.norm(dim=1).mean().item() == pytest.approx(START_SPREAD * width**0.5 / 2, rel=1e-4)


def test_a_new_models_shape_is_checked(lender: dict[str, str]) -> None:
    scorer = new_scorer(lender, layers=3, heads=4)
    assert (len(scorer.model.layers), scorer.model.config.num_attention_heads) == (3, 4)
    for width, heads in ((16, 3), (12, 4), (6, 1)):
        with pytest.raises(BadInput, match=f"`new_width` {width} must divide into `new_heads` {heads}"):
            new_scorer(lender, width=width, heads=heads)
    wide = new_scorer(lender, width=64)  # more directions than there are tokens: the others are empty
    assert wide.model.embed_tokens.weight.isfinite().all()
    assert overfit(wide, lr=3e-3, steps=1).isfinite().all()


def information_by_hand(
    words: list[set[int]], tokens: NDArray[np.integer], size: int, prior: float = PRIOR
) -> dict[int, NDArray[np.float32]]:
    """For each word that is said, how much more often each token stands on its pictures than on all."""
    on = np.array([[token in row for token in range(size)] for row in tokens])
    share = on.mean(axis=0)
    found: dict[int, NDArray[np.float32]] = {}
    for word in sorted(set().union(*words)):
        pictures = [picture for picture, own in enumerate(words) if word in own]
        row = np.zeros(size)
        for token in range(size):
            if share[token]:
                given = (on[pictures, token].sum() + prior * share[token]) / (len(pictures) + prior)
                row[token] = np.clip(np.log(given / share[token]), LEAST, MOST)
        found[word] = row.astype(np.float32)
    return found


WORDS: list[set[int]] = [{3, 7}, {3}, {7, 9}, {9}, set(), {3, 9, 40}]


@pytest.mark.parametrize("prior", [0.01, 5.0])
def test_products_are_the_mutual_information(prior: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "PRIOR", prior)
    tokens = np.array([[0, 1], [0, 0], [2, 3], [3, 1], [4, 4], [0, 3]])
    expected = information_by_hand(WORDS, tokens, 7, prior)
    assert (np.stack(list(expected.values())) == LEAST).any() == (prior < 1)  # what is clamped
    found = factorise(WORDS, tokens, size=7, rank=7)
    assert found.words.tolist() == list(expected) == [3, 7, 9, 40]  # words that are never said have no vector
    products = found.word_vectors @ found.token_vectors.T
    assert np.allclose(products, np.stack(list(expected.values())), atol=1e-4)
    assert (products[:, 5:].abs() < 1e-4).all()  # tokens of no picture say nothing
    wider = factorise(WORDS, tokens, size=7, rank=10)
    assert wider.word_vectors.shape == (4, 10)
    assert torch.allclose(wider.word_vectors @ wider.token_vectors.T, products, atol=1e-5)


def test_fewer_directions_are_the_best_ones() -> None:
    generator = np.random.default_rng(0)
    words = [set(generator.integers(0, 9, size=3).tolist()) for _ in range(30)]
    tokens = generator.integers(0, 6, size=(30, 3))
    whole = np.stack(list(information_by_hand(words, tokens, 6).values()))
    left, strengths, right = np.linalg.svd(whole)
    for rank in (1, 3):
        found = factorise(words, tokens, size=6, rank=rank)
        best = left[:, :rank] * strengths[:rank] @ right[:rank]
        assert np.allclose(found.word_vectors @ found.token_vectors.T, best, atol=1e-4)
        assert np.allclose(found.word_vectors.norm(dim=0), found.token_vectors.norm(dim=0), rtol=1e-4)
