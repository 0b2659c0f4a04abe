"""How much memory the training of a language model takes on a GPU, from its sizes and its batch: no GPU is asked.

Weights, gradients and optimiser are counted exactly. Of the activations, what the backward pass keeps is counted, in
bytes a token and layer as `torch.autograd.graph.saved_tensors_hooks` shows them for these models in bf16; a test holds
the two against each other. A peak is the sum, with a tenth on top for fragments and what libraries keep.

Nothing here imports torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

GIB = 1 << 30
CONTEXT = 0.6 * GIB  # CUDA itself and its libraries
FRAGMENTS = 1.1
TRAINED_BYTES = 16  # a weight, its gradient and AdamW's two means, in fp32
COPY_BYTES = 2  # what autocast keeps of a weight in 16 bits during a step
PACKED_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight in 4 bits, a scale of 64, and a scale of 256 scales
LOGIT_BYTES = 20  # of a scored position, a row of the vocabulary: 16 bits, fp32, logarithms, and their gradients


class Shape(NamedTuple):
    """The sizes of a language model."""

    layers: int
    """Of the decoder; an encoder has as many."""
    width: int
    feed_forward: int
    vocabulary: int
    heads: int
    kv_width: int
    """Of keys and of values: the width, unless heads share them or are of another width"""
    gated: bool
    """Whether the feed-forward has a third matrix, a gate"""
    encoder: bool
    """Whether there is an encoder, which the decoder's cross-attention reads"""
    tied: bool
    """Whether input and output share one matrix of the vocabulary"""
    query_width: int | None = None
    """Of queries: the width, unless the heads together are wider or narrower"""

    @property
    def layer_parameters(self) -> int:
        """Matrices of one layer, without cross-attention."""
        attention = 2 * self.width * ((self.query_width or self.width) + self.kv_width)
        return attention + (3 if self.gated else 2) * self.width * self.feed_forward

    @property
    def cross_parameters(self) -> int:
        """Matrices of one layer's cross-attention."""
        return 4 * self.width * (self.query_width or self.width) if self.encoder else 0

    @property
    def body_parameters(self) -> int:
        """All matrices but the vocabulary's."""
        stacks = 2 if self.encoder else 1
        return self.layers * (stacks * self.layer_parameters + self.cross_parameters)

    @property
    def vocabulary_parameters(self) -> int:
        return (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.vocabulary_parameters


SHAPES = {
    "t5-small": Shape(6, 512, 2048, 32128, 8, 512, gated=False, encoder=True, tied=True),
    "t5-base": Shape(12, 768, 3072, 32128, 12, 768, gated=False, encoder=True, tied=True),
    "t5-large": Shape(24, 1024, 4096, 32128, 16, 1024, gated=False, encoder=True, tied=True),
    "meta-llama/Llama-2-7b-hf": Shape(32, 4096, 11008, 32000, 32, 4096, gated=True, encoder=False, tied=False),
    "meta-llama/Meta-Llama-3-8B": Shape(32, 4096, 14336, 128256, 32, 1024, gated=True, encoder=False, tied=False),
    "AILab-CVC/seed-llama-8b-sft": Shape(32, 4096, 11008, 40194, 32, 4096, gated=True, encoder=False, tied=False),
}
"""What the recipes name, for where no configuration of theirs is on disk yet."""


def shape_from(config: dict[str, Any]) -> Shape | None:
    """The sizes that a Hugging Face configuration says; None for models of other forms."""
    try:
        width = int(config.get("d_model") or config["hidden_size"])
        heads = int(config.get("num_heads") or config["num_attention_heads"])
        shared = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("d_kv") or config.get("head_dim") or width // heads)
        encoder = config["model_type"] in ("t5", "mt5")
        return Shape(
            layers=int(config.get("num_layers") or config["num_hidden_layers"]),
            width=width,
            feed_forward=int(config.get("d_ff") or config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            heads=heads,
            kv_width=head * shared,
            gated=not encoder or str(config.get("feed_forward_proj", "")).startswith("gated"),
            encoder=encoder,
            tied=bool(config.get("tie_word_embeddings", encoder)),
            query_width=head * heads,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def read_shape(path: Path) -> Shape | None:
    """The sizes that a `config.json` says; None where there is none that can be read."""
    try:
        return shape_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


class Training(NamedTuple):
    """What decides how much memory a training takes, on one of its processes."""

    shape: Shape
    sequences: int
    """Texts of a forward pass"""
    tokens: int
    """Of the longest of them, which the others are padded to"""
    written: int = 1
    """Sequences that the decoder writes for each text"""
    positions: int = 5
    """Tokens of each of these"""
    rank: int = 0
    """Of low-rank adapters; 0 where all weights are trained"""
    adapted: int = 2
    """Matrices of a layer with adapters: 2, or all 7 of a LLaMA"""
    whole: int = 2
    """Matrices of the vocabulary that are trained beside adapters"""
    scored: int = 5
    """Positions of a text whose whole vocabulary is scored"""
    new_tokens: int = 0
    """Rows that are added to the vocabulary"""
    shared: int = 0
    """Tokens of a sequence whose keys and values are computed apart, and copied to it"""
    checkpointing: bool = False
    searched: bool = False
    """Whether a validation makes a copy with the adapters merged into the weights"""
    four_bits: bool = False
    """Whether the frozen matrices of the layers are kept in 4 bits"""
    copies: int = 0
    """Copies of the trained weights that are kept in fp32"""

    @property
    def vocabulary(self) -> int:
        return self.shape.vocabulary + self.new_tokens

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        if not self.rank:
            matrices = 1 if self.shape.tied else 2
            return self.shape.body_parameters + matrices * self.vocabulary * self.shape.width
        adapters = self.shape.layers * self.adapted * self.rank * 2 * self.shape.width
        return adapters + self.whole * self.vocabulary * self.shape.width

    @property
    def frozen(self) -> int:
        """Weights that are only read."""
        return self.shape.parameters if self.rank else 0

    @property
    def frozen_bytes(self) -> int:
        """What they take, in 16 bits; or in 4, but for those of the vocabulary."""
        if not self.rank or not self.four_bits:
            return self.frozen * 2
        return int(self.shape.body_parameters * PACKED_BYTES) + self.shape.vocabulary_parameters * 2


class Need(NamedTuple):
    """Bytes on one GPU."""

    fixed: int
    """Weights, gradients and optimiser: less is impossible"""
    activations: int
    """What the backward pass needs of the forward pass, and the scores of the vocabulary; or, if that is more, what a
    validation needs"""

    @property
    def peak(self) -> int:
        return int(FRAGMENTS * (self.fixed + self.activations) + CONTEXT)


def need(training: Training) -> Need:
    """The memory of a training."""
    fixed = training.trained * (TRAINED_BYTES + 4 * training.copies) + training.frozen_bytes
    scores = training.sequences * training.written * training.scored * training.vocabulary * LOGIT_BYTES
    layers = training.shape.layers * layer_bytes(training)
    if training.checkpointing:
        kept = 4 * training.shape.width * training.sequences * training.tokens
        layers = training.shape.layers * kept + layer_bytes(training)
    copies = 0 if training.rank else training.trained * COPY_BYTES
    copied = 0 if training.four_bits else training.frozen_bytes  # in 4 bits, a search reads the weights as they are
    searched = copied + training.trained * 4 if training.searched else 0  # while nothing is trained
    return Need(fixed, max(scores + layers + copies, searched))


def layer_bytes(training: Training) -> int:
    """What the backward pass keeps of one layer: of encoder and decoder together where there are both."""
    shape, texts = training.shape, training.sequences * training.tokens
    if not shape.encoder:
        width, wide = (42, 9) if training.adapted > 2 else (22, 6)
        if not training.rank:
            width, wide = width + 12, wide + 4  # what each matrix read, for its own gradient
        # Keys and values are copied to each sequence, and copied again where those of its own tokens follow.
        copied = training.sequences * training.shared * 8 * shape.kv_width
        return texts * (width * shape.width + wide * shape.feed_forward) + copied
    written = training.sequences * training.written * training.positions
    encoder = texts * (40 * shape.width + 5 * shape.feed_forward + 12 * shape.heads * training.tokens)
    seen = 12 * shape.heads * (training.positions + training.tokens)
    decoder = written * (57 * shape.width + 5 * shape.feed_forward + seen)
    return encoder + decoder + 12 * shape.width * texts * training.written
