"""How every pretrained Hugging Face model is read: it is loaded whole or not at all, and is given new tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import transformers  # whose classes are slow to load: where they are used
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from tools.errors import BadInput
from tools.files import read_json
from tools.texts import did_you_mean

from .weights import ANEW, first_line

LOADING_ERRORS = (OSError, ValueError, TypeError, RuntimeError, SafetensorError, UnpicklingError)
UNUSED = ".pooler."  # of BERTs
ADAPTER_NAME = "adapter_config.json"  # of a peft folder


def load_whole(loader: Any, name: str, **options: Any) -> Any:
    """A pretrained model, of which no weight may be missing: Hugging Face would fill it with random numbers."""
    model, info = loader.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    if missing := sorted(info["missing_keys"]):
        raise BadInput(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} among them: fetch it again")
    return model


def cannot_load(name: str, error: Exception) -> BadInput:
    return BadInput(f"`language_model` {name} cannot be loaded: {first_line(error)}")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside it a model is read that this project has saved.

    Raises:
        BadInput: a file of it is missing or damaged.
    """
    try:
        yield
    except LOADING_ERRORS as error:
        raise BadInput(f"{folder} cannot be read ({first_line(error)}): {ANEW}") from None


def load_saved(loader: Any, folder: Path, **options: Any) -> Any:
    """A model that this project has saved, of which no weight may be missing that is used."""
    model, info = loader.from_pretrained(folder, output_loading_info=True, trust_remote_code=False, **options)
    if missing := sorted(key for key in info["missing_keys"] if UNUSED not in f".{key}"):
        raise BadInput(f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} among them: {ANEW}")
    return model


def load_config(name: str | Path, **options: Any) -> Any:
    """The configuration of a pretrained model; one that comes with code of its own is refused."""
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a pretrained model; one that comes with code of its own is refused."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError:
        folder = downloaded(name)
        if folder is None:
            raise
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def downloaded(name: str | Path) -> Path | None:
    """Folder of a model that was downloaded from the hub; None where it was not.

    Without a network, transformers asks the hub's cache for each file, and takes one that the model has not for one
    that could not be fetched. SEED's tokenizer has no config.json: in a folder, that is known.
    """
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError):
        return None


def merged(
    loader: Any,
    folder: Path,
    tokens: int,
    *,
    options: Callable[[str], dict[str, Any]] = lambda name: {},
    dtype: torch.dtype | None = None,
    whole: torch.dtype | None = None,
    load: Callable[..., Any] | None = None,
) -> Any:
    """The model that a peft folder adapts, with the adapters merged into its weights.

    The adapters are float32, so each sum is computed in float32 and rounded once, to the type of the weights. In bf16
    that changes the outputs of a small LLaMA by 0.03 % at most, with updates of any size; its forward pass in bf16
    rounds them by 0.5 %, merged or not.

    Args:
        options: of `loader.from_pretrained`, by the model's name.
        dtype: of the weights; by default the one that the model was published in, which may be float32.
        whole: of the modules that were trained whole beside the adapters, in float32; by default as the weights.
        load: reads the model that is adapted, as `load_whole` does, where the adapters learned around rounded weights.
    """
    from peft import PeftModel

    config = read_json(folder / ADAPTER_NAME)
    name = config["base_model_name_or_path"]
    try:
        model = (load or load_whole)(loader, name, dtype=dtype or "auto", **options(name))
    except LOADING_ERRORS as error:
        raise BadInput(
            f"{folder} adapts {name}, which cannot be loaded: {first_line(error)}; if it has moved, correct "
            f"base_model_name_or_path in {ADAPTER_NAME}"
        ) from None
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens, mean_resizing=False)  # the adapters hold the new rows
    for path, module in model.named_modules():
        if whole is not None and any(fits(saved, [path]) for saved in config.get("modules_to_save") or ()):
            module.to(whole)  # or peft would round what it reads to the type that is there
    with reading(folder):
        return PeftModel.from_pretrained(model, folder).merge_and_unload()


def module_names(model: nn.Module) -> set[str]:
    """Paths of all modules of a model."""
    return {path for path, _ in model.named_modules()}


def fits(name: str, paths: Iterable[str]) -> bool:
    """Whether a module's name, or the end of its path, is among paths of modules; peft reads names so."""
    return any(path == name or path.endswith(f".{name}") for path in paths)


def check_names(
    name: str, model: nn.Module, wanted: Sequence[str], *, argument: str, published: Sequence[str] = ()
) -> None:
    """Whether a model has modules of the names that are wanted, where peft would pass over those it has not.

    Args:
        name: of the model.
        published: names that need not be there, as long as one of the wanted is.

    Raises:
        BadInput: it lacks one; the message has the names of its own.
    """
    paths = module_names(model)
    unknown = [each for each in wanted if not fits(each, paths)]
    misspelt = [each for each in unknown if each not in published]
    if not misspelt and (not wanted or len(unknown) < len(wanted)):
        return
    weights = (each.split(".")[:-1] for each, _ in model.named_parameters())
    own = sorted({path[-1] for path in weights if path and not path[-1].isdigit()})
    wrong = (misspelt or unknown)[0]
    near = did_you_mean(wrong, own)
    raise BadInput(f"`{argument}` {wrong}: {name} has no module of that name, it has {', '.join(own)}{near}")


def widened(codebooks: NDArray[np.float32], width: int, name: str) -> NDArray[np.float32]:
    """Codebooks (books, codebook_size, narrower) turned into a wider space; lengths and angles stay as they are.

    Raises:
        BadInput: the model `name` is narrower than the codebooks.
    """
    own = codebooks.shape[-1]
    if own == width:
        return codebooks
    if own > width:
        raise BadInput(f"the codebooks are {own} wide, {name} is {width}: train the RQ-VAE with a width of {width}")
    rows, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, own)))
    turned: NDArray[np.float32] = (codebooks @ rows.T).astype(np.float32)
    return turned


@torch.no_grad()
def set_rows(matrices: Sequence[Tensor], first: int, codebooks: NDArray[np.float32]) -> None:
    """Copy the codebooks (books, codebook_size, width) into consecutive rows."""
    rows = torch.from_numpy(np.ascontiguousarray(codebooks.reshape(-1, codebooks.shape[-1])))
    for matrix in matrices:
        matrix[first : first + len(rows)] = rows.to(matrix.dtype)
