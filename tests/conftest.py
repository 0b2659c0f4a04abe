"""Tests run on one thread each: small models gain nothing from more, and a busy machine slows threads down.

The tiny chain and what is made from it run once; what a test changes, it changes in a copy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.chain import Chain

torch.set_num_threads(1)

LONGEST = (  # two that share work among processes do not come one after the other
    "sharding", "package", "serve_operations", "training", "rehearsal", "processes", "advice", "faults",
    "benchmarks_gpu", "reranker", "graphs", "repeat", "gallery", "pipeline", "segments", "docs_python", "sync",
    "pseudo_queries", "benchmarks", "place",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that at the end no worker waits long for another."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """The libraries stay until the end: each garbage collection would go through their million objects in vain."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_vocabulary() -> Iterator[None]:
    """Tests load hundreds of small models, all with CLIP's vocabulary: it is parsed once."""
    from open_clip import factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "SimpleTokenizer", lru_cache(factory.SimpleTokenizer))
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Folders of a finished chain up to the retriever's dataset."""
    from tests.chain import run_chain  # not loaded for the tests that need no models

    return run_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def retriever(chain: Chain) -> Path:
    """A trained encoder-decoder."""
    from retriever import train
    from tests.chain import encoder_decoder_config

    config = encoder_decoder_config(chain, chain.root / "retriever")
    train.main(config)
    return config.output


@pytest.fixture(scope="session")
def index(chain: Chain) -> Path:
    """The index of the chain's 48 pictures."""
    from retriever.gallery import build as build_index

    config = build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=chain.root / "index")
    build_index.main(config)
    return config.output


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the front of PATH, whose `python` starts at once."""
    from tests.warm import python_of_scripts

    with python_of_scripts(tmp_path_factory.mktemp("python")) as folder:
        yield folder
