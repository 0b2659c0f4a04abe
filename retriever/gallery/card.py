"""The model card of an exported folder: what it was trained on, how, and how well it does, out of the manifests."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tools import runs
from tools.captions import SPLITS
from tools.command_line.command_names import scripts_for
from tools.errors import BadInput
from tools.files import read_json
from tools.results import FIRST, GUIDED, markdown
from tools.texts import as_markdown_cell

from ..data import read_data
from ..setting import setting_on
from . import origins
from .gallery import Gallery

TAGS = ["text-to-image-retrieval", "generative-retrieval", "residual-quantization"]
TASK = "text-ranking"  # the task of the hub's list that fits: pictures are ranked for a text
USE = """```bash
{install}
```

```python
from avg import Retriever

for found in Retriever.from_pretrained({place}).search(["a dog"], k=10)[0]:
    print(found.score, found.image, found.file)
```"""
NO_PACKAGE = "pip install .  # in a clone of the repository that this retriever was trained with"
SETTINGS = {
    "inductive": "no picture of val or test was trained on",
    "transductive": "pictures of val and test were trained on, through captions that are not theirs",
}


def describe(
    gallery: Gallery, trained: runs.Manifest, *, share: float, system: str | None, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the card says, as JSON, from the run folders that are still what they were.

    Args:
        share: of the features in the final order.
        system: the retriever's name in the results; None for all of them.
        rows: of the results (`summary.json`).
    """
    found = list(stages(gallery.manifest, trained))
    captions = next((each for each in found if each["command"] == "tools.prepare_captions"), None)
    return {
        "system": system,
        "setting": setting_of(gallery.manifest, trained),
        "kind": trained.facts["kind"],
        "share": share,
        "dataset": next((row["dataset"] for row in rows), None),
        "origins": made_from(found),
        "levels": gallery.facts["levels"],
        "codebook_size": gallery.facts["codebook_size"],
        "pictures": None if captions is None else captions["facts"]["pictures"],
        "captions": None if captions is None else captions["facts"]["captions"],
        "stages": [
            {"command": each["command"], "settings": settings(each), "commit": each["commit"]} for each in found
        ],
        "figures": figures(rows, system),
    }


def made_from(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """`origins.origins` of some runs, as JSON."""
    known = origins.origins(found)
    return None if known is None else [origin._asdict() for origin in known]


def setting_of(gallery: runs.Manifest, trained: runs.Manifest) -> str:
    """The setting of a search of a gallery by a trained retriever: that of the training where its dataset is gone."""
    try:
        return setting_on(trained, read_data(runs.unchanged_input(gallery, "dataset")))
    except (BadInput, KeyError):
        return str(trained.facts["setting"])


def stages(*ends: runs.Manifest) -> Iterator[dict[str, Any]]:
    """Manifests of the runs that led to some, in the order of the chain, and theirs last; runs that are gone or have
    changed since are passed over."""
    seen: set[Path] = set()

    def before(folder: Path) -> Iterator[dict[str, Any]]:
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        manifest = read_json(folder / runs.MANIFEST)
        for each in manifest["inputs"].values():
            path = Path(each["path"])
            run = path if (path / runs.MANIFEST).is_file() else path.parent  # or a file or folder in a run's
            if (run / runs.MANIFEST).is_file() and unchanged(path, each):
                yield from before(run)
        yield manifest

    for end in ends:
        yield from before(end.folder)


def unchanged(path: Path, recorded: dict[str, str]) -> bool:
    """Whether a run folder is what it was when it was read."""
    try:
        return runs.fingerprint(path, recorded["by"]) == recorded["fingerprint"]
    except BadInput:
        return False


def settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without its inputs, switches that are off, and folders of this machine."""
    config: dict[str, Any] = without_places(manifest["config"])
    left_out = {name.rstrip("0123456789") for name in manifest["inputs"] if name != "language_model"}
    return {name: value for name, value in config.items() if name not in left_out and value not in (None, False, [])}


def without_places(value: Any) -> Any:
    """JSON whose absolute paths are cut to their last part: where things lie on one machine is nobody else's business.

    >>> without_places({"model": "/home/someone/t5", "lr": 0.1, "names": ["a/b", "/a/b"]})
    {'model': 't5', 'lr': 0.1, 'names': ['a/b', 'b']}
    """
    if isinstance(value, dict):
        return {name: without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and value[:1] == "/" and len(Path(value).parts) > 2 else value


def figures(rows: Sequence[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Of a summary the rows by picture: two-tower search, and the system with and without guide and features."""
    own = {f"{system}{guided}{features}" for guided in ("", GUIDED) for features in ("", "+features")}
    chosen = (
        row
        for row in rows
        if row["level"] == "image" and (system is None or row["system"] in own or row["system"].startswith(FIRST))
    )
    return [without_places({**row, "command": measured_by(row)}) for row in chosen]


def measured_by(row: dict[str, Any]) -> str | None:
    """What was typed to measure a row of a summary, as far as its run folder is there."""
    path = Path(row["run"])
    if not (path / runs.MANIFEST).is_file():
        return None
    return scripts_for(path, read_json(path / runs.MANIFEST)["command"]).replace("scripts/", "bash scripts/")


def render(card: dict[str, Any], gallery: Gallery, *, name: str, with_pictures: bool, package: str | None) -> ModelCard:
    """README.md of an exported folder: what it is, and a snippet that uses it.

    Args:
        name: of the folder, or "owner/name" on the Hugging Face Hub.
        package: file or address of the Python package that reads it, for pip.
    """
    data = metadata(card, name=name, with_pictures=with_pictures)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text(card, gallery, name, with_pictures, package)}")


def metadata(card: dict[str, Any], *, name: str, with_pictures: bool) -> ModelCardData:
    """What the hub reads of a card."""
    known = origins_of(card)
    own = origins.licence(known, with_pictures=with_pictures)
    dataset = origins.DATASETS.get(card.get("dataset") or "")
    models = [origin.hub for origin in known or [] if origin.hub is not None]
    return ModelCardData(
        base_model=models or None,
        datasets=None if dataset is None else [dataset],
        library_name="avg",
        license=own or "other",
        license_name=None if own else "see-the-card",
        license_link=None if own else "README.md",
        model_name=name.rpartition("/")[2],
        pipeline_tag=TASK,
        tags=TAGS,
        eval_results=list(results(card)) or None,
    )


def results(card: dict[str, Any]) -> Iterator[EvalResult]:
    """The figures as the hub reads them: each with its system, pool, setting and command.

    Two-tower search is what they are compared with, in the text.
    """
    for row in (row for row in card["figures"] if not row["system"].startswith(FIRST)):
        values = {f"R@{cutoff}": value for cutoff, value in row["recall"].items()} | {"MRR": row["mrr"]}
        about = {name: row.get(name) for name in ("system", "setting", "queries", "captions_per_picture", "command")}
        for name, value in values.items():
            yield EvalResult(
                task_type=TASK,
                task_name="text-to-image retrieval",
                dataset_type=origins.DATASETS.get(row["dataset"], row["dataset"]),
                dataset_name=row["dataset"],
                dataset_config=f"{row['pool']} ({row['pool_size']:,} pictures)",
                dataset_split=row["split"],
                metric_type="mrr" if name == "MRR" else f"recall_at_{name.removeprefix('R@')}",
                metric_name=f"{name} of {row['system']} ({row['setting']})",
                metric_value=value,
                metric_args={key: value for key, value in about.items() if value is not None},
            )


def origins_of(card: dict[str, Any]) -> list[origins.Origin] | None:
    """The pretrained models that a card tells of; None where it does not know them."""
    known = card.get("origins")
    return None if known is None else [origins.Origin(**origin) for origin in known]


def text(card: dict[str, Any], gallery: Gallery, name: str, with_pictures: bool, package: str | None) -> str:
    """A card's text, in Markdown."""
    install = NO_PACKAGE if package is None else f"pip install {shlex.quote(package)}"
    return "\n\n".join(
        [
            f"# {as_markdown_cell(name)}: text-to-image retrieval as generation",
            f"A language model reads a text and writes {card['levels']} vokens (visual tokens) of "
            f"{card['codebook_size']:,} codes each; a beam search that can only write vokens of existing pictures "
            f"finds them among {len(gallery):,}.",
            USE.format(install=install, place=json.dumps(name)),
            *_about_order(card, gallery),
            _about_files(with_pictures),
            *_about_data(card),
            *_about_figures(card),
            *_about_recipe(card),
            "\n".join(_about_licence(card, with_pictures)),
        ]
    )


def _about_order(card: dict[str, Any], gallery: Gallery) -> Iterator[str]:
    if gallery.keeps_features:
        yield (
            "The pictures found are put in order by the retriever's score and the cosine of their features with the "
            f"text's, which has a share of {card['share']:.2f}."
        )


def _about_files(with_pictures: bool) -> str:
    if with_pictures:
        return "`pictures/` holds the picture files."
    return (
        "The picture files are not part of it: put them, or a link to them, into `pictures/`, under the names that "
        "`found.file` gives."
    )


def _about_data(card: dict[str, Any]) -> Iterator[str]:
    lines = [f"{card['setting']}: {SETTINGS[card['setting']]}."]
    if card["pictures"]:
        lines += ["", "| split | pictures | captions |", "| --- | --- | --- |"]
        lines += [
            f"| {split} | {card['pictures'].get(split, 0):,} | {card['captions'].get(split, 0):,} |" for split in SPLITS
        ]
    yield "\n".join(["## Data", "", *lines])


def _about_figures(card: dict[str, Any]) -> Iterator[str]:
    if card["figures"]:
        machines = " and ".join(dict.fromkeys(str(row["machine"]) for row in card["figures"] if "machine" in row))
        measured = f"\n\nSpeed was measured on: {machines}." if machines else ""
        yield f"## Figures\n\n{markdown(card['figures'])}{measured}"


def _about_recipe(card: dict[str, Any]) -> Iterator[str]:
    lines = ["| command | settings | commit |", "| --- | --- | --- |"]
    for stage in card["stages"]:
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in stage["settings"].items())
        code = f"`{told.replace('|', '/').replace('`', chr(39))}`" if told else ""
        lines.append(f"| {stage['command']} | {code} | {stage['commit'][:12]} |")
    yield "\n".join(["## Recipe", "", *lines])


def _about_licence(card: dict[str, Any], with_pictures: bool) -> Iterator[str]:
    yield "## Licence\n\nThe code, and what was trained with it: CC BY-NC 4.0."
    known = origins_of(card)
    if known is None:
        yield "The pretrained models behind it, which have licences of their own, are no longer known.\n"
    else:
        yield "It was made from these pretrained models:\n\n| model | on the hub | licence |\n| --- | --- | --- |"
        yield from (
            f"| {as_markdown_cell(each.name)} | {each.hub or '–'} | {each.licence or 'not known here'} |"
            for each in known
        )
        yield ""
    commands = {stage["command"] for stage in card["stages"]}
    source = f": {origins.EMOJI}" if "tools.fetch_emoji" in commands else ""
    where = " `pictures/` holds the picture files under these licences." if with_pictures else ""
    yield f"The pictures and captions have licences of their own{source}.{where}\n"
