"""What a person finds in W&B: runs that were logged offline are read back from their files."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from reranker import test as rerank_test
from retriever import rank_splits, retrieve, train
from retriever import test as final
from tests.chain import RQVAE, Chain, encoder_decoder_config
from tests.offline_runs import OfflineRun, read_offline_runs
from tests.warm import run_python
from tools import logs, results, runs
from tools.command_line import sweeps
from tools.files import read_json

SETTINGS = {"precision": "fp32", "device": "cpu"}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder below which this process's W&B runs are logged."""
    for name in ("WANDB_RUN_GROUP", "WANDB_PROJECT", sweeps.SWEEP_VARIABLE, sweeps.RUN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "logged"))
    (tmp_path / "logged").mkdir()
    wandb.teardown()  # it keeps the settings of its first run in this process
    yield tmp_path / "logged"
    wandb.teardown()


def only_run(folder: Path) -> OfflineRun:
    wandb.teardown()  # what is still on its way to the file
    (run,) = read_offline_runs(folder)
    return run


def test_scalars_of_the_final_test_of_a_retriever(chain: Chain, retriever: Path, tmp_path: Path, offline: Path) -> None:
    found = tmp_path / "found"
    retrieve.main(
        retrieve.Config(dataset=chain.dataset, retriever=retriever, output=found, pools=("test", "all"), **SETTINGS)  # type: ignore[arg-type]
    )
    output = tmp_path / "output" / "toy-better" / "13_test" / "retriever+x"
    config = final.Config(
        predictions=found, output=output, summary=tmp_path / "summary.json", name="toy", system="retriever+x",
        rqvae=chain.rqvae, device="cpu",
    )  # fmt: skip
    final.main(config)
    run = only_run(offline)
    assert (run.name, run.group, run.job) == (str(output), "toy-better", "test_retriever")
    assert run.config["system"] == "retriever+x"
    rows = {(row["system"], row["pool"], row["level"]): row for row in read_json(config.summary)}
    for cutoff in ("1", "5", "10"):
        for system in ("two-tower", "two-tower, quantised", "retriever+x"):
            for pool, place in (("test", "test"), ("all", "test-all")):
                recall = rows[system, pool, "image"]["recall"][cutoff]
                assert run.summary[f"{system}/{place}/R@{cutoff}"] == recall
        assert run.summary[f"test/R@{cutoff}"] == rows["retriever+x", "test", "image"]["recall"][cutoff]
        assert run.summary[f"test-all/R@{cutoff}"] == rows["retriever+x", "all", "image"]["recall"][cutoff]
        assert run.summary[f"test/code/R@{cutoff}"] == rows["retriever+x", "test", "code"]["recall"][cutoff]
    assert run.summary["test/MRR"] == rows["retriever+x", "test", "image"]["mrr"]
    assert run.summary["run/device"].startswith("cpu, ")
    assert run.summary["run/precision"] in ("float32", "bfloat16")
    assert 0 < run.summary["run/hours"] < 1


def test_scalars_of_the_final_test_of_a_reranker(chain: Chain, retriever: Path, tmp_path: Path, offline: Path) -> None:
    rank_splits.main(
        rank_splits.Config(
            dataset=chain.dataset, retriever=retriever, output=tmp_path / "lists", beams=8, train_per_picture=0,
            **SETTINGS,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    config = rerank_test.Config(
        lists=tmp_path / "lists", output=tmp_path / "18_test" / "retriever", summary=tmp_path / "s.json", name="toy",
        device="cpu",
    )  # fmt: skip
    rerank_test.main(config)
    run = only_run(offline)
    assert (run.group, run.job) == (tmp_path.name, "test_reranker")
    (row,) = read_json(config.summary)
    assert row["system"] == "retriever+features"
    for cutoff in ("1", "5", "10"):
        assert run.summary[f"test/R@{cutoff}"] == row["recall"][cutoff]
        assert run.summary[f"retriever+features/test/R@{cutoff}"] == row["recall"][cutoff]
        assert f"two-tower/test/R@{cutoff}" in run.summary
        assert f"val/R@{cutoff}" in run.summary
    assert run.summary["test/ceiling"] == row["ceiling"]


def test_a_training_shows_its_best_figures(chain: Chain, tmp_path: Path, offline: Path) -> None:
    config = encoder_decoder_config(chain, tmp_path / "toy" / "09_train" / "retriever", epochs=2, validate_every=1)
    train.main(config)
    run = only_run(offline)
    assert (run.group, run.job) == ("toy", "train_retriever")
    best = max(step["val/R@1"] + step["val/R@5"] + step["val/R@10"] for step in run.history if "val/R@1" in step)
    assert sum(run.summary[f"best/R@{cutoff}"] for cutoff in (1, 5, 10)) == pytest.approx(best)
    assert (run.summary["run/precision"], run.config["lr"]) == ("float32", config.lr)
    assert run.summary["run/hours"] * 3600 <= runs.read_manifest(config.output, "retriever.train").seconds + 0.5


def test_the_group_can_be_named(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    folder = tmp_path / "output" / "emoji" / "05_train_rqvae"
    folder.mkdir(parents=True)
    logs.Tracker(folder, job="x", config={}).finish()
    assert only_run(offline).group == "mine"


# Sweeps


def trial(number: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The same command as an agent starts it for one trial."""
    agent = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": number}
    return run_python("-m", *arguments, variables={**os.environ, **agent})


def test_two_trials_of_a_sweep(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "output" / "toy" / "05_train_rqvae"
    flags: list[str] = []
    for name, value in {**RQVAE, "epochs": 2}.items():
        values = [str(each) for each in value] if isinstance(value, tuple) else [str(value)]
        flags += [f"--{name.replace('_', '-')}", *values] if name != "lr" else []
    command = ["RQ-VAE.train", "--features", str(chain.features), "--output", str(output), *flags]
    rates = {"r1": 0.001, "r2": 0.002}
    for number, rate in rates.items():
        done = trial(number, [*command, f"--lr={rate}"], tmp_path)
        assert done.returncode == 0, done.stderr
        folder = output.parent / "sweeps" / "sw1" / number / output.name
        assert runs.read_manifest(folder, "RQ-VAE.train").config["lr"] == rate
    assert not output.exists()
    logged = read_offline_runs(tmp_path)
    assert [(run.id, run.group, run.job, run.config["lr"]) for run in logged] == [
        (number, "toy", "train_rqvae", rate) for number, rate in rates.items()
    ]
    assert all(len([step for step in run.history if "val/quantized_R@1" in step]) == 2 for run in logged)
    again = trial("r1", [*command, "--lr=0.001"], tmp_path)  # as after the agent was stopped
    assert "nothing to do" in again.stdout


def test_places_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sweeps.SWEEP_VARIABLE, raising=False)
    config = final.Config(predictions=tmp_path / "a", output=tmp_path / "b", summary=tmp_path / "s.json", name="toy")
    assert sweeps.of_trial(config) == config
    monkeypatch.setenv(sweeps.SWEEP_VARIABLE, "me/avg/sw1")
    monkeypatch.setenv(sweeps.RUN_VARIABLE, "r1")
    own = tmp_path / "sweeps" / "sw1" / "r1"
    assert sweeps.of_trial(config).output == own / "b"
    assert sweeps.of_trial(config).predictions == tmp_path / "a"  # made outside the sweep
    (own / "a").mkdir(parents=True)
    assert sweeps.of_trial(config).predictions == own / "a"  # made by an earlier command of the trial
    assert sweeps.own_place(own / "b") == own / "b"
    assert sweeps.common_place(own / "b") == tmp_path / "b"
    row: dict[str, Any] = {"system": "x", "dataset": "d", "split": "test", "pool": "test", "level": "image"}
    results.merge_summary(config.summary, [{**row, "recall": {}}])
    assert read_json(own / "s.json") == [{**row, "recall": {}}]
    assert not config.summary.exists()
