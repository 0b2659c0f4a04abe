"""The device that a command takes, what it says of it, and the machines on which it must not go on in silence."""

from pathlib import Path

import pytest
import torch

from models import compute
from models.compute import pick_device, pick_dtype, refuse_unknown_card
from tests.warm import run_python
from tools import environment, logs, processes
from tools.errors import BadInput


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sees no GPU, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program of that name, and no other, on PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("driver", "cuda", "parts"),
    [
        ("550.54.15", "13.2", ("is built for CUDA 13.2", "TORCH_BACKEND=auto", "driver 580 or newer")),
        ("470.10", "12.6", ("is built for CUDA 12.6", "driver 525 or newer")),
        ("580.82.07", None, ("is built without CUDA", "set TORCH_BACKEND=auto and start the script again;")),
        ("580.82.07", "13.2", ("the driver is new enough: check CUDA_VISIBLE_DEVICES",)),
        ("580.82.07", "14.0", ("is built for CUDA 14.0", "set TORCH_BACKEND=auto and start the script again;")),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    driver: str, cuda: str | None, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"echo '{driver}, Tesla V100-SXM2-32GB'\necho '{driver}, another'")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(BadInput) as refused:
        pick_device()
    line = str(refused.value)
    assert line.startswith(f"nvidia-smi sees Tesla V100-SXM2-32GB with driver {driver}, but torch {torch.__version__} ")
    assert all(part in line for part in parts)
    assert "\n" not in line
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert pick_device() == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("body", ["exit 9", "echo 'No devices were found'", "echo"])
def test_a_machine_without_a_gpu_takes_the_cpu(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pick_device() == torch.device("cpu")
    nvidia_smi(tmp_path, monkeypatch, body)
    assert pick_device() == torch.device("cpu")


def test_a_command_ends_with_one_line_and_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo '470.10, Tesla V100'")
    program = """
from dataclasses import dataclass
from models.compute import pick_device, pick_dtype
from tools.command_line.commands import run_command
import torch
torch.cuda.is_available = lambda: False

@dataclass(frozen=True)
class Config:
    device: str | None = None

def main(config: Config) -> None:
    for _ in range(2):
        pick_dtype("fp32", pick_device(config.device))

run_command(main, Config)
"""

    def run(*arguments: str) -> tuple[int, str]:
        done = run_python("-c", program, *arguments)
        return done.returncode, done.stderr

    status, line = run()
    assert (status, line.count("\n")) == (2, 1)
    assert line.startswith("error: nvidia-smi sees Tesla V100 with driver 470.10, but torch ")
    status, line = run("--device", "cpu")
    assert (status, line.count("\n")) == (0, 1)
    assert line.startswith("device: cpu (")
    assert line.endswith(" threads), precision: float32\n")


def test_a_card_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    for capability in ((7, 5), (8, 9), (9, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        refuse_unknown_card(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(BadInput, match=r"Tesla V100 has compute capability 7\.0, .*sm_75, .*such as cu126 for Volta"):
        refuse_unknown_card(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)  # a build that does not say
    refuse_unknown_card(torch.device("cuda"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that begins."""
    monkeypatch.setattr(environment, "_chosen", {})
    monkeypatch.setattr(environment, "_untold", set())
    environment.tell_choices()


@pytest.mark.usefixtures("told")
def test_the_device_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    device = pick_device("cpu")
    assert capsys.readouterr().err == ""
    pick_dtype("bf16", device)
    pick_dtype("fp32", pick_device("cpu"))
    list(logs.progress([1], "pictures"))
    written = capsys.readouterr().err
    assert written.startswith("device: cpu (")
    assert written.count("precision: bfloat16\n") == written.count("device:") == 1


@pytest.mark.usefixtures("told")
def test_a_command_without_a_precision_says_its_device_before_it_computes(capsys: pytest.CaptureFixture[str]) -> None:
    list(logs.progress([1], "reading"))
    assert "device:" not in capsys.readouterr().err
    pick_device("cpu")
    list(logs.progress([1], "pictures"))
    assert capsys.readouterr().err.startswith("device: cpu (")


def test_only_the_main_process_says_its_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "_untold", set())
    monkeypatch.setattr(processes, "is_main", lambda: False)
    environment.tell_choices()
    pick_dtype("fp32", pick_device("cpu"))
    assert capsys.readouterr().err == ""


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "_chosen", {})
    monkeypatch.setattr(environment, "_untold", {"device"})
    monkeypatch.setattr(environment, "machine", lambda: {"gpu": "NVIDIA H100", "threads": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(compute, "refuse_unknown_card", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    pick_device()
    assert capsys.readouterr().err == "device: cuda (NVIDIA H100), precision: float32\n"
