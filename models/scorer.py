"""The reranker: a language model without its head reads a picture's tokens and a query, and an MLP scores the pair.

The prompt begins with the picture and ends with the query, so that in a model that reads from left to right a picture's
part is computed once for all queries. That is exact, and what batched scoring and, unless activations are
checkpointed, training do. Source of prompt and head: AVG (SIGIR 2025), on SEED-LLaMA (Ge et al. 2023).
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers  # whose classes are slow to load: where they are used
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel  # elsewhere where adapters are, and not above: slow to import

from tools.errors import BadInput
from tools.files import read_json, replacing, write_json

from .cooccurrence import factorise
from .four_bits import load_in_4bit, name_of, reader
from .opened_pictures import KeysAndValues, behind_pictures
from .pretrained import (
    ADAPTER_NAME,
    LOADING_ERRORS,
    cannot_load,
    check_names,
    fits,
    load_config,
    load_saved,
    load_tokenizer,
    load_whole,
    merged,
    module_names,
    reading,
    set_rows,
    widened,
)
from .weights import load_weights

# Without a space before <img>: that is how SEED-LLaMA was trained (its tokenizer took the space away).
PROMPT = "USER: Image:<img>{image}</img> Query: {query} ASSISTANT:"
IMAGE_TOKEN, OPEN_IMAGE, CLOSE_IMAGE = "<img_{:05d}>", "<img>", "</img>"  # as SEED's tokenizer has them
SCORER_NAME, HEAD_NAME = "scorer.json", "head.safetensors"
READ_BOTH_WAYS = ("bert", "roberta", "xlm-roberta", "electra")  # unless their configuration says `is_decoder`
START_SPREAD = 0.5  # root mean square of a new model's embeddings
LENT_SHARE = 0.5  # length of a word's borrowed part, as a share of the other
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # published
# Published, but for lm_head, which this loss gives no gradient.
TRAINED_WHOLE = ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")


class ImageTokens(NamedTuple):
    """The tokens that stand for a picture."""

    length: int
    """Tokens per picture."""
    size: int
    """Distinct tokens."""


class Lora(NamedTuple):
    """Low-rank adapters (Hu et al. 2022); what `whole` names is trained in full beside them."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    whole: tuple[str, ...]


class Pairs(NamedTuple):
    """Pictures, queries, and which of them are to be scored together."""

    pictures: Tensor
    """(pictures, opening) token ids of the prompt up to the query"""
    queries: Tensor
    """(queries, length) token ids of the rest"""
    lengths: Tensor
    """(queries,) tokens of each; what follows is padding"""
    of_picture: Tensor
    """(pairs,) rows of `pictures`"""
    of_query: Tensor
    """(pairs,) rows of `queries`"""


class Scorer(nn.Module):
    """A causal language model with a scoring head.

    Attributes:
        images: how many tokens a picture has, and how many there are.
        first_image: token id of the first image token; the others follow.
        max_query: tokens of a query at most; the prompt around it is never cut.
        compat: None, or the number of tokens of a whole prompt as published: cut and padded to it on the right, without
            a mask, and scored at its last position, which is a padding token wherever the prompt is shorter.
        rounded_in: the type that frozen weights had when they were put in 4 bits, as torch names it; else None.
    """

    reader = "the reranker"  # models.lengths.Reader

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        tokenizer: Any,
        *,
        images: ImageTokens,
        first_image: int,
        max_query: int,
        compat: int | None = None,
        adapted: "PeftModel | None" = None,
        rounded_in: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head = model, head
        self._adapted = (adapted,)  # in a tuple: its parameters are those of `model`, and not to be found twice
        self.tokenizer = tokenizer
        self.images, self.first_image, self.max_query, self.compat = images, first_image, max_query, compat
        self.rounded_in = rounded_in
        before, after = PROMPT.split("{image}")
        self.before: list[int] = tokenizer(before)["input_ids"]
        if self.before[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            self.before = self.before[:-1]  # tokenizers of encoders close what they read
        self.between = tokenizer(after.split(" {query}")[0], add_special_tokens=False)["input_ids"]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def padding(self) -> int:
        """Token id behind a short text."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id):
            if token is not None:
                return int(token)
        return 0

    def in_precision(self, dtype: torch.dtype) -> "Scorer":
        """Cast the weights for forward passes in `dtype` under autocast, in place: the matrices that autocast would
        cast anew, or keep a second time, in each pass. The scores stay the same to the bit, except that weights which
        are less exact than float32 are made float32 for it.
        """
        if dtype == torch.float32:
            return self.float()
        for module in self.modules():
            if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
                module.to(dtype)
        return self

    def picture_ids(self, tokens: NDArray[np.integer]) -> Tensor:
        """Prompts up to the query (pictures, opening) for pictures' tokens (pictures, images.length)."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)) + self.first_image
        before, between = (torch.tensor(part).expand(len(ids), -1) for part in (self.before, self.between))
        return torch.cat([before, ids, between], dim=1)

    def query_ids(self, queries: Sequence[str]) -> list[list[int]]:
        """The rest of the prompt for each query, cut to `max_query` tokens; white space counts as one space."""
        return [query[: self.max_query] + closing for query, closing in self._tails(queries)]

    def _tails(self, queries: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each query, uncut, and of what follows it.

        The whole tail is tokenized at once, as a tokenizer may join a word to the space before it.
        """
        closing = PROMPT.rpartition("{query}")[2]
        opening = PROMPT.rpartition("{image}")[2].partition(" {query}")[0]
        texts = [f"{opening} {' '.join(query.split())}{closing}" for query in queries]
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        result = []
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            starts = sum(end <= len(opening) for _, end in offsets)
            ends = sum(end <= len(text) - len(closing) for _, end in offsets)
            result.append((ids[starts:ends], ids[ends:]))
        return result

    @property
    def most_tokens(self) -> int:
        """Tokens of a query that it reads at most."""
        if self.compat is None:
            return self.max_query
        return max(0, min(self.max_query, self.compat - len(self.before) - self.images.length - len(self.between)))

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """Whether it cuts each of the queries."""
        return [len(query) > self.most_tokens for query, _ in self._tails(texts)]

    def pairs(
        self, pictures: NDArray[np.integer], queries: Sequence[Sequence[int]], of_picture: Tensor, of_query: Tensor
    ) -> Pairs:
        """A batch on the model's device.

        Args:
            pictures: (pictures, images.length) image tokens.
            queries: what `query_ids` gave.
            of_picture, of_query: (pairs,)
        """
        lengths = torch.tensor([len(ids) for ids in queries])
        padded = torch.full((len(queries), int(lengths.max())), self.padding)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor([one for ids in queries for one in ids])
        parts = (self.picture_ids(pictures), padded, lengths, of_picture, of_query)
        return Pairs(*(part.to(self.device, non_blocking=True) for part in parts))

    def forward(self, pairs: Pairs, *, share_pictures: bool = True) -> Tensor:
        """Scores (pairs,) float32.

        Args:
            share_pictures: compute each picture's part of the prompt once, not once a pair; the same to rounding.
        """
        if self.compat is not None:
            return self._read_as_published(pairs)
        if share_pictures:
            return self.close(self.open(pairs.pictures), pairs.of_picture, pairs)
        ids = torch.cat([pairs.pictures[pairs.of_picture], pairs.queries[pairs.of_query]], dim=1)
        lengths = pairs.pictures.shape[1] + pairs.lengths[pairs.of_query]
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return self._score(states, lengths - 1)

    def open(self, pictures: Tensor) -> list[KeysAndValues]:
        """Keys and values (pictures, heads, opening, width) of each layer for prompts (pictures, opening)."""
        cache = transformers.DynamicCache()
        self.read_pictures(pictures, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def read_pictures(self, pictures: Tensor, cache: "transformers.Cache") -> None:
        """Give a cache the keys and values of prompts (pictures, opening), layer by layer."""
        self.model(input_ids=pictures, past_key_values=cache, use_cache=True)

    def close(self, opened: Sequence[KeysAndValues], places: Tensor, pairs: Pairs) -> Tensor:
        """Scores (pairs,) from keys and values of pictures, and which of them each pair has.

        Args:
            opened: keys and values (pictures, heads, opening, width) of each layer.
            places: (pairs,) among those pictures.
        """
        ids, lengths = pairs.queries[pairs.of_query], pairs.lengths[pairs.of_query]
        behind = torch.arange(ids.shape[1], device=ids.device)
        opening = opened[0][0].shape[2]
        mask = torch.cat([torch.ones_like(ids[:, :1]).expand(-1, opening), (behind < lengths[:, None]).long()], dim=1)
        states = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(opening + behind).expand_as(ids),
            past_key_values=behind_pictures(opened, places),
            use_cache=True,
        ).last_hidden_state
        return self._score(states, lengths - 1)

    def _score(self, states: Tensor, places: Tensor) -> Tensor:
        """The head at one place (pairs,) of each row of states (pairs, length, width)."""
        scores: Tensor = self.head(states[torch.arange(len(places), device=states.device), places])
        return scores.squeeze(1).float()

    def _read_as_published(self, pairs: Pairs) -> Tensor:
        assert self.compat is not None
        whole = []
        for picture, query in zip(pairs.of_picture.tolist(), pairs.of_query.tolist(), strict=True):
            ids = torch.cat([pairs.pictures[picture], pairs.queries[query, : pairs.lengths[query]]])[: self.compat]
            whole.append(nn.functional.pad(ids, (0, self.compat - len(ids)), value=self.padding))
        states = self.model(input_ids=torch.stack(whole), use_cache=False).last_hidden_state
        return self._score(states, torch.full((len(whole),), self.compat - 1, device=states.device))

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face model folder (with LoRA, a peft adapter folder) with tokenizer, the head, and
        `scorer.json`, last."""
        (self._adapted[0] or self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        with replacing(folder / HEAD_NAME) as temporary:
            save_file({name: value.detach().cpu() for name, value in self.head.state_dict().items()}, temporary)
        facts = {"images": self.images._asdict(), "first_image": self.first_image, "max_query": self.max_query}
        facts |= {"compat": self.compat, "layers": self.model.config.num_hidden_layers}
        write_json(folder / SCORER_NAME, facts if self.rounded_in is None else {**facts, "rounded_in": self.rounded_in})

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype | None = None) -> "Scorer":
        """Read what `save_pretrained` wrote; the model is in eval mode, adapters are merged into its weights.

        Args:
            dtype: arithmetic of the forward passes to come, to which weights are cast (see `in_precision`); by default
                they stay as they were saved or published.

        Raises:
            BadInput: the model that adapters belong to cannot be loaded.
        """
        facts = read_json(folder / SCORER_NAME)
        layers = facts.pop("layers", None)
        with reading(folder):
            tokenizer = load_tokenizer(folder)
        rounded_in = facts.pop("rounded_in", None)
        if (folder / ADAPTER_NAME).is_file():
            model = merged(
                transformers.AutoModel,
                folder,
                len(tokenizer),
                options=lambda name: _causal(name, layers),
                dtype=dtype,
                whole=torch.float32,
                load=None if rounded_in is None else reader(rounded_in),
            )
        else:
            with reading(folder):
                model = load_saved(transformers.AutoModel, folder, **_without_pooler(load_config(folder)))
        head = scoring_head(model.config.hidden_size)
        load_weights(head, folder / HEAD_NAME)
        images = ImageTokens(**facts.pop("images"))
        scorer = cls(model, head.to(next(model.parameters()).dtype), tokenizer, images=images, **facts).eval()
        return scorer if dtype is None else scorer.in_precision(dtype)


def scoring_head(width: int) -> nn.Sequential:
    """Two layers with a ReLU, from a state (width,) to a score (1,); torch's own start."""
    return nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))


def build_scorer(
    name: str,
    *,
    images: ImageTokens,
    starts: NDArray[np.float32] | None = None,
    tokenizer_name: str | None = None,
    layers: int | None = None,
    max_query: int = 64,
    compat: int | None = None,
    dtype: torch.dtype = torch.float32,
    lora: Lora | None = None,
    four_bits: torch.device | None = None,
) -> Scorer:
    """A pretrained language model with an untrained head; image tokens are added unless its tokenizer has them.

    Args:
        name: Hugging Face name or folder of a causal model (SEED-LLaMA, LLaMA, ...), or of a BERT, which then reads
            from left to right.
        starts: (images.size, width) start of the embeddings of added tokens, if not random; see `widened`.
        tokenizer_name: where the tokenizer lies, if not there.
        layers: use the first so many layers alone.
        dtype: of the weights that are not trained.
        lora: train adapters instead of all weights.
        four_bits: put the linear layers in 4 bits, on this device.

    Raises:
        BadInput: the model cannot be loaded, does not read from left to right, or has other image tokens.
    """
    try:
        if four_bits is None:
            model = load_whole(transformers.AutoModel, name, dtype=dtype, **_causal(name, layers))
        else:
            model = load_in_4bit(transformers.AutoModel, name, dtype=dtype, device=four_bits, **_causal(name, layers))
        tokenizer = load_tokenizer(tokenizer_name or name)
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from None
    first = _image_tokens(name, model, tokenizer, images, starts)
    refuse_both_ways(name, model)
    adapted = None if lora is None else _adapt(name, model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    parts = (model, scoring_head(model.config.hidden_size), tokenizer)
    return Scorer(
        *parts,
        images=images,
        first_image=first,
        max_query=max_query,
        compat=compat,
        adapted=adapted,
        rounded_in=None if four_bits is None else name_of(dtype),
    )


def build_new_scorer(
    name: str,
    *,
    images: ImageTokens,
    pictures: NDArray[np.integer],
    captions: Sequence[Sequence[str]],
    layers: int,
    width: int,
    heads: int,
    max_query: int,
    compat: int | None = None,
) -> Scorer:
    """A small LLaMA with random layers. Its embeddings start with what words and image tokens occur together
    (`models.cooccurrence`) in three quarters of the width, and with the words of a pretrained model in the rest.

    Args:
        name: Hugging Face name or folder of the model that lends its tokenizer and its words' embeddings.
        pictures: (pictures, images.length) tokens of the pictures of the train split.
        captions: the captions of each.

    Raises:
        BadInput: the model cannot be loaded, has image tokens of its own, or the width does not divide into heads.
    """
    if width % (2 * heads) or width % 4:
        raise BadInput(f"`new_width` {width} must divide into `new_heads` {heads} of even width, and by 4")
    try:
        tokenizer = load_tokenizer(name)
        lender = load_whole(transformers.AutoModel, name, **_without_pooler(load_config(name)))
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from None
    lent = lender.get_input_embeddings().weight.detach().float()[: len(tokenizer)]
    words = [_words(tokenizer, own) for own in captions]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        initializer_range=0.8 * width**-0.5,
    )
    model = transformers.LlamaModel(config)
    first = _image_tokens(name, model, tokenizer, images, None)
    rank = width * 3 // 4
    found = factorise(words, pictures, size=images.size, rank=rank)
    table = torch.zeros_like(model.embed_tokens.weight)
    table[: len(lent), rank:] = _main_directions(lent, width - rank)
    length = found.word_vectors.norm(dim=1).mean()
    table *= LENT_SHARE * length / table[: len(lent)].norm(dim=1).mean()
    table[torch.from_numpy(found.words), :rank] = found.word_vectors
    table[first : first + images.size, :rank] = found.token_vectors
    model.embed_tokens.weight.data = table * (START_SPREAD * width**0.5 / length)
    parts = (model, scoring_head(width), tokenizer)
    return Scorer(*parts, images=images, first_image=first, max_query=max_query, compat=compat)


def _words(tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """Ids of the tokens that occur in any of the texts."""
    return set(chain.from_iterable(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))


def _main_directions(vectors: Tensor, width: int) -> Tensor:
    """The main directions (rows, width) of vectors (rows, wider), around their mean."""
    centred = vectors - vectors.mean(dim=0)
    if centred.shape[1] <= width:
        return nn.functional.pad(centred, (0, width - centred.shape[1]))
    return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:].flip(1)


def _causal(name: str, layers: int | None) -> dict[str, Any]:
    """How a pretrained model is loaded: its first so many layers, and from left to right where it can do either."""
    config = load_config(name)
    if config.model_type in READ_BOTH_WAYS:
        config.is_decoder = True
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    return {"config": config, **_without_pooler(config)}


def _without_pooler(config: Any) -> dict[str, Any]:
    """BERTs come with a layer for whole texts that nothing here reads."""
    return {"add_pooling_layer": False} if config.model_type in READ_BOTH_WAYS else {}


def _image_tokens(
    name: str, model: Any, tokenizer: Any, images: ImageTokens, starts: NDArray[np.float32] | None
) -> int:
    """Id of the first image token, which are added to model and tokenizer, in place, where these have none."""
    names = [IMAGE_TOKEN.format(number) for number in range(images.size)]
    known = tokenizer.get_vocab()
    new = names[0] not in known
    if new:
        marks = [transformers.AddedToken(mark, normalized=False) for mark in (*names, OPEN_IMAGE, CLOSE_IMAGE)]
        tokenizer.add_tokens(marks)
        known = tokenizer.get_vocab()
    first = known[names[0]]
    more = IMAGE_TOKEN.format(images.size) in known
    if more or known.get(names[-1]) != first + images.size - 1 or not {OPEN_IMAGE, CLOSE_IMAGE} <= known.keys():
        raise BadInput(
            f"the tokenizer of {name} has other image tokens than {names[0]} to {names[-1]}, {OPEN_IMAGE} and "
            f"{CLOSE_IMAGE}: give the pictures the tokens it was made for, or another `language_model`"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new:
        table = model.get_input_embeddings().weight
        words = table[:first].detach().float()
        rows = np.random.default_rng(0).normal(size=(images.size, table.shape[1])).astype(np.float32)
        if starts is not None and starts.shape[1] > table.shape[1]:
            raise BadInput(
                f"the image tokens' codebook is {starts.shape[1]} wide, {name} is {table.shape[1]}: make the tokens "
                f"with a patch width of {table.shape[1]}"
            )
        if starts is not None:
            rows = widened(starts - starts.mean(axis=0), table.shape[1], name)
        centre, spread = words.mean(dim=0).numpy(force=True), float(words.std(dim=0).mean())
        set_rows([table], first, (centre + rows / rows.std() * spread).astype(np.float32))
    return int(first)


@torch.no_grad()
def refuse_both_ways(name: str, model: Any) -> None:
    """Refuse a model in which what follows changes what was read before: pictures could not be shared by queries.

    Raises:
        BadInput: it is one.
    """
    model.eval()
    table = model.get_input_embeddings()
    ids = torch.arange(10, 16, device=table.weight.device).expand(2, -1).clone() % table.num_embeddings
    ids[1, -1] += 1
    try:
        states = model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].float()
    except (TypeError, ValueError):  # it wants a decoder's input too
        states = torch.tensor([0.0, 1.0])
    if not torch.allclose(states[0], states[1], rtol=1e-2, atol=1e-3):
        raise BadInput(f"`language_model` {name} does not read from left to right: give a causal model")


def _adapt(name: str, model: Any, lora: Lora) -> "PeftModel":
    """Put adapters into a model, in place: they, and the modules that are trained whole, are what is trained.

    Names of the published lists that the model lacks are passed over: they are those of LLaMA and its head.
    """
    from peft import LoraConfig, get_peft_model

    there = module_names(model)
    check_names(name, model, lora.targets, argument="lora_targets", published=LORA_TARGETS)
    check_names(name, model, lora.whole, argument="lora_whole", published=(*TRAINED_WHOLE, "lm_head"))
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[target for target in lora.targets if fits(target, there)],
        modules_to_save=[each for each in lora.whole if fits(each, there)],
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"`lora_targets` do not fit {name}: {str(error).splitlines()[0]}") from None
