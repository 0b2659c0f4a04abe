"""Options that the gallery's commands have in common."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Which gallery."""

    index: Path
    """Run folder of retriever.gallery.build: the pictures that can be found."""


@dataclass(frozen=True, kw_only=True)
class RetrieverOptions(IndexOptions):
    """Which gallery, and what searches it."""

    retriever: Path
    """Run folder of retriever.train or retriever.train_stage2."""
    weights: Path | None = None
    """Run folder of reranker.test, which chose the features' share on val; passed over while none is finished."""
