"""Features of all records of a data set, made of the few that were encoded: what 05 to 07 need at their full size."""

from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools import runs
from tools.captions import query_owners, read_captions
from tools.features import IMAGES, TEXTS
from tools.files import new_array, read_array, replacing

NOISE = 0.5  # in standard deviations of the encoded features
BLOCK = 8192  # rows at a time
COMMAND = "RQ-VAE.prepare_emb"
Floats = NDArray[np.float32]


def write_features(folder: Path, *, encoded: Path, few: Path, captions: Path, seed: int) -> None:
    """Write a finished run folder as RQ-VAE.prepare_emb leaves it: each picture's features, and its captions', are an
    encoded picture's and its captions', with noise.

    Args:
        encoded: run folder of RQ-VAE.prepare_emb with the features of some pictures.
        few: run folder of tools.prepare_captions with these pictures.
        captions: the same with all pictures.
    """
    some, every = read_captions(few).records, read_captions(captions)
    facts = {
        **runs.read_manifest(encoded, COMMAND).facts,
        "captions": str(captions),
        "captions_fingerprint": every.manifest.fingerprint,
    }
    config = import_module(COMMAND).Config(captions=captions, model=facts["model"], output=folder, overwrite=True)
    run = runs.begin(COMMAND, config, inputs={"captions": captions})
    assert run is not None
    generator = np.random.default_rng(seed)
    like = generator.integers(len(some), size=len(every.records))  # which encoded picture each is like
    first = np.searchsorted(np.array(query_owners(some)), np.arange(len(some)))
    owners = np.array(query_owners(every.records), dtype=np.int64)
    _write(run.folder / IMAGES, np.asarray(read_array(encoded / IMAGES)), like, generator)
    _write(run.folder / TEXTS, np.asarray(read_array(encoded / TEXTS)), first[like[owners]], generator)
    run.finish(facts=facts)


def _write(path: Path, rows: Floats, chosen: NDArray[np.int64], generator: np.random.Generator) -> None:
    """Write chosen rows with noise, some at a time."""
    spread = NOISE * rows.std(axis=0)
    with replacing(path) as temporary:
        array = new_array(temporary, dtype=np.float32, shape=(len(chosen), rows.shape[1]))
        for start in range(0, len(chosen), BLOCK):
            block = rows[chosen[start : start + BLOCK]]
            noise = generator.standard_normal(block.shape, dtype=np.float32)
            array[start : start + BLOCK] = block + spread * noise
        array.flush()
