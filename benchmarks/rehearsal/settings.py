"""What a data set's file in scripts/datasets/ says, and that file once more with the rehearsal's own folders."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.errors import BadInput

ROOT = Path(__file__).parent.parent.parent
ARRAYS = ("TRAIN_RQVAE", "TRAIN_RETRIEVER", "TRAIN_STAGE2", "FINETUNE_LLAMA", "TRAIN_RERANKER")
OF_THE_CALLER = ("ABLATION", "BEST", "DATASET", "LAUNCH", "PICTURES", "RECIPE", "REQUIREMENTS", "SYSTEM", "VERIFY")
OF_THE_RECIPE = (
    "FEATURES",
    "RERANKER",
    "RERANKER_MODEL",
    "RERANKER_SYSTEM",
    "RETRIEVER",
    "RQVAE",
    "TOKENIZER",
    "TRAINED",
)


def clean_environment() -> dict[str, str]:
    """This process's environment without what the scripts would take for a choice, and without a hub's settings."""
    chosen = {*OF_THE_CALLER, *OF_THE_RECIPE}
    return {name: value for name, value in os.environ.items() if name not in chosen and not name.startswith("HF_")}


def read_stages(file: str, recipe: str) -> list[str]:
    """The stages of a data set's file, as quickstart.sh runs them."""
    return _printed(file, recipe, 'printf "%s\\0" $STAGES')


def read_arrays(file: str, recipe: str) -> dict[str, list[str]]:
    """The flags of the trainings in a data set's file."""
    return {name: _printed(file, recipe, f'printf "%s\\0" "${{{name}[@]}}"') for name in ARRAYS}


def _printed(file: str, recipe: str, command: str) -> list[str]:
    script = f"set -euo pipefail; source {shlex.quote(file)}; {command}"
    environment = {**clean_environment(), "RECIPE": recipe}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise BadInput(f"{file} cannot be read with RECIPE={recipe}: {reason or 'correct the name'}")
    return done.stdout.split("\0")[:-1]


def derived_file(
    path: Path,
    *,
    of: str,
    form: Path,
    source: Path,
    images: Path,
    pictures: Sequence[int],
    variables: Mapping[str, str],
    more: Sequence[str] = (),
) -> Path:
    """Write a data set's file that reads the published one and moves its folders.

    Args:
        of: the published file, seen from the root.
        form: where the folders go.
        source: folder of the captions' file.
        pictures: of train, val and test that there must be.
        variables: further variables; values are put down as they are.
        more: further lines.
    """
    places = {name: str(place) for name, place in (("form", form), ("source", source), ("images", images))}
    lines = [
        f"# The settings of {of} in the folders of a rehearsal (docs/rehearsal.md).",
        f"source {of}",
        f'CAPTIONS=("${{CAPTIONS[@]/#"$DATA"/{places["source"]}}}" --expect {" ".join(map(str, pictures))})',
        f"IMAGES={places['images']} DATA={places['form']}/$DATA TOKENIZER={places['form']}/$TOKENIZER",
        f"RETRIEVER={places['form']}/$RETRIEVER RERANKER={places['form']}/$RERANKER",
        "FEATURES=$TOKENIZER/03_prepare_emb",
        *(f"{name}={value}" for name, value in variables.items()),
        *more,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
