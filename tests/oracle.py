"""The search as it was published, kept as the oracle: Hugging Face `generate` and a dictionary trie; and scoring every
picture of the pool with a full forward pass each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from models.decoding import Scoring
from models.voken_lm import VokenLM

Codes = NDArray[np.int64]


class Generated(NamedTuple):
    """Codes of one query, best first, and their scores; `generate` fills up with repetitions scored about -1e9."""

    codes: list[tuple[int, ...]]
    scores: list[float]


class DictionaryTrie:
    """Nested dictionaries over token ids, walked from the root for every beam at every step."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.root: dict[int, Any] = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def after(self, prefix: Sequence[int]) -> list[int]:
        node = self.root
        for token in prefix:
            node = node.get(token, {})
        return list(node)


class VokensOnly(LogitsProcessor):
    """Renormalises over the vokens of the level that is written."""

    def __init__(self, lm: VokenLM, prompt: int) -> None:
        self.lm, self.prompt = lm, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = input_ids.shape[1] - self.prompt
        start = int(self.lm.level_offsets[level])
        rows = slice(start, start + self.lm.space.codebook_size)
        result = torch.full_like(scores, -torch.inf)
        result[:, rows] = scores[:, rows].log_softmax(dim=-1)
        return result


def dictionary_trie(lm: VokenLM, codes: Codes, *, score_end: bool) -> DictionaryTrie:
    """The trie over token ids of all pictures, with the end token where it is scored."""
    ending = [lm.end] if score_end else []
    return DictionaryTrie([[*sequence, *ending] for sequence in lm.token_ids(torch.tensor(codes)).tolist()])


def generate(
    lm: VokenLM,
    trie: DictionaryTrie,
    token_ids: Sequence[Sequence[int]],
    *,
    beams: int,
    score_end: bool,
    scoring: Scoring = "full",
    use_cache: bool = True,
    pad_to: int | None = None,
) -> list[Generated]:
    """Constrained beam search with `generate`.

    Args:
        token_ids: queries as `lm.tokenize` gives them.
        pad_to: length of every query; by default that of the longest. Sequence-to-sequence models pad right, causal
            ones left.
    """
    causal = lm.kind == "causal"
    length = max(pad_to or 0, max(map(len, token_ids)))
    source = torch.full((len(token_ids), length), lm.padding)
    mask = torch.zeros_like(source)
    for row, ids in enumerate(token_ids):
        place = slice(length - len(ids), None) if causal else slice(0, len(ids))
        source[row, place], mask[row, place] = torch.tensor(ids), 1
    source, mask = source.to(lm.device), mask.to(lm.device)
    prompt = length if causal else 1
    options: dict[str, Any] = {} if causal else {"decoder_start_token_id": lm.start}

    def allowed(_: int, prefix: Tensor) -> list[int]:
        return trie.after(prefix[prompt:].tolist()) or [lm.end]

    if scoring == "full":
        options["prefix_allowed_tokens_fn"] = allowed
    else:  # the softmax first, then the constraint
        constraint = PrefixConstrainedLogitsProcessor(allowed, beams)
        options["logits_processor"] = LogitsProcessorList([VokensOnly(lm, prompt), constraint])
    end = lm.end if score_end else None
    output: Any = lm.model.generate(
        input_ids=source,
        attention_mask=mask,
        eos_token_id=end,
        pad_token_id=lm.padding,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        early_stopping=True,
        length_penalty=0.0,
        use_cache=use_cache,
        max_new_tokens=lm.space.levels + score_end,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    sequences = output.sequences[:, prompt : prompt + lm.space.levels].cpu() - lm.level_offsets
    scores = [0.0] * len(token_ids) if beams == 1 else output.sequences_scores.tolist()  # greedy search keeps no scores
    return [
        Generated([tuple(row) for row in sequences[start : start + beams].tolist()], scores[start : start + beams])
        for start in range(0, len(sequences), beams)
    ]


def exhaustive(
    lm: VokenLM, codes: Codes, token_ids: Sequence[Sequence[int]], *, scoring: Scoring, score_end: bool
) -> Tensor:
    """Score of every picture for every query, (queries, pictures), by forward passes without any cache."""
    rows = []
    starts = lm.level_offsets.tolist()
    written = torch.from_numpy(codes)
    with torch.inference_mode():
        for ids in token_ids:
            logits = lm(lm.encode([ids] * len(codes)), written)
            total = torch.zeros(len(codes))
            for level, start in enumerate(starts):
                own = slice(start, start + lm.space.codebook_size)
                if scoring == "voken":
                    log_probabilities = logits[:, level, own].log_softmax(dim=-1)
                else:
                    log_probabilities = logits[:, level].log_softmax(dim=-1)[:, own]
                total += log_probabilities.gather(1, written[:, level : level + 1]).squeeze(1)
            rows.append(total + logits[:, -1].log_softmax(dim=-1)[:, lm.end] if score_end else total)
    return torch.stack(rows)
