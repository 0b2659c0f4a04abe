"""Search by a picture: one of the index, or any other, which is encoded and coded as the index's own were."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.arithmetic import Arithmetic
from tools.errors import BadInput
from tools.features import Floats, normalized
from tools.pictures import MOST_OBLONG, as_seen, find_unreadable, open_picture
from tools.texts import printable

from .advice import rebuild
from .answers import Ranked, need_features
from .compact import BLOCK
from .gallery import Gallery
from .query_encoder import cosines

Likeness = Literal["features", "vokens"]


def read_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A picture that is searched by, as a person sees it.

    Raises:
        BadInput: it cannot be read.
    """
    if isinstance(picture, Image.Image):
        return _as_seen(picture)
    path = Path(picture)
    if path.is_dir():
        raise BadInput(f"{printable(str(path))} is a folder: name one picture to search by")
    if reason := find_unreadable([str(path)], workers=0)[str(path)]:
        raise BadInput(f"{printable(str(path))}: {reason}: name a picture to search by")
    return open_picture(path)


def _as_seen(picture: Image.Image) -> Image.Image:
    if not min(picture.size) or max(picture.size) > MOST_OBLONG * min(picture.size):
        raise BadInput(
            f"the picture to search by has {picture.width} × {picture.height} pixels: each side must have at least 1, "
            f"and at most {MOST_OBLONG} times those of the other"
        )
    try:
        return as_seen(picture)
    except Exception as error:  # Pillow decodes only now, and raises many kinds for damaged files
        raise BadInput(f"the picture to search by cannot be read ({type(error).__name__}): give another one") from None


class PictureEncoder:
    """The image tower that made a gallery's features."""

    def __init__(self, gallery: Gallery, precision: Arithmetic, device: torch.device) -> None:
        """
        Raises:
            BadInput: the model has changed since, or cannot be loaded.
        """
        advice = f"search with words, or {rebuild(gallery)}"
        gallery.check_clip(advice)
        self.made_for = gallery.facts["clip"]
        try:
            from models.clip import feature_dtype, load_recorded  # a search by words alone needs no image tower

            self.clip = load_recorded(gallery.clip_facts)
        except (BadInput, ImportError) as error:
            raise BadInput(
                f"the model of the features of {gallery.folder} cannot be loaded ({error}): {advice}"
            ) from None
        del self.clip.model.text
        dtype = feature_dtype("auto" if precision == "int8" else precision, device)
        self.clip.model.to(device=device, dtype=dtype, memory_format=torch.channels_last)

    def feature(self, picture: Image.Image) -> Floats:
        """The picture's feature (width,), not normalised."""
        from models.clip import encode_images

        with torch.inference_mode():
            found: Floats = encode_images(self.clip, self.clip.preprocess(picture).unsqueeze(0))[0].cpu().numpy()
        return found


def codes_of(gallery: Gallery, feature: Floats, device: torch.device) -> NDArray[np.integer]:
    """Codes (levels,) of a picture's feature (width,), not normalised, whatever pictures have them already.

    Raises:
        BadInput: the tokenizer has changed since the gallery was built.
    """
    from models.rqvae import RqVae, tokenize

    tokenizer = RqVae.from_pretrained(gallery.check_rqvae(f"search with words, or {rebuild(gallery)}")).to(device)
    return tokenize(tokenizer, feature[None], groups=None).codes[0]


def by_feature(gallery: Gallery, feature: Floats) -> Ranked:
    """All pictures by the cosine of their features with one (width,); equal ones by their row."""
    nearness = all_cosines(gallery, normalized(feature[None])[0])
    order = np.argsort(-nearness, kind="stable")
    return Ranked(gallery.rows[order], nearness[order], nearness[order])


def by_codes(gallery: Gallery, codes: NDArray[np.integer], feature: Floats | None) -> Ranked:
    """All pictures by the number of leading vokens that they share with codes (levels,), equal ones by the cosine with
    a feature (width,), where there is one."""
    scores = np.cumprod(gallery.read_codes() == codes, axis=1).sum(axis=1)
    nearness = None if feature is None else all_cosines(gallery, normalized(feature[None])[0])
    order = np.lexsort((np.zeros(len(scores)) if nearness is None else -nearness, -scores))
    return Ranked(gallery.rows[order], scores[order].astype(np.float32), None if nearness is None else nearness[order])


def all_cosines(gallery: Gallery, feature: Floats) -> Floats:
    """Cosines (pictures,) of all pictures' features, in the order of rows, with a normalised one (width,)."""
    need_features(gallery)
    scores = np.empty(len(gallery), dtype=np.float32)
    for start in range(0, len(scores), BLOCK):
        block = slice(start, start + BLOCK)
        scores[block] = cosines(feature, gallery, gallery.rows[block])
    return scores
