"""The rehearsal: stand-ins in the published form, a plan that has every stage, steps through the real scripts."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from benchmarks.rehearsal import data, models, settings, stages, usage, weights, words
from benchmarks.rehearsal.__main__ import Config
from benchmarks.rehearsal.rehearse import Rehearsal, Row, Scale, failure, markdown
from benchmarks.rehearsal.stages import Counts, Step, plan
from tools.errors import BadInput

RECIPES = ("better", "faithful")
SMALL = data.Collection("flickr30k", "dataset_flickr30k.json", (("train", 40), ("val", 6), ("test", 6)))


def rows_of(collection: data.Collection) -> list[data.Row]:
    return list(data.records(collection, np.random.default_rng(0)))


def test_flickr30k_has_its_counts_and_keys() -> None:
    assert dict(data.FLICKR30K.splits) == {"train": 29_000, "val": 1_014, "test": 1_000}
    tenth = 2_900
    rows = rows_of(dataclasses.replace(data.FLICKR30K, splits=(("train", tenth), ("val", 101), ("test", 100))))
    assert Counter(row["split"] for row in rows) == {"train": tenth, "val": 101, "test": 100}
    assert list(rows[0]) == ["sentids", "imgid", "sentences", "split", "filename"]
    assert list(rows[0]["sentences"][0]) == ["tokens", "raw", "imgid", "sentid"]
    texts = [each["raw"] for row in rows for each in row["sentences"]]
    assert len(texts) == 5 * len(rows) == len(set(texts))
    assert 10 <= np.mean([len(text.split()) for text in texts]) <= 14
    assert [each for row in rows for each in row["sentids"]] == list(range(len(texts)))
    assert len({row["filename"] for row in rows}) == len(rows)


def test_coco_has_its_counts_folders_and_further_captions() -> None:
    splits, more = dict(data.MSCOCO.splits), dict(data.MSCOCO.more)
    assert splits == {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
    assert (5 * splits["test"] + more["test"], 5 * splits["val"] + more["val"]) == (25_010, 25_010)
    assert 5 * sum(splits.values()) + sum(more.values()) == 616_767
    fewer = tuple((split, count // 50) for split, count in data.MSCOCO.splits)
    rows = rows_of(dataclasses.replace(data.MSCOCO, splits=fewer))
    captions = Counter[str]()
    for row in rows:
        captions[row["split"]] += len(row["sentences"])
        folder = "train2014" if row["split"] == "train" else "val2014"
        assert (row["filepath"], row["filename"]) == (folder, f"COCO_{folder}_{row['cocoid']:012d}.jpg")
    assert captions["test"] == captions["val"] == 5 * 100 + 10
    assert list(rows[0]) == ["filepath", "sentids", "filename", "imgid", "split", "sentences", "cocoid"]
    assert {len(row["sentences"]) for row in rows} == {5, 6, 7}


def test_some_rows_are_the_first_of_each_split(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "all.json", SMALL, rows_of(SMALL))
    chosen = data.some_rows(tmp_path / "all.json", {"train": 3, "val": 2, "test": 1})
    assert Counter(row["split"] for row in chosen) == {"train": 3, "val": 2, "test": 1}
    train = [row for row in rows_of(SMALL) if row["split"] == "train"]
    assert [row for row in chosen if row["split"] == "train"] == train[:3]


def test_pictures_are_of_all_kinds_and_files_of_their_own(tmp_path: Path) -> None:
    data.write_collection(tmp_path, SMALL, seed=0, kinds=16)
    files = [tmp_path / "images" / row["filename"] for row in json.loads((tmp_path / SMALL.file).read_text())["images"]]
    assert not any(file.is_symlink() for file in files)
    modes, turned = Counter[str](), 0
    for file in files[:16]:
        with Image.open(file) as picture:
            modes[picture.mode] += 1
            turned += ImageOps.exif_transpose(picture).size != picture.size
    assert modes == {"RGB": 13, "L": 2, "CMYK": 1}
    assert turned == 1
    assert len({file.read_bytes() for file in files}) == 16


def test_captions_follow_from_the_seed() -> None:
    first, second = (list(words.captions(5, np.random.default_rng(seed))) for seed in (0, 0))
    assert first == second != list(words.captions(5, np.random.default_rng(1)))


def test_no_two_rows_of_random_weights_are_alike() -> None:
    table = weights.RandomWeights(0, scale=lambda name, shape: 0.02).tensor("x.weight", (3000, 1024), torch.float32)
    assert len({row.numpy().tobytes() for row in table}) == len(table)
    assert table.std().item() == pytest.approx(0.02, rel=0.01)


LOADING = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from benchmarks.rehearsal.models import *
from models.captioner import load_captioner
from models.clip import load_clip
from models.pretrained import load_tokenizer, load_whole
sizes = {name: len(load_tokenizer(name)) for name in (T5_BASE, LLAMA2, LLAMA3, SEED_WORDS)}
causal = [(name, AutoModelForCausalLM) for name in (LLAMA2, LLAMA3)]
for name, loader in ((T5_BASE, AutoModelForSeq2SeqLM), *causal, (SEED_LLAMA, AutoModel)):
    sizes[f"rows of {name}"] = load_whole(loader, name, dtype="auto").get_input_embeddings().num_embeddings
captioner = load_captioner(BLIP2, device=torch.device("cpu"), dtype=torch.float32)
sizes[BLIP2] = len(captioner.tokenizer)
sizes[CLIP] = load_clip(sys.argv[1]).image_size[0]
print(json.dumps(sizes))
"""


@pytest.fixture(scope="module")
def scale() -> Scale:
    return Scale(models.TINY, Counts(pictures=(12, 4, 4)), {"flickr30k": SMALL}, kinds=16)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, scale: Scale) -> Rehearsal:
    """A rehearsal of tiny stand-ins with its folders and settings."""
    folder = tmp_path_factory.mktemp("rehearsal")
    clip = models.Models(folder / "models", scale.sizes, seed=0).cache / f"models--{models.CLIP.replace('/', '--')}"
    commit = "$(cat " + str(clip / "refs" / "main") + ")"
    more = (
        f"CLIP=(--model {clip}/snapshots/{commit} --batch-size 16 --workers 0)",
        "TRAIN_RQVAE+=(--width 16 --hidden 16 --codebook-size 8)",
        f"CONVERT=(--tokenizer patches --model {clip}/snapshots/{commit} --grid 2 --patch-width 16 --codebook-size 4)",
    )
    tiny = Scale(scale.sizes, scale.counts, scale.collections, scale.kinds, more)
    made = Rehearsal(folder, "flickr30k", tiny)
    made.make_stand_ins()
    made.check_out()
    made.begin("better", first="better")
    return made


def test_models_are_found_by_their_names_without_a_network(rehearsal: Rehearsal) -> None:
    environment = {**os.environ, "HF_HOME": str(rehearsal.models.home), "HF_HUB_OFFLINE": "1"}
    clip = str(rehearsal.models.snapshot(models.CLIP))
    done = subprocess.run(
        [sys.executable, "-c", LOADING, clip], cwd=settings.ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "t5-base": 1_100,
        "meta-llama/Llama-2-7b-hf": 1_000,
        "meta-llama/Meta-Llama-3-8B": 1_200 + 256,
        "AILab-CVC/seed-tokenizer-2": 1_000 + 8 + 2,  # it has no config.json
        "rows of t5-base": 1_128,
        "rows of meta-llama/Llama-2-7b-hf": 1_000,
        "rows of meta-llama/Meta-Llama-3-8B": 1_456,
        "rows of AILab-CVC/seed-llama-8b-sft": 1_010,
        "Salesforce/blip2-opt-2.7b": 1_101,
        "timm/vit_large_patch14_clip_336.openai": 32,
    }


def test_what_is_there_is_not_made_again(rehearsal: Rehearsal) -> None:
    weights_of = rehearsal.models.snapshot(models.T5_BASE) / "model.safetensors"
    before = weights_of.stat().st_mtime_ns
    rehearsal.make_stand_ins()
    assert weights_of.stat().st_mtime_ns == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dataset", ["flickr30k", "mscoco"])
def test_the_plan_has_every_stage_and_needs_nothing_that_is_not_in_it(dataset: str, recipe: str) -> None:
    listed, arrays = settings.read_stages(dataset, recipe), settings.read_arrays(dataset, recipe)
    steps = plan(listed, arrays, Counts(), first=True, two=True)
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    scripts = {(step.script, step.system) for step in steps}
    assert {(stage.partition("@")[0], stage.partition("@")[2] or "retriever") for stage in listed} <= scripts
    assert ("11_finetune_retriever_llama", "llama") in scripts
    for place, step in enumerate(steps):
        assert set(step.needs) <= set(names[:place]), step
        assert step.script == "llama3" or (settings.ROOT / "scripts" / f"{step.script}.sh").is_file()


def test_an_epoch_is_cut_to_whole_steps() -> None:
    arrays = {name: ["--batch-size", "4", "--accumulate", "3"] for name in settings.ARRAYS}
    flags = stages.cuts("17_finetune_reranker_llama", arrays, Counts(steps=2))
    assert flags[:4] == ("--epochs", "1", "--queries-per-epoch", "24")


def test_steps_run_through_the_real_scripts(rehearsal: Rehearsal) -> None:
    """The first stages; one that is refused; one that needs it."""
    arrays = settings.read_arrays(rehearsal.dataset, "better")
    scripts = ("01_prepare_captions", "03_prepare_emb", "05_train_rqvae", "06_generate_codes")
    steps = plan([*scripts, "13_test_retriever"], arrays, Counts(), first=True, two=False)
    ran: set[str] = set()
    for step in steps:
        if step.script in scripts and step.form != "few" and step.name != "cut: 06_generate_codes":
            row = rehearsal.run_step(step, "better", ran)
            assert (row.state, row.reason) == ("ran", ""), row
            assert row.seconds is not None
            assert row.peak is not None
            assert row.peak > 0
            ran.add(step.name)
    codes = rehearsal.output("whole", "RQ-VAE", "better") / "06_generate_codes" / "codes.npy"
    assert np.load(codes).shape == (52, 4)
    refused = Step("01_prepare_captions", "few", flags=("--codes", "3"))
    row = rehearsal.run_step(refused, "better", ran)
    assert row.state == "failed"
    assert "--codes is not an option of this command" in row.reason
    row = rehearsal.run_step(next(step for step in stages.of_few() if step.needs), "better", ran)
    assert (row.state, row.reason) == ("left out", "it needs few: 01_prepare_captions")


def test_why_a_step_failed_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text, told in (
        ("reading ...\nerror: --lr is 0\n", "error: --lr is 0"),
        ("Traceback\nValueError: no\n=====\n", "ValueError: no"),
        ("Root Cause:\n  exitcode  : -9 (pid: 7)\n=====\n", "it was killed, as when memory runs out"),
    ):
        log.write_text(text)
        found = failure(usage.Usage(status=1, seconds=1.0, peak=1.0, timed_out=False), log)
        assert found == f"status 1: {told} ({log})"


def test_memory_of_children_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child holds its memory until it has been seen."""
    seen, real = tmp_path / "seen", usage.memory

    def memory(pid: int) -> int:
        found = real(pid)
        if found > 300 << 20:
            seen.touch()
        return found

    monkeypatch.setattr(usage, "memory", memory)
    child = (
        "import pathlib, time; kept = bytearray(300 << 20)\n"
        f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.1)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = usage.run_and_watch(
        [sys.executable, "-c", parent], folder=tmp_path, environment=os.environ, log=tmp_path / "log", most_seconds=300
    )
    assert (found.status, found.timed_out) == (0, False)
    assert 0.29 < found.peak < 0.6


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    parent = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    log = tmp_path / "log"
    found = usage.run_and_watch(
        [sys.executable, "-c", parent], folder=tmp_path, environment=os.environ, log=log, most_seconds=2
    )
    assert found.timed_out
    assert found.status == -9
    assert not Path(f"/proc/{log.read_text().strip()}/cmdline").is_file() or not Path(
        f"/proc/{log.read_text().strip()}/cmdline"
    ).read_bytes().startswith(b"sleep")


def test_results_are_a_table() -> None:
    rows = [
        Row("better", "whole: 01_prepare_captions", "ran", 27.0, 0.61, "nothing"),
        Row("better", "cut: 03_prepare_emb", "failed", 1.0, 0.2, "x", "status 2: error: no such file"),
        Row("better", "cut: 06_generate_codes", "left out", None, None, "x", "it needs cut: 03_prepare_emb"),
    ]
    assert markdown(rows).splitlines()[2:] == [
        "| better | whole: 01_prepare_captions | ran | 27.0 | 0.61 | nothing |",
        "| better | cut: 03_prepare_emb | failed: status 2: error: no such file | 1.0 | 0.2 | x |",
        "| better | cut: 06_generate_codes | left out: it needs cut: 03_prepare_emb | – | – | x |",
    ]


def test_an_unknown_data_set_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="emoji cannot be rehearsed: write flickr30k or mscoco"):
        Rehearsal(tmp_path, "emoji", Scale())
    assert Config("flickr30k").recipes == RECIPES


def test_steps_are_told_apart() -> None:
    names = {Step("03_prepare_emb", "few", note=note).name for note in ("", "model by tag", "two processes")}
    assert names == {"few: 03_prepare_emb", "few: 03_prepare_emb (model by tag)", "few: 03_prepare_emb (two processes)"}
