"""The text tower of the model that made a gallery's features: it turns queries into features to compare them with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.arithmetic import Arithmetic
from models.compute import pick_dtype
from tools.errors import BadInput
from tools.features import Floats, normalized

from .gallery import Gallery, model_content

if TYPE_CHECKING:
    from models.clip import Clip  # elsewhere where queries are encoded: a search by codes alone needs no open_clip


class QueryEncoder:
    """Loaded once; good for every version of a gallery whose features the same model made."""

    def __init__(self, gallery: Gallery, precision: Arithmetic, device: torch.device) -> None:
        self.made_by: dict[str, Any] = gallery.facts["clip"]
        self.device = device
        self.clip = self._load(gallery)
        del self.clip.model.visual  # the greater half of the model, and no picture is encoded here
        dtype = pick_dtype("auto" if precision == "int8" else precision, device)
        self.clip.model.text.to(device=device, dtype=dtype)

    def _load(self, gallery: Gallery) -> "Clip":
        name, pretrained = gallery.clip
        advice = "search with --no-rerank, or run scripts/14_build_index.sh --overwrite and add again what was added"
        if model_content(name, pretrained) != self.made_by["content"]:
            raise BadInput(f"{name} is not the model that made the features of {gallery.folder} any more: {advice}")
        try:
            from models.clip import load_recorded

            return load_recorded(gallery.clip_facts)
        except (BadInput, ImportError) as error:
            raise BadInput(
                f"the model of the features of {gallery.folder} cannot be loaded ({error}): {advice}"
            ) from None

    @torch.inference_mode()
    def encode(self, queries: Sequence[str]) -> Floats:
        """Features (queries, width) of texts, normalised."""
        from models.clip import encode_tokens, trim_padding

        tokens = trim_padding(self.clip, self.clip.tokenizer(list(queries))).to(self.device)
        return normalized(encode_tokens(self.clip, tokens).cpu().numpy())


def cosines(text: Floats, gallery: Gallery, rows: Sequence[int] | slice) -> Floats:
    """Cosines (rows,) between a query's feature (width,) and pictures of a gallery that keeps features."""
    assert gallery.features is not None, "only features that are kept can be compared"
    result: Floats = gallery.features[rows].astype(np.float32) @ text
    return result
