"""The scripts themselves: `quickstart.sh` killed with all that it started, and called again."""

import random
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.tiny import clip_folder, picture_set
from tools.files import hash_file, read_json

from .faults import FAILED, SAME, Outcome
from .harness import Ended, run_alone, untimed
from .zygote import ROOT

STAGES = ("01_prepare_captions", "03_prepare_emb", "05_train_rqvae", "06_generate_codes")
DATASET = """
DATA={folder}/data TOKENIZER={folder}/tokenizer RETRIEVER={folder}/retriever RERANKER={folder}/reranker
STAGES="{stages}"
IMAGES={base}/images CAPTIONS=(--source {base}/captions.jsonl)
CLIP=(--model {base}/clip --precision fp32 --device cpu --batch-size 8)
FEATURES=$TOKENIZER/03_prepare_emb
TRAIN_RQVAE=(--width 16 --hidden 24 --levels 3 --codebook-size 8 --epochs 12 --batch-size 16 --device cpu)
GENERATE_CODES=(--device cpu)
"""


def quickstart(folder: Path, base: Path, *, kill_after: float | None = None) -> Ended:
    """Run `scripts/quickstart.sh` for a small dataset whose results go below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "dataset.sh"
    dataset.write_text(DATASET.format(folder=folder, base=base, stages=" ".join(STAGES)))
    more = {
        "DATASET": str(dataset),
        "CONDA_PREFIX": sys.prefix,  # no other environment is set up
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    }
    return run_alone(["bash", "scripts/quickstart.sh"], ROOT, kill_after=kill_after, more=more)


def left(folder: Path) -> dict[str, Any]:
    """Hashes of all files of the stages, and their figures; manifests say where they lie, and are left out."""
    stages = [folder / ("data" if stage.startswith("01") else "tokenizer") / stage for stage in STAGES]
    files = {path for stage in stages for path in stage.rglob("*") if path.is_file() and path.name != ".lock"}
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hash_file(path) for path in files if path.name != "manifest.json"
    }
    return found | {stage.name: untimed(read_json(stage / "manifest.json")["metrics"]) for stage in stages}


def killed_scripts(folder: Path, draw: random.Random, count: int) -> list[Outcome]:
    """Kill `quickstart.sh` at random moments, and call it again."""
    base = folder / "base"
    picture_set(base)
    clip_folder(base / "clip")
    whole = quickstart(folder / "whole", base)
    if whole.status:
        return [Outcome(FAILED, "", wrong=f"undisturbed: {whole.errors[-600:]}")]
    outcomes = []
    for number in range(count):
        seconds = draw.uniform(0.1, 0.95) * whole.seconds
        own = folder / f"killed{number}"
        killed = quickstart(own, base, kill_after=seconds)
        again = quickstart(own, base)
        same = again.status == 0 and left(own) == left(folder / "whole")
        moment = f"after {seconds:.1f} of {whole.seconds:.1f} s"
        wrong = "" if same else again.errors[-600:]
        outcomes.append(Outcome(SAME if same else FAILED, moment, wrong=wrong, felt=killed.status != 0))
    shutil.rmtree(folder)
    return outcomes
