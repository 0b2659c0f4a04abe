"""The rules of the house: import direction, short functions, scripts and command names."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("RQ-VAE", "retriever", "reranker")
MAY_IMPORT = {"tools": {"tools"}, "models": {"models", "tools"}} | {
    stage: {stage, "models", "tools"} if stage != "RQ-VAE" else {"models", "tools"} for stage in STAGES
}
ROOMS = set(MAY_IMPORT)
PUBLISHED_NAMES = (
    "RQ-VAE/scripts/prepare_emb.sh",
    "RQ-VAE/scripts/train_rqvae.sh",
    "RQ-VAE/scripts/generate_codes.sh",
    "scripts/prepare_retriever_dataset.sh",
    "scripts/train_retriever_t5.sh",
    "scripts/train_retriever_t5_stage2.sh",
    "scripts/finetune_retriever_llama.sh",
    "scripts/convert_voken_to_seed.sh",
    "scripts/prepare_reranker_dataset.sh",
    "scripts/finetune_reranker_llama.sh",
    "scripts/test_reranker_llama.sh",
)
SHORT_HELP = 8  # words: "Run folder of retriever.train or retriever.train_stage2."
NUMBERED = sorted((ROOT / "scripts").glob("[0-9][0-9]_*.sh"))


def imported_rooms(source: str, room: str) -> Iterator[str]:
    """Rooms that a file of `room` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            name = room if node.level else (node.module or "")
            yield name.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_go_stage_models_tools(room: str) -> None:
    for path in (ROOT / room).glob("**/*.py"):
        found = set(imported_rooms(path.read_text(), room)) & ROOMS
        assert found <= MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {found - MAY_IMPORT[room]}"


def test_the_rule_is_seen_when_broken() -> None:
    assert set(imported_rooms("from retriever.beam import x\nimport models.clip\nfrom .y import z", "tools")) == {
        "retriever",
        "models",
        "tools",
    }


def test_the_method_is_read_in_sixteen_files_and_knows_nothing_of_the_wings() -> None:
    """The wings import from the method, and not the other way; the package's door to `Retriever` is the exception."""
    room = ROOT / "retriever"
    method = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    wings = {path.parent.name for path in room.glob("*/__init__.py")}
    assert len(method) <= 16
    assert wings == {"gallery", "pseudo_queries", "report", "serve"}
    for path in method:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not wings & set((node.module or "").split(".")), path.name


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.stem)
def test_models_speak_of_arguments_and_not_of_options_or_scripts(path: Path) -> None:
    """The commands put their options in the place of `arguments`; the programs that are called are another matter."""
    of_others = {"--query-gpu", "--format", "--multi_gpu"}
    text = path.read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= of_others
    assert "scripts/" not in text


def test_tools_find_the_script_of_a_command_and_name_none() -> None:
    """But for the preflight, whose list is of scripts."""
    for path in (ROOT / "tools").glob("**/*.py"):
        if path.parent.name != "preflight":
            assert not re.findall(r"scripts/\d\d_", path.read_text()), path.name


def test_texts_are_read_and_written_in_one_encoding() -> None:
    """And not in that of the machine's locale."""
    for path in (path for room in ROOMS for path in (ROOT / room).glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".read_text", ".write_text")):
                assert "encoding" in {each.arg for each in node.keywords}, f"{path.relative_to(ROOT)}: {node.lineno}"


def test_rq_vae_is_a_folder_of_commands() -> None:
    assert not (ROOT / "RQ-VAE" / "__init__.py").exists()


def test_core_needs_no_open_clip_wandb_or_faiss() -> None:
    code = (
        "import sys\n"
        "for name in ('open_clip', 'wandb', 'faiss'): sys.modules[name] = None\n"
        "import models.training, models.voken_lm, retriever.beam, retriever.train, retriever.retrieve\n"
        "import retriever.gallery.search"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_command_names_lead_to_numbered_scripts(name: str) -> None:
    path = ROOT / name
    assert path.is_symlink()
    assert path.resolve() in NUMBERED


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.name)
def test_numbered_scripts_are_one_sentence_one_source_one_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert re.fullmatch(r"# [A-Z].*\.", lines[1])
    assert re.match(r'(SYSTEM="\$\{SYSTEM:-[a-z0-9+]+\}" )?source ', lines[2])  # some are of one system
    assert re.match(r"run (RQ-VAE|retriever|reranker|tools)\.", lines[-1])
    assert lines[-1].endswith('"$@"')
    assert os.access(path, os.X_OK)


def test_every_script_parses() -> None:
    for path in [*(ROOT / "scripts").glob("**/*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_no_two_configurations_repeat_a_help_text() -> None:
    """What several commands have in common is written once, in the options that they derive from."""
    seen: dict[str, str] = {}
    for path in (path for room in ROOMS for path in (ROOT / room).glob("**/*.py")):
        for name, text in help_texts(path.read_text()):
            if len(text.split()) > SHORT_HELP:
                assert text not in seen, f"{path.relative_to(ROOT)}: {name} repeats {seen[text]}"
                seen[text] = f"{path.relative_to(ROOT)}: {name}"


def help_texts(source: str) -> Iterator[tuple[str, str]]:
    """Name and help of each option that a file declares."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and re.search("Config|Options", node.name):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield ast.unparse(field.target), " ".join(ast.literal_eval(text.value).split())
