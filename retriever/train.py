"""Stage 1: train a language model to write the vokens of the picture a caption asks for.

In:  a `retriever.prepare` folder; T5 by name or path, a text encoder that gets a small decoder, or a causal model.
Out: `<output>/model/`, the best checkpoint by recall on val (real constrained search over the val pictures);
     `<output>/curves.jsonl`, losses and validations (tools/curves.py).
Command: python -m retriever.train --dataset DIR --language-model t5-base --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.compute import pick_device, pick_dtype, seed_everything
from models.four_bits import check_four_bits
from models.options import LoraOptions
from models.voken_lm import Kind, Lora, VokenLM, build_causal, build_encoder_decoder, build_seq2seq
from tools import runs
from tools.command_line.commands import run_command
from tools.command_line.place import NameOrPath
from tools.errors import BadInput
from tools.logs import Tracker

from .data import RetrieverData, read_data, read_retriever
from .training import Training, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, LoraOptions):
    """Model and training. Published values: T5-base on Flickr30k."""

    language_model: NameOrPath
    """Hugging Face name or folder: a T5 (seq2seq), a text encoder or a CLIP, whose text tower is read
    (encoder-decoder), or a causal model."""
    kind: Kind = "seq2seq"
    """seq2seq: a pretrained sequence-to-sequence model, all of it trained; encoder-decoder: a frozen text encoder,
    its states computed once, and a new decoder as wide as the codebooks; causal: LLaMA 2, LLaMA 3 and the like behind
    an instruction, trained whole or with --lora-rank."""
    decoder_layers: int = 2
    """Layers of a new decoder."""
    decoder_heads: int = 8
    """Attention heads of a new decoder."""
    text_slot: bool = False
    """Let the decoder read the query's two-tower text feature too, as one more state (--kind seq2seq, encoder-decoder);
    a query then takes both text encoders. Published: no."""
    start: Path | None = None
    """Run folder of retriever.train to go on from, in place of the untrained model."""
    max_source: int = 128
    """Tokens of a caption at most."""
    dropout: float = 0.2
    """Dropout of the language model; a causal one keeps its own."""
    lora_rank: int = 0
    """Above 0: train low-rank adapters of this rank, the embeddings and the head of a causal model; its other weights
    are frozen, and kept in --precision. Published for LLaMA: 8."""
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = ()
    """Projections that get adapters (q_proj v_proj ...); by default those that peft names for the model."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        LoraOptions.__post_init__(self)
        if not 0 <= self.dropout < 1:
            raise BadInput("--dropout must be in [0, 1)")
        if min(self.decoder_layers, self.decoder_heads, self.max_source) < 1:
            raise BadInput("--decoder-layers, --decoder-heads and --max-source must be at least 1")
        if self.lora_targets and not self.lora_rank:
            raise BadInput("--lora-targets are for --lora-rank above 0: give both or none")
        if self.lora_rank and self.kind != "causal":
            raise BadInput(f"--lora-rank {self.lora_rank} is for --kind causal, not for --kind {self.kind}")

        if self.text_slot and self.kind == "causal":
            raise BadInput("--text-slot is for --kind seq2seq and encoder-decoder: a causal model reads a prompt alone")
        if self.start is not None and self.kind == "causal":
            raise BadInput("--start is for --kind seq2seq and encoder-decoder: a causal model's adapters are merged")

    def inputs(self) -> dict[str, Path]:
        start = {} if self.start is None else {"start": self.start}
        return {**super().inputs(), **start}

    @property
    def lora(self) -> Lora | None:
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets) if self.lora_rank else None


def build_model(config: Config, data: RetrieverData) -> VokenLM:
    """The language model with the dataset's vokens: untrained, or as an earlier training left it."""
    lm = new_model(config, data) if config.start is None else VokenLM.from_pretrained(config.start / "model")
    if config.gradient_checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def new_model(config: Config, data: RetrieverData) -> VokenLM:
    """The untrained language model with the dataset's vokens."""
    shared: dict[str, Any] = {
        "space": data.space,
        "codebooks": np.array(data.codebooks),
        "max_source": config.max_source,
    }
    slot_width = data.features.texts.shape[1] if config.text_slot else 0
    if config.kind == "seq2seq":
        return build_seq2seq(config.language_model, dropout=config.dropout, slot_width=slot_width, **shared)
    if config.kind == "causal":
        device = pick_device(config.device)
        dtype = pick_dtype(config.precision, device) if config.lora else torch.float32
        four_bits = device if config.load_in_4bit else None
        return build_causal(config.language_model, lora=config.lora, dtype=dtype, four_bits=four_bits, **shared)
    return build_encoder_decoder(
        config.language_model,
        layers=config.decoder_layers,
        heads=config.decoder_heads,
        dropout=config.dropout,
        slot_width=slot_width,
        **shared,
    )


def check_start(config: Config, data: RetrieverData) -> None:
    """Refuse a start that is not finished, or of another tokenizer, model or setting.

    Raises:
        BadInput: it is one of these.
    """
    if config.start is None:
        return
    start = read_retriever(config.start, data, "retriever.train")
    for name in ("kind", "language_model", "decoder_layers", "decoder_heads", "text_slot", "max_source", "dropout"):
        if (trained := start.config.get(name, getattr(Config, name, None))) != getattr(config, name):
            flag = "--" + name.replace("_", "-")
            told = f"with {flag} {trained}"
            if isinstance(trained, bool):
                told = f"{'with' if trained else 'without'} {flag}"
            raise BadInput(f"--start {config.start} was trained {told}: do the same here")
    if start.facts["setting"] == "transductive" and config.pseudo_queries is None:
        raise BadInput(f"--start {config.start} was trained with --pseudo-queries: give them here too")


def train(training: Training, tracker: Tracker) -> None:
    """Run every epoch that is still to come, validate, and keep the best model."""
    config, checkpoint = training.config, training.checkpoint
    while not checkpoint.over:
        training.lm.train()
        for batches in checkpoint.steps(training.batches(checkpoint.epoch), seed=config.seed):
            checkpoint.record(training.stepper.step(training.loss, batches), tracker)
        checkpoint.epoch_ends()
        if checkpoint.validation_is_due(config.validate_every):
            checkpoint.report(tracker, training.validate())
        checkpoint.save()


def main(config: Config) -> None:
    data = read_data(config.dataset)
    config.check(data)
    check_start(config, data)
    check_four_bits(config, config.device)
    inputs = config.inputs()
    if Path(config.language_model).is_dir():
        inputs["language_model"] = Path(config.language_model)
    run = runs.begin("retriever.train", config, inputs=inputs)
    if run is None:
        return
    seed_everything(config.seed)
    training = Training(config, data, run, build_model(config, data).to(pick_device(config.device)))
    checkpoint = training.checkpoint
    checkpoint.resume()
    tracker = Tracker(run.folder, job="train_retriever", config=run.started["config"])
    train(training, tracker)
    if config.guide_head:
        training.fit_guide_head()
    checkpoint.finish(tracker, facts=training.facts())
    print(f"{checkpoint.told(chance=training.chance)}\n-> {run.folder / 'model'}")


if __name__ == "__main__":
    run_command(main, Config, shares_work=True)
