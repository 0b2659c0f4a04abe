"""Features of queries, to compare them with a gallery's: by the text tower of the model that made those."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.arithmetic import Arithmetic
from models.compute import pick_dtype
from tools.errors import BadInput
from tools.features import Floats, Rows, normalized

from .advice import rebuild
from .gallery import Gallery

if TYPE_CHECKING:
    from models.clip import TextEncoder  # elsewhere where queries are encoded: a search by codes needs no open_clip


def load_encoder(gallery: Gallery, precision: Arithmetic, device: torch.device) -> "TextEncoder":
    """The encoder that is good for every version of a gallery whose features the same model made.

    Raises:
        BadInput: the model has changed since, or cannot be loaded.
    """
    advice = f"search with --no-guided --no-rerank, or {rebuild(gallery)}"
    gallery.check_clip(advice)
    dtype = pick_dtype("auto" if precision == "int8" else precision, device)
    try:
        from models.clip import TextEncoder

        return TextEncoder.recorded(gallery.clip_facts, device, dtype)
    except (BadInput, ImportError) as error:
        raise BadInput(f"the model of the features of {gallery.folder} cannot be loaded ({error}): {advice}") from None


def query_features(encoder: "TextEncoder", queries: Sequence[str]) -> Floats:
    """Features (queries, width) of one batch, normalised."""
    return normalized(encoder.encode_batch(encoder.tokens(queries)).cpu().numpy())


def cosines(text: Floats, gallery: Gallery, rows: Rows) -> Floats:
    """Cosines (rows,) between a query's feature (width,) and pictures of a gallery that keeps features."""
    result: Floats = gallery.read_features(rows).astype(np.float32) @ text
    return result
