"""The final table: two-tower search and the retriever on the same queries and pools.

In:  a `retriever.retrieve` folder; the features the pictures were tokenized from.
Out: `<output>/table.txt`, `<output>/contact_sheet.png`; rows in the dataset's `summary.json`.
Command: python -m retriever.test --predictions DIR --output DIR --summary FILE --name emoji
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.compute import machine
from models.hubness import Hubness
from models.options import DeviceOptions
from models.rqvae import RqVae
from tools import runs
from tools.captions import first_captions
from tools.command_line.command_names import scripts_for
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions, TableOptions
from tools.contact_sheet import SheetRow, draw_sheet
from tools.errors import BadInput
from tools.features import Features, Floats, read_features
from tools.files import read_json_lines, replacing
from tools.logs import Tracker
from tools.recall import Ranks, Report, code_rank, image_rank, report
from tools.results import GUIDED, HUBS_CORRECTED, MRR_NOTE, Row, merge_summary, printable, scalars
from tools.two_tower import two_tower_recall

from .data import UNKNOWN, RetrieverData, read_data
from .two_tower import queries_per_second


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TableOptions, DeviceOptions):
    """What is compared, and where the figures go."""

    predictions: Path
    """Run folder of retriever.retrieve; its first pool is drawn."""
    system: str = "retriever"
    """Name of the retriever in the rows."""
    rqvae: Path | None = None
    """Run folder of RQ-VAE.train: adds two-tower rows on quantised features."""
    quantized_system: str = "two-tower, quantised"
    """Name of these rows."""
    examples: int = 8
    """Queries on the contact sheet, taken at even steps."""

    def __post_init__(self) -> None:
        TableOptions.__post_init__(self)
        if self.examples < 1:
            raise BadInput("--examples must be at least 1")


class Case:
    """One pool: queries, targets and the retriever's ranked lists.

    Attributes:
        ranked: "" or `GUIDED` -> for each query the rows found by the search without or with the guide.
    """

    def __init__(self, manifest: runs.Manifest, data: RetrieverData, features: Features, pool: str) -> None:
        self.manifest, self.data, self.features, self.pool = manifest, data, features, pool
        self.split, self.setting = manifest.config["split"], manifest.facts["setting"]
        self.rows = self.data.rows(self.pool)
        queries = self.data.queries(self.split)
        self.texts, self.targets, self.captions = queries.texts, queries.pictures, queries.captions
        if (self.captions == UNKNOWN).any():
            self.captions = np.flatnonzero(np.isin(features.owners, np.unique(self.targets)))
        self.captions_per_picture: int | None = None
        row_of = {image: row for row, image in enumerate(self.data.images)}
        self.ranked: dict[str, list[list[int]]] = {}
        for guided in [each for each in ("", GUIDED) if pool + each in manifest.metrics]:
            lines = [line for _, line in read_json_lines(manifest.folder / f"{pool}{guided}.jsonl")]
            if [line["query"] for line in lines] != self.texts:
                raise BadInput(
                    f"{manifest.folder} answers other queries than {data.folder} has: run "
                    f"{scripts_for(manifest.folder, 'retriever.retrieve')} --overwrite"
                )
            self.ranked[guided] = [[row_of[image] for image in line["ranked"]] for line in lines]

    def first(self, count: int) -> "Case":
        """The same for the first captions of each picture alone."""
        chosen = first_captions(self.targets, count)
        case = copy.copy(self)
        case.captions_per_picture, case.split = count, f"{self.split}, first {count} captions"
        case.targets, case.captions = self.targets[chosen], self.captions[chosen]
        case.texts = [self.texts[place] for place in chosen]
        case.ranked = {guided: [every[place] for place in chosen] for guided, every in self.ranked.items()}
        return case

    def ranks(self, ranked: list[list[int]], level: str) -> Ranks:
        """Rank of each query's picture, or of its codes."""
        codes = [row.tobytes() for row in self.data.codes]
        if level == "image":
            each = [image_rank(rows, int(target)) for rows, target in zip(ranked, self.targets, strict=True)]
        else:
            each = [
                code_rank([codes[row] for row in rows], codes[target])
                for rows, target in zip(ranked, self.targets, strict=True)
            ]
        return np.array(each, dtype=np.int64)

    def row(self, config: Config, system: str, figures: Report, **more: Any) -> dict[str, Any]:
        """One line of summary.json.

        Args:
            more: fields of `Row`, in place of the retriever's own.
        """
        values = {"setting": self.setting, "run": self.manifest.folder, **more}
        place = {"split": self.split, "pool": self.pool, "pool_size": len(self.rows)}
        some = self.captions_per_picture
        return Row(
            system=system, dataset=config.name, **place, figures=figures, captions_per_picture=some, machine=machine(),
            **values,
        ).line()  # fmt: skip


def two_tower_row(
    case: Case, pictures: Floats, config: Config, *, system: str, hubness: Hubness | None = None
) -> dict[str, Any]:
    """Brute-force search of a case's queries over picture features (all pictures, width).

    Args:
        hubness: what is taken off the cosines.
    """
    features = case.features
    taken_off = None if hubness is None else hubness.taken_off(pictures[case.rows])
    figures = two_tower_recall(features, case.captions, case.rows, pictures=pictures, taken_off=taken_off)
    speed = None
    if system == "two-tower" and case.captions_per_picture is None:
        speed = queries_per_second(features, case.texts, pictures[case.rows], device=config.device)
    own = {"setting": "inductive", "run": features.manifest.folder}  # whatever the retriever beside it was trained on
    return case.row(config, system, figures, speed=speed, **own)


def quantized_features(rqvae: Path, data: RetrieverData) -> Floats:
    """Picture features decoded from their codes, (pictures, width).

    Raises:
        BadInput: another RQ-VAE made the codes.
    """
    runs.read_manifest(rqvae, "RQ-VAE.train")
    model = RqVae.from_pretrained(rqvae)
    if not np.array_equal(model.quantizer.codebooks.detach().numpy(), data.codebooks):
        raise BadInput(f"--rqvae {rqvae} is not the RQ-VAE that coded {data.folder}: give that one")
    decoded: Floats = model.reconstruct(torch.tensor(data.codes)).numpy()
    return decoded


def result_rows(cases: list[Case], config: Config) -> list[dict[str, Any]]:
    """All rows: for each case two-tower first, then two-tower with its hubs corrected and on quantised features, then
    the retriever by image and by code, without the guide and with it."""
    rows = []
    some = config.captions_per_picture
    for case in cases if some is None else [*cases, *(case.first(some) for case in cases)]:
        pictures, guide = case.features.images, case.data.guide
        rows.append(two_tower_row(case, pictures, config, system="two-tower"))
        if guide is not None and guide.hubness is not None:
            rows.append(two_tower_row(case, pictures, config, system=HUBS_CORRECTED, hubness=guide.hubness))
        if config.rqvae is not None:
            quantized = quantized_features(config.rqvae, case.data)
            rows.append(two_tower_row(case, quantized, config, system=config.quantized_system))
        for guided, ranked in case.ranked.items():
            speed = case.manifest.metrics[case.pool + guided]["queries_per_second"]
            for level in ("image", "code"):
                figures = report(case.ranks(ranked, level))
                rows.append(case.row(config, config.system + guided, figures, speed=speed, level=level))
    return rows


def sheet_rows(case: Case, count: int) -> list[SheetRow]:
    """Queries at even steps through the split, with the files they found."""
    folder = case.data.image_folder
    files = [folder / file for file in case.data.files]
    chosen = np.linspace(0, len(case.texts) - 1, num=min(count, len(case.texts))).astype(int)
    ranked = case.ranked.get(GUIDED) or case.ranked[""]
    return [SheetRow(case.texts[i], [files[row] for row in ranked[i]], files[case.targets[i]]) for i in chosen]


def main(config: Config) -> None:
    manifest = runs.read_manifest(config.predictions, "retriever.retrieve")
    data = read_data(Path(manifest.facts["dataset"]))
    if data.manifest.fingerprint != manifest.inputs["dataset"]["fingerprint"]:
        raise BadInput(
            f"{data.folder} has changed since {config.predictions} was made: run "
            f"{scripts_for(manifest.folder, 'retriever.retrieve')} --overwrite"
        )
    inputs = {"predictions": config.predictions, "features": Path(data.manifest.facts["features"])}
    if config.rqvae is not None:
        inputs["rqvae"] = config.rqvae
    run = runs.begin("retriever.test", config, inputs=inputs)
    if run is None:
        print((config.output / "table.txt").read_text(encoding="utf-8", errors="backslashreplace"), end="")
        return
    features = read_features(Path(data.manifest.facts["features"]))
    cases = [Case(manifest, data, features, pool) for pool in manifest.config["pools"]]
    rows = result_rows(cases, config)
    text = f"{printable(rows)}\n\n{MRR_NOTE}"
    with replacing(run.folder / "table.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    sheet = run.folder / "contact_sheet.png"
    first = cases[0]
    draw_sheet(sheet, sheet_rows(first, config.examples), title=f"{config.name}: {config.system}, pool {first.pool}")
    merge_summary(config.summary, rows)
    tracker = Tracker(run.folder, job="test_retriever", config=run.started["config"])
    flat = [{key: value for key, value in row.items() if key != "recall"} | row["recall"] for row in rows]
    tracker.table("results", flat)
    tracker.image("contact_sheet", sheet)
    tracker.summary(scalars(rows, main=config.system + list(first.ranked)[-1]))
    tracker.finish()
    every = [row for row in rows if row["captions_per_picture"] is None]
    metrics = {f"{row['system']}/{row['pool']}/{row['level']}/R@1": row["recall"]["1"] for row in every}
    run.finish(metrics=metrics)
    print(f"{text}\n\nexamples: {sheet}\nrows:     {config.summary}")


if __name__ == "__main__":
    run_command(main, Config)
