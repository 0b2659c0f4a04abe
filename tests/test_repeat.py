"""The same answer twice: every stage from the same seed, and `tools.repeat`."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from models.compute import seed_everything
from reranker import convert
from reranker import train as train_reranker
from retriever import rank_splits, retrieve, train, train_stage2
from retriever import test as final
from retriever.gallery import build as build_index
from retriever.pseudo_queries import generate as generate_pseudo_query
from tests.chain import RQVAE, Chain, encoder_decoder_config, run_chain
from tests.test_pipeline import retrieve_config
from tests.test_reranker import Stages, convert_config, lists_config, train_config
from tests.test_training import stage2_config
from tests.tiny import picture_set, rqvae_train
from tools import environment, prepare_captions, repeat, runs
from tools.errors import BadInput
from tools.files import hash_file, read_json, write_json
from tools.logs import table

TIMED = {
    "table.txt",
    "segment-000000/pictures.sqlite",
}  # outputs that hold times: of the work, and of the picture files


def run_rest(chain: Chain, retriever: Path, index: Path) -> list[Path]:
    """Every further stage, beside the others. Returns all run folders."""
    made = {name: chain.root / f"again-{name}" for name in ("pseudo", "stage2", "found", "test")}
    generate_pseudo_query.main(
        generate_pseudo_query.Config(dataset=chain.dataset, source="nearest", output=made["pseudo"], neighbours=2)
    )
    train_stage2.main(stage2_config(chain, retriever, made["stage2"], epochs=1, pseudo_queries=made["pseudo"]))
    retrieve.main(retrieve_config(chain, made["stage2"], made["found"], pools=("test", "all"), beams=8))
    summary = chain.root / "again.json"
    final.main(final.Config(predictions=made["found"], output=made["test"], summary=summary, name="toy", device="cpu"))
    stages = Stages(chain, retriever, *(chain.root / f"again-{name}" for name in ("tokens", "lists", "reranker")))
    convert.main(convert_config(chain, stages.tokens))
    rank_splits.main(lists_config(chain, retriever, stages.lists))
    train_reranker.main(train_config(stages, stages.model, epochs=1))
    return [*chain[1:], retriever, index, *made.values(), stages.tokens, stages.lists, stages.model]


def run_everything(folder: Path) -> None:
    """Every stage from the pictures on: what another process repeats."""
    chain = run_chain(folder)
    config = encoder_decoder_config(chain, folder / "retriever")
    train.main(config)
    build_index.main(build_index.Config(dataset=chain.dataset, rqvae=chain.rqvae, output=folder / "index"))
    run_rest(chain, config.output, folder / "index")


def test_two_runs_from_one_seed_give_the_same(
    chain: Chain, retriever: Path, index: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Codes, weights, rankings and figures of all stages: in another folder and process, with other hashes of text."""
    again = tmp_path_factory.mktemp("again")  # as long a name as the first one's: files hold paths, and their lengths
    assert len(str(again)) == len(str(chain.root))
    code = f"from tests.test_repeat import *; run_everything(Path({str(again)!r}))"
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in run_rest(chain, retriever, index):
        one, two = (repeat.read_run(root / folder.relative_to(chain.root)) for root in (chain.root, again))
        assert one.outputs.keys() == two.outputs.keys()
        for name in set(one.outputs) - TIMED:
            first, second = ((run.folder / name).read_bytes() for run in (one, two))
            assert first.replace(bytes(chain.root), bytes(again)) == second, f"{folder.name}/{name}"
        assert [each for each in repeat.differences(one, two) if each.startswith("metrics")] == []


def test_another_seed_gives_other_weights(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    rqvae_train.main(rqvae_train.Config(features=chain.features, output=tmp_path / "rqvae", **{**RQVAE, "seed": 1}))
    train.main(encoder_decoder_config(chain, tmp_path / "retriever", seed=1))
    for one, two, name in (
        (chain.rqvae, tmp_path / "rqvae", "model.safetensors"),
        (retriever, tmp_path / "retriever", "model/model.safetensors"),
    ):
        assert repeat.read_run(one).outputs[name] != repeat.read_run(two).outputs[name]


def test_a_manifest_says_what_the_figures_depend_on(chain: Chain, retriever: Path) -> None:
    found = repeat.read_run(retriever).environment
    assert {"torch", "numpy", "transformers", "open_clip"} <= set(found["packages"])
    assert (found["processes"], found["device"], found["precision"]) == (1, "cpu", "float32")
    assert found["machine"]["threads"] == 1
    assert all(found["machine"][name] for name in ("system", "processor", "capability"))
    one, two = (repeat.read_run(path) for path in (chain.rqvae, retriever))
    assert dataclasses.replace(one, environment=two.environment).fingerprint == one.fingerprint


def test_a_gpu_is_told_to_add_up_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        seed_everything(0)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_only_named_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("LAUNCH", raising=False)
    described = environment.describe()
    assert described["variables"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert "LAUNCH" not in described["variables"]
    assert "secret" not in str(described)


# The command


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that a command line made."""
    picture_set(tmp_path)
    folder = tmp_path / "captions"
    arguments = ["--images", str(tmp_path / "images"), "--source", str(tmp_path / "captions.jsonl"), "--workers=0"]
    monkeypatch.setattr("sys.argv", ["prepare_captions", *arguments, "--output", str(folder)])
    prepare_captions.main(tyro.cli(prepare_captions.Config))
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Of what was printed the lines from the commit on."""
    lines = capsys.readouterr().out.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.startswith("# commit")) :]


def test_the_printed_command_runs_and_gives_the_same(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repeat.main(repeat.Config(prepared))
    commit, command = printed(capsys)
    assert commit == f"# commit {runs.current_commit()}"
    output = prepared.with_name("captions-repeat")
    assert command.endswith(f" --workers=0 --output {output}")
    subprocess.run(["bash", "-c", command.replace("python ", f"{sys.executable} ", 1)], check=True, capture_output=True)
    assert list(repeat.differences(repeat.read_run(prepared), repeat.read_run(output))) == []


def test_repeating_says_identical(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A training, in another process."""
    arguments = ["--features", str(chain.features), "--output", str(tmp_path / "rqvae"), "--width", "16"]
    arguments += ["--hidden", "24", "--levels", "3", "--codebook-size", "8", "--epochs", "3", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    rqvae_train.main(tyro.cli(rqvae_train.Config))
    capfd.readouterr()
    repeat.main(repeat.Config(tmp_path / "rqvae", execute=True, output=tmp_path / "again"))
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith("OMP_NUM_THREADS=1 python -m RQ-VAE.train --features ")
    count = len(repeat.read_run(tmp_path / "rqvae").outputs)
    assert lines[-1] == f"identical: {count} outputs, facts and metrics of {tmp_path / 'rqvae'}"


def rewritten(folder: Path, **values: Any) -> runs.Manifest:
    """Change values of a manifest."""
    runs.write_manifest(folder, {**read_json(folder / runs.MANIFEST), **values})
    return repeat.read_run(folder)


def test_a_difference_is_named_and_the_status_tells(prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = repeat.read_run(prepared)
    (prepared / "captions.jsonl").write_text("{}\n")
    facts = {**manifest.facts, "pictures": {**manifest.facts["pictures"], "val": 3}}
    runs.replace_outputs(manifest, [prepared / "captions.jsonl"], facts)
    with pytest.raises(SystemExit) as ended:
        repeat.main(repeat.Config(prepared, execute=True))
    assert ended.value.code == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2:] == ["output captions.jsonl differs", "facts pictures/val: was 3, now 8"]


def test_a_command_that_fails_ends_with_its_status(prepared: Path) -> None:
    manifest = repeat.read_run(prepared)
    rewritten(prepared, arguments=[*manifest.arguments, "--no-such-flag"])
    with pytest.raises(SystemExit) as ended:
        repeat.main(repeat.Config(prepared, execute=True))
    assert ended.value.code == 2


def record(folder: Path = Path("run"), **values: Any) -> runs.Manifest:
    plain: dict[str, Any] = {
        "command": "x", "arguments": ["--output", "run"], "source": "", "config": {}, "inputs": {}, "outputs": {},
        "facts": {}, "metrics": {}, "seconds": 1.0, "commit": "",
    }  # fmt: skip
    return runs.Manifest(folder=folder, **{**plain, **values})


def test_every_kind_of_difference() -> None:
    one = record(outputs={"same": "1", "gone": "2", "other": "3"}, metrics={"R@1": 0.5, "a": {"b": 1}})
    two = record(outputs={"same": "1", "new": "2", "other": "4"}, metrics={"R@1": 0.6, "a": {"b": 1}})
    assert list(repeat.differences(one, two)) == [
        "output gone is missing", "output new is new", "output other differs", "metrics R@1: was 0.5, now 0.6",
    ]  # fmt: skip
    times = (record(metrics={"all": {"queries_per_second": n}, "seconds": n}, seconds=n) for n in (1.0, 2.0))
    assert list(repeat.differences(*times)) == []
    places = (record(arguments=[f"--output={n}"], facts={"model": f"{n}/clip"}) for n in ("a/b", "c"))
    assert list(repeat.differences(*places)) == []
    undefined = (record(metrics={"loss": float("nan")}) for _ in range(2))
    assert list(repeat.differences(*undefined)) == []


def test_tables_are_compared_without_their_speeds(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"system": "two-tower", "R@1": "39.8%", "queries/s": 684.0},
        {"system": "x", "R@1": "1%", "queries/s": None},
    ]
    folders = [tmp_path / name for name in "abc"]
    every: list[dict[str, Any]] = [{}, {"queries/s": 1.0}, {"R@1": "40.0%"}]
    for folder, changes in zip(folders, every, strict=True):
        folder.mkdir()
        (folder / "table.txt").write_text(table([{**rows[0], **changes}, rows[1]]) + "\n")
        write_json(folder / "other.txt", changes)
    first, faster, better = (record(folder, outputs={"table.txt": folder.name}) for folder in folders)
    assert list(repeat.differences(first, faster)) == []
    assert list(repeat.differences(first, better)) == ["output table.txt differs"]
    others = (dataclasses.replace(each, outputs={"other.txt": each.folder.name}) for each in (first, faster))
    assert list(repeat.differences(*others)) == ["output other.txt differs"]


def test_a_file_may_name_its_own_folder(tmp_path: Path) -> None:
    made = []
    for name, model in (("run", "clip"), ("run-repeat", "clip"), ("run-other", "blip")):
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", {"name": f"{folder}/{model}"})
        (folder / "weights.npy").write_text(str(folder))
        outputs = {file: hash_file(folder / file) for file in ("config.json", "weights.npy")}
        made.append(record(folder, arguments=["--output", str(folder)], outputs=outputs))
    assert list(repeat.differences(made[0], made[1])) == ["output weights.npy differs"]
    assert list(repeat.differences(made[0], made[2])) == ["output config.json differs", "output weights.npy differs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "captions.jsonl").unlink(), r"input source0 \(.*captions\.jsonl\) is gone since"),
        (lambda root: (root / "captions.jsonl").write_text("x"), r"input source0 \(.*captions\.jsonl\) has changed"),
        (lambda root: (root / "images" / "red-ring.png").unlink(), r"input images \(.*images\) has changed since"),
        (lambda root: rewritten(root / "captions", arguments=["--images", "x"]), "not made by a command line"),
        (lambda root: (root / "captions" / "manifest.json").unlink(), r"not a finished run, it has no manifest\.json"),
        (lambda root: (root / "captions-repeat").mkdir(), "captions-repeat is there already: name another --output"),
    ],
)
def test_what_cannot_be_repeated_is_refused(change: Callable[[Path], Any], message: str, prepared: Path) -> None:
    change(prepared.parent)
    with pytest.raises(BadInput, match=message):
        repeat.main(repeat.Config(prepared, execute=True))


def test_what_is_no_longer_as_it_was_is_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = repeat.read_run(prepared).environment
    found["machine"].pop("threads")
    packages = {**found["packages"], "PIL": "0.1"}
    made_with = {**found, "packages": packages, "python": "2.7", "machine": {**found["machine"], "processor": "abacus"}}
    rewritten(prepared, commit="abc", source="old", environment=made_with)
    repeat.main(repeat.Config(prepared))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"warning: made at commit abc, this checkout is {runs.current_commit()}"
    assert lines[1] == "warning: the files beside tools.prepare_captions are not those it was made with"
    assert lines[2] == f"warning: made with python 2.7, here it is {found['python']}"
    assert lines[3] == f"warning: made with PIL 0.1, here it is {found['packages']['PIL']}"
    assert lines[4] == f"warning: made on abacus, this is {found['machine']['processor']}"
    assert len(lines) == 5


def test_a_manifest_of_an_earlier_version_is_repeated_with_a_warning(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = read_json(prepared / runs.MANIFEST)
    del values["environment"]
    del values["format"]
    runs.write_manifest(prepared, values)
    repeat.main(repeat.Config(prepared))
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("python -m tools.prepare_captions ")
    assert "did not record packages and machine" in captured.err


@pytest.mark.parametrize(
    ("variables", "beginning"),
    [
        ({"LAUNCH": "torchrun --nproc_per_node 2"}, "torchrun --nproc_per_node 2"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "4"},
            "CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=4 accelerate launch --num_processes 2",
        ),
    ],
)
def test_as_many_processes_as_the_run_had(
    variables: dict[str, str], beginning: str, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = repeat.read_run(prepared)
    made_with = {**found.environment, "processes": 2, "variables": variables, "machine": {"processor": ""}}
    arguments = [*found.arguments, "--overwrite", "--summary", "summary.json"]
    rewritten(prepared, environment=made_with, arguments=arguments)
    repeat.main(repeat.Config(prepared))
    line = printed(capsys)[1]
    assert line.startswith(f"{beginning} -m tools.prepare_captions --images ")
    assert "--overwrite" not in line
    assert line.endswith(f" --summary {prepared}-repeat.summary.json")
