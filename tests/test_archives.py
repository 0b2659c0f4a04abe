"""TorchScript archives: their weights are read, and nothing of them is run."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.archives import is_scripted, read_archive
from tools.errors import BadInput


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.attn_mask = torch.zeros(2, 2)  # as OpenAI's blocks have it: no buffer

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows) + self.attn_mask[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), nn.ReLU(), nn.BatchNorm1d(2))
        self.scale = nn.Parameter(torch.ones(()).half())
        self.shared = nn.Parameter(torch.arange(6.0).view(2, 3).t())  # strides of its own
        self.register_buffer("size", torch.tensor(336))
        self.heads = [1, 2, 3]

    def forward(self, rows: Tensor) -> Tensor:
        return self.blocks(rows) * self.scale


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    torch.jit.script(Model()).save(str(path))
    return path


def test_an_archives_weights_are_its_state(archive: Path) -> None:
    wanted, found = torch.jit.load(archive).state_dict(), read_archive(archive)
    assert is_scripted(archive)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


def test_a_storage_that_was_cut_short_is_damage(archive: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter.pt"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(shorter, "w") as cut:
        for name in whole.namelist():
            held = whole.read(name)
            cut.writestr(name, held[:-1] if "/data/" in name else held)
    with pytest.raises(BadInput, match="no archive that can be read"):
        read_archive(shorter)


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("no zip")
    assert not any(is_scripted(tmp_path / name) for name in ("state.pt", "text.pt", "absent.pt"))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (pickle.dumps(Evil(), protocol=2), "it asks for __builtin__.print"),
        (b"\x80\x02}.", "holds no module"),
        (b"", ""),
    ],
)
def test_code_in_a_record_is_refused(
    record: bytes, message: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            new.writestr(name, record if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(BadInput, match=f"{broken}.*{message}.*download it again"):
        read_archive(broken)
    assert capsys.readouterr().out == ""
