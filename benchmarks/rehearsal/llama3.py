"""Whether LLaMA-3 takes vokens: it is loaded with adapters as scripts/11 does, reads a caption and is searched.

Its training in scripts/11 keeps embeddings and head in fp32 with their optimiser's states, about 18 GiB at a vocabulary
of 128,256, which is more than a rehearsal may take.
Command: python -m benchmarks.rehearsal.llama3 MODEL DATASET
"""

import sys
from pathlib import Path

import numpy as np
import torch

from models.decoding import make_writer
from models.voken_lm import Lora, build_causal
from retriever.data import read_data
from retriever.queries import LiveQueries
from retriever.retrieve import search_queries

QUERIES = 8


def main(name: str, dataset: Path) -> None:
    data = read_data(dataset)
    adapters = Lora(8, 16.0, 0.1, ())
    lm = build_causal(
        name, space=data.space, codebooks=np.array(data.codebooks), max_source=128, dtype=torch.bfloat16, lora=adapters
    ).eval()
    queries = data.queries("test")
    texts = LiveQueries(lm, queries.texts[:QUERIES])
    codes = torch.from_numpy(data.codes[queries.pictures[:QUERIES]])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = lm(texts.batch(np.arange(len(texts.lengths))), codes)
    assert torch.isfinite(logits).all()
    assert logits.shape[:2] == (len(codes), data.space.levels + 1)
    found = search_queries(
        make_writer(lm, "bf16"), texts, data.codes, data.rows("all"), beams=10, keep=10, batch_size=64, quiet=True
    )
    assert all(len(one.rows) >= min(10, len(data.images)) for one in found)
    print(f"{name}: {logits.shape[2]:,} logits; each of {len(found)} captions found {len(found[0].rows)} pictures")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
