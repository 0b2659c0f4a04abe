"""The settings in scripts/datasets/ fit the commands: a misspelt flag fails here, not on the CUDA machine."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro

from retriever import generate_pseudo_query, retrieve, train, train_stage2
from tests.tiny import assemble_clip, generate_codes, prepare_emb, rqvae_train, train_heads
from tools import fetch_emoji, prepare_captions

ROOT = Path(__file__).parent.parent
REQUIRED: dict[str, tuple[type[Any], list[str]]] = {
    "FETCH_EMOJI": (fetch_emoji.Config, []),
    "CAPTIONS": (prepare_captions.Config, ["--images", "."]),
    "CLIP": (prepare_emb.Config, ["--captions", "x"]),
    "ASSEMBLE_CLIP": (assemble_clip.Config, []),
    "TRAIN_HEADS": (train_heads.Config, ["--features", "x"]),
    "TRAIN_RQVAE": (rqvae_train.Config, ["--features", "x"]),
    "GENERATE_CODES": (generate_codes.Config, ["--features", "x", "--rqvae", "x"]),
    "PSEUDO_QUERIES": (generate_pseudo_query.Config, ["--dataset", "x"]),
    "TRAIN_RETRIEVER": (train.Config, ["--dataset", "x"]),
    "TRAIN_STAGE2": (train_stage2.Config, ["--dataset", "x", "--stage1", "x"]),
    "FINETUNE_LLAMA": (train.Config, ["--dataset", "x"]),
    "RETRIEVE": (retrieve.Config, ["--dataset", "x", "--retriever", "x"]),
}


def settings(dataset: str, array: str, **environment: str) -> list[str]:
    """One array of a dataset's settings, as the scripts pass it on; nothing when the dataset has none."""
    command = f'source scripts/env.sh; [ -z "${{{array}+x}}" ] || printf "%s\\0" "${{{array}[@]}}"'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "DATASET": dataset, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caption files need not be there for their flags to be right."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)


@pytest.mark.parametrize(
    ("dataset", "environment"),
    [
        ("emoji", {}),
        ("folder", {"PICTURES": "."}),
        ("flickr30k", {}),
        ("flickr30k", {"RECIPE": "faithful"}),
        ("mscoco", {}),
        ("mscoco", {"RECIPE": "faithful"}),
    ],
)
@pytest.mark.parametrize("array", REQUIRED)
def test_flags_are_the_commands_own(dataset: str, environment: dict[str, str], array: str, sources: None) -> None:
    config_type, required = REQUIRED[array]
    flags = settings(dataset, array, **environment)
    if flags or array == "GENERATE_CODES":
        tyro.cli(config_type, args=[*required, "--output", "out", *flags])


def test_the_faithful_recipe_is_the_published_one() -> None:
    flags = {array: settings("flickr30k", array, RECIPE="faithful") for array in ("TRAIN_RQVAE", "TRAIN_RETRIEVER")}
    rqvae = tyro.cli(rqvae_train.Config, args=["--features", "x", "--output", "y", *flags["TRAIN_RQVAE"]])
    assert (rqvae.shared_codebook, rqvae.codebook_size, rqvae.levels, rqvae.width) == (True, 1024, 4, 768)
    assert (rqvae.alignment, rqvae.align_at, rqvae.normalize, rqvae.skip) == ("mse", "after", False, False)
    assert (rqvae.lr, rqvae.batch_size, rqvae.epochs, rqvae.hidden) == (1e-4, 16384, 3000, (1024, 512))
    model = tyro.cli(train.Config, args=["--dataset", "x", "--output", "y", *flags["TRAIN_RETRIEVER"]])
    assert (model.language_model, model.epochs, model.lr, model.batch_size) == ("t5-base", 100, 1e-3, 128)
    assert (model.temperature, model.warmup, model.dropout, model.label_temperature) == (0.5, 0.1, 0.2, 0.0)
    assert (model.train_end, model.score_end, model.beams) == (True, True, 10)


def test_an_unknown_dataset_is_one_clear_line() -> None:
    done = subprocess.run(
        ["bash", "scripts/01_prepare_captions.sh"], cwd=ROOT, env={**os.environ, "DATASET": "flicker"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: DATASET=flicker: there is no scripts/datasets/flicker.sh; "
        "write one after scripts/datasets/flickr30k.sh\n"
    )


def test_a_users_own_file_reaches_every_stage(tmp_path: Path) -> None:
    """A path from where the user stands, given once: stages started by quickstart see the same settings."""
    folder = tmp_path / "my files"
    folder.mkdir()
    (folder / "mine.sh").write_text(f'STAGES="01_prepare_captions"\nIMAGES="{folder}"\nDATA="{folder}"\nCAPTIONS=()\n')
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh")], cwd=folder, env={**os.environ, "DATASET": "mine.sh"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == f"error: no usable picture: nothing in {folder} matches the source"
