"""Language models that read a caption and write vokens: T5, a pretrained text encoder with a small new decoder, or a
causal model such as LLaMA behind an instruction.

All are Hugging Face models; this file adds the vokens to them, starts the vokens' embeddings from the codebooks, and
gives training one interface. Search writes through models/decoding.py.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import transformers  # whose classes are slow to load: where they are used
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import PeftModel  # elsewhere where adapters are, and not above: slow to import

from tools.errors import BadInput
from tools.files import read_json, replacing, write_json
from tools.vokens import VokenSpace

from .four_bits import load_in_4bit, name_of, reader
from .pretrained import (
    ADAPTER_NAME,
    LOADING_ERRORS,
    cannot_load,
    check_names,
    load_config,
    load_saved,
    load_tokenizer,
    load_whole,
    merged,
    reading,
    set_rows,
    widened,
)
from .weights import load_weights

Kind = Literal["seq2seq", "encoder-decoder", "causal"]
LOADERS = {  # classes of transformers
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder-decoder": "EncoderDecoderModel",
    "causal": "AutoModelForCausalLM",
}
CLIPS = ("clip", "clip_text_model")
T5_FAMILY = ("t5", "mt5")  # decoders that models/decoding.py reads
UNSEARCHABLE = ("bloom", "mpt", "gpt_neo")  # causal models whose positions do not come as ids
SCALED_HEADS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
VOKENS_NAME, SLOT_NAME = "vokens.json", "slot.safetensors"
DECODER_SPECIALS = 3  # <pad>, <start>, <end> of a new decoder's vocabulary; the vokens follow
PAD, START, END = range(DECODER_SPECIALS)
START_LOGIT_SPREAD = 4.0  # standard deviation of a new decoder's logits at the start
# What a causal model reads.
PROMPT = "Below is a caption of an image. Write its vokens.\n\n### Caption:\n{query}\n\n### Vokens:\n"


class Tokens(NamedTuple):
    """Texts as padded token ids and their mask, both (batch, length); 1 for text, 0 for the padding behind it."""

    ids: Tensor
    mask: Tensor


class Lora(NamedTuple):
    """Low-rank adapters (Hu et al. 2022) on a causal model's projections; its embeddings and head are trained whole."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Names of the projections, for example q_proj; empty: those that peft names for the model."""


class Memory(NamedTuple):
    """What the decoder reads: encoder states, or a causal model's prompt as input embeddings, (batch, length, width);
    and their mask (batch, length), 1 for text, 0 for the padding behind it."""

    states: Tensor
    mask: Tensor


class VokenLM(nn.Module):
    """A language model with vokens in the vocabulary that it writes.

    Attributes:
        space: levels, codebook size, and whether one codebook serves all levels.
        first_voken: token id of the first voken; the others follow in the order of `space.tokens`.
        start, end: token ids that open and close a written sequence; a causal model's opens with its prompt.
        prompt: the text around a causal model's query, with "{query}" in it; empty for the others.
        frozen_encoder: the encoder keeps its weights; its states may be computed once.
        adapted: the peft model around `model`, whose layers hold the adapters, while LoRA trains; else None.
        rounded_in: the type that frozen weights had when they were put in 4 bits, as torch names it; else None.
        slot: from a query's two-tower text feature to a state that the decoder reads beside the encoder's; or None.
        level_starts: token id of code 0 at each level; `level_offsets` is the same as a tensor (levels,) on the device.
    """

    reader = "the language model"  # models.lengths.Reader
    level_offsets: Tensor

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        kind: Kind,
        space: VokenSpace,
        first_voken: int,
        start: int,
        end: int,
        max_source: int,
        frozen_encoder: bool,
        prompt: str = "",
        adapted: "PeftModel | None" = None,
        rounded_in: str | None = None,
        slot_width: int = 0,
    ) -> None:
        """
        Args:
            slot_width: of the text features; 0: the decoder reads none.
        """
        super().__init__()
        self.model = model
        self._adapted = (adapted,)  # in a tuple: its parameters are those of `model`, and not to be found twice
        self.tokenizer = tokenizer
        self.kind, self.space = kind, space
        self.first_voken, self.start, self.end = first_voken, start, end
        self.max_source, self.frozen_encoder, self.prompt = max_source, frozen_encoder, prompt
        self.rounded_in = rounded_in
        self.level_starts = [first_voken + int(row) for row in space.rows(np.zeros(space.levels, dtype=np.int64))]
        self.register_buffer("level_offsets", torch.tensor(self.level_starts), persistent=False)
        self.slot = nn.Linear(slot_width, self.state_width) if slot_width else None
        if frozen_encoder:
            self.model.get_encoder().requires_grad_(False)

    @property
    def adapted(self) -> "PeftModel | None":
        return self._adapted[0]

    @property
    def plain_model(self) -> Any:
        """The Hugging Face model without adapters: itself, or a copy into whose weights they are merged."""
        if self.adapted is None:
            return self.model
        return copy.deepcopy(self.adapted).merge_and_unload()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def state_width(self) -> int:
        """Width of the encoder's states."""
        return int(self.model.get_encoder().config.hidden_size)

    def train(self, mode: bool = True) -> "VokenLM":
        """A frozen encoder stays in eval mode: its states must not depend on dropout."""
        super().train(mode)
        if self.frozen_encoder:
            self.model.get_encoder().eval()
        return self

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without padding: the text is cut to `max_source`, the prompt around it never."""
        queries = self._query_ids(texts, truncation=True, max_length=self.max_source)
        if self.kind != "causal":
            return queries
        before, after = self.prompt.split("{query}")
        opening: list[int] = self.tokenizer(before)["input_ids"]
        closing: list[int] = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return [opening + query + closing for query in queries]

    @property
    def most_tokens(self) -> int:
        """Tokens of a text that it reads at most."""
        return self.max_source

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """Whether `tokenize` cuts each of the texts."""
        return [len(ids) > self.max_source for ids in self._query_ids(texts, verbose=False)]

    def _query_ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        """Token ids of the texts alone, without a prompt."""
        given = list(texts)
        if self.kind == "causal":
            given, options = [text.strip() for text in texts], {**options, "add_special_tokens": False}
        ids: list[list[int]] = self.tokenizer(given, **options)["input_ids"]
        return ids

    def pad(self, token_ids: Sequence[Sequence[int]], *, multiple: int = 1) -> Tokens:
        """A batch of texts, padded to the longest or to the next `multiple` of tokens, on the model's device."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(-(-int(lengths.max()) // multiple) * multiple) < lengths[:, None]
        padded = torch.full(mask.shape, self.padding, dtype=torch.long)
        padded[mask] = torch.tensor([token for ids in token_ids for token in ids])
        return Tokens(*(each.to(self.device, non_blocking=True) for each in (padded, mask.long())))

    def encode(self, token_ids: Sequence[Sequence[int]], *, encoder: nn.Module | None = None) -> Memory:
        """Run the encoder on a batch; of a causal model only the embeddings.

        Args:
            encoder: a cast or quantised copy to run in place of the model's own.
        """
        return self.read(self.pad(token_ids), encoder=encoder)

    def read(self, tokens: Tokens, *, encoder: nn.Module | None = None) -> Memory:
        """`encode` of a batch that is padded already."""
        if self.kind == "causal":
            return Memory(self.model.get_input_embeddings()(tokens.ids), tokens.mask)
        run = self.model.get_encoder() if encoder is None else encoder
        return Memory(run(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state, tokens.mask)

    @property
    def padding(self) -> int:
        """Token id behind a short text; masked, so that any would do."""
        padding = self.tokenizer.pad_token_id
        return 0 if padding is None else int(padding)

    def token_ids(self, codes: Tensor) -> Tensor:
        """Codes (batch, levels) to decoder token ids (batch, levels)."""
        return codes + self.level_offsets.to(codes.device)

    def with_slot(self, memory: Memory, features: Tensor | None) -> Memory:
        """The memory with one more state of each query, made of its text feature; as it is, where there is no slot.

        Args:
            features: (batch, features) on the device; their lengths do not matter.
        """
        if self.slot is None:
            return memory
        assert features is not None, "a slot reads the queries' text features"
        unit = F.normalize(features.float(), dim=1) * features.shape[1] ** 0.5
        state = self.slot(unit.to(self.slot.weight.dtype)).unsqueeze(1).to(memory.states.dtype)
        return Memory(torch.cat([memory.states, state], dim=1), F.pad(memory.mask, (0, 1), value=1))

    def forward(self, texts: Tokens | Memory, codes: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits (batch * written, levels + 1, vocabulary) at each position when `codes` are written.

        Position l predicts the voken of level l, the last one the end token.

        Args:
            texts: a batch of texts, or their memory where it is known.
            codes: (batch * written, levels), the same number for each text, one text's behind one another.
            features: (batch, features) of the texts, for the slot.
        """
        memory = self.with_slot(self.read(texts) if isinstance(texts, Tokens) else texts, features)
        if (each := len(codes) // len(memory.mask)) > 1:
            memory = Memory(*(part.repeat_interleave(each, dim=0) for part in memory))
        written = self.token_ids(codes)
        if self.kind == "causal":
            return self._continue_prompt(memory, written)
        opening = torch.full_like(written[:, :1], self.start)
        output = self.model(
            encoder_outputs=(memory.states,),
            attention_mask=memory.mask,
            decoder_input_ids=torch.cat([opening, written], dim=1),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits

    def _continue_prompt(self, memory: Memory, written: Tensor) -> Tensor:
        """`forward` of a causal model: the vocabulary is scored at the last word of the prompt and behind it alone."""
        embeddings = torch.cat([memory.states, self.model.get_input_embeddings()(written)], dim=1)
        mask = torch.cat([memory.mask, torch.ones_like(written)], dim=1)
        states = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        last = memory.mask.sum(dim=1, keepdim=True) - 1
        behind = torch.arange(written.shape[1], device=last.device).expand_as(written) + memory.mask.shape[1]
        chosen = torch.cat([last, behind], dim=1).unsqueeze(2).expand(-1, -1, states.shape[2])
        logits: Tensor = self.model.get_output_embeddings()(states.gather(1, chosen))
        return logits

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face model folder with tokenizer, and `vokens.json`, last; with LoRA, a peft adapter folder,
        which names the model that it adapts."""
        (self.adapted or self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.slot is not None:
            with replacing(folder / SLOT_NAME) as temporary:
                save_file({name: part.detach().cpu() for name, part in self.slot.state_dict().items()}, temporary)
        write_json(
            folder / VOKENS_NAME,
            {
                "kind": self.kind,
                "space": self.space._asdict(),
                "first_voken": self.first_voken,
                "start": self.start,
                "end": self.end,
                "max_source": self.max_source,
                "frozen_encoder": self.frozen_encoder,
                "prompt": self.prompt,
                "slot_width": 0 if self.slot is None else self.slot.in_features,
                **({} if self.rounded_in is None else {"rounded_in": self.rounded_in}),
            },
        )

    @classmethod
    def from_pretrained(cls, folder: Path, *, dtype: torch.dtype | None = None) -> "VokenLM":
        """Read what `save_pretrained` wrote; the model is in eval mode, adapters are merged into its weights.

        Args:
            dtype: of the weights that adapters are merged into; by default the one that the model was published in. A
                search in another one needs a second copy of them.

        Raises:
            BadInput: the model that adapters belong to cannot be loaded.
        """
        facts = read_json(folder / VOKENS_NAME)
        with reading(folder):
            tokenizer = load_tokenizer(folder)
        if (folder / ADAPTER_NAME).is_file():
            rounded_in = facts.pop("rounded_in", None)
            load = None if rounded_in is None else reader(rounded_in)
            model = merged(transformers.AutoModelForCausalLM, folder, len(tokenizer), dtype=dtype, load=load)
        else:
            with reading(folder):
                model = load_saved(getattr(transformers, LOADERS[facts["kind"]]), folder)
            if getattr(model.get_encoder(), "pooler", None) is not None:  # it comes back random, and is never used
                model.get_encoder().pooler = None
        space = VokenSpace(**facts.pop("space"))
        lm = cls(model, tokenizer, space=space, **facts)
        if lm.slot is not None:
            load_weights(lm.slot, folder / SLOT_NAME)
        return lm.eval()


def build_seq2seq(
    name: str,
    *,
    space: VokenSpace,
    codebooks: NDArray[np.float32],
    dropout: float,
    max_source: int,
    slot_width: int = 0,
) -> VokenLM:
    """A pretrained sequence-to-sequence model (T5) with voken tokens added to its tokenizer and embeddings.

    Args:
        name: Hugging Face name or folder.
        codebooks: (books, codebook_size, width), start of the vokens' embeddings; see `widened`.

    Raises:
        BadInput: the model cannot be loaded, or the codebooks are too wide.
    """
    try:
        config = load_config(name, dropout_rate=dropout)
        if config.model_type not in T5_FAMILY:
            raise BadInput(f"`language_model` {name} is a {config.model_type}, seq2seq takes {', '.join(T5_FAMILY)}")
        model = load_whole(transformers.AutoModelForSeq2SeqLM, name, config=config, dtype=torch.float32)
        tokenizer = load_tokenizer(name)
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from None
    return VokenLM(
        model,
        tokenizer,
        kind="seq2seq",
        space=space,
        first_voken=_add_vokens(name, model, tokenizer, space, codebooks, scaled=False),
        start=int(config.decoder_start_token_id),
        end=int(config.eos_token_id),
        max_source=max_source,
        frozen_encoder=False,
        slot_width=slot_width,
    )


def build_causal(
    name: str,
    *,
    space: VokenSpace,
    codebooks: NDArray[np.float32],
    max_source: int,
    prompt: str = PROMPT,
    dtype: torch.dtype = torch.float32,
    lora: Lora | None = None,
    four_bits: torch.device | None = None,
) -> VokenLM:
    """A pretrained causal model (LLaMA, Qwen, ...) with voken tokens added; it reads the query inside a prompt.

    Args:
        name: Hugging Face name or folder.
        codebooks: (books, codebook_size, width), start of the vokens' embeddings; see `widened`.
        max_source: tokens of the query at most; the prompt's come on top.
        prompt: text with "{query}" in it.
        dtype: of the weights that are not trained.
        lora: train adapters, embeddings and head, instead of all weights.
        four_bits: put the linear layers in 4 bits, on this device.

    Raises:
        BadInput: the model cannot be loaded or searched, the codebooks are too wide, the prompt has no place for the
            query, or the model has none of the projections that `lora` names.
    """
    if prompt.count("{query}") != 1:
        raise BadInput(f"the prompt {prompt!r} must have {{query}} in it once")
    try:
        if four_bits is None:
            model = load_whole(transformers.AutoModelForCausalLM, name, dtype=dtype)
        else:
            model = load_in_4bit(transformers.AutoModelForCausalLM, name, dtype=dtype, device=four_bits)
        tokenizer = load_tokenizer(name)
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from None
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {name} has no end token: set its eos_token")
    longest = len(tokenizer(prompt)["input_ids"]) + max_source + space.levels
    refuse_unsearchable(name, model.config.get_text_config(), longest)
    first_voken = _add_vokens(name, model, tokenizer, space, codebooks, scaled=True)
    adapted = None if lora is None else _adapt(name, model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return VokenLM(
        model,
        tokenizer,
        kind="causal",
        space=space,
        first_voken=first_voken,
        start=-1,
        end=int(tokenizer.eos_token_id),
        max_source=max_source,
        frozen_encoder=False,
        prompt=prompt,
        adapted=adapted,
        rounded_in=None if four_bits is None else name_of(dtype),
    )


def _adapt(name: str, model: Any, lora: Lora) -> "PeftModel":
    """Put adapters into a causal model, in place: they, its embeddings and its head are what is trained."""
    from peft import LoraConfig, get_peft_model

    check_names(name, model, lora.targets, argument="lora_targets")
    whole = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or None,
        modules_to_save=[path.rsplit(".")[-1] for path, module in model.named_modules() if id(module) in whole],
        ensure_weight_tying=bool(model.config.tie_word_embeddings),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"`lora_targets` do not fit {name}: {str(error).splitlines()[0]}") from None


def refuse_unsearchable(name: str, config: Any, longest: int) -> None:
    """Refuse causal models that would be searched otherwise than they were trained.

    Args:
        config: of the Hugging Face model.
        longest: tokens of prompt, query and vokens together.

    Raises:
        BadInput: the model is one of them.
    """
    scaled = [key for key in SCALED_HEADS if getattr(config, key, None) not in (None, 1, 1.0)]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if config.model_type in UNSEARCHABLE or getattr(config, "alibi", False):
        reason = "tells positions in a way that beams cannot share"
    elif scaled:
        reason = f"scales its logits ({scaled[0]}), which is not supported"
    elif window is not None and window <= longest:
        reason = f"sees {window} tokens back, prompt and vokens have up to {longest}: shorten `max_source`"
    else:
        return
    raise BadInput(f"`language_model` {name} ({config.model_type}) {reason}")


def _add_vokens(
    name: str, model: Any, tokenizer: Any, space: VokenSpace, codebooks: NDArray[np.float32], *, scaled: bool
) -> int:
    """Add the voken tokens to a pretrained model and its tokenizer, in place; returns the first one's id.

    Args:
        scaled: the vokens' rows get the mean length of the other rows of their matrix. Those of LLaMA are short, and
            with codebooks as they are the first logits are so large that the loss is far above that of a guess.
    """
    codebooks = widened(codebooks, model.get_input_embeddings().embedding_dim, name)
    tokenizer.add_tokens(space.tokens)
    first = int(tokenizer.convert_tokens_to_ids(space.tokens[0]))
    last = int(tokenizer.convert_tokens_to_ids(space.tokens[-1]))
    if last - first + 1 != len(space.tokens):
        raise BadInput(f"the tokenizer of {name} already has some vokens: their ids {first} to {last} are not in a row")
    if last >= model.get_input_embeddings().num_embeddings:
        _resize(model, last + 1)  # the new rows are set below
    rows = torch.from_numpy(np.ascontiguousarray(codebooks.reshape(-1, codebooks.shape[-1])))
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            scale = _mean_length(matrix[:first]) / _mean_length(rows) if scaled else 1.0
            matrix[first : last + 1] = (rows.to(matrix.device) * scale).to(matrix.dtype)
    return first


def _resize(model: Any, tokens: int) -> None:
    """Give a model room for more tokens, in place; a head that differs from the input embeddings goes on doing so.

    T5 1.1, Flan-T5 and mT5 have such a head, and a configuration that says otherwise: transformers would tie the two.
    """
    head = model.get_output_embeddings().weight
    own = None if head is model.get_input_embeddings().weight else head.detach()
    model.resize_token_embeddings(tokens, mean_resizing=False)
    output = model.get_output_embeddings()
    if own is not None and output.weight is model.get_input_embeddings().weight:
        grown = output.weight.detach().clone()
        grown[: len(own)] = own
        output.weight = nn.Parameter(grown)


def _mean_length(rows: Tensor) -> Tensor:
    """Mean Euclidean norm of rows (rows, width), a scalar."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).mean()


def build_encoder_decoder(
    encoder: str,
    *,
    space: VokenSpace,
    codebooks: NDArray[np.float32],
    layers: int,
    heads: int,
    dropout: float,
    max_source: int,
    slot_width: int = 0,
) -> VokenLM:
    """A frozen pretrained text encoder and a new decoder whose vocabulary is the vokens alone.

    The decoder is as wide as the codebooks, and its tied embeddings start from them, scaled so that its first logits
    have a standard deviation of about four.

    Args:
        encoder: Hugging Face name or folder of an encoder such as BERT or MiniLM, or of a CLIP, whose text tower it is.
        codebooks: (books, codebook_size, width).

    Raises:
        BadInput: the encoder cannot be loaded, or the width does not divide into heads.
    """
    width = codebooks.shape[-1]
    if width % heads:
        raise BadInput(f"`decoder_heads` {heads} does not divide the codebooks' width {width}")
    try:
        if load_config(encoder).model_type in CLIPS:
            text_encoder = load_whole(transformers.CLIPTextModel, encoder, dtype=torch.float32)
        else:
            text_encoder = load_whole(transformers.AutoModel, encoder, add_pooling_layer=False, dtype=torch.float32)
        tokenizer = load_tokenizer(encoder)
    except LOADING_ERRORS as error:
        raise cannot_load(encoder, error) from None
    config = decoder_config(space, width=width, layers=layers, heads=heads, dropout=dropout)
    joint = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(text_encoder.config, config)
    model = transformers.EncoderDecoderModel(
        config=joint, encoder=text_encoder, decoder=transformers.GPT2LMHeadModel(config)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = START, PAD
    spread = START_LOGIT_SPREAD / width**0.5
    set_rows([model.decoder.get_input_embeddings().weight], DECODER_SPECIALS, codebooks / codebooks.std() * spread)
    return VokenLM(
        model,
        tokenizer,
        kind="encoder-decoder",
        space=space,
        first_voken=DECODER_SPECIALS,
        start=START,
        end=END,
        max_source=min(max_source, int(text_encoder.config.max_position_embeddings)),
        frozen_encoder=True,
        slot_width=slot_width,
    )


def decoder_config(
    space: VokenSpace, *, width: int, layers: int, heads: int, dropout: float
) -> "transformers.GPT2Config":
    """A small decoder with cross-attention; its weights start at 1/sqrt(width), not at GPT-2's 0.02, which is far too
    small for its width."""
    return transformers.GPT2Config(
        vocab_size=DECODER_SPECIALS + len(space.tokens),
        n_positions=space.levels + 2,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=width**-0.5,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        is_decoder=True,
        add_cross_attention=True,
    )
