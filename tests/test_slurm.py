"""The files for SLURM, with stand-ins for its programs: what they would start on each machine."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "scripts" / "slurm"
STAND_INS = {
    "scontrol": 'echo "$SLURM_JOB_NODELIST" | tr "," "\\n"',
    "getent": 'echo "10.0.0.7 STREAM $2"',
    "ray": 'echo "ray $*" >>"$SAID"',
    # srun starts the command on each machine
    "srun": 'shift; for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit; done',
}


@pytest.fixture
def machines(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines of four GPUs."""
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    (tmp_path / "stage.sh").write_text('echo "$LAUNCH | $OMP_NUM_THREADS | $*" >>"$SAID"\n')
    kept = {name: value for name, value in os.environ.items() if name not in ("LAUNCH", "OMP_NUM_THREADS")}
    return {
        **kept, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "SAID": str(tmp_path / "said"),
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "left,right", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "123456", "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip


def submit(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SLURM / name), *words], env=environment, capture_output=True, text=True)


def said(environment: dict[str, str]) -> list[str]:
    return Path(environment["SAID"]).read_text().splitlines()


def test_training_starts_one_launcher_on_each_machine(machines: dict[str, str]) -> None:
    done = submit("train.sbatch", "stage.sh", "--epochs", "2 or 3", **machines)
    assert done.returncode == 0, done.stderr
    shared = "accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank {} "
    shared += "--main_process_ip left --main_process_port 23456 | 8 | --epochs 2 or 3"
    assert said(machines) == [shared.format(0), shared.format(1)]


def test_training_with_deepspeed_and_on_one_gpu(machines: dict[str, str]) -> None:
    configuration = "--config_file scripts/accelerate/zero3.yaml"
    submit("train.sbatch", "stage.sh", **machines, ACCELERATE=configuration)
    assert said(machines)[0].startswith(f"accelerate launch {configuration} --num_machines 2")
    Path(machines["SAID"]).unlink()
    submit("train.sbatch", "stage.sh", **{**machines, "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"})
    assert said(machines) == [" | 32 | "]


def test_encoding_starts_ray_on_each_machine(machines: dict[str, str]) -> None:
    done = submit("encode.sbatch", "--source", "/shared/{0..9}.tar", **machines)
    assert done.returncode == 0, done.stderr
    started = "ray symmetric-run --address 10.0.0.7:23456 --min-nodes 2 --num-cpus 32 --num-gpus 4 "
    started += "--disable-usage-stats -- bash scripts/encode_collection.sh --cluster 10.0.0.7:23456 "
    started += "--source /shared/{0..9}.tar"
    assert said(machines) == ["ray get-auth-token --generate", started, started]


def test_what_is_missing_is_said_in_one_line(machines: dict[str, str]) -> None:
    assert submit("train.sbatch", "no.sh", **machines).stderr.startswith("error: no.sh is not a script of ")
    without = {name: value for name, value in machines.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    assert "run 'bash scripts/venv.sh requirements.txt' once" in submit("train.sbatch", "stage.sh", **without).stderr
    (Path(machines["PATH"].partition(":")[0]) / "ray").unlink()
    path = f"{machines['PATH'].partition(':')[0]}:/usr/bin:/bin"
    done = submit("encode.sbatch", "--source", "x.tar", **{**machines, "PATH": path})
    assert "run 'bash scripts/venv.sh requirements-cluster.txt' once" in done.stderr
    alone = {name: value for name, value in machines.items() if name != "SLURM_SUBMIT_DIR"}
    assert "start this file with sbatch" in submit("train.sbatch", "stage.sh", **alone).stderr


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_files_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
