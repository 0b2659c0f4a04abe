"""The advice of each message in docs/troubleshooting.md, taken from the printed line and typed as it stands.

All scripts run from the folder of a user, who sets variables for one command alone: the advice must name what it needs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain import Chain, files_of
from tests.tiny import draw_picture
from tools.files import read_json, write_json

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

NOT_RUN = {  # a part of each row's message: why its advice is not typed here
    "nvidia-smi": "it needs a GPU with an old driver",
    "with which activation": "it needs a published checkpoint; tests/test_clip.py gives both answers to one",
    "accelerate launch": "it needs several GPUs",
    "needs bitsandbytes": "the advice is a package; tests/test_four_bits.py hides it",
    "to read them takes bitsandbytes": "the same",
    "vokens of another tokenizer": "the advice is a choice between two trainings",
    "download it again": "it needs a download",
    "fill 256 codes": "nothing is to be done",
    "the best checkpoint": "the advice is a longer training",
    "val is near chance": "the advice is a longer training",
    "the guide did not help": "nothing is to be done",
    "has no guide": "the advice is two stages and a training; tests/test_guide.py makes such a dataset",
    "holds no key": "the advice is a key of an endpoint; tests/test_pseudo_queries.py has one",
}
RUN: dict[str, Callable[["User"], None]] = {}


def row(*messages: str) -> Callable[[Callable[["User"], None]], Callable[["User"], None]]:
    """Registers what provokes the messages of some rows, and takes their advice."""

    def register(function: Callable[["User"], None]) -> Callable[["User"], None]:
        RUN.update(dict.fromkeys(messages, function))
        return function

    return register


class User:
    """A folder with a dataset's file, pictures and captions, in which somebody types commands."""

    def __init__(self, folder: Path, chain: Chain, index: Path, python: Path) -> None:
        self.folder, self.chain, self.index, self.python = folder, chain, index, python
        self.data = folder / "made"
        self.captions = self.data / "01_prepare_captions"
        for number in range(6):
            draw_picture(folder / "my photos" / f"{number}.png", "red", "circle", number)
        self.write("STAGES=01_prepare_captions\n")

    def write(self, *lines: str) -> None:
        """The dataset's file."""
        clip = self.chain.features / "clip"
        (self.folder / "mine.sh").write_text(
            f"DATA={self.data} TOKENIZER={self.data} RETRIEVER={self.data} RERANKER={self.data}\n"
            f'IMAGES="${{PICTURES:-{self.folder}/my photos}}" CAPTIONS=() RQVAE={self.chain.rqvae}\n'
            f"CLIP=(--model {clip} --precision fp32 --workers 0)\n" + "".join(lines)
        )

    def types(self, line: str, variables: str = "DATASET=mine.sh") -> "subprocess.CompletedProcess[str]":
        """One line of a shell, with variables for this line alone."""
        known = {name: value for name, value in os.environ.items() if name not in ("DATASET", "PICTURES", "SYSTEM")}
        path = f"{self.python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", f"{variables} {line}"], cwd=self.folder, capture_output=True, text=True,
            env={**known, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHON_SAID": "yes"},
        )  # fmt: skip

    def script(self, name: str, words: str = "", variables: str = "DATASET=mine.sh") -> str:
        """What a script prints that must succeed."""
        done = self.types(f"bash {ROOT}/scripts/{name}.sh {words}", variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refused(self, name: str, words: str = "", variables: str = "DATASET=mine.sh") -> str:
        """The message of a script that must refuse."""
        done = self.types(f"bash {ROOT}/scripts/{name}.sh {words}", variables)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr[done.stderr.index("error: ") :].rstrip("\n")

    def follow(self, line: str) -> str:
        """Types a whole command of a message, without any variable that it does not name."""
        done = self.types(line, variables="")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def user(tmp_path: Path, chain: Chain, index: Path, warm_python: Path) -> User:
    return User(tmp_path, chain, index, warm_python)


def taken(pattern: str, message: str) -> str:
    """The advice in a message."""
    found = re.search(pattern, message)
    assert found, message
    return found[1]


@row("has no manifest.json", "was not finished")
def an_earlier_stage_is_missing(user: User) -> None:
    user.data.mkdir()
    (user.data / "06_generate_codes").symlink_to(user.chain.codes)
    dataset = user.data / "07_dataset"
    for state in ("has no manifest.json", "was not finished"):
        message = user.refused("14_build_index")
        assert state in message
        user.follow(taken(r"run (.*) first$", message))
        assert (dataset / "manifest.json").is_file()
        if state == "has no manifest.json":
            (dataset / "manifest.json").rename(dataset / "started.json")
    user.script("14_build_index")


@row("holds another run (--lr", "make all stages again with")
def the_settings_have_changed(user: User) -> None:
    user.script("01_prepare_captions")
    message = user.refused("01_prepare_captions", "--skip-bad")
    user.script("01_prepare_captions", f"--skip-bad {taken('name another (--[a-z]+)', message)} another")
    assert (user.folder / "another" / "manifest.json").is_file()
    user.script("01_prepare_captions", f"--skip-bad {taken('add (--[a-z]+)', message)}")
    message = user.refused("quickstart")
    assert "--output" not in message
    user.follow(taken(r"or this one with (.*--overwrite) and", message))
    user.script("quickstart")
    draw_picture(user.folder / "my photos" / "new.png", "blue", "square", 7)
    done = user.follow(taken("make all stages again with (.*--overwrite),", user.refused("quickstart")))
    assert "test          7" in done


def test_a_chain_that_was_stopped_while_it_is_made_again_goes_on(user: User) -> None:
    user.write(
        "STAGES='01_prepare_captions 06_generate_codes 14_build_index' PREFLIGHT=off\n",
        'FOLLOWS="$IMAGES" FEATURES=gone\n',
    )
    shutil.copytree(user.index, user.data / "14_index")
    user.refused("quickstart", "--overwrite")  # 06 has no features
    assert files_of(user.data / "14_index") == []
    before = files_of(user.captions)
    done = user.types(f"bash {ROOT}/scripts/quickstart.sh")
    assert "01_prepare_captions is finished; nothing to do." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("== 06_generate_codes")
    assert files_of(user.captions) == before


def test_help_needs_no_python(tmp_path: Path) -> None:
    (tmp_path / "sed").symlink_to(shutil.which("sed") or "")
    done = subprocess.run(
        [shutil.which("bash") or "", str(ROOT / "scripts" / "quickstart.sh"), "--help"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("Set everything up and run the whole chain")
    assert "--overwrite" in done.stdout
    assert "for word" not in done.stdout


@row("is not an option of quickstart.sh")
def an_option_of_a_stage(user: User) -> None:
    (user.folder / "my photos" / "broken.png").write_bytes(b"not a picture")
    message = user.refused("quickstart", "--format folder")
    path = taken("settings of the stages are in (.*)$", message)
    with Path(path).open("a") as file:
        file.write("CAPTIONS+=(--format folder --skip-bad)\n")
    user.script("quickstart")


@row("is the id of", "no picture of", "came from: is its disk mounted?")
def an_index_and_its_folders(user: User) -> None:
    shutil.copytree(user.index, user.data / "14_index")
    name = "blue-ring.png"
    draw_picture(user.folder / name, "red", "line", 1)
    draw_picture(user.folder / "other" / "new.png", "red", "line", 1)
    message = user.refused("sync_pictures", "other")
    assert "1 picture added" in user.follow(taken("add those that are there with (.*), or search", message))
    shutil.rmtree(user.folder / "other")
    message = user.refused("sync_pictures", "other")
    flag = taken("is its disk mounted\\? (--[a-z-]+) lets", message)
    assert "1 went" in user.script("sync_pictures", f"other {flag}")
    path = taken(r"or (\S+) for the picture with this id", user.refused("remove_pictures", name))
    assert "47" in user.script("remove_pictures", path)


@row("was made by an earlier version", "has changed since it was made")
def a_folder_of_an_earlier_version_and_a_damaged_one(user: User) -> None:
    user.script("01_prepare_captions")
    before = files_of(user.captions)
    values = {key: value for key, value in read_json(user.captions / "manifest.json").items() if key != "checksum"}
    write_json(user.captions / "manifest.json", values | {"format": 0})
    message = user.refused("01_prepare_captions")
    assert "format 0" in message
    user.follow(taken("run (.* --overwrite)$", message))
    with (user.captions / "captions.jsonl").open("a") as file:
        file.write("\n")
    user.follow(taken("has changed since it was made: run (.* --overwrite)$", user.refused("01_prepare_captions")))
    assert files_of(user.captions) == before
    assert "nothing to do" in user.script("01_prepare_captions")


@row("problems in the data", "link that leads out of --images")
def bad_pictures_and_links(user: User) -> None:
    draw_picture(user.folder / "elsewhere" / "a.png", "blue", "square", 3)
    (user.folder / "my photos" / "broken.png").write_bytes(b"not a picture")
    (user.folder / "my photos" / "link.png").symlink_to(user.folder / "elsewhere" / "a.png")
    message = user.refused("quickstart")
    flags = [taken("go on without them with (--[a-z-]+)", message), taken(r"\((--[a-z-]+) lets it\)", message)]
    assert "test          7" in user.script("quickstart", " ".join(flags))


def test_links_alone_pass_the_preflight_too(user: User) -> None:
    (user.folder / "my photos").rename(user.folder / "elsewhere")
    (user.folder / "my photos").mkdir()
    for picture in (user.folder / "elsewhere").iterdir():
        (user.folder / "my photos" / picture.name).symlink_to(picture)
    assert "test          6" in user.script("quickstart", "--follow-links")


@row("is not an option of this command")
def an_option_is_misspelt(user: User) -> None:
    words = f"-m tools.prepare_captions --imges '{user.folder}/my photos' --output made"
    elsewhere = f"PYTHONPATH={ROOT}"
    done = user.types(f"python {words}", elsewhere)
    right = taken(r"did you mean (--[a-z-]+)\?", done.stderr)
    assert user.types(f"python {words.replace('--imges', right)}", elsewhere).returncode == 0


@row("there is no scripts/datasets/")
def a_dataset_is_misspelt(user: User) -> None:
    message = user.refused("01_prepare_captions", "--help", variables="DATASET=emojy")
    user.script("01_prepare_captions", "--help", variables=f"DATASET={taken('did you mean ([a-z]+)', message)}")


@row("PREFLIGHT=off starts the chain")
def the_preflight_finds_something(user: User) -> None:
    user.write("STAGES='01_prepare_captions 06_generate_codes' RQVAE=gone\n")
    variable = taken(r"(PREFLIGHT=\w+) starts the chain", user.refused("quickstart"))
    done = user.types(f"bash {ROOT}/scripts/quickstart.sh", f"DATASET=mine.sh {variable}")
    assert "test          6" in done.stdout


@pytest.mark.parametrize("take", dict.fromkeys(RUN.values()), ids=lambda function: function.__name__)
def test_advice_works_as_it_is_printed(take: Callable[[User], None], user: User) -> None:
    take(user)


def test_every_row_of_the_table_is_run_or_says_why_not() -> None:
    rows = re.findall(r"^\| (`.*?) \| .* \| .* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == PAGE.read_text(encoding="utf-8").count("\n| `")
    known = [*RUN, *NOT_RUN]
    for message in rows:
        assert len([part for part in known if part in message]) == 1, message
    assert all(any(part in message for message in rows) for part in known)


def test_variables_lead_to_the_folder_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tokenizer of another dataset, a SYSTEM's folder and one of an ABLATION are made by other variables."""
    from tools.command_line.command_names import scripts_for
    from tools.command_line.place import variables_of, with_commands

    photos = "/tmp/it's mine"
    monkeypatch.setenv("SETTINGS", f"folder DATASET=folder PICTURES={shlex.quote(photos)} ")
    mine = f"DATASET=folder PICTURES={shlex.quote(photos)} "
    assert variables_of(ROOT / "RQ-VAE/output/folder/03_prepare_emb") == mine
    assert variables_of(ROOT / "RQ-VAE/output/emoji/05_train_rqvae") == "DATASET=emoji "
    retriever = ROOT / "retriever/output/emoji/10_stage2/retriever+stage2"
    assert scripts_for(retriever, "retriever.train", "retriever.train_stage2") == (
        "DATASET=emoji SYSTEM=retriever+stage2 scripts/10_train_retriever_t5_stage2.sh"
    )
    assert variables_of(ROOT / "retriever/output/folder/ablations/small/07_dataset") == f"{mine}ABLATION=small "
    assert variables_of(tmp_path / "12_retrieve" / "llama") == f"{mine}SYSTEM=llama "
    assert with_commands(f"run {mine}scripts/x.sh") == f"run {mine}bash scripts/x.sh"
    assert with_commands("run scripts/x.sh or DATASET=emoji scripts/y.sh") == (
        f"run {mine}bash scripts/x.sh or DATASET=emoji bash scripts/y.sh"
    )
