"""The preflight: what is missing is told before the first stage, and what cannot be known stops nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tests.tiny import bert_folder, clip_folder, draw_picture, llama_folder, t5_folder
from tools.preflight import __main__ as preflight
from tools.preflight import devices as preflight_devices
from tools.preflight import models as preflight_models
from tools.preflight.devices import Gpu
from tools.preflight.needs import MISSING, OK, UNKNOWN, Need
from tools.training_memory import GIB

ROOT = Path(__file__).parent.parent


def states(kind: str, **values: Any) -> list[tuple[str, str]]:
    """What is said of one need: state and advice."""
    need = Need(kind, "09_train", {name: str(value) for name, value in values.items()})
    return [(each.state, each.advice) for each in preflight.CHECKS[kind](need)]


def state(kind: str, **values: Any) -> str:
    (found,) = states(kind, **values)
    return found[0]


# Files, keys, disk


def test_a_file_is_there_or_missing(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    assert state("file", path=tmp_path / "there") == OK
    assert states("file", path=tmp_path / "not", advice="fetch it") == [(MISSING, "fetch it")]


def test_pictures_are_counted_and_some_are_opened(tmp_path: Path) -> None:
    assert state("pictures", path=tmp_path / "none") == MISSING
    (tmp_path / "notes.txt").touch()
    assert state("pictures", path=tmp_path) == MISSING
    for number in range(40):
        draw_picture(tmp_path / "below" / f"{number:02}.png", "red", "circle", number)
    assert state("pictures", path=tmp_path) == OK
    assert state("pictures", path=tmp_path, count=40) == OK
    assert states("pictures", path=tmp_path, count=41) == [(MISSING, "41 pictures belong there")]
    for path in (tmp_path / "below").iterdir():
        path.write_bytes(b"no picture")
    assert states("pictures", path=tmp_path, count=40) == [(UNKNOWN, "copy it again")]
    assert states("pictures", path=tmp_path, skippable="yes") == [(UNKNOWN, "--skip-bad leaves damaged pictures out")]


def test_a_key_is_looked_for_and_not_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert state("key", variable="MY_KEY") == OK
    monkeypatch.setenv("MY_KEY", " ")
    assert states("key", variable="MY_KEY") == [(MISSING, "export MY_KEY=...")]


def test_a_package_is_there_or_missing() -> None:
    assert states("package", name="torch") == [(OK, "pip install torch")]
    assert states("package", name="torch_of_nobody") == [(MISSING, "pip install torch_of_nobody")]


@pytest.mark.parametrize(("free", "expected"), [(100, OK), (20, UNKNOWN), (14, MISSING)])
def test_disk_is_added_up_over_all_stages(
    free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 GiB written: much less cannot do, a little less may."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free * GIB))
    path = str(tmp_path / "not" / "yet")
    needs = [Need("disk", stage, {"path": path, "bytes": str(15 * GIB)}) for stage in ("01", "05")]
    (found,) = preflight.findings(needs)
    assert found.state == expected
    assert "about 32 GiB" in found.what


def test_a_trainings_own_states_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000 * GIB))
    monkeypatch.setattr(preflight_models, "locate_in", lambda name: lambda file: None)
    monkeypatch.setattr(preflight_devices, "gpus_here", lambda: [])
    values = {"model": "t5-base", "output": str(tmp_path), "batch": "1", "tokens": "8"}
    (found,) = preflight.findings([Need("memory", stage, values) for stage in ("09", "10")])
    weights = preflight_devices.trained_weights(Need("memory", "09", values))
    assert 220e6 < weights < 225e6  # T5-base
    assert f"about {(weights * (4 + 4 + 32)) / GIB + 2:.0f} GiB" in found.what


# Models


def cached(cache: Path, name: str, files: dict[str, str]) -> None:
    """A repository as the Hub's cache holds it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for file, text in files.items():
        (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / "abc" / file).write_text(text)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("abc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, which is to be used offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(folder), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    preflight_models.ask.cache_clear()
    return folder


def test_a_models_folder_must_be_whole(tmp_path: Path, cache: Path) -> None:
    assert state("model", name=t5_folder(tmp_path / "t5")) == OK
    assert state("tokenizer", name=llama_folder(tmp_path / "llama")) == OK
    (tmp_path / "t5" / "model.safetensors").unlink()
    assert state("model", name=tmp_path / "t5") == UNKNOWN  # perhaps under names of its own
    (tmp_path / "empty").mkdir()
    assert state("model", name=tmp_path / "empty") == MISSING
    assert states("model", name=tmp_path / "not" / "there") == [(MISSING, "there is no such folder")]


def test_a_cached_model_must_have_every_part(cache: Path) -> None:
    name = "someone/large"
    command = f"HF_HUB_OFFLINE=0 hf download {name}"
    assert states("model", name=name) == [(MISSING, command)]
    index = json.dumps({"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}})
    cached(cache, name, {"config.json": "{}", "model.safetensors.index.json": index, "1-of-2.safetensors": ""})
    assert states("model", name=name) == [(MISSING, command)]
    cached(cache, name, {"2-of-2.safetensors": ""})
    assert state("model", name=name, untokenized="yes") == OK  # as SEED-LLaMA, whose tokenizer is another's
    assert state("model", name=name) == state("tokenizer", name=name) == MISSING
    cached(cache, name, {"tokenizer.model": ""})
    assert state("model", name=name) == state("tokenizer", name=name) == OK


def refusal(kind: type[Exception]) -> Any:
    def ask(self: Any, name: str, **options: Any) -> None:
        error = kind.__new__(kind)  # its constructor wants an answer of a server
        Exception.__init__(error, "no")
        raise error

    return ask


@pytest.mark.parametrize(
    ("kind", "token", "expected", "advice"),
    [
        (GatedRepoError, None, MISSING, "hf auth login, and ask for it on its page"),
        (GatedRepoError, "hf_x", MISSING, "ask for it on its page"),
        (RepositoryNotFoundError, None, MISSING, "correct the name; hf auth login if it is private"),
        (RepositoryNotFoundError, "hf_x", MISSING, "correct the name"),
        (ConnectionError, None, UNKNOWN, "hf download meta-llama/Llama-2-7b-hf"),
    ],
)
def test_what_the_hub_answers(
    kind: type[Exception],
    token: str | None,
    expected: str,
    advice: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refusal(kind))
    assert states("model", name="meta-llama/Llama-2-7b-hf") == [(expected, advice)]


def test_a_model_on_the_hub_will_be_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *words, **options: None)
    assert state("model", name="t5-base") == OK
    folder, size = preflight_models.size_of("t5-base") or (Path(), 0)
    assert folder == cache
    assert 0.88e9 < size < 0.90e9  # the Hub's file: 892 MB


def test_clip_by_folder_by_tag_and_by_file(tmp_path: Path, cache: Path) -> None:
    assert state("clip", name=clip_folder(tmp_path / "clip")) == OK
    tag = {"name": "ViT-L-14-336", "tag": "openai"}
    repository = "timm/vit_large_patch14_clip_336.openai"
    assert states("clip", **tag) == [(MISSING, f"HF_HUB_OFFLINE=0 hf download {repository}")]
    cached(cache, repository, {"open_clip_model.safetensors": ""})
    assert state("clip", **tag) == OK
    assert states("clip", name="ViT-L-14-336", tag="opena")[0][1].endswith("did you mean openai?")
    assert "did you mean" in states("clip", name="ViT-L-14-363", tag="openai")[0][1]
    assert states("clip", name="output/clip") == [(MISSING, "there is no such folder")]
    (tmp_path / "weights.pt").touch()
    assert state("clip", name="ViT-L-14-336", tag=tmp_path / "weights.pt") == OK


# Devices

SMI = """#!/bin/sh
echo "NVIDIA A10G, 23028, {driver}"
echo "NVIDIA A10G, 23028, {driver}"
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with two GPUs and some driver."""

    def install(driver: str, visible: str | None = None) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SMI.format(driver=driver))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        preflight_devices.gpus_here.cache_clear()

    yield install
    preflight_devices.gpus_here.cache_clear()


def test_gpus_are_those_that_nvidia_smi_lists_and_the_user_leaves(smi: Any) -> None:
    smi("580.65.06")
    assert preflight_devices.gpus_here() == [Gpu("NVIDIA A10G", 23028 << 20, "580.65.06")] * 2
    for visible, count in (("1", 1), ("0,1", 2), ("", 0), ("GPU-1234", 1)):
        smi("580.65.06", visible)
        assert len(preflight_devices.gpus_here()) == count


@pytest.mark.parametrize(("driver", "expected"), [("580.65.06", [OK]), ("550.54.15", [OK, MISSING])])
def test_an_old_driver_is_told_with_both_versions(
    driver: str, expected: list[str], smi: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(driver)
    monkeypatch.setattr(preflight_devices, "cuda_of_torch", lambda: 13)
    monkeypatch.setattr(preflight_devices, "COMPATIBLE", tmp_path / "none")
    found = list(preflight_devices.check_processes(Need("processes", "all", {})))
    assert [each.state for each in found] == expected
    assert found[-1].state == OK or "driver 550.54.15, torch is built for CUDA 13" in found[-1].what
    if expected[-1] == MISSING:  # or NVIDIA's package for older drivers is there: torch itself will tell
        monkeypatch.setattr(preflight_devices, "COMPATIBLE", tmp_path)
        assert states("processes")[-1][0] == UNKNOWN
    monkeypatch.setattr(preflight_devices, "cuda_of_torch", lambda: None)
    assert states("processes")[-1][0] == MISSING


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    version = torch.version.cuda
    assert preflight_devices.cuda_of_torch() == (int(version.split(".")[0]) if version else None)


def test_processes_need_a_gpu_each(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_devices, "cuda_of_torch", lambda: 12)
    smi("580.65.06")
    launch = "accelerate launch --multi_gpu --num_processes 8"
    assert states("processes", launch=launch)[-1] == (MISSING, "--num_processes 2 in LAUNCH")
    assert states("processes", launch=f"{launch} --cpu")[-1][0] == OK
    assert states("processes", launch=f"{launch} --num_machines 4")[-1][0] == OK
    assert states("processes", launch="torchrun --nproc-per-node=3")[-1][0] == MISSING
    smi("580.65.06", "")
    assert states("processes", launch=launch) == []
    assert states("processes", gpu="yes")[0][0] == UNKNOWN


def test_memory_is_missing_only_where_it_cannot_be_enough(smi: Any, cache: Path) -> None:
    smi("580.65.06")  # 22.5 GiB
    fits = {"model": "t5-base", "batch": 32, "tokens": 40}
    assert state("memory", **fits) == OK
    assert state("memory", **{**fits, "batch": 4096}) == UNKNOWN  # a smaller batch would do
    assert state("memory", **{**fits, "batch": 4096}, at_once=32) == OK
    assert state("memory", **{**fits, "batch": 32}, each=128) == UNKNOWN
    many = "accelerate launch --num_processes 128 --num_machines 64"
    assert state("memory", **{**fits, "batch": 4096}, launch=many) == OK
    large = {"model": "meta-llama/Llama-2-7b-hf", "batch": 1, "tokens": 40}
    assert state("memory", **large) == MISSING  # all weights, in fp32, with AdamW
    assert state("memory", **large, launch="accelerate launch --config_file zero3.yaml") == UNKNOWN
    assert state("memory", **large, rank=8) == OK
    assert state("memory", **large, rank=8, searched=1) == UNKNOWN  # a validation copies the weights
    assert state("memory", **large, rank=8, searched=1, four_bits=1) == OK
    assert state("memory", model="AILab-CVC/seed-llama-8b-sft", weights=2, room=4.5) == OK
    assert state("memory", model="AILab-CVC/seed-llama-8b-sft", weights=2, room=16) == UNKNOWN
    assert states("memory", model="someone/unheard-of", batch=1, tokens=8) == []


# The list


def test_each_thing_is_said_once_and_a_broken_check_stops_nothing(tmp_path: Path) -> None:
    needs = [Need("file", stage, {"path": str(tmp_path / "not")}) for stage in ("09", "10")]
    needs.append(Need("pictures", "01", {"path": str(tmp_path), "count": "many"}))
    found = preflight.findings([*needs, Need("disk", "01", {"path": str(tmp_path), "bytes": "1"})])
    assert [(each.stage, each.state) for each in found[:2]] == [("09", MISSING), ("01", UNKNOWN)]
    assert found[2].stage == "all"  # the disk
    text = preflight.shown(found, brief=True)
    assert str(tmp_path / "not") in text
    assert "disk" not in text
    assert "disk" in preflight.shown(found, brief=False)


# The script


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def run(dataset: Path | str, *flags: str, **environment: str) -> Ran:
    settings = {**os.environ, "DATASET": str(dataset), "HF_HUB_OFFLINE": "1", "PYTHON_SAID": "yes", **environment}
    command = ["bash", str(ROOT / "scripts" / "preflight.sh"), *flags]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A dataset's file of a user, with everything there that it names."""
    draw_picture(tmp_path / "my pictures" / "1.png", "red", "circle", 1)
    (tmp_path / "captions.csv").touch()
    (tmp_path / "quantizer.pt").touch()
    path = tmp_path / "mine.sh"
    path.write_text(f"""
DATA={tmp_path}/data TOKENIZER={tmp_path}/tokenizer RETRIEVER={tmp_path}/retriever RERANKER={tmp_path}/reranker
STAGES="01_prepare_captions 03_prepare_emb 05_train_rqvae 09_train_retriever_t5 11_finetune_retriever_llama@llama
15_convert_voken_to_seed 17_finetune_reranker_llama"
IMAGES="{tmp_path}/my pictures"
CAPTIONS=(--source {tmp_path}/captions.csv)
CLIP=(--model {clip_folder(tmp_path / "clip")})
TRAIN_RETRIEVER=(--language-model {t5_folder(tmp_path / "t5")})
FINETUNE_LLAMA=(--kind causal --language-model {llama_folder(tmp_path / "llama")})
CONVERT=(--quantizer {tmp_path}/quantizer.pt --vision $TOKENIZER/03_prepare_emb/made.pth)
TRAIN_RERANKER=(--language-model {tmp_path}/llama --tokenizer {bert_folder(tmp_path / "bert")} --batch-size 2)
""")
    return path


def test_a_users_own_file_with_everything_there(mine: Path) -> None:
    found = run(mine)
    assert (found.status, found.err) == (0, "")
    for name in ("my pictures: 1 pictures", "captions.csv", "clip", "t5", "llama", "quantizer.pt", "bert"):
        assert name in found.out
    assert MISSING not in found.out
    assert "made.pth" not in found.out  # a stage makes it
    assert run(mine, "--brief").out == ""


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("captions.csv", "01_prepare_captions"),
        ("my pictures", "01_prepare_captions"),
        ("clip", "03_prepare_emb"),
        ("t5", "09_train_retriever_t5"),
        ("llama", "11_finetune_retriever_llama"),
        ("quantizer.pt", "15_convert_voken_to_seed"),
        ("bert", "17_finetune_reranker_llama"),
    ],
)
def test_what_is_missing_is_named_with_the_first_stage_that_needs_it(mine: Path, name: str, stage: str) -> None:
    (mine.parent / name).rename(mine.parent / "elsewhere")
    found = run(mine, "--brief")
    assert found.status == 2
    (line,) = [line for line in found.out.splitlines() if MISSING in line]
    assert line.startswith(stage)
    assert name in line
    assert found.err.startswith(f"error: 1 missing ({stage}")
    assert run(mine, PREFLIGHT="off") == (0, "", "")
    finished = {"01": "data", "03": "tokenizer", "09": "retriever", "11": "retriever", "15": "reranker"}
    if number := finished.get(stage[:2]):
        system = {"09": "09_train/retriever", "11": "11_llama/llama", "15": "15_tokens"}.get(stage[:2], stage)
        folder = mine.parent / number / system
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        assert run(mine, "--brief").status == (2 if name == "llama" else 0)  # stage 17 needs that one too


def test_an_endpoint_needs_its_key(mine: Path) -> None:
    text = mine.read_text().replace('STAGES="', 'STAGES="08_generate_pseudo_query ')
    mine.write_text(text + "PSEUDO_QUERIES=(--source endpoint --api-key-variable HERS --url x)\n")
    found = run(mine, "--brief")
    assert found.status == 2
    assert "export HERS=..." in found.out
    assert run(mine, HERS="secret").status == 0
    assert "secret" not in run(mine, HERS="secret").out


def test_a_folder_of_pictures_needs_the_models_of_another_dataset(tmp_path: Path) -> None:
    draw_picture(tmp_path / "1.png", "red", "circle", 1)
    found = run("folder", PICTURES=str(tmp_path))
    assert f"{tmp_path}: 1 pictures" in found.out
    if not (ROOT / "RQ-VAE/output/emoji").exists():
        assert found.status == 2
        assert "RQ-VAE/output/emoji/05_train_rqvae/manifest.json" in found.out


def test_nothing_left_to_do_needs_nothing() -> None:
    code = (
        "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b''))\n"
        "from tools.preflight.__main__ import main; assert main(['--brief']) == 0\n"
        "slow = {'torch', 'open_clip', 'transformers', 'huggingface_hub', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_quickstart_looks_before_its_first_stage(mine: Path) -> None:
    (mine.parent / "quantizer.pt").unlink()
    settings = {**os.environ, "DATASET": str(mine), "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh")]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "15_convert_voken_to_seed" in done.stdout
    assert "== 01_prepare_captions" not in done.stdout


@pytest.mark.parametrize("dataset", ["emoji", "flickr30k"])
def test_the_folders_of_the_stages_are_their_scripts_own(dataset: str) -> None:
    for system in ("retriever", "retriever+pseudo", "retriever+stage2", "llama"):
        lines = ["source scripts/env.sh"]
        for script in sorted((ROOT / "scripts").glob("[01][0-9]_*.sh")):
            last = script.read_text().splitlines()[-1]
            output = last[last.index("--output ") :].split()[1]
            lines.append(f'echo {script.stem} {output} "$(output_of "{script.stem}@$SYSTEM")"')
        settings = {**os.environ, "DATASET": dataset, "SYSTEM": system}
        command = ["bash", "-c", "\n".join(lines)]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            stage, output, told = line.split()
            trained_by = {"09": ("retriever", "retriever+pseudo"), "10": ("retriever+stage2",), "11": ("llama",)}
            if system in trained_by.get(stage[:2], (system,)) and not (stage[:2] == "17" and dataset == "emoji"):
                assert told == output, stage
