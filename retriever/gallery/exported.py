"""A retriever as one folder, which can be copied, archived, or put on a model hub:

config.json       what it is, the features' share in the final order, and what the card says
README.md         the model card (retriever/gallery/card.py)
language_model/   a Hugging Face folder with vokens.json
clip/             the two-tower model that encodes queries and new pictures, an open_clip folder
rqvae/            the tokenizer that codes new pictures
index/            ids, codes and features of the pictures: a run folder that retriever.gallery.add changes, too
pictures/         the picture files, where they were included
package/          the Python package that reads the folder, for pip

Nothing in it says where it lies or lay. It is written under another name beside its place, and config.json comes last.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_url

from models.guide import GUIDE_NAME, read_guide
from models.pretrained import ADAPTER_NAME
from models.rqvae import RqVae
from models.voken_lm import VokenLM
from tools import runs
from tools.captions import portable
from tools.errors import BadInput
from tools.files import hash_file, read_json, replacing, write_json

from . import card
from .advice import rebuild
from .compact import BLOCK
from .contents import unknown
from .gallery import EARLIER, EXPORTED, EXPORTED_PICTURES, FOLDERS, Gallery, model_content, read_gallery
from .package import PACKAGE, write_package
from .pictures import Picture
from .publish import entry, shape_of, version_facts
from .segments import Block, write_segment

CONFIG, README = "config.json", "README.md"
FORMAT, VERSION = "avg-retriever", 1
LANGUAGE_MODEL, CLIP, RQVAE, INDEX = "language_model", "clip", "rqvae", "index"
REPLACED = ".config.json.replaced"  # the folder's config.json while its parts are exchanged
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TEXT_TOWER = ("hf_model_name", "hf_tokenizer_name")
MAKE_AGAIN = re.compile(r": (run .* (--overwrite|first.*)|build the index again)$")
AGAIN = "add again what was added, then export"
NOT_UPLOADED = [".lock", "**/.lock"]
REPLACED_THERE = [f"{part}/*" for part in (LANGUAGE_MODEL, CLIP, RQVAE, INDEX, EXPORTED_PICTURES, PACKAGE)]
CONFIGS = "*config.json"  # what says where a model once lay


class Source(NamedTuple):
    """What a retriever is made of, beside its pictures."""

    model: Path
    """Folder of the language model."""
    share: float
    """Of the features in the final order, where the index keeps them."""
    trained: runs.Manifest | None
    """The run that trained it; None of an exported folder."""
    card: dict[str, Any] | None
    """What an exported folder's card says."""


class Results(NamedTuple):
    """Figures for the card."""

    rows: list[dict[str, Any]]
    """Of the summary."""
    system: str | None
    """The retriever's name in them; None for all rows."""


def read_exported(folder: Path) -> tuple[Gallery, Source]:
    """Open what `write_exported` wrote, wherever it lies now.

    Raises:
        BadInput: it is not such a folder, or not a whole one.
    """
    if not folder.exists():
        raise BadInput(f"there is no folder {folder}, and it is no name on the Hugging Face Hub either (owner/name)")
    if not (folder / CONFIG).is_file():
        hint = (
            "it is a run folder: use Retriever.from_runs" if (folder / runs.MANIFEST).is_file() else "export it again"
        )
        raise BadInput(f"{folder} is no exported retriever, it has no {CONFIG}: {hint} (scripts/export.sh)")
    config = read_json(folder / CONFIG)
    check_config(config, str(folder))
    missing = [part for part in (LANGUAGE_MODEL, INDEX) if not (folder / part).is_dir()]
    if missing:
        raise BadInput(f"{folder} lacks {missing[0]}/: copy the whole folder again")
    try:
        gallery = read_gallery(folder / INDEX)
    except BadInput as error:  # whose advice is for run folders
        raise BadInput(MAKE_AGAIN.sub(": copy the whole folder again", str(error))) from None
    if gallery.codebooks_hash != config["codebooks"]:
        raise BadInput(f"{folder / INDEX} has vokens of another tokenizer than {CONFIG} says: copy the folder again")
    return gallery, Source(folder / LANGUAGE_MODEL, float(config["share"]), None, config["card"])


def check_config(config: Any, place: str) -> None:
    """Refuse what is no configuration of an exported folder, or of a later program's."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BadInput(f"{place}: its {CONFIG} is of another kind of model: name what scripts/export.sh wrote")
    if config["version"] != VERSION:
        raise BadInput(f"{place} has version {config['version']} of its format, this program reads {VERSION}")


def write_exported(
    folder: Path,
    gallery: Gallery,
    source: Source,
    *,
    results: Results | None = None,
    include_pictures: bool = False,
    overwrite: bool = False,
    hub_name: str | None = None,
) -> Path:
    """Write the folder.

    Args:
        hub_name: under which its card speaks of it, where it is put on the hub.
        results: what the card says of figures, for a retriever that was not exported before.
        overwrite: replace a folder that was exported before, pictures added to it since included.

    Raises:
        BadInput: the folder holds something, a model has changed since the index was made, or a picture is missing.
    """
    folder = folder.resolve()
    refuse_used(folder, overwrite=overwrite)
    told = source.card
    if told is None:
        assert source.trained is not None, "a retriever is trained or exported"
        rows, system = results or Results([], None)
        told = card.describe(gallery, source.trained, share=source.share, system=system, rows=rows)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_language_model(part / LANGUAGE_MODEL, source.model)
        write_clip(part / CLIP, gallery)
        write_rqvae(part / RQVAE, gallery)
        write_index(part / INDEX, gallery, include_pictures=include_pictures)
        wheel = write_package(part / PACKAGE, source.model.parent / PACKAGE if source.trained is None else None)
        place = None if wheel is None else package_place(wheel.name, folder.name, hub_name)
        name = hub_name or folder.name
        shown = card.render(told, gallery, name=name, with_pictures=include_pictures, package=place)
        with replacing(part / README) as path:
            path.write_text(str(shown), encoding="utf-8")
        config = {"format": FORMAT, "version": VERSION, "share": source.share, "codebooks": gallery.codebooks_hash}
        write_json(part / CONFIG, {**config, "commit": runs.current_commit(), "card": told})
        put_in_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def package_place(wheel: str, folder: str, hub_name: str | None) -> str:
    """Where pip finds the package of an exported folder: in the folder beside it, or on the hub."""
    if hub_name is None:
        return f"{folder}/{PACKAGE}/{wheel}"
    return hf_hub_url(hub_name, f"{PACKAGE}/{wheel}")


def refuse_used(folder: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything but an exported folder, and over that unless it is meant."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = any(
        path.is_file() and read_json(path).get("format") == FORMAT for path in (folder / CONFIG, folder / REPLACED)
    )
    if not ours:
        raise BadInput(f"{folder} is there already, and no exported retriever: name another folder")
    if not overwrite:
        raise BadInput(f"{folder} holds an exported retriever: replace it with --overwrite, or name another folder")


def write_language_model(folder: Path, model: Path) -> None:
    """Copy a language model; adapters are merged into the model that they adapt, so that it stands alone."""
    if (model / ADAPTER_NAME).is_file():
        VokenLM.from_pretrained(model).save_pretrained(folder)
        if (guide := read_guide(model / GUIDE_NAME)) is not None:
            guide.save(folder / GUIDE_NAME)
    else:
        shutil.copytree(model, folder)
    forget_places(folder)


def write_clip(folder: Path, gallery: Gallery) -> None:
    """Write the two-tower model of a gallery as a folder.

    Raises:
        BadInput: it has changed since the index was made, or cannot be loaded.
    """
    from models.clip import CONFIG_NAME, WEIGHTS_NAME, load_recorded, save_clip  # a search by codes needs no open_clip

    gallery.check_clip(rebuild(gallery, AGAIN))
    name = gallery.clip[0]
    if Path(name).is_dir() and (Path(name) / WEIGHTS_NAME).is_file():
        folder.mkdir()
        for path in sorted(Path(name).iterdir()):
            if path.is_file() and path.name not in (runs.MANIFEST, runs.LOCK):
                shutil.copyfile(path, folder / path.name)
    else:
        save_clip(folder, load_recorded(gallery.clip_facts))
    config = read_json(folder / CONFIG_NAME)
    text = config["model_cfg"]["text_cfg"]
    text.update({name: "." for name in TEXT_TOWER if name in text})  # they lie in the folder itself
    write_json(folder / CONFIG_NAME, config)
    forget_places(folder)


def write_rqvae(folder: Path, gallery: Gallery) -> None:
    """Write the tokenizer of a gallery as a run folder."""
    manifest = runs.read_manifest(gallery.check_rqvae(rebuild(gallery, AGAIN)), "RQ-VAE.train")
    RqVae.from_pretrained(manifest.folder).save_pretrained(folder)
    write_manifest(folder, manifest, manifest.facts)


def write_index(folder: Path, gallery: Gallery, *, include_pictures: bool) -> None:
    """Write the current pictures as an index whose models lie beside it; clip/ and rqvae/ have been written."""
    folder.mkdir()
    below = common_folder(gallery)
    root = os.path.abspath(gallery.files_below)  # noqa: PTH100  (links are to stay)

    def relative(picture: Picture) -> Picture:
        return picture._replace(file=os.path.relpath(os.path.join(root, picture.file), below))  # noqa: PTH118

    if include_pictures:
        for picture in gallery.pictures():
            copy_picture(gallery.files_below / picture.file, folder.parent / EXPORTED_PICTURES / relative(picture).file)
    written = write_segment(folder, 0, shape_of(gallery, len(gallery)), all_blocks(gallery, relative), tree=True)
    place = portable(below)
    facts = {
        **card.without_places(gallery.facts),
        **version_facts(0, len(gallery), {written[0].parent.name: len(gallery)}),
        "clip": {"model": CLIP, "pretrained": None, "content": model_content(str(folder.parent / CLIP))},
        "rqvae": {"path": RQVAE, "content": runs.fingerprint(folder.parent / RQVAE)},
        "history": [entry(added=len(gallery), removed=0, source="retriever.gallery.export")],
        FOLDERS: [],
        EARLIER: [],
        EXPORTED: {"pictures": place if below.is_dir() and not Path(place).is_absolute() else None},
    }
    write_manifest(folder, gallery.manifest, facts)


def all_blocks(gallery: Gallery, renamed: Callable[[Picture], Picture]) -> Iterator[Block]:
    """All pictures under other names, without what their files held."""
    pictures = map(renamed, gallery.pictures())
    for start in range(0, len(gallery), BLOCK):
        rows = gallery.rows[start : start + BLOCK]
        features = gallery.stored_features(rows) if gallery.keeps_features else None
        yield Block(gallery.read_codes(rows), list(islice(pictures, len(rows))), features, unknown(len(rows)))


def common_folder(gallery: Gallery) -> Path:
    """The lowest folder that all pictures of a gallery lie below."""
    common = None
    root = os.path.abspath(gallery.files_below)  # noqa: PTH100
    for picture in gallery.pictures():
        own = os.path.dirname(os.path.normpath(os.path.join(root, picture.file)))  # noqa: PTH118, PTH120
        common = own if common is None else os.path.commonpath([common, own])
    assert common is not None, "a gallery has at least one picture"
    return Path(common)


def copy_picture(file: Path, copy: Path) -> None:
    """Copy one picture file into a folder that may not be there yet."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(file, copy)
    except FileNotFoundError:
        raise BadInput(
            f"{file} is missing: put it back, remove it from the index, or export without pictures"
        ) from None


def write_manifest(folder: Path, manifest: runs.Manifest, facts: dict[str, Any]) -> None:
    """Write the manifest of a run's copy: nothing in it says where the run lay."""
    values = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    del values["folder"]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    outputs = {str(path.relative_to(folder)): hash_file(path) for path in files}
    kept = card.without_places({**values, "arguments": [], "environment": {}})
    runs.write_manifest(folder, {**kept, "outputs": outputs, "facts": facts})


def forget_places(folder: Path) -> None:
    """Take from the configurations of a copied model where it, or what it was made from, lay."""
    for path in folder.glob(CONFIGS):
        write_json(path, card.without_places(read_json(path)))


def put_in_place(part: Path, folder: Path) -> None:
    """Let a finished folder take the place of an earlier export, whose other files (.git, say) stay."""
    if not folder.exists():
        part.rename(folder)
        return
    if (folder / CONFIG).is_file():
        (folder / CONFIG).replace(folder / REPLACED)
    for name in (LANGUAGE_MODEL, CLIP, RQVAE, INDEX, EXPORTED_PICTURES, PACKAGE):
        shutil.rmtree(folder / name, ignore_errors=True)
        if (part / name).is_dir():
            (part / name).rename(folder / name)
    for name in (README, CONFIG):
        (part / name).replace(folder / name)
    (folder / REPLACED).unlink(missing_ok=True)


def not_fetched(name: str) -> str:
    """The beginning of a line about a name that leads nowhere."""
    return f"{name} is neither a folder nor fetched from the Hugging Face Hub"


def check_hub_name(name: str) -> None:
    """Refuse what cannot be a repository's name."""
    if not HUB_NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name on the Hugging Face Hub: write owner/name")


@contextmanager
def hub_errors(what: str, *others: type[Exception]) -> Iterator[None]:
    """One line for whatever the hub's client, and what it stands on, raise.

    Args:
        what: has not come about, as the beginning of the line.
        others: errors that are not the hub's.

    Raises:
        BadInput: something was raised.
    """
    try:
        yield
    except BadInput:
        raise
    except others:
        raise
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInput(f"{what}: {line}") from None


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Put an exported folder on the Hugging Face Hub as "owner/name"; returns its address.

    Raises:
        BadInput: the name is none, or the hub refuses it.
    """
    check_hub_name(name)
    with hub_errors(f"{folder} is written, but the Hugging Face Hub does not take {name}"):
        api = HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Retriever",
            ignore_patterns=NOT_UPLOADED,
            delete_patterns=REPLACED_THERE,
        )
    return address
