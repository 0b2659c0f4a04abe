"""Where embeddings of a model trained from nothing start: with the words and image tokens that occur together.

The matrix of their pointwise mutual information is factorised, so that the product of a word's and a token's vector is
about log p(word, token) / (p(word) p(token)); word2vec does the same implicitly (Levy & Goldberg 2014).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

PRIOR = 5.0  # pictures that every word is taken to have been seen on, with the tokens of an average picture
LEAST, MOST = -3.0, 4.0  # what a pair's information counts at most; rare pairs would else rule the factors


class WordsAndTokens(NamedTuple):
    """Vectors whose products tell how much more often than by chance a word and a token meet on a picture."""

    words: NDArray[np.int64]
    """(words,) ids of the words that were seen, ascending"""
    word_vectors: Tensor
    """(words, rank)"""
    token_vectors: Tensor
    """(tokens, rank)"""


def factorise(words: Sequence[set[int]], tokens: NDArray[np.integer], *, size: int, rank: int) -> WordsAndTokens:
    """Vectors of the words that stand on the pictures, and of all tokens.

    Args:
        words: for each picture the ids of its captions' words.
        tokens: (pictures, length) image tokens.
        size: distinct tokens.
        rank: width of the vectors.
    """
    pictures = len(tokens)
    on = torch.zeros(pictures, size)
    on[torch.arange(pictures)[:, None], torch.from_numpy(np.asarray(tokens, dtype=np.int64))] = 1.0
    rows = np.repeat(np.arange(pictures), [len(own) for own in words])
    said = np.array([word for own in words for word in sorted(own)], dtype=np.int64)
    seen, columns = np.unique(said, return_inverse=True)
    meeting = torch.zeros(len(seen), size).index_add_(0, torch.from_numpy(columns), on[torch.from_numpy(rows)])
    share = on.mean(dim=0)
    spoken = torch.from_numpy(np.bincount(columns, minlength=len(seen))).float()[:, None]
    given_word = (meeting + PRIOR * share) / (spoken + PRIOR)
    information = torch.where(share > 0, (given_word / share).log().clamp(LEAST, MOST), 0.0)
    values, right = torch.linalg.eigh(information.double().T @ information.double())
    strengths = values[-rank:].clamp_min(1e-12).sqrt().flip(0)
    right = right[:, -rank:].flip(1)
    left = information.double() @ right / strengths
    padding = (0, rank - len(strengths))  # there are no more directions than tokens
    word_vectors, token_vectors = (functional.pad(part * strengths.sqrt(), padding).float() for part in (left, right))
    return WordsAndTokens(seen, word_vectors, token_vectors)
