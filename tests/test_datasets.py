"""The settings in scripts/datasets/ fit the commands: a misspelt flag fails here, not on the CUDA machine."""

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro

from models import voken_lm
from models.scorer import LORA_TARGETS, TRAINED_WHOLE, Lora
from reranker import convert
from reranker import test as test_reranker
from reranker import train as train_reranker
from retriever import rank_splits, retrieve, train, train_stage2
from retriever.pseudo_queries import generate as generate_pseudo_query
from retriever.report import report
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
    "CONVERT": (convert.Config, ["--captions", "x"]),
    "RANK": (rank_splits.Config, ["--dataset", "x", "--retriever", "x"]),
    "TRAIN_RERANKER": (train_reranker.Config, ["--lists", "x", "--tokens", "x"]),
    "TEST_RERANKER": (test_reranker.Config, ["--lists", "x", "--summary", "x", "--name", "x"]),
    "REPORT": (report.Config, ["--dataset", "x", "--summary", "x", "--name", "x"]),
}


def settings(dataset: str, array: str, **environment: str) -> list[str]:
    """One array of a dataset's settings, as the scripts pass it on; nothing when the dataset has none."""
    return all_settings(dataset, tuple(environment.items())).get(array, [])


@functools.cache
def all_settings(dataset: str, environment: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    """Every array of a dataset's settings that is not empty."""
    command = (
        f'source scripts/env.sh; for name in {" ".join(REQUIRED)} STAGES; do declare -n array="$name"; '
        'if [ -n "${array+x}" ]; then words=("${array[@]}"); printf "%s\\0" "$name" "${#words[@]}" "${words[@]}"; fi; '
        "done"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "DATASET": dataset, **dict(environment)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = iter(done.stdout.split("\0")[:-1])
    return {name: [next(words) for _ in range(int(next(words)))] for name in words}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caption files need not be there for their flags to be right."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)


@pytest.mark.parametrize(
    ("dataset", "environment"),
    [
        ("emoji", {}),
        ("folder", {"PICTURES": "."}),
        ("captioned", {"PICTURES": ".", "CAPTIONS_FILE": "README.md", "MODELS": "sample"}),
        ("captioned", {"PICTURES": ".", "CAPTIONS_FILE": "README.md", "MODELS": "hub"}),
        ("flickr30k", {}),
        ("flickr30k", {"RECIPE": "faithful"}),
        ("flickr30k", {"RECIPE": "large-batch"}),
        ("mscoco", {}),
        ("mscoco", {"RECIPE": "faithful"}),
        ("mscoco", {"RECIPE": "large-batch"}),
    ],
)
@pytest.mark.parametrize("array", REQUIRED)
def test_flags_are_the_commands_own(dataset: str, environment: dict[str, str], array: str, sources: None) -> None:
    config_type, required = REQUIRED[array]
    flags = settings(dataset, array, **environment)
    if flags or array == "GENERATE_CODES":
        tyro.cli(config_type, args=[*required, "--output", "out", *flags])


def test_the_faithful_recipe_is_the_published_one() -> None:
    arrays = ("TRAIN_RQVAE", "TRAIN_RETRIEVER", "TRAIN_STAGE2", "FINETUNE_LLAMA")
    flags = {array: settings("flickr30k", array, RECIPE="faithful") for array in arrays}
    rqvae = tyro.cli(rqvae_train.Config, args=["--features", "x", "--output", "y", *flags["TRAIN_RQVAE"]])
    assert (rqvae.shared_codebook, rqvae.codebook_size, rqvae.levels, rqvae.width) == (True, 1024, 4, 768)
    assert (rqvae.alignment, rqvae.align_at, rqvae.normalize, rqvae.skip) == ("mse", "after", False, False)
    assert (rqvae.shuffle, rqvae.kmeans_first_batch, rqvae.sinkhorn_temperature > 0) == (False, True, True)
    assert (rqvae.pairs, rqvae.pseudo_queries is None, rqvae.kmeans_balance) == ("caption", False, 0.0)
    assert (rqvae.lr, rqvae.batch_size, rqvae.epochs, rqvae.hidden) == (1e-4, 16384, 3000, (1024, 512))
    model = tyro.cli(train.Config, args=["--dataset", "x", "--output", "y", *flags["TRAIN_RETRIEVER"]])
    assert (model.language_model, model.epochs, model.lr, model.batch_size) == ("t5-base", 100, 1e-3, 128)
    assert (model.temperature, model.warmup, model.dropout, model.label_temperature) == (0.5, 0.1, 0.2, 0.0)
    assert (model.train_end, model.score_end, model.beams) == (True, True, 10)
    stage2 = tyro.cli(
        train_stage2.Config, args=["--dataset", "x", "--stage1", "x", "--output", "y", *flags["TRAIN_STAGE2"]]
    )
    assert (stage2.discriminative, stage2.discriminative_weight, stage2.negatives) == ("double-softmax", 0.5, 9)
    assert (stage2.epochs, stage2.lr, stage2.spare_same_words, stage2.mix) == (5, 1e-4, False, ())
    llama = tyro.cli(train.Config, args=["--dataset", "x", "--output", "y", *flags["FINETUNE_LLAMA"]])
    assert (llama.kind, llama.epochs, llama.lr, llama.batch_size, llama.accumulate) == ("causal", 10, 3e-4, 16, 1)
    assert llama.lora == voken_lm.Lora(8, 16.0, 0.1, ())
    assert (llama.temperature, llama.label_temperature) == (1.0, 0.0)


def test_the_faithful_reranker_is_the_published_one() -> None:
    flags = {array: settings("flickr30k", array, RECIPE="faithful") for array in ("TRAIN_RERANKER", "RANK", "CONVERT")}
    model = tyro.cli(
        train_reranker.Config, args=["--lists", "x", "--tokens", "x", "--output", "y", *flags["TRAIN_RERANKER"]]
    )
    assert model.lora == Lora(16, 32.0, 0.05, LORA_TARGETS, TRAINED_WHOLE)
    assert (model.language_model, model.lr, model.epochs) == ("AILab-CVC/seed-llama-8b-sft", 3e-5, 3)
    assert (model.batch_size * model.accumulate, model.weight_decay, model.warmup) == (16, 0.0, 0.1)
    assert (model.negatives, model.random_negatives, model.easing, model.by_picture) == (7, 0, 0.0, False)
    assert (model.compat, model.max_length, model.spare_same_words, model.top_k) == (True, 64, False, 50)
    lists = tyro.cli(rank_splits.Config, args=["--dataset", "x", "--retriever", "x", "--output", "y", *flags["RANK"]])
    assert (lists.train_beams, lists.beams, lists.score_end, lists.train_per_picture) == (100, 50, True, None)
    tokens = tyro.cli(convert.Config, args=["--captions", "x", "--output", "y", *flags["CONVERT"]])
    assert (tokens.tokenizer, tokens.interpolation) == ("seed", "bilinear")


@pytest.mark.parametrize(("dataset", "captions", "tested", "updates"), [
    ("flickr30k", 145_000, 1_000, 10 * 3000), ("mscoco", 566_747, 5_000, 289 * 5000),
])  # fmt: skip
def test_the_faithful_tokenizer_is_updated_as_often_as_the_published_one(
    dataset: str, captions: int, tested: int, updates: int
) -> None:
    """A row a caption of a train picture and a row a pseudo query of a test picture, cut as a loader cuts them."""
    flags = settings(dataset, "TRAIN_RQVAE", RECIPE="faithful")
    config = tyro.cli(rqvae_train.Config, args=["--features", "x", "--output", "y", *flags])
    flags = settings(dataset, "PSEUDO_QUERIES", RECIPE="faithful")
    pseudo = tyro.cli(generate_pseudo_query.Config, args=["--features", "x", "--output", "y", *flags])
    assert pseudo.splits == ("test",)  # of others, no published training has any
    assert config.epochs * -(-(captions + tested * pseudo.per_picture) // config.batch_size) == updates


@pytest.mark.parametrize("dataset", ["flickr30k", "mscoco"])
@pytest.mark.parametrize("recipe", ["better", "faithful", "large-batch"])
def test_every_batch_has_a_part_for_each_of_eight_processes(dataset: str, recipe: str) -> None:
    for array, config_type, needed in (
        ("TRAIN_RETRIEVER", train.Config, ("--dataset", "x")),
        ("TRAIN_STAGE2", train_stage2.Config, ("--dataset", "x", "--stage1", "x")),
        ("FINETUNE_LLAMA", train.Config, ("--dataset", "x")),
        ("TRAIN_RERANKER", train_reranker.Config, ("--lists", "x", "--tokens", "x")),
    ):
        flags = settings(dataset, array, RECIPE=recipe)
        config: Any = tyro.cli(config_type, args=[*needed, "--output", "y", *flags])
        assert config.batch_size % 8 == 0, array


def test_eight_gpus_get_batches_eight_times_as_large() -> None:
    """With the rate times the square root, as is the rule for Adam (Malladi et al. 2022)."""
    for array in ("TRAIN_RETRIEVER", "TRAIN_STAGE2", "FINETUNE_LLAMA", "TRAIN_RERANKER"):
        one, eight = (settings("flickr30k", array, RECIPE=recipe) for recipe in ("better", "large-batch"))
        for name, factor in (("--batch-size", 8.0), ("--lr", 8**0.5)):
            small, large = (float(last_of(flags, name)) for flags in (one, eight))
            assert large / small == pytest.approx(factor, rel=0.02), (array, name)


def last_of(flags: list[str], name: str) -> str:
    """The value that counts where an option is given twice."""
    return flags[len(flags) - flags[::-1].index(name)]


def test_an_unknown_dataset_is_one_clear_line() -> None:
    done = subprocess.run(
        ["bash", "scripts/01_prepare_captions.sh"], cwd=ROOT, env={**os.environ, "DATASET": "flicker"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == ("error: DATASET=flicker: there is no scripts/datasets/flicker.sh; did you mean flickr30k?\n")


def test_a_users_own_file_reaches_every_stage(tmp_path: Path) -> None:
    """A path from where the user stands, given once: stages started by quickstart see the same settings."""
    folder = tmp_path / "my files"
    folder.mkdir()
    (folder / "mine.sh").write_text(f'STAGES="01_prepare_captions"\nIMAGES="{folder}"\nDATA="{folder}"\nCAPTIONS=()\n')
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh")], cwd=folder, env={**os.environ, "DATASET": "mine.sh"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1].startswith(f"error: there is no picture below {folder} (3 other files: ")


def variables(system: str, *names: str, **environment: str) -> list[str]:
    """What env.sh makes of a SYSTEM."""
    command = "source scripts/env.sh; " + "; ".join(f'echo "${{{name}[*]}}"' for name in names)
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "DATASET": "emoji", "SYSTEM": system, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_system_names_its_folders_and_its_setting() -> None:
    output = "retriever/output/emoji"
    pseudo = f"--pseudo-queries {output}/08_pseudo_queries"
    for system, trained, start, flags in (
        ("retriever", "09_train/retriever", "", ""),
        ("retriever+pseudo", "09_train/retriever+pseudo", "09_train/retriever", pseudo),
        ("inductive+stage2", "10_stage2/inductive+stage2", "09_train/retriever", ""),
        ("retriever+stage2", "10_stage2/retriever+stage2", "09_train/retriever+pseudo", pseudo),
        ("llama", "11_llama/llama", "", ""),
        ("llama+pseudo", "11_llama/llama+pseudo", "", pseudo),
    ):
        started = f"--start {output}/{start}" if start else ""
        folder = f"{output}/{trained}"
        assert variables(system, "OWN", "TRAINED", "START", "PSEUDO") == [folder, folder, started, flags]
    assert variables("retriever+pseudo", "START", DATASET="flickr30k") == [""]  # it begins anew there
    assert variables("best", "TRAINED") == [f"{output}/10_stage2/retriever+stage2"]
    own = {"DATASET": "folder", "PICTURES": "photos"}
    for system, trained in (("best", "10_stage2/retriever+stage2"), ("retriever", "09_train/retriever")):
        assert variables(system, "TRAINED", **own) == [f"{output}/{trained}"]
    named = {"TRAINED": "my/retriever", "RQVAE": "my/rqvae"}
    assert variables("best", "TRAINED", "RQVAE", **own, **named) == list(named.values())
    ablation = variables("retriever", "RQVAE", "CODES", "OWN", "SUMMARY", ABLATION="x")
    folder = f"{output}/ablations/x"
    assert ablation == [
        f"{folder}/05_train_rqvae", f"{folder}/06_generate_codes", f"{folder}/09_train/retriever",
        f"{output}/ablations/summary.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SYSTEM": "retriver"}, "error: SYSTEM=retriver: write retriever, retriever+pseudo, retriever+stage2"),
        ({"LAUNCH": "accelerate launch --config_file scripts/accelerate/zero2.yaml"}, "needs DeepSpeed: install it"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", "scripts/12_retrieve.sh"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("train_retriever_t5", {"SYSTEM": "retriever+stage2"}, "trained by scripts/10_train_retriever_t5_stage2.sh"),
        ("09_train_retriever_t5", {"SYSTEM": "llama"}, "trained by scripts/11_finetune_retriever_llama.sh"),
        ("10_train_retriever_t5_stage2", {"SYSTEM": "retriever+pseudo"}, "trained by scripts/09_train_retriever_t5.sh"),
        ("finetune_retriever_llama", {"SYSTEM": "retriever"}, "trained by scripts/09_train_retriever_t5.sh"),
        ("08_generate_pseudo_query", {"ABLATION": "x"}, "the same in every ABLATION"),
    ],
)
def test_a_script_refuses_what_it_does_not_make(script: str, environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", f"scripts/{script}.sh"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


@pytest.mark.parametrize("dataset", ["emoji", "flickr30k", "mscoco"])
@pytest.mark.parametrize("recipe", ["better", "faithful"])
def test_stages_are_scripts_in_an_order_that_works(dataset: str, recipe: str) -> None:
    """A search comes after the training it searches with, a test after its search."""
    done: set[tuple[str, str]] = set()
    for item in " ".join(settings(dataset, "STAGES", RECIPE=recipe)).split():
        script, _, system = item.partition("@")
        assert (ROOT / "scripts" / f"{script}.sh").is_file()
        system = system or "retriever"
        if script == "12_retrieve":
            stage = "10_train_retriever_t5_stage2" if system.endswith("+stage2") else "09_train_retriever_t5"
            assert (stage, system) in done
        if script == "13_test_retriever":
            assert ("12_retrieve", system) in done
        if script == "10_train_retriever_t5_stage2":
            assert ("08_generate_pseudo_query", "retriever") in done
            assert ("09_train_retriever_t5", system.replace("+stage2", "+pseudo")) in done
        if script in ("17_finetune_reranker_llama", "18_test_reranker_llama"):
            assert {("16_prepare_reranker_dataset", system), ("15_convert_voken_to_seed", "retriever")} <= done
        if script == "18_test_reranker_llama":
            (trained_on,) = variables(system, "RERANKER_SYSTEM", DATASET=dataset)
            assert ("17_finetune_reranker_llama", trained_on) in done
        done.add((script, system))
    assert {("13_test_retriever", "retriever+stage2"), ("18_test_reranker_llama", "retriever+stage2")} <= done
