"""What every pretrained Hugging Face model goes through here: loaded whole or not at all, and given new tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from tools.errors import BadInput
from tools.files import read_json

LOADING_ERRORS = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)
ADAPTER_NAME = "adapter_config.json"  # of a peft folder


def load_whole(loader: Any, name: str, **options: Any) -> Any:
    """A pretrained model, of which no weight may be missing: Hugging Face would fill it with random numbers."""
    model, info = loader.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise BadInput(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} among them: fetch it again")
    return model


def cannot_load(name: str, error: Exception) -> BadInput:
    return BadInput(f"--language-model {name} cannot be loaded: {str(error).splitlines()[0]}")


def merged(
    loader: Any, folder: Path, tokens: int, *, options: Callable[[str], dict[str, Any]] = lambda name: {}
) -> Any:
    """The model that a peft folder adapts, with the adapters merged into its weights.

    Args:
        options: of `loader.from_pretrained`, by the model's name.
    """
    from peft import PeftModel

    name = read_json(folder / ADAPTER_NAME)["base_model_name_or_path"]
    try:
        model = load_whole(loader, name, dtype="auto", **options(name))
    except LOADING_ERRORS as error:
        raise BadInput(
            f"{folder} adapts {name}, which cannot be loaded: {str(error).splitlines()[0]}; if it has moved, correct "
            f"base_model_name_or_path in {ADAPTER_NAME}"
        ) from None
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens, mean_resizing=False)  # the adapters hold the new rows
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def widened(codebooks: NDArray[np.float32], width: int, name: str) -> NDArray[np.float32]:
    """Codebooks (books, codebook_size, narrower) turned into a wider space; lengths and angles stay as they are.

    Raises:
        BadInput: the model `name` is narrower than the codebooks.
    """
    own = codebooks.shape[-1]
    if own == width:
        return codebooks
    if own > width:
        raise BadInput(
            f"the codebooks are {own} wide, {name} is {width}: "
            f"train the RQ-VAE with --width {width} (scripts/05_train_rqvae.sh)"
        )
    rows, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, own)))
    turned: NDArray[np.float32] = (codebooks @ rows.T).astype(np.float32)
    return turned


@torch.no_grad()
def set_rows(matrices: Sequence[Tensor], first: int, codebooks: NDArray[np.float32]) -> None:
    """Copy the codebooks (books, codebook_size, width) into consecutive rows."""
    rows = torch.from_numpy(np.ascontiguousarray(codebooks.reshape(-1, codebooks.shape[-1])))
    for matrix in matrices:
        matrix[first : first + len(rows)] = rows.to(matrix.dtype)
