"""What is timed, as functions of a writer, an index and a batch of queries."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.decoding import Scoring, Writer
from models.guide import Steering
from models.voken_lm import Memory
from retriever.beam import Beams, beam_search, best, children_of
from retriever.index import DeviceLevel, build_sorted, load_index, save_index, sort_codes
from tests.oracle import DictionaryTrie, generate

from .codes import synthetic_codes
from .rows import Setting


def engine(
    writer: Writer,
    levels: list[DeviceLevel],
    setting: Setting,
    *,
    scoring: Scoring = "full",
    score_end: bool = False,
    steering: Steering | None = None,
) -> Beams:
    """A whole answer of this engine: encode, search."""
    with torch.inference_mode():
        memory = writer.encode(setting.token_ids)
    options: dict[str, Any] = {"beams": setting.beams, "scoring": scoring, "score_end": score_end}
    return beam_search(writer, memory, levels, steering=steering, **options)


@torch.inference_mode()
def forward(writer: Writer, setting: Setting, *, scoring: Scoring = "voken") -> torch.Tensor:
    """The passes that no search can do without: encoder, keys and values, one decoder step a level, the logits.

    Tokens are arbitrary; beams are as many as a search has, 1 and then `setting.beams`.
    """
    return passes(writer, writer.encode(setting.token_ids), setting.beams, scoring=scoring)


def passes(writer: Writer, memory: Memory, beams: int, *, scoring: Scoring = "voken") -> torch.Tensor:
    """`forward` from what the decoder reads."""
    session = writer.begin(memory)
    states = session.open()
    queries, device = len(memory.mask), memory.states.device
    levels = writer.lm.space.levels
    for level in range(levels):
        scores = writer.head.log_probabilities(states, level, scoring)
        if level + 1 < levels:
            tokens = torch.arange(beams, device=device).expand(queries, -1) + writer.lm.first_voken
            parents = torch.arange(beams, device=device).expand(queries, -1) % states.shape[1]
            states = session.advance(tokens, parents)
    return scores


@torch.inference_mode()
def constraint(levels: list[DeviceLevel], log_probabilities: torch.Tensor, beams: int) -> torch.Tensor:
    """What the index and the choice of the best cost, without any model.

    Args:
        log_probabilities: (queries, beams, codebook_size), taken for every level.
    """
    scores = log_probabilities.new_zeros(len(log_probabilities), 1)
    nodes = torch.zeros_like(scores, dtype=torch.long)
    for level in levels:
        nodes, scores, *_ = best(children_of(nodes, scores, log_probabilities[:, : nodes.shape[1]], level), beams)
    return nodes


@torch.inference_mode()
def encode_only(writer: Writer, setting: Setting) -> Memory:
    """The text encoder alone."""
    return writer.encode(setting.token_ids)


def same_as_generate(
    writer: Writer, setting: Setting, trie: DictionaryTrie, codes: NDArray[np.int16], levels: list[DeviceLevel]
) -> str:
    """How many queries get the same codes in the same order from `generate`, and the largest difference of a score."""
    found = engine(writer, levels, setting, score_end=True)
    sequences = np.unique(codes, axis=0)
    expected = generate(writer.lm, trie, setting.token_ids, beams=setting.beams, score_end=True)
    same, worst = 0, 0.0
    for leaves, scores, oracle in zip(found.leaves.tolist(), found.scores.tolist(), expected, strict=True):
        same += [tuple(sequences[leaf].tolist()) for leaf in leaves] == oracle.codes
        worst = max(worst, *(abs(a - b) for a, b in zip(scores, oracle.scores, strict=True)))
    return f"{same} of {len(setting.token_ids)} queries, scores within {worst:.1e}"


def index_figures(pictures: int, folder: Path) -> dict[str, Any]:
    """One size of index, made, saved and loaded."""
    codes = synthetic_codes(pictures)
    began = time.perf_counter()
    order = sort_codes(codes)
    ordered = codes[order]
    sorted_at = time.perf_counter()
    index = build_sorted(ordered, order)
    built_at = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    save_index(folder, index)
    saved_at = time.perf_counter()
    load_index(folder, len(index.levels))
    loaded_at = time.perf_counter()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return {
        "pictures": pictures,
        "bytes a picture": round(index.constraint_bytes / pictures, 2),
        "map to pictures": round(index.map_bytes / pictures, 2),
        "sort s": round(sorted_at - began, 3),
        "build s": round(built_at - sorted_at, 3),
        "save s": round(saved_at - built_at, 3),
        "load ms": round(1e3 * (loaded_at - saved_at), 2),
    }
