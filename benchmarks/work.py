"""What each stage of a recipe has to do, in kernels, operations and bytes: from counts and sizes, nothing is timed.

Sizes that no recipe says are constants here, each with where it comes from. Operations count a multiplication and an
addition as two. The backward pass of trained weights takes twice the operations of the forward pass, that of frozen
weights as many.
"""

from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from reranker import convert
from reranker import test as reranker_test
from reranker import train as reranker_train
from retriever import rank_splits, retrieve, train, train_stage2
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.training import TrainingConfig
from tools import prepare_captions
from tools.training_memory import GIB, SHAPES, Shape, Training, layer_bytes, need

from .recipes import Recipe

CAPTIONS_A_PICTURE = 5  # of both data sets; COCO has a few more
CAPTION_TOKENS = 16  # of a batch of captions of similar length, with its padding (benchmarks/shapes.py)
LONGEST_CAPTION = 40
PROMPT_TOKENS = 30  # around a caption, of a causal model
OPENING_TOKENS, CLOSING_TOKENS = 44, 20  # of the reranker's prompt: a picture's part, and a query's
NEW_VOKENS = 4096
SEARCH_BATCH = 64
LEVELS = 4
# Operations of one picture: 24 layers, 1024 wide, on 577 patches; 39 layers, 1408 wide, on 257; and attention.
CLIP_FLOPS, EVA_FLOPS = 0.38e12, 0.52e12
OPT_PARAMETERS, OPT_LAYERS, OPT_KERNELS, OPT_PROMPT = 2.65e9, 32, 25, 32  # BLIP-2's language model; a layer and token
FEATURES = 768
CAPTIONER_BATCH_BYTES = 2 * OPT_PARAMETERS
ADAM_BYTES = 28  # read and written of a trained weight: itself, gradient, two means
PASSES = 3  # an activation is written, read by the next operation, and read by the backward pass


@dataclass(frozen=True)
class Part:
    """Something that a stage does again and again."""

    name: str
    times: float
    kernels: float = 0
    flops: float = 0
    """In bf16"""
    exact: float = 0
    """Floating-point operations in fp32"""
    moved: float = 0
    """Bytes that are read and written"""
    sent: float = 0
    """Bytes of gradients that each device sends to the others"""
    pictures: int = 0
    """That are read and decoded by `workers` processes of each device"""
    workers: int = 1
    shared: bool = True
    """Whether several devices share the repetitions; a training's steps are shared within a batch instead"""


class Stage(NamedTuple):
    """One stage of a chain."""

    name: str
    parts: list[Part]
    memory: float | None
    """Bytes at the peak of one device; None where it is far below the others' """


class Kernels(NamedTuple):
    """Of a training: see `benchmarks.kernels.Counted`."""

    micro_step: float
    optimizer_step: float


class Counts(NamedTuple):
    """Kernels of one repetition, counted on narrow models (benchmarks/kernels.py)."""

    trainings: dict[str, Kernels]
    """By the name of the array of options"""
    searches: dict[str, float]
    """Of one batch, by the same names"""
    tokenizer: int
    """Of one step of the RQ-VAE"""
    scoring: float
    """Of one batch of the reranker's scoring"""


class Data(NamedTuple):
    """Pictures of each split."""

    train: int
    val: int
    test: int

    @property
    def pictures(self) -> int:
        return sum(self)

    def captions(self, split: str) -> int:
        return CAPTIONS_A_PICTURE * int(getattr(self, split))

    def pool(self, name: str) -> int:
        return self.pictures if name == "all" else int(getattr(self, name))


SOME = Path("x")  # for options that scripts add, and no count depends on


def data_of(recipe: Recipe) -> Data:
    """Pictures of each split, as the dataset's file expects them."""
    config = recipe.config("CAPTIONS", _AnyCaptions, output=SOME)
    assert config.expect is not None
    return Data(*config.expect)


class _AnyCaptions(prepare_captions.Config):
    """The same options, of files that need not be there."""

    def __post_init__(self) -> None:
        pass


def stages_of(recipe: Recipe, counts: Counts, *, devices: int = 1) -> list[Stage]:
    """What each stage of a recipe has to do, in the order of STAGES; stage 11 behind them.

    Args:
        devices: that share each training's batches.
    """
    data, found = data_of(recipe), []
    makers = {
        "03": encode,
        "05": tokenizer,
        "08": pseudo_queries,
        "12": search,
        "15": image_tokens,
        "16": rank,
        "18": score,
    }
    for script, system in recipe.stages:
        name = script if system == "retriever" else f"{script}@{system}"
        if make := makers.get(script[:2]):
            found.append(make(name, recipe, data, counts))
        elif script[:2] in TRAININGS:
            found.append(TRAININGS[script[:2]](name, recipe, data, counts, devices))
    found.append(llama("11_finetune_retriever_llama@llama", recipe, data, counts, devices))
    return found


# Stages that read pictures


def encode(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """Both towers over all pictures and captions."""
    config = recipe.config("CLIP", import_module("RQ-VAE.prepare_emb").Config, captions=SOME, output=SOME)
    pictures = Part("pictures", 1, exact=CLIP_FLOPS * data.pictures, pictures=data.pictures, workers=config.workers)
    texts = Part("captions", 1, exact=2 * 85e6 * CAPTION_TOKENS * CAPTIONS_A_PICTURE * data.pictures)
    return Stage(name, [pictures, texts], None)


def image_tokens(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """SEED's image tower over all pictures."""
    config = recipe.config("CONVERT", convert.Config, captions=SOME, output=SOME)
    work = Part("pictures", 1, flops=EVA_FLOPS * data.pictures, pictures=data.pictures, workers=config.workers)
    return Stage(name, [work], None)


def pseudo_queries(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """BLIP-2: its image tower once a picture, its language model once a candidate and token."""
    paths = dict.fromkeys(("dataset", "output"), SOME)
    config = recipe.config("PSEUDO_QUERIES", generate_pseudo_query.Config, **paths)
    pictures = sum(data.pool(split) for split in config.splits)
    batches = -(-pictures // config.batch_size)
    words = pictures * config.candidates * (OPT_PROMPT + config.max_new_tokens)
    steps = batches * config.max_new_tokens
    return Stage(
        name,
        [
            Part("pictures", 1, flops=EVA_FLOPS * pictures, pictures=pictures),
            Part("words", steps, kernels=OPT_LAYERS * OPT_KERNELS, flops=2 * OPT_PARAMETERS * words / steps,
                 moved=CAPTIONER_BATCH_BYTES),
        ],
        2 * (OPT_PARAMETERS + 1.1e9) + 2 * GIB,
    )  # fmt: skip


def tokenizer(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """Steps of the RQ-VAE, which one device makes alone, and validations."""
    config = recipe.config("TRAIN_RQVAE", import_module("RQ-VAE.train").Config, features=SOME, output=SOME)
    batches, batch = tokenizer_batches(config, recipe, data)
    widths = [FEATURES, *config.hidden, config.width]
    weights = 2 * sum(a * b for a, b in pairwise(widths))
    distances = 2 * config.levels * config.codebook_size * config.width
    step = Part(
        "steps",
        config.epochs * batches,
        kernels=counts.tokenizer,
        flops=batch * (6 * weights + distances),
        moved=PASSES * batch * 4 * (2 * sum(widths) + config.levels * config.codebook_size) + ADAM_BYTES * weights,
        shared=False,
    )
    recall = 2 * 2 * data.captions("val") * data.val * FEATURES
    validations = Part("validations", config.epochs // config.validate_every, 300, recall, shared=False)
    return Stage(name, [step, validations], None)


def tokenizer_batches(config: Any, recipe: Recipe, data: Data) -> tuple[int, int]:
    """Batches of an epoch, and pairs of a batch, as `TrainData` cuts them."""
    if config.pairs == "picture":
        batches = max(1, data.train // config.batch_size)
        return batches, -(-data.train // batches)
    pairs = data.captions("train")
    if config.pseudo_queries is not None:
        paths = dict.fromkeys(("dataset", "output"), SOME)
        pseudo = recipe.config("PSEUDO_QUERIES", generate_pseudo_query.Config, **paths)
        pairs += pseudo.per_picture * sum(data.pool(split) for split in pseudo.splits)
    return -(-pairs // config.batch_size), config.batch_size


# Language models


def model_named(name: str) -> Shape:
    """The sizes of a model that a recipe names."""
    return SHAPES[name]


def encoder_flops(shape: Shape, tokens: float) -> float:
    """Of the encoder's forward pass over so many tokens."""
    return 2 * shape.layers * shape.layer_parameters * tokens


def decoder_flops(shape: Shape, written: float, read: float) -> float:
    """Of the decoder's forward pass that writes so many tokens, the vocabulary scored at each; it reads the states of
    other tokens."""
    own = shape.layer_parameters + shape.cross_parameters / 2
    return 2 * (shape.layers * (own * written + shape.cross_parameters / 2 * read) + _head(shape) * written)


def _head(shape: Shape) -> int:
    return (shape.vocabulary + NEW_VOKENS) * shape.width


def training_queries(recipe: Recipe, data: Data, name: str) -> int:
    """Captions of an epoch: the train captions, and pseudo queries where the system has them."""
    paths = dict.fromkeys(("dataset", "output"), SOME)
    pseudo = recipe.config("PSEUDO_QUERIES", generate_pseudo_query.Config, **paths)
    transductive = "pseudo" in name or "retriever+stage2" in name
    more = pseudo.per_picture * sum(data.pool(split) for split in pseudo.splits) if transductive else 0
    return data.captions("train") + more


class Cut(NamedTuple):
    """How a process takes its part of a batch."""

    examples: int
    """Captions or groups of a forward pass."""
    pieces: int
    """Forward passes a batch."""


def cut_of(config: TrainingConfig | reranker_train.Config, devices: int) -> Cut:
    """The forward passes of a batch on one of so many devices."""
    part = -(-config.batch_size // devices)
    pieces = 1 if config.at_once is None else -(-part // config.at_once)
    return Cut(-(-part // pieces), pieces)


def activation_bytes(training: Training) -> float:
    """What a step moves of its activations: layers, and the vocabulary's scores."""
    scores = need(training._replace(searched=False)).activations - training.shape.layers * layer_bytes(training)
    return PASSES * training.shape.layers * layer_bytes(training) + max(0.0, scores)


def optimizer_bytes(training: Training) -> int:
    return training.trained * ADAM_BYTES


def stage1(name: str, recipe: Recipe, data: Data, counts: Counts, devices: int) -> Stage:
    """An encoder-decoder, all of whose weights are trained."""
    config = recipe.config("TRAIN_RETRIEVER", train.Config, dataset=SOME, output=SOME)
    shape, texts = model_named(config.language_model), cut_of(config, devices).examples
    training = Training(
        shape, texts, CAPTION_TOKENS, new_tokens=NEW_VOKENS, checkpointing=config.gradient_checkpointing
    )
    tokens = texts * CAPTION_TOKENS
    forward = encoder_flops(shape, tokens) + decoder_flops(shape, texts * (LEVELS + 1), tokens)
    queries = training_queries(recipe, data, name)
    parts = [
        _steps(config, queries, counts.trainings["TRAIN_RETRIEVER"], training, 3 * forward, devices),
        _validations(config, data, shape, counts.searches["TRAIN_RETRIEVER"]),
    ]
    return Stage(name, parts, need(training._replace(tokens=LONGEST_CAPTION)).peak)


def stage2(name: str, recipe: Recipe, data: Data, counts: Counts, devices: int) -> Stage:
    """Stage 1's model on its right and wrong sequences, which each epoch searches anew."""
    config = recipe.config("TRAIN_STAGE2", train_stage2.Config, dataset=SOME, output=SOME, stage1=SOME)
    start = recipe.config("TRAIN_RETRIEVER", train.Config, dataset=SOME, output=SOME)
    shape, texts = model_named(start.language_model), cut_of(config, devices).examples
    written = config.negatives + 2
    training = Training(shape, texts, CAPTION_TOKENS, written, new_tokens=NEW_VOKENS, copies=1)
    tokens = texts * CAPTION_TOKENS
    forward = encoder_flops(shape, tokens)
    forward += decoder_flops(shape, texts * written * (LEVELS + 1), tokens * written)
    queries, kernels = training_queries(recipe, data, name), counts.searches["TRAIN_RETRIEVER"]
    mixtures = 1 + len(config.mix)
    parts = [
        _steps(config, queries, counts.trainings["TRAIN_STAGE2"], training, 3 * forward, devices),
        _search("negatives", config.epochs * queries, config.negatives + 1, shape, kernels, batch=config.search_batch),
        _validations(config, data, shape, kernels, mixtures),
    ]
    return Stage(name, parts, need(training._replace(tokens=LONGEST_CAPTION)).peak)


def llama(name: str, recipe: Recipe, data: Data, counts: Counts, devices: int) -> Stage:
    """A causal model with adapters."""
    config = recipe.config("FINETUNE_LLAMA", train.Config, dataset=SOME, output=SOME)
    shape, texts = model_named(config.language_model), cut_of(config, devices).examples
    length = PROMPT_TOKENS + CAPTION_TOKENS
    training = Training(shape, texts, length, rank=config.lora_rank, new_tokens=NEW_VOKENS, searched=True,
                        checkpointing=config.gradient_checkpointing)  # fmt: skip
    passes = 3 if config.gradient_checkpointing else 2
    flops = passes * 2 * shape.body_parameters * texts * length + 6 * _head(shape) * texts * (LEVELS + 1)
    queries = training_queries(recipe, data, name)
    parts = [
        _steps(config, queries, counts.trainings["FINETUNE_LLAMA"], training, flops, devices),
        _validations(config, data, shape, counts.searches["FINETUNE_LLAMA"]),
    ]
    return Stage(name, parts, need(training._replace(tokens=PROMPT_TOKENS + LONGEST_CAPTION)).peak)


def reranker(name: str, recipe: Recipe, data: Data, counts: Counts, devices: int) -> Stage:
    """Groups of pairs through a language model with adapters."""
    config = recipe.config("TRAIN_RERANKER", reranker_train.Config, lists=SOME, tokens=SOME, output=SOME)
    shape = model_named(config.language_model)
    pairs = cut_of(config, devices).examples * (1 + config.negatives)
    shares = not config.gradient_checkpointing and not config.compat
    length = config.max_length if config.compat else OPENING_TOKENS + CLOSING_TOKENS
    training = Training(
        shape,
        pairs,
        length,
        rank=config.lora_rank,
        adapted=len(config.lora_targets),
        whole=1,
        scored=0,
        shared=OPENING_TOKENS if shares else 0,
        checkpointing=config.gradient_checkpointing,
    )
    passes = 3 if config.gradient_checkpointing else 2
    flops = passes * 2 * shape.body_parameters * pairs * length
    counted, queries = counts.trainings["TRAIN_RERANKER"], config.queries_per_epoch or data.captions("train")
    steps = _steps(config, queries, counted, training, flops, devices)
    validated = config.epochs // config.validate_every * min(config.validate_queries, data.captions("val"))
    parts = [steps, _scoring("validations", validated, config.top_k, data.val, shape, counts.scoring, memory=4.0)]
    return Stage(name, parts, need(training._replace(tokens=length + LONGEST_CAPTION - CAPTION_TOKENS)).peak)


TRAININGS = {"09": stage1, "10": stage2, "11": llama, "17": reranker}


def _steps(
    config: TrainingConfig | reranker_train.Config,
    queries: int,
    counted: Kernels,
    training: Training,
    flops: float,
    devices: int,
) -> Part:
    """All forward and backward passes of a training, with what a step of the optimiser adds to each."""
    pieces = cut_of(config, devices).pieces
    passes = pieces * config.accumulate  # a step
    return Part(
        "steps",
        config.epochs * -(-queries // config.batch_size) * pieces,
        kernels=counted.micro_step + counted.optimizer_step / passes,
        flops=flops,
        moved=activation_bytes(training) + optimizer_bytes(training) / passes + 4 * training.frozen,
        sent=_sent(training, devices) / passes,
        shared=False,
    )


def _sent(training: Training, devices: int) -> float:
    """Bytes of gradients that a ring of devices sends and receives."""
    return 2 * 4 * training.trained * (devices - 1) / devices


def _validations(config: TrainingConfig, data: Data, shape: Shape, kernels: float, times: int = 1) -> Part:
    queries = min(config.validate_queries, data.captions("val"))
    return _search(
        "validations", config.epochs // config.validate_every * times * queries, config.beams, shape, kernels
    )


# Search and scoring


def _search(name: str, queries: int, beams: int, shape: Shape, kernels: float, *, batch: int = SEARCH_BATCH) -> Part:
    """Constrained search of so many captions, in batches."""
    tokens, written = batch * CAPTION_TOKENS, batch * (1 + (LEVELS - 1) * beams)
    if shape.encoder:
        flops = encoder_flops(shape, tokens) + decoder_flops(shape, written, tokens)
    else:
        flops = 2 * shape.body_parameters * (tokens + batch * PROMPT_TOKENS + written) + 2 * _head(shape) * written
    logits = 4 * PASSES * written * (shape.vocabulary + NEW_VOKENS)
    return Part(name, -(-queries // batch), kernels, flops, logits + 2 * LEVELS * shape.parameters)


def search(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """Every test caption over each pool."""
    config = recipe.config("RETRIEVE", retrieve.Config, dataset=SOME, retriever=SOME, output=SOME)
    shape, kernels = _retriever_of(recipe, name, counts)
    queries = data.captions(config.split) * len(config.pools)
    return Stage(name, [_search("queries", queries, config.beams, shape, kernels, batch=config.batch_size)], None)


def rank(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """Train captions with many beams, those of val and test with fewer."""
    config = recipe.config("RANK", rank_splits.Config, dataset=SOME, retriever=SOME, output=SOME)
    shape, kernels = _retriever_of(recipe, name, counts)
    each = CAPTIONS_A_PICTURE if config.train_per_picture is None else config.train_per_picture
    others = data.captions("val") + data.captions("test") * len(config.pools)
    parts = [
        _search("train captions", data.train * each, config.train_beams, shape, kernels, batch=config.batch_size),
        _search("val and test captions", others, config.beams, shape, kernels, batch=config.batch_size),
    ]
    return Stage(name, parts, None)


def _retriever_of(recipe: Recipe, name: str, counts: Counts) -> tuple[Shape, float]:
    variable = "FINETUNE_LLAMA" if "@llama" in name else "TRAIN_RETRIEVER"
    config = recipe.config(variable, train.Config, dataset=SOME, output=SOME)
    return model_named(config.language_model), counts.searches[variable]


def score(name: str, recipe: Recipe, data: Data, counts: Counts) -> Stage:
    """The first of each list, of val and of the test captions over each pool."""
    config = recipe.config("TEST_RERANKER", reranker_test.Config, lists=SOME, output=SOME, summary=SOME, name="x")
    trained = recipe.config("TRAIN_RERANKER", reranker_train.Config, lists=SOME, tokens=SOME, output=SOME)
    pools = recipe.config("RANK", rank_splits.Config, dataset=SOME, retriever=SOME, output=SOME).pools
    shape, pairs = model_named(trained.language_model), config.pairs or 2048
    lists = [("val", data.captions("val"), data.val)]
    lists += [(f"test over {pool}", data.captions("test"), data.pool(pool)) for pool in pools]
    parts = [
        _scoring(each, queries, config.top_k, pool, shape, counts.scoring, memory=config.memory, pairs=pairs)
        for each, queries, pool in lists
    ]
    return Stage(name, parts, 2 * shape.parameters + config.memory * GIB)


def _scoring(
    name: str, queries: int, top: int, pool: int, shape: Shape, kernels: float, *, memory: float, pairs: int = 2048
) -> Part:
    """Pairs of a query and a picture; a picture is read once while there is room for its keys and values."""
    picture = OPENING_TOKENS * 2 * 2 * shape.kv_width * shape.layers
    room = max(top, int(memory * GIB / picture))
    pairs = min(pairs, room)
    batches = -(-queries // max(1, pairs // top))
    again = queries * top * max(0.0, 1 - room / pool)
    tokens = (min(pool, queries * top) + again) * OPENING_TOKENS + queries * top * CLOSING_TOKENS
    moved = 4 * picture * queries * top + 2 * shape.parameters * batches
    return Part(name, batches, kernels, 2 * shape.body_parameters * tokens / batches, moved / batches)
