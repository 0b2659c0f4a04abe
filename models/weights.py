"""Files of tensors: read without running code that they hold, and refused in one line when they are damaged."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tools.errors import BadInput

READ_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError)
ANEW = "let the script that made it overwrite it"


def read_state(path: Path, *, prefix: str = "", advice: str = "download it again") -> dict[str, Any]:
    """Tensors whose names start with `prefix`, left on the disk until they are used where the format can do that.

    Args:
        advice: what to do about a damaged file.

    Raises:
        BadInput: the file is missing or damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: download it, or correct the path") from None
    except UnpicklingError:
        raise BadInput(f"{path} is damaged or holds more than tensors, and pickled code is not run: {advice}") from None
    except READ_ERRORS as error:
        raise BadInput(f"{path} is not a readable file of tensors ({first_line(error)}): {advice}") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path} holds one {type(state).__name__}, expected tensors by name: {advice}")
    return {str(key): value for key, value in state.items() if str(key).startswith(prefix)}


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file of tensors of our own into a module, all of them.

    Raises:
        BadInput: the file is missing or damaged, or its tensors are not the module's.
    """
    state, wanted = read_state(path, advice=ANEW), module.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise BadInput(f"{path} has no {name} of shape {tuple(tensor.shape)}: {ANEW}")
        if state[name].shape != tensor.shape:
            found = tuple(state[name].shape)
            raise BadInput(f"{path}: {name} has the shape {found}, expected {tuple(tensor.shape)}: {ANEW}")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise BadInput(f"{path} has {unknown[0]}, which its config.json knows nothing of: {ANEW}")
    module.load_state_dict(state)


def first_line(error: Exception) -> str:
    """What a library says of its failure, in one line."""
    if isinstance(error, UnpicklingError):  # torch would advise to load it all the same
        return "the weights are damaged or hold more than tensors, and pickled code is not run"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "custom code" in line:
        return "it comes with code of its own, which is not run: give a model that transformers knows by itself"
    return line
