"""Add pictures to the index by embeddings that clip-retrieval computed: their files need not be here.

In:  a `retriever.gallery.build` folder, a folder of embeddings (tools/embeddings.py), and the name of their model,
     which must be the index's own.
Out: the index's next version. A picture's id is what --id-column says of it, its file what --file-column says.
Command: python -m retriever.gallery.add_embeddings --index DIR --model ViT-L-14-336 --pretrained openai laion/part0
"""

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from models.compute import pick_device
from models.options import DeviceOptions
from models.rqvae import RqVae
from tools import runs
from tools.captions import portable
from tools.command_line.commands import run_command
from tools.command_line.place import NameOrPath, user_folder
from tools.embeddings import (
    Embeddings,
    named_model,
    read_embeddings,
    same_model,
    same_space,
    source_columns,
    spread,
)
from tools.errors import BadInput
from tools.features import Rows, normalized
from tools.texts import clean, plural
from tools.vokens import Codes

from .add import Added, again, code, known_rows
from .by_picture import PictureEncoder, read_picture
from .compact import BLOCK, stored_features
from .contents import unknown
from .gallery import Gallery
from .options import IndexOptions
from .pictures import Picture
from .publish import changing, replace_pictures
from .query_encoder import load_encoder, query_features
from .segments import Block

ID_COLUMNS = ("key", "image_path", "url", "URL")
FILE_COLUMNS = ("url", "URL", "image_path")
SAME = 0.999  # cosine from which two computations are of one picture


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions, DeviceOptions):
    """What is added to which index, and who computed it."""

    folder: tyro.conf.Positional[Path]
    """Folder of embeddings: img_emb/, metadata/, and text_emb/ where it is there."""
    model: NameOrPath
    """The model that computed them, as open_clip or as clip-retrieval names it, or an open_clip folder."""
    pretrained: NameOrPath | None = None
    """Tag or checkpoint file of a model given by its open_clip name."""
    id_column: str | None = None
    """Column of the metadata with the ids; by default the first of key, image_path, url and URL that is there."""
    file_column: str | None = None
    """Column with the files; by default image_path where its files are here, else url, URL or image_path, else that
    of the ids."""
    images: Path | None = None
    """Folder that files with a relative path lie in; by default the current one."""
    prefix: str = ""
    """Put before each id."""
    replace: bool = False
    """Let rows take the place of pictures with their id or file."""
    skip_known: bool = False
    """Leave out rows whose id or file is in the index."""
    skip_bad: bool = False
    """Leave out rows without an id or a direction, and those of another picture with an earlier one's id."""

    def __post_init__(self) -> None:
        if self.replace and self.skip_known:
            raise BadInput("--replace and --skip-known contradict each other: give one")


class Choice(NamedTuple):
    """What changes."""

    rows: Rows
    """Of the embeddings that are added."""
    added: list[Picture]
    replaced: Rows
    """Rows of the gallery that leave for them."""


def check_model(gallery: Gallery, embeddings: Embeddings, config: Config) -> None:
    """Refuse embeddings of another model than the index's, by its name.

    Raises:
        BadInput: see above; or the index's tokenizer reads the lengths of features, which embeddings do not have.
    """
    named = named_model(config.model, config.pretrained)
    if not same_model(named, gallery.clip):
        raise BadInput(
            f"{gallery.folder} is of {_called(gallery.clip)}, the embeddings are of {_called(named)}: an index has "
            "features of one model. If they are the same model, name it as the index does: "
            f"--model {_typed(gallery.clip)}"
        )
    tokenizer = RqVae.from_pretrained(gallery.check_rqvae(again(gallery))).config
    if not tokenizer.normalize:
        raise BadInput(
            f"{gallery.rqvae} reads the lengths of features (--no-normalize), and embeddings of clip-retrieval have "
            "length 1: add the pictures themselves"
        )
    if tokenizer.features != embeddings.width:
        raise BadInput(
            f"{embeddings.folder} has vectors of width {embeddings.width}, {gallery.folder} has features of width "
            f"{tokenizer.features}: they are of another model"
        )


def _called(model: tuple[str, str | None]) -> str:
    return model[0] + (f" ({model[1]})" if model[1] else "")


def _typed(model: tuple[str, str | None]) -> str:
    return shlex.quote(model[0]) + (f" --pretrained {shlex.quote(model[1])}" if model[1] else "")


def try_model(gallery: Gallery, embeddings: Embeddings, choice: Choice, device: torch.device) -> str:
    """Compare some vectors with what the index's model gives: of pictures whose files are here, else of captions.

    Returns:
        A line about it.

    Raises:
        BadInput: they are not of that model.
    """
    model = _called(gallery.clip)
    files = [gallery.files_below / picture.file for picture in choice.added]
    here = [place for place in spread(len(files)).tolist() if files[place].is_file()]
    if here:
        tower = PictureEncoder(gallery, "auto", device)
        computed = np.stack([tower.feature(read_picture(files[place])) for place in here])
        cosine = same_space(embeddings.images(choice.rows[here]), computed, embeddings.folder, model)
        return f"{plural(len(here), 'picture')} encoded to compare: median cosine {cosine:.3f}"
    if embeddings.has_texts and "caption" in embeddings.columns:
        captions = embeddings.column("caption")
        rows = np.array([row for row in spread(len(captions)).tolist() if clean(str(captions[row] or ""))], np.int64)
        if len(rows):
            with torch.inference_mode():
                encoder = load_encoder(gallery, "auto", device)
                computed = query_features(encoder, [clean(captions[row]) for row in rows.tolist()])
            cosine = same_space(embeddings.texts(rows), computed, embeddings.folder, model)
            return f"{plural(len(rows), 'caption')} encoded to compare: median cosine {cosine:.3f}"
    return (
        "note: none of the files that were tried is here, and there is no text_emb: nothing shows that the embeddings "
        f"are of {model}"
    )


def pictures_of(gallery: Gallery, embeddings: Embeddings, config: Config) -> dict[int, Picture]:
    """The picture of each row that can be used.

    Raises:
        BadInput: a row cannot be used, and nothing says to leave it out.
    """
    id_column = source_columns(embeddings, config.id_column, among=ID_COLUMNS, option="--id-column")
    below = config.images or user_folder()
    file_column = config.file_column or column_of_files(embeddings, below, id_column)
    source_columns(embeddings, file_column, among=(), option="--file-column")
    print(f"ids are of the column {id_column}, files of the column {file_column}")
    names, files = embeddings.column(id_column), embeddings.column(file_column)
    left_out = unusable(embeddings, names, id_column, skip_bad=config.skip_bad)
    return {
        row: Picture(config.prefix + str(name), recorded(gallery, below, str(files[row] or name)))
        for row, name in enumerate(names)
        if row not in left_out
    }


def column_of_files(embeddings: Embeddings, below: Path, id_column: str) -> str:
    """The column that says where the pictures are: image_path where such files are here, else an address, else what
    there is. Of shards, clip-retrieval writes the keys into image_path."""
    if "image_path" in embeddings.columns:
        paths = embeddings.column("image_path")
        if any((below / str(paths[row])).is_file() for row in spread(len(paths)).tolist()):
            return "image_path"
    return next((name for name in FILE_COLUMNS if name in embeddings.columns), id_column)


def unusable(embeddings: Embeddings, names: list[Any], id_column: str, *, skip_bad: bool) -> set[int]:
    """Rows that are left out, with printed lines about them: those that repeat a picture, and those without use.

    Raises:
        BadInput: there are some without use, and they are not to be skipped.
    """
    problems = dict.fromkeys(embeddings.unusable().tolist(), "its vector has no direction")
    problems |= {
        row: f"it has no {id_column}" for row, name in enumerate(names) if name is None or not str(name).strip()
    }
    repeated = repetitions(names, problems)
    others = different(embeddings, repeated)
    for row in others:
        problems[row] = f"row {repeated[row]} has the {id_column} {names[row]!r}, too, of another picture"
    if same := len(repeated) - len(others):
        print(f"left out as it repeats an earlier row's picture: {plural(same, 'row')}")
    if problems:
        first = min(problems)
        told = f"{len(problems):,} of {len(names):,} rows cannot be used, the first: row {first}: {problems[first]}"
        if not skip_bad:
            raise BadInput(
                f"{embeddings.folder}: {told}: choose another --id-column, or go on without these rows with "
                "--skip-bad; nothing was added"
            )
        print(f"left out: {told}")
    return {*problems, *repeated}


def repetitions(names: list[Any], problems: dict[int, str]) -> dict[int, int]:
    """For each usable row whose id an earlier usable one has that row."""
    first: dict[str, int] = {}
    places = ((row, first.setdefault(str(name), row)) for row, name in enumerate(names) if row not in problems)
    return {row: earlier for row, earlier in places if row != earlier}


def different(embeddings: Embeddings, repeated: dict[int, int]) -> list[int]:
    """Those of the repeated rows that are not of the picture that the earlier row is of."""
    found: list[int] = []
    pairs = np.array(list(repeated.items()), dtype=np.int64).reshape(-1, 2)
    for some in blocks(pairs):
        own, earlier = (normalized(embeddings.images(some[:, side])) for side in (0, 1))
        found += some[(own * earlier).sum(axis=1) < SAME, 0].tolist()
    return found


def recorded(gallery: Gallery, below: Path, file: str) -> str:
    """A file as the gallery has it; an address on the web stays as it is."""
    return file if "://" in file else gallery.recorded(below / file)


def choose(gallery: Gallery, pictures: dict[int, Picture], config: Config) -> Choice:
    """Which rows are added, and what they replace.

    Raises:
        BadInput: a picture is in the index already, and nothing says what to do then.
    """
    known = same_pictures(gallery, list(pictures.values()))
    if known and not (config.replace or config.skip_known):
        first, rows = next(iter(known.items()))
        raise BadInput(
            f"{len(known):,} of {len(pictures):,} rows are in the index already, the first: {first.image} (there: id "
            f"{gallery.picture(rows[0]).image!r}); leave them out with --skip-known, put them in the old ones' place "
            "with --replace, or tell them apart with --prefix; nothing was added"
        )
    kept = {row: picture for row, picture in pictures.items() if not (config.skip_known and picture in known)}
    replaced = {row for picture in kept.values() for row in known.get(picture, [])}
    chosen = np.array(list(kept), dtype=np.int64)
    return Choice(chosen, list(kept.values()), np.array(sorted(replaced), dtype=np.int64))


def same_pictures(gallery: Gallery, new: list[Picture]) -> dict[Picture, list[int]]:
    """Those of the new pictures whose id is in the gallery, or whose file is and lies on this machine: two folders of
    embeddings may have equal names of files that are not here."""
    found = {}
    for picture, rows in known_rows(gallery, new).items():
        here = (gallery.files_below / picture.file).is_file()
        if same := [row for row in rows if here or gallery.picture(row).image == picture.image]:
            found[picture] = same
    return found


def coded(gallery: Gallery, embeddings: Embeddings, choice: Choice, device: torch.device) -> Codes:
    """Codes (added, levels), a block after the other, as if they were added one block after the other."""
    new: list[Codes] = []

    def taken(prefixes: Codes) -> NDArray[np.integer]:
        return np.concatenate([gallery.codes_behind(prefixes, without=choice.replaced), *new])

    for rows in blocks(choice.rows):
        new.append(code(gallery, embeddings.images(rows), taken, device))
    return np.concatenate(new)


def blocks(rows: Rows) -> Iterator[Rows]:
    """Rows, a bounded number at a time."""
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def add_embeddings(index: Path, config: Config) -> Added:
    """Publish a version of the index with the pictures of a folder of embeddings.

    Raises:
        BadInput: the embeddings are damaged or of another model, or see `pictures_of` and `choose`.
    """
    device = pick_device(config.device)
    embeddings = read_embeddings(config.folder)
    with changing(index) as gallery:
        check_model(gallery, embeddings, config)
        choice = choose(gallery, pictures_of(gallery, embeddings, config), config)
        if not choice.added:
            return Added([], 0, len(gallery))
        print(try_model(gallery, embeddings, choice, device))
        codes = coded(gallery, embeddings, choice, device)
        kept = None
        if gallery.keeps_features:
            kept = stored_features(embeddings.images(choice.rows), gallery.segments[0].codec)
        total = replace_pictures(
            gallery,
            removed=choice.replaced,
            added=Block(codes, choice.added, kept, unknown(len(codes))),
            source=portable(config.folder),
        )
    return Added([picture.image for picture in choice.added], len(choice.replaced), total)


def main(config: Config) -> None:
    began = time.monotonic()
    runs.read_manifest(config.index, "retriever.gallery.build")
    added = add_embeddings(config.index, config)
    if not added.images:
        print("nothing to add: every row is in the index or cannot be used; the index stays as it is")
        return
    replaced = f" in the place of {added.replaced:,}" if added.replaced else ""
    seconds = time.monotonic() - began
    print(f"{plural(len(added.images), 'picture')} added{replaced}, {added.total:,} can be found, {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, Config)
