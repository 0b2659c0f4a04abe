"""Pseudo queries: captions that were generated for pictures of the pool, to train on.

pseudo.jsonl  {"image", "query", "source", "similarity"} a line a pseudo query, from retriever.generate_pseudo_query
"""

from pathlib import Path

import numpy as np

from tools.errors import BadInput
from tools.files import read_json_lines
from tools.runs import read_manifest

from .data import Pairs, RetrieverData

FILE_NAME = "pseudo.jsonl"


def read_pseudo_queries(folder: Path, data: RetrieverData) -> Pairs:
    """Read a finished folder of pseudo queries.

    Raises:
        BadInput: it is not finished, is empty, was made from other captions (whose splits may be others: a caption of a
            train picture of theirs may be one of test here), or names a picture that the dataset does not have.
    """
    manifest = read_manifest(folder, "retriever.generate_pseudo_query")
    if manifest.facts["captions_fingerprint"] != data.manifest.facts.get("captions_fingerprint"):
        raise BadInput(
            f"{folder} was made from other captions than {data.folder}: run scripts/08_generate_pseudo_query.sh "
            "--overwrite"
        )
    row_of = {image: row for row, image in enumerate(data.images)}
    texts, pictures = [], []
    for number, line in read_json_lines(folder / FILE_NAME):
        if line["image"] not in row_of:
            raise BadInput(
                f"{folder / FILE_NAME}, line {number}: {data.folder} has no picture {line['image']}: make the pseudo "
                "queries for this dataset (scripts/08_generate_pseudo_query.sh)"
            )
        texts.append(line["query"])
        pictures.append(row_of[line["image"]])
    if not texts:
        raise BadInput(f"{folder} holds no pseudo queries: generate some, or train without --pseudo-queries")
    return Pairs(texts, np.array(pictures, dtype=np.int64))
