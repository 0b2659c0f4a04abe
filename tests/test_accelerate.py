"""The launcher's files in scripts/accelerate: what accelerate makes of them, as far as that takes no DeepSpeed."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from models import sharding

ROOT = Path(__file__).parent.parent
FOLDER = "scripts/accelerate"
STAGES = [2, 3]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def launched(monkeypatch: pytest.MonkeyPatch, launcher: str, file: str, *options: str) -> Namespace:
    """Arguments that `accelerate launch --config_file` would give to one of its launchers."""
    given: list[Namespace] = []
    monkeypatch.setattr(launch, launcher, given.append)
    command = ["--config_file", f"{FOLDER}/{file}", *options, "-m", "retriever.train", "--epochs", "1"]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    (arguments,) = given
    return arguments


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("parallel.yaml", DistributedType.MULTI_GPU),
        ("fsdp2.yaml", DistributedType.FSDP),
        ("zero2.yaml", DistributedType.DEEPSPEED),
        ("zero3.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_files_are_read(file: str, kind: DistributedType) -> None:
    config = load_config_from_file(f"{FOLDER}/{file}")  # refuses unknown keys
    assert config.distributed_type == kind
    assert (config.num_machines, config.machine_rank) == (1, 0)
    assert config.mixed_precision is None  # beside a DeepSpeed file accelerate refuses even "no"
    assert config.num_processes == -1  # the launcher asks for --num_processes


def test_every_file_is_tested() -> None:
    assert {path.stem for path in (ROOT / FOLDER).iterdir()} == {"parallel", "fsdp2", "zero2", "zero3"}


def test_parallel_launches_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched(monkeypatch, "multi_gpu_launcher", "parallel.yaml", "--num_processes", "2")
    assert (arguments.num_processes, arguments.mixed_precision) == (2, "no")
    assert arguments.training_script_args == ["--epochs", "1"]


def test_fsdp_gets_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of the settings that a training would not follow."""
    arguments = launched(monkeypatch, "multi_gpu_launcher", "fsdp2.yaml", "--num_processes", "2")
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert not sharding.is_asked_for()  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding.is_asked_for()
    assert arguments.mixed_precision == "no"


def test_number_of_processes_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--num_processes"):
        launched(monkeypatch, "multi_gpu_launcher", "parallel.yaml")


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_gets_its_stage(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--num_processes", "2", "--main_process_port", "0")
    arguments = launched(monkeypatch, "deepspeed_launcher", f"zero{stage}.yaml", *options)
    for key in load_config_from_file(f"{FOLDER}/zero{stage}.yaml").deepspeed_config:
        assert key in {action.dest for action in launch.launch_command_parser()._actions}
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()  # refuses what contradicts the DeepSpeed file
    assert plugin.zero_stage == stage
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_files_leave_the_rest_to_the_command(stage: int) -> None:
    """Batch size, clipping and precision are set from the command's flags, so that nothing is left to fill in."""
    settings: dict[str, Any] = json.loads((ROOT / FOLDER / f"zero{stage}.json").read_text())
    assert set(settings) == {"zero_optimization"}
    assert "auto" not in json.dumps(settings)


def test_several_machines_need_no_deepspeed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = ("--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "127.0.0.1")
    options = (*machines, "--main_process_port", "29500", "--num_processes", "4")
    arguments = launched(monkeypatch, "deepspeed_launcher", "zero2.yaml", *options)
    command, _ = prepare_deepspeed_cmd_env(arguments)
    assert command is None  # else `deepspeed`, which reaches the machines by pdsh
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "2", 1)
