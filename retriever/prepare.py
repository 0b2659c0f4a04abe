"""Join captions and codes into the retriever's dataset (retriever/data.py).

In:  a `RQ-VAE.generate_codes` folder and the captions its pictures came with.
Out: `<output>/pool.jsonl`, `train.jsonl`, `val.jsonl`, `test.jsonl`, and the arrays of the codes.
Command: python -m retriever.prepare --codes DIR --output DIR
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.guide import GUIDE_NAME
from tools import runs
from tools.captions import SPLITS, CaptionSet, Split, portable, query_owners, read_captions
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.files import read_array, replacing, write_json_lines
from tools.logs import table

from .data import ARRAYS, POOL
from .setting import setting_of_codes


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Where the codes are and where the dataset goes."""

    codes: Path
    """Run folder of RQ-VAE.generate_codes."""


def pairs(captions: CaptionSet, split: Split) -> Iterator[dict[str, Any]]:
    """(caption, picture) pairs of one split alone, with the row that each caption has among all."""
    texts = (text for record in captions.records for text in record.captions)
    for caption, (text, row) in enumerate(zip(texts, query_owners(captions.records), strict=True)):
        if captions.records[row].split == split:
            yield {"query": text, "picture": row, "caption": caption}


def shared_queries(captions: CaptionSet) -> int:
    """Distinct val and test captions whose very words are a train caption of another picture."""
    texts: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for record in captions.records:
        texts[record.split].update(record.captions)
    return len(texts["train"] & (texts["val"] | texts["test"]))


def main(config: Config) -> None:
    manifest = runs.read_manifest(config.codes, "RQ-VAE.generate_codes")
    captions = read_captions(Path(manifest.facts["captions"]))
    if captions.manifest.fingerprint != manifest.facts["captions_fingerprint"]:
        raise BadInput(f"{manifest.facts['captions']} has changed since {config.codes} was made: make it again")
    inputs = {"codes": config.codes}
    run = runs.begin("retriever.prepare", config, inputs=inputs)
    if run is None:
        return
    codes = read_array(config.codes / "codes.npy")
    if len(codes) != len(captions.records):
        raise BadInput(f"{config.codes} has codes of {len(codes)} pictures, there are {len(captions.records)}")
    for name in (*ARRAYS, GUIDE_NAME) if (config.codes / GUIDE_NAME).is_file() else ARRAYS:
        with replacing(run.folder / name) as temporary:
            shutil.copyfile(config.codes / name, temporary)
    rows: list[dict[str, Any]] = [
        {"image": record.image, "file": record.file, "split": record.split} for record in captions.records
    ]
    write_json_lines(run.folder / POOL, rows)
    counts = {split: write_json_lines(run.folder / f"{split}.jsonl", pairs(captions, split)) for split in SPLITS}
    kept = ("levels", "codebook_size", "shared", "width", "features", "captions_fingerprint")
    setting = setting_of_codes(manifest, [record.image for record in captions.records])
    facts = {key: manifest.facts[key] for key in kept} | {"setting": setting}
    overlap = shared_queries(captions)
    run.finish(facts={**facts, "images": portable(captions.images), "queries": counts})
    print(table([{"split": split, "queries": counts[split]} for split in SPLITS]))
    print(f"{overlap} captions of val or test also stand, word for word, under a train picture")


if __name__ == "__main__":
    run_command(main, Config)
