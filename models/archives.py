"""Weights of a TorchScript archive, such as OpenAI's CLIP comes in, without running the program that it is.

An archive is a zip file: `data.pkl` names modules and tensors, each file of `data/` holds a storage, and `code/` is the
program. Of the pickle only what tensors and their names need is understood, as with `torch.load(weights_only=True)`.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from tools.errors import BadInput

RECORD = "data.pkl"
DAMAGE = (
    *(BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, EOFError),
    *(RuntimeError, RecursionError),  # a tensor that reaches beyond its storage, a module within itself
)
DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
}  # fmt: skip
NOT_STATE = ("attn_mask",)  # a tensor that OpenAI's modules keep beside their parameters and buffers


def is_scripted(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not path.is_file() or not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """All tensors of an archive's modules, by the names that a state has.

    Raises:
        BadInput: the file is damaged, or its record holds more than modules, tensors and plain values.
    """
    try:
        with ZipFile(path) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith(f"/{RECORD}"))
            root = _Record(archive, record).load()
        found = dict(_tensors(root)) if isinstance(root, _Module) else None
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise BadInput(
            f"{path} is no archive that can be read without running it ({reason}): download it again"
        ) from None
    if found is None:
        raise BadInput(f"{path} holds no module: download it again")
    return found


class _Module:
    """A module of an archive: its attributes, and nothing that it could do."""


class _Record(pickle.Unpickler):
    """The record of an archive; every class but those of `find_class` is refused."""

    def __init__(self, archive: ZipFile, record: str) -> None:
        super().__init__(io.BytesIO(archive.read(record)))
        self.archive, self.folder = archive, record.removesuffix(RECORD)

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, _, count = identity
        if kind != "storage":
            raise pickle.UnpicklingError(f"it asks for a {kind}")
        held = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(held, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _tensors(module: _Module, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            found += _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and name not in NOT_STATE:
            found.append((prefix + name, value))
    return found
