"""The preflight of models: in a folder, in the cache of the Hugging Face Hub, or on the Hub, which is then asked."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..texts import did_you_mean
from ..training_memory import SHAPES, Shape, read_shape
from .needs import MISSING, OK, UNKNOWN, Finding, Need

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LARGE = 10**9  # parameters from which on the Hub's files are mostly in 16 bits

Locate = Callable[[str], Path | None]
"""Where a model's file of some name lies; None where it does not."""


def locate_in(name: str) -> Locate:
    """The files of a model: of a folder, or those of a repository that the cache holds."""
    if Path(name).is_dir():
        return lambda file: path if (path := Path(name) / file).is_file() else None
    if not is_repository(name):
        return lambda file: None

    def cached(file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file)
        return Path(found) if isinstance(found, str) else None

    return cached


def is_repository(name: str) -> bool:
    """Whether a model of the Hub can be called so; else it is the path of a folder."""
    return bool(REPOSITORY.fullmatch(name))


def has_weights(locate: Locate, names: tuple[str, ...] = WEIGHTS) -> bool:
    """Whether weights are whole: one file, or every part that an index names."""
    for name in names:
        if locate(name):
            return True
        if index := locate(f"{name}.index.json"):
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all(locate(part) for part in parts)
    return False


def check_model(need: Need) -> Iterator[Finding]:
    """name: a Hugging Face model's folder or name; untokenized: no tokenizer of its own is needed."""
    tokenizers = () if need.values.get("untokenized") else TOKENIZERS
    yield from _check(need, need.values["name"], lambda locate: _is_whole(locate, tokenizers))


def _is_whole(locate: Locate, tokenizers: tuple[str, ...]) -> bool:
    config = locate("config.json") or locate("adapter_config.json")
    return bool(config) and has_weights(locate) and (not tokenizers or any(map(locate, tokenizers)))


def check_tokenizer(need: Need) -> Iterator[Finding]:
    """name: the folder or name of a model that lends its tokenizer."""
    name = need.values["name"]
    yield from _check(need, name, lambda locate: any(map(locate, TOKENIZERS)), label="tokenizer of ")


def _check(need: Need, name: str, whole: Callable[[Locate], bool], *, label: str = "") -> Iterator[Finding]:
    what = f"{label}{name}"
    if whole(locate_in(name)):
        yield Finding(need.stage, what, OK, "")
    elif Path(name).is_dir():  # or they have names of their own
        state = UNKNOWN if any(Path(name).iterdir()) else MISSING
        yield Finding(need.stage, f"{what}: not the files of a whole model", state, "copy or download it again")
    elif not is_repository(name):
        yield Finding(need.stage, what, MISSING, "there is no such folder")
    else:
        yield on_the_hub(need.stage, what, name)


def on_the_hub(stage: str, what: str, name: str) -> Finding:
    """Whether a repository that the cache does not hold can be fetched.

    Args:
        what: as the list calls it.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    fetch = f"hf download {name}"
    if constants.HF_HUB_OFFLINE:
        return Finding(stage, f"{what}: not in the cache", MISSING, f"HF_HUB_OFFLINE=0 {fetch}")
    try:
        error = ask(name)
    except GatedRepoError:
        login = "" if get_token() else "hf auth login, and "
        return Finding(stage, f"{what}: access is granted by its owners", MISSING, f"{login}ask for it on its page")
    except RepositoryNotFoundError:
        login = "" if get_token() else "; hf auth login if it is private"
        return Finding(stage, f"{what}: neither a folder nor on the Hub", MISSING, f"correct the name{login}")
    if error:
        return Finding(stage, f"{what}: not in the cache, and the Hub does not answer", UNKNOWN, fetch)
    return Finding(stage, f"{what} (will be fetched)", OK, "")


@functools.cache
def ask(name: str) -> str:
    """Ask the Hub whether a repository can be read; what went wrong where there is no answer, else nothing.

    Raises:
        GatedRepoError, RepositoryNotFoundError: it cannot.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().auth_check(name)
    except (GatedRepoError, RepositoryNotFoundError):
        raise
    except Exception as error:  # of the network, of many kinds
        return str(error) or type(error).__name__
    return ""


def check_clip(need: Need) -> Iterator[Finding]:
    """name: an open_clip model's folder, name, or "hf-hub:..."; tag: of its weights, or their file."""
    name, tag = need.values["name"], need.values.get("tag", "")
    if Path(name).is_dir() or name.startswith("hf-hub:"):
        name = name.removeprefix("hf-hub:")
        yield from _check(need, name, lambda locate: bool(locate(CLIP_CONFIG)) and any(map(locate, CLIP_WEIGHTS)))
    elif Path(tag).is_file():
        yield Finding(need.stage, tag, OK, "")
    elif "/" in name:  # no name of open_clip's has one
        yield Finding(need.stage, name, MISSING, "there is no such folder")
    else:
        yield _clip_tag(need.stage, name, tag)


def _clip_tag(stage: str, name: str, tag: str) -> Finding:
    import open_clip  # slow: not above

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        near = did_you_mean(name, open_clip.list_models())
        return Finding(stage, f"open_clip has no {name}", MISSING, f"correct the name{near}")
    if not open_clip.get_pretrained_cfg(name, tag):
        advice = f"a file, or one of {', '.join(tags)}{did_you_mean(tag, tags)}"
        return Finding(stage, f"open_clip has no {tag or 'untagged'} weights of {name}", MISSING, advice)
    config = open_clip.get_pretrained_cfg(name, tag)
    repository, _, file = str(config.get("hf_hub", "")).rpartition("/")
    what = f"{name} ({tag})"
    if not repository:
        there = (Path.home() / ".cache" / "clip" / Path(str(config.get("url", "/"))).name).is_file()
        return Finding(stage, what, OK if there else UNKNOWN, "open_clip fetches it with the first use")
    if any(map(locate_in(repository), (*CLIP_WEIGHTS, *filter(None, [file])))):
        return Finding(stage, what, OK, "")
    return on_the_hub(stage, f"{what} of {repository}", repository)


def shape_of(name: str) -> Shape | None:
    """The sizes of a model: by its configuration, where that is on disk, or by its name."""
    config = locate_in(name)("config.json")
    return (read_shape(config) if config else None) or SHAPES.get(name)


def size_of(name: str) -> tuple[Path, int] | None:
    """Where a model will be fetched to, and about how many bytes; None where it is there, or where nobody knows."""
    shape = shape_of(name)
    if shape is None or Path(name).is_dir() or has_weights(locate_in(name)):
        return None
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE), shape.parameters * (2 if shape.parameters > LARGE else 4)
