"""Several processes: the same files as one, clear ends, and nothing lost when one of them dies.

Most tests fork: the copies get what a launcher would give them, and need not import everything again.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import models.clip
from models import compute
from models.compute import pick_device
from models.decoding import make_writer
from models.voken_lm import VokenLM
from retriever import retrieve, train, train_stage2
from retriever.beam import beam_search
from retriever.data import read_data
from retriever.queries import LiveQueries, StoredQueries
from retriever.retrieve import queries_per_second, search_queries
from tests.chain import RQVAE, Chain, encode_config, encoder_decoder_config, files_of
from tests.test_pipeline import retrieve_config, t5_config
from tests.test_training import llama_config, stage2_config
from tests.tiny import prepare_emb, rqvae_train, tiny_encoder_decoder
from tests.warm import warm_context
from tools import processes
from tools.blocks import Blocks
from tools.command_line import commands
from tools.curves import read_curves
from tools.errors import EXIT_BAD_INPUT, BadInput
from tools.files import read_json, write_json
from tools.vokens import VokenSpace

ROOT = Path(__file__).parent.parent
SECONDS = 120  # until a test gives up on a process


@dataclass
class Started:
    """Processes that work together, and what they have printed."""

    each: list[ForkProcess]
    log: Path

    def statuses(self) -> list[int | None]:
        """Wait for all of them."""
        for one in self.each:
            one.join(SECONDS)
        return [one.exitcode for one in self.each]


def start(function: Callable[[], Any], log: Path, *, count: int = 2, anew: bool = False) -> Started:
    """Run a function in copies of this process that are told what a launcher would tell them.

    Args:
        anew: in copies of a process that has run nothing. A copy of this one cannot compute gradients once other tests
            have left threads of torch's autograd or of a tokenizer's training in it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.write_text("")
    context: Any = warm_context() if anew else multiprocessing.get_context("fork")
    variables = dict(os.environ)  # the other process has those of the test that needed it first
    each = [context.Process(target=_take_part, args=(function, log, n, count, port, variables)) for n in range(count)]
    for one in each:
        one.start()
    return Started(each, log)


def _take_part(
    function: Callable[[], Any], log: Path, number: int, count: int, port: int, variables: dict[str, str]
) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), descriptor)
    torch.cuda.is_available = lambda: False  # a copy of a process that has used a GPU cannot
    torch.set_num_threads(1)  # as torchrun has it
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ |= {**variables, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function()
    sys.stdout.flush()


def command(name: str, **options: Any) -> Callable[[], Any]:
    """What `python -m name --options` does."""
    return partial(_run_module, name, arguments(options))


def _run_module(name: str, words: list[str]) -> None:
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def arguments(options: dict[str, Any]) -> list[str]:
    """Options as they are typed; several values as a tuple."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def encoding(chain: Chain, output: Path) -> dict[str, Any]:
    """Options of RQ-VAE.prepare_emb that `chain.towers` was made with."""
    return {
        "captions": chain.captions, "model": chain.root / "clip", "output": output, "layer": "tower", "batch_size": 8,
        "workers": 0, "precision": "fp32", "device": "cpu",
    }  # fmt: skip


def assert_same(one: Path, other: Path) -> None:
    """The same files with the same content; the manifests may tell other times."""
    assert files_of(one) == files_of(other)
    manifests = [read_json(folder / "manifest.json") for folder in (one, other)]
    assert manifests[0]["outputs"] == manifests[1]["outputs"]
    for name in manifests[0]["outputs"]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert manifests[0]["facts"].keys() == manifests[1]["facts"].keys()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Process and pictures of each batch of pictures that is encoded from here on, slowly."""
    log, real = tmp_path / "encoded.log", models.clip.encode_images
    log.write_text("")

    def encode(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        with log.open("a") as file:
            file.write(f"{processes.number()}:{len(pixels)}\n")
        return real(clip, pixels)

    monkeypatch.setattr(models.clip, "encode_images", encode)
    return lambda: log.read_text().split()


def test_encoding_on_two_processes(chain: Chain, tmp_path: Path, encoded: Callable[[], list[str]]) -> None:
    started = start(command("RQ-VAE.prepare_emb", **encoding(chain, tmp_path / "two")), tmp_path / "log")
    assert started.statuses() == [0, 0]
    assert sorted(encoded()) == ["0:8"] * 3 + ["1:8"] * 3
    assert_same(tmp_path / "two", chain.towers)
    assert started.log.read_text().count("48 pictures and their captions encoded") == 1
    again = start(command("RQ-VAE.prepare_emb", **encoding(chain, tmp_path / "two")), tmp_path / "log")
    assert again.statuses() == [0, 0]
    assert again.log.read_text().count("nothing to do") == 1


def test_searching_on_two_processes(chain: Chain, retriever: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 1, "pools": ("test", "all")}  # 24 queries: two blocks
    retrieve.main(retrieve_config(chain, retriever, tmp_path / "one", **settings))
    options = {"dataset": chain.dataset, "retriever": retriever, "output": tmp_path / "two", **settings}
    started = start(command("retriever.retrieve", **options, precision="fp32", device="cpu"), tmp_path / "log")
    assert started.statuses() == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")
    metrics = read_json(tmp_path / "two" / "manifest.json")["metrics"]
    assert all(metrics[pool]["queries_per_second"] > 0 for pool in ("test", "all"))


def train_anew(main: Callable[[Any], None], config: Any) -> None:
    """A training in a copy of a process that may have trained already, alone."""
    AcceleratorState._reset_state(True)
    main(config)


@pytest.mark.parametrize("kind", ["t5", "llama", "stage2"])
def test_training_on_two_processes(kind: str, chain: Chain, tmp_path: Path) -> None:
    """The same global batches, so the same weights to rounding; 15 captions do not divide by two, nor do 96 by 15."""
    settings: dict[str, Any] = {"batch_size": 15, "epochs": 2, "validate_every": 1}
    module: Any = train
    if kind == "stage2":
        module, weak = train_stage2, encoder_decoder_config(chain, tmp_path / "weak", epochs=1, lr=1e-5, dropout=0.0)
        train.main(weak)
        build: Any = partial(stage2_config, chain, weak.output, **{**settings, "epochs": 3, "lr": 1e-2})
    elif kind == "llama":
        build = partial(llama_config, chain, lora_dropout=0.0, **settings)
    else:
        build = partial(t5_config, chain, dropout=0.0, **settings)
    one, two = build(tmp_path / "one"), build(tmp_path / "two")
    module.main(one)
    started = start(partial(train_anew, module.main, two), tmp_path / "log", anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    assert files_of(one.output) == files_of(two.output)
    metrics = [read_json(config.output / "manifest.json")["metrics"] for config in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1])
    assert metrics[0]["val/epoch"] > 0  # stage 2 did not keep its start
    codes = torch.tensor(read_data(chain.dataset).codes[:2])
    logits = []
    for config in (one, two):  # not weights: the bias of attention's keys changes nothing, and wanders by rounding
        lm = VokenLM.from_pretrained(config.output / "model")
        with torch.no_grad():
            logits.append(lm(lm.pad(lm.tokenize(["a red circle", "drawing of a blue ring"])), codes))
    assert torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"sinkhorn_temperature": 0.05, "alignment": "contrastive", "epochs": 4}])
def test_the_tokenizer_on_two_processes(options: dict[str, Any], chain: Chain, tmp_path: Path) -> None:
    """Without hidden layers there is no batch norm, and the weights are those of one process, to rounding.

    Balance and contrast are those of the whole batch.
    """
    settings: dict[str, Any] = {**RQVAE, "batch_size": 15, "pairs": "caption", "dropout": 0.0, "hidden": (), **options}
    one, two = (
        rqvae_train.Config(features=chain.features, output=tmp_path / name, **settings) for name in ("one", "two")
    )
    rqvae_train.main(one)
    started = start(partial(train_anew, rqvae_train.main, two), tmp_path / "log", anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    assert files_of(one.output) == files_of(two.output)
    first, second = (load_file(config.output / "model.safetensors") for config in (one, two))
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-4), name
    losses = [[row["train/alignment"] for row in read_curves(config.output) if "train/alignment" in row]
              for config in (one, two)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_sharing_a_model_in_parts_is_not_for_the_tokenizer(chain: Chain, tmp_path: Path) -> None:
    """A launch with DeepSpeed for the whole chain trains it in whole copies."""
    config = rqvae_train.Config(features=chain.features, output=tmp_path / "run", **{**RQVAE, "epochs": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        train_anew(rqvae_train.main, config)
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert (config.output / "model.safetensors").is_file()


def test_every_process_has_the_tokenizers_weights(chain: Chain, tmp_path: Path) -> None:
    """With batch norm each process has statistics of its own, and moves unused codes by them: the main one's count."""
    settings = {**RQVAE, "codebook_size": 24, "epochs": 7, "revive_every": 2}
    config = rqvae_train.Config(features=chain.features, output=tmp_path / "run", **settings)
    log = tmp_path / "log"
    started = start(partial(train_anew, partial(tokenizer_hashes, tmp_path), config), log, anew=True)
    assert started.statuses() == [0, 0], started.log.read_text()
    assert (tmp_path / "hash-0").read_text() == (tmp_path / "hash-1").read_text()


def tokenizer_hashes(folder: Path, config: Any) -> None:
    """Train the tokenizer, and write down what each process's weights are at the end."""
    real = rqvae_train.train

    def train_and_hash(model: torch.nn.Module, *args: Any) -> Any:
        checkpoint = real(model, *args)
        values = torch.cat([value.detach().flatten() for value in model.parameters()])
        (folder / f"hash-{processes.number()}").write_text(hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rqvae_train, "train", train_and_hash)
        rqvae_train.main(config)


def test_commands_that_share_nothing_run_once(chain: Chain, tmp_path: Path) -> None:
    options = {"features": chain.features, "rqvae": chain.rqvae, "output": tmp_path / "codes", "device": "cpu"}
    assert start(command("RQ-VAE.generate_codes", **options), tmp_path / "log").statuses() == [0, 0]
    assert_same(tmp_path / "codes", chain.codes)
    options = {"codes": chain.codes, "output": tmp_path / "dataset"}
    assert start(command("retriever.prepare", **options), tmp_path / "log").statuses() == [0, 0]
    assert_same(tmp_path / "dataset", chain.dataset)


def test_a_mistake_is_one_line_and_a_status(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when no process waits for another: whichever comes first says it."""
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = encoding(chain, tmp_path / "run")
    wrong = start(command("RQ-VAE.prepare_emb", **options, nonsense=3), tmp_path / "wrong.log")
    unfinished = start(command("RQ-VAE.prepare_emb", **{**options, "captions": tmp_path}), tmp_path / "unfinished.log")
    assert wrong.statuses() == [EXIT_BAD_INPUT] * 2
    assert wrong.log.read_text() == "error: --nonsense is not an option of this command: --help lists the options\n"
    assert unfinished.statuses() == [EXIT_BAD_INPUT] * 2
    line = f"error: {tmp_path} has no manifest.json: run bash scripts/01_prepare_captions.sh first\n"
    assert unfinished.log.read_text() == line
    prepare_emb.main(encode_config(chain.captions, str(chain.root / "clip"), tmp_path / "run", layer="tower"))
    refused = start(command("RQ-VAE.prepare_emb", **{**options, "layer": "embedding"}), tmp_path / "refused.log")
    assert refused.statuses() == [EXIT_BAD_INPUT] * 2
    assert refused.log.read_text().count("--layer was tower, now embedding") == 1


@pytest.mark.parametrize("first", [0, 1])
def test_whichever_process_comes_first_says_a_line(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MASTER_PORT", "1")
    for number in (first, 1 - first):
        be(monkeypatch, number, 2)
        processes.say_once("error: no space")
    assert capsys.readouterr().err == "error: no space\n"
    processes.say_once("error: another")
    monkeypatch.setenv("MASTER_PORT", "2")  # another launch
    processes.say_once("error: no space")
    assert capsys.readouterr().err == "error: another\nerror: no space\n"


def test_a_line_waits_for_the_one_who_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed before it could print leaves the line to the others."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    barrier = multiprocessing.get_context("fork").Barrier(3)

    def speak() -> None:
        barrier.wait()
        if processes.number() == 0:
            with processes._said("x").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.kill(os.getpid(), signal.SIGKILL)
        processes.say_once("x")

    started = start(speak, tmp_path / "log", count=3)
    assert sorted(map(str, started.statuses())) == ["-9", "0", "0"]
    assert started.log.read_text() == "x\n"


def test_a_line_is_said_where_no_file_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    be(monkeypatch, 1, 2)
    processes.say_once("error: no space")
    assert capsys.readouterr().err == "error: no space\n"


def test_after_a_kill_any_number_of_processes_goes_on(
    chain: Chain, tmp_path: Path, encoded: Callable[[], list[str]]
) -> None:
    output, blocks = tmp_path / "cut", tmp_path / "cut" / "resume" / "images"
    run = command("RQ-VAE.prepare_emb", **encoding(chain, output))
    started = start(run, tmp_path / "log")
    began = time.monotonic()
    while len(list(blocks.glob("*.npy"))) < 2 and time.monotonic() - began < SECONDS:
        time.sleep(0.01)
    assert started.each[1].pid is not None
    os.kill(started.each[1].pid, signal.SIGKILL)
    assert started.statuses() == [EXIT_BAD_INPUT, -signal.SIGKILL]
    assert "error: process 0 of 2 lost another one" in started.log.read_text()
    assert not (output / "manifest.json").exists()
    kept, before = len(list(blocks.glob("*.npy"))), len(encoded())
    assert 2 <= kept < 6
    started = start(run, tmp_path / "log", count=3)
    assert started.statuses() == [0, 0, 0]
    assert "\nRQ-VAE.prepare_emb: resuming in " in started.log.read_text()
    assert len(encoded()) - before == 6 - kept  # no block twice
    assert_same(output, chain.towers)


def test_under_a_launcher_one_unreadable_picture_ends_all(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, as `torchrun` starts them; then one process goes on."""
    output, picture = tmp_path / "cut", chain.root / "images" / "grey-ring.png"  # of the last batch
    words = arguments(encoding(chain, output))
    hidden = picture.rename(picture.with_suffix(".hidden"))
    try:
        launched = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "RQ-VAE.prepare_emb", *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}, capture_output=True,
            text=True, timeout=SECONDS,
        )  # fmt: skip
    finally:
        hidden.rename(picture)
    assert launched.returncode != 0
    assert launched.stderr.count(f"error: {picture} cannot be read any more") == 1
    kept = len(list((output / "resume" / "images").glob("*.npy")))
    assert 2 <= kept <= 5
    encoded: list[int] = []
    real = prepare_emb.encode_images

    def encode(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return real(clip, pixels)

    monkeypatch.setattr(prepare_emb, "encode_images", encode)
    prepare_emb.main(encode_config(chain.captions, str(chain.root / "clip"), output, layer="tower"))
    assert encoded == [8] * (6 - kept)
    assert_same(output, chain.towers)


def test_ranked_lists_and_scores_are_exactly_those_of_one_process(
    chain: Chain, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "BLOCK_BATCHES", 3)
    data = read_data(chain.dataset)
    lm = VokenLM.from_pretrained(retriever / "model")
    live = LiveQueries(lm, data.queries("test").texts)

    def search(folder: Path | None) -> list[Any]:
        options: dict[str, Any] = {"beams": 4, "keep": 4, "batch_size": 2, "blocks_folder": folder}
        ranking = search_queries(make_writer(lm, "fp32"), live, data.codes, data.rows("all"), **options)
        return [[one.rows, one.scores] for one in ranking]

    expected = search(None)
    started = start(
        lambda: write_json(tmp_path / f"{processes.number()}.json", search(tmp_path / "blocks")), tmp_path / "log"
    )
    assert started.statuses() == [0, 0]
    assert [read_json(tmp_path / f"{number}.json") for number in range(2)] == [expected] * 2
    monkeypatch.setattr(retrieve, "beam_search", lambda *_, **__: 1 / 0)
    assert search(tmp_path / "blocks") == expected  # found, not searched


def test_a_killed_search_goes_on_at_its_last_block(
    chain: Chain, retriever: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve.main(retrieve_config(chain, retriever, tmp_path / "one", batch_size=1))
    searched = 0

    def search(*args: Any, **options: Any) -> Any:
        nonlocal searched
        searched += 1
        if searched == 20:
            raise KeyboardInterrupt
        return beam_search(*args, **options)

    monkeypatch.setattr(retrieve, "beam_search", search)
    with pytest.raises(KeyboardInterrupt):
        retrieve.main(retrieve_config(chain, retriever, tmp_path / "cut", batch_size=1))
    retrieve.main(retrieve_config(chain, retriever, tmp_path / "cut", batch_size=1))
    assert searched == 20 + 24 - retrieve.BLOCK_BATCHES
    assert_same(tmp_path / "cut", tmp_path / "one")


def test_speed_is_that_of_the_slowest_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        (tmp_path / f"{number:06d}.jsonl").write_text(json.dumps({"seconds": seconds}) + "\n")
    assert queries_per_second(tmp_path, 160, tokenising=1.0) == pytest.approx(160 / 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert queries_per_second(tmp_path, 160, tokenising=1.0) == pytest.approx(160 / 6)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert queries_per_second(tmp_path, 160, tokenising=0.0) == pytest.approx(160 / 4)


def test_stored_queries_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.queries.ENCODE_BATCH", 2)
    lm = tiny_encoder_decoder(tmp_path / "lm", VokenSpace(3, 5, shared=False))
    texts = ["a red circle", "blue", "drawing of a small green square", "a ring", "small blue line", "red", "a cross"]

    def store(folder: Path) -> StoredQueries:
        folder.mkdir(exist_ok=True)
        return StoredQueries(lm, texts, folder=folder, name="train", dtype=torch.float32)

    one = store(tmp_path / "one")
    started = start(
        lambda: np.save(tmp_path / f"{processes.number()}.npy", store(tmp_path / "two").states.numpy()),
        tmp_path / "log",
    )
    assert started.statuses() == [0, 0]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["train.npy"]
    assert (tmp_path / "two" / "train.npy").read_bytes() == (tmp_path / "one" / "train.npy").read_bytes()
    for number in range(2):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), one.states.numpy())


def be(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    """Take a process's number, without the others."""
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(processes, "wait", lambda: None)
    monkeypatch.setattr(processes, "share", lambda value: value)
    monkeypatch.setattr(processes, "is_main", lambda: True)  # it looks for itself


def test_blocks_are_shared_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for number in range(3):
        be(monkeypatch, number, 3)
        shares.append(Blocks(tmp_path / "blocks", 8, suffix=".txt").left)
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    work = Blocks(tmp_path / "blocks", 8, suffix=".txt")
    for done in (0, 1, 4):
        work.path(done).write_text(str(done))
    shares = []
    for number in range(2):  # fewer processes go on
        be(monkeypatch, number, 2)
        shares.append(Blocks(tmp_path / "blocks", 8, suffix=".txt").left)
    assert shares == [[2, 5, 7], [3, 6]]
    for block in (2, 3, 5, 6, 7):
        work.path(block).write_text(str(block))
    assert [path.read_text() for path in work.gather()] == [str(block) for block in range(8)]


def test_a_folder_that_is_not_shared_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.blocks.SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(BadInput, match=r"000000\.npy is finished but not to be seen here"):
        Blocks(tmp_path / "blocks", 1).gather()


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.number(), processes.count(), processes.on_this_machine()) == (0, 1, 0)
    assert processes.is_main()
    processes.connect()
    processes.wait()
    assert (processes.share("mine"), processes.collect("mine")) == ("mine", ["mine"])


def test_numbers_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (processes.number(), processes.count(), processes.on_this_machine()) == (5, 8, 1)
    assert not processes.is_main()
    processes.go_alone()
    assert (processes.number(), processes.count(), processes.on_this_machine()) == (0, 1, 0)


def test_each_process_gets_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(compute, "refuse_unknown_card", lambda _: None)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)]
    taken.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = torch.device("cuda", 1)
    assert [pick_device(), pick_device("cuda"), *taken] == [own] * 4
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(BadInput, match="`device` cuda:0 would be every process's: write cuda"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="each process needs a GPU, this machine has 2"):
        pick_device()
