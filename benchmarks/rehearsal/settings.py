"""What a data set's file in scripts/datasets/ says, and checkouts of this repository in which its scripts can run.

A checkout has the rooms and the scripts as they are, so that each script writes where it always writes, and reads from
where a user puts the data; what lies there is the rehearsal's.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tools.errors import BadInput

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("RQ-VAE", "models", "reranker", "retriever", "scripts", "tools")
PRODUCTS = ("data", "output", "seed", "__pycache__")  # of a room, not of the repository; tools/data/ is another matter
ARRAYS = ("TRAIN_RQVAE", "TRAIN_RETRIEVER", "TRAIN_STAGE2", "FINETUNE_LLAMA", "TRAIN_RERANKER")
OF_THE_CALLER = {
    *("ABLATION", "DATASET", "LAUNCH", "PICTURES", "RECIPE", "REQUIREMENTS", "SEED_WEIGHTS", "SYSTEM", "VERIFY"),
    *("FEATURES", "RERANKER", "RERANKER_MODEL", "RERANKER_SYSTEM", "RETRIEVER", "RQVAE", "TOKENIZER", "TRAINED"),
}


def clean_environment() -> dict[str, str]:
    """This process's environment without what the scripts would take for a choice, and without a hub's settings."""
    return {
        name: value for name, value in os.environ.items() if name not in OF_THE_CALLER and not name.startswith("HF_")
    }


def file_of(dataset: str) -> str:
    """A data set's file, seen from the root."""
    return f"scripts/datasets/{dataset}.sh"


def read_stages(dataset: str, recipe: str) -> list[str]:
    """The stages of a data set, as quickstart.sh runs them."""
    return _printed(dataset, recipe, 'printf "%s\\0" $STAGES')


def read_arrays(dataset: str, recipe: str) -> dict[str, list[str]]:
    """The flags of the trainings of a data set."""
    return {name: _printed(dataset, recipe, f'printf "%s\\0" "${{{name}[@]}}"') for name in ARRAYS}


def _printed(dataset: str, recipe: str, command: str) -> list[str]:
    script = f"set -euo pipefail; source {shlex.quote(file_of(dataset))}; {command}"
    environment = {**clean_environment(), "RECIPE": recipe}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise BadInput(f"{file_of(dataset)} cannot be read with RECIPE={recipe}: {reason or 'correct the name'}")
    return done.stdout.split("\0")[:-1]


def check_out(folder: Path, *, dataset: str, more: Sequence[str]) -> None:
    """Copy rooms, scripts and pins as they are now; what the scripts have written into the folder stays.

    Args:
        more: lines that go behind the data set's file.
    """
    for room in ROOMS:
        (folder / room).mkdir(parents=True, exist_ok=True)
        products = () if room == "tools" else PRODUCTS
        for source in (ROOT / room).iterdir():
            if source.name not in products:
                _replace(source, folder / room / source.name)
    for pins in ROOT.glob("requirements*.txt"):
        _replace(pins, folder / pins.name)
    if (ROOT / ".venv").exists():
        link(folder / ".venv", ROOT / ".venv")
    path = folder / file_of(dataset)
    path.write_text(
        path.read_text() + "\n# Of a rehearsal (docs/rehearsal.md).\n" + "".join(f"{line}\n" for line in more)
    )


def link(path: Path, target: Path) -> None:
    """A link to a file or folder, which need not be there yet, in the place of what is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _replace(source: Path, path: Path) -> None:
    """Copy a file or folder over an earlier copy."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, path, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, path, follow_symlinks=False)
