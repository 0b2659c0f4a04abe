"""Embeddings that clip-retrieval computed, as LAION publishes them, too: vectors, and what each of them stands for.

    img_emb/img_emb_0.npy        (rows, width) of the pictures, in half or single precision
    text_emb/text_emb_0.npy      the same of the captions; it may be missing
    metadata/metadata_0.parquet  a row each: image_path, caption, key, url, ...

There may be any number of parts. Those of one number belong together, and number 07 is number 7. The files may also lie
in the folder itself. Nothing in them says which model computed them, so whoever reads them names it, and `same_space`
compares some vectors with what that model gives.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .captions import CaptionSet, Record
from .errors import BadInput
from .features import Floats, Rows, normalized
from .files import read_array
from .texts import shortened

IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
OPENAI, OPEN_CLIP = "openai", "open_clip:"
QUICK = "-quickgelu"
SAME_SPACE = 0.9  # cosine of two computations of one vector: other arithmetic, resizing or a re-saved file cost little
TRIED = 16  # vectors that are compared
BLOCK = 65_536  # rows that are looked at at once


class Part(NamedTuple):
    """The files of one number."""

    images: Path
    metadata: Path
    texts: Path | None
    rows: int


class Embeddings(NamedTuple):
    """A folder whose parts fit together."""

    folder: Path
    parts: list[Part]
    width: int
    columns: list[str]
    """Of the metadata of every part."""

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def has_texts(self) -> bool:
        return all(part.texts is not None for part in self.parts)

    def column(self, name: str) -> list[Any]:
        """One column of the metadata (rows,)."""
        from pyarrow import parquet

        read = (parquet.read_table(part.metadata, columns=[name])[name].to_pylist() for part in self.parts)
        return [value for values in read for value in values]

    def images(self, rows: Rows) -> Floats:
        """Vectors (chosen, width) of pictures, in the order of `rows`."""
        return self._vectors(rows, [part.images for part in self.parts])

    def texts(self, rows: Rows) -> Floats:
        """Vectors (chosen, width) of captions, in the order of `rows`."""
        paths = [part.texts for part in self.parts if part.texts is not None]
        assert len(paths) == len(self.parts), "there are vectors of captions"
        return self._vectors(rows, paths)

    def unusable(self) -> Rows:
        """Rows whose picture has no direction: a vector of zeros, or with numbers that are not finite."""
        found = []
        for start in range(0, len(self), BLOCK):
            lengths = np.linalg.norm(self.images(np.arange(start, min(start + BLOCK, len(self)))), axis=1)
            found.append(start + np.flatnonzero(~((lengths > 0) & np.isfinite(lengths))))
        return np.concatenate(found)

    def _vectors(self, rows: Rows, paths: Sequence[Path]) -> Floats:
        found = np.empty((len(rows), self.width), dtype=np.float32)
        start = 0
        for part, path in zip(self.parts, paths, strict=True):
            own = np.flatnonzero((rows >= start) & (rows < start + part.rows))
            if len(own):
                found[own] = read_array(path)[rows[own] - start]
            start += part.rows
        return found


def read_embeddings(folder: Path) -> Embeddings:
    """Find the parts of a folder, and check that they fit together; the vectors themselves are not read.

    Raises:
        BadInput: there are none, one lacks a file, or the rows, widths or columns of two files differ.
    """
    images, texts, metadata = (
        _numbered(folder, kind, ending) for kind, ending in ((IMAGES, "npy"), (TEXTS, "npy"), (METADATA, "parquet"))
    )
    if not images:
        raise BadInput(
            f"{folder} has no {IMAGES}/{IMAGES}_0.npy: name a folder that clip-retrieval's inference wrote, or that "
            "has its layout"
        )
    for number, path in sorted(images.items()):
        for others, name in ((metadata, METADATA), *([(texts, TEXTS)] if texts else [])):
            if number not in others:
                raise BadInput(f"{path} has no file {name}_{number} beside it: put it there, or move {path.name} away")
    for number, path in sorted({**texts, **metadata}.items()):
        if number not in images:
            raise BadInput(f"{path} has no {IMAGES}_{number} beside it: put it there, or move {path.name} away")
    parts = [_part(path, metadata[number], texts.get(number)) for number, path in sorted(images.items())]
    widths = {read_array(path).shape[1]: path for part in parts for path in (part.images, part.texts) if path}
    if len(widths) > 1:
        (first, one), (second, other) = list(widths.items())[:2]
        raise BadInput(f"{one} has vectors of width {first}, {other} of width {second}: they are of different models")
    columns = [_columns(part.metadata) for part in parts]
    shared = [name for name in columns[0] if all(name in each for each in columns)]
    found = Embeddings(folder, parts, next(iter(widths)), shared)
    if not len(found):
        raise BadInput(f"{folder} has parts without any row")
    return found


def _numbered(folder: Path, kind: str, ending: str) -> dict[int, Path]:
    """The files of one kind by their number."""
    found: dict[int, Path] = {}
    for path in sorted([*(folder / kind).glob(f"*.{ending}"), *folder.glob(f"{kind}_*.{ending}")]):
        number = re.fullmatch(r".*?(\d+)", path.stem)
        if number is None:
            raise BadInput(f"{path} has no number in its name: call it {kind}_0.{ending}, and so on")
        if int(number[1]) in found:
            raise BadInput(f"{found[int(number[1])]} and {path} have the same number: move one of them away")
        found[int(number[1])] = path
    return found


def _part(images: Path, metadata: Path, texts: Path | None) -> Part:
    rows = _described(metadata).num_rows
    for path in (images, texts):
        if path is None:
            continue
        vectors = read_array(path)
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise BadInput(f"{path} holds {vectors.dtype} of shape {vectors.shape}: expected rows of floating numbers")
        if len(vectors) != rows:
            raise BadInput(f"{path} has {len(vectors):,} rows and {metadata} {rows:,}: compute or fetch them again")
    return Part(images, metadata, texts, rows)


def _described(path: Path) -> Any:
    """What a parquet file says of itself."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is no readable parquet file ({shortened(str(error))}): fetch it again") from None


def _columns(path: Path) -> list[str]:
    return list(_described(path).schema.to_arrow_schema().names)


def named_model(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """A model as open_clip names it, also where it is named as clip-retrieval does.

    >>> named_model("ViT-L/14@336px", None), named_model("open_clip:ViT-B-32/laion2b_s34b_b79k", None)
    (('ViT-L-14-336', 'openai'), ('ViT-B-32', 'laion2b_s34b_b79k'))
    >>> named_model("ViT-B-32", "openai"), named_model("my/clip", None)
    (('ViT-B-32', 'openai'), ('my/clip', None))
    """
    if model.startswith(OPEN_CLIP):
        name, _, tag = model.removeprefix(OPEN_CLIP).partition("/")
        return name, tag or pretrained
    if re.fullmatch(r"ViT-[A-Z]/\d+(@336px)?", model) or re.fullmatch(r"RN\d+(x\d+)?", model):
        name = model.replace("/", "-").replace("@336px", "-336")
        return name, pretrained or OPENAI
    return model, pretrained


def same_model(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Whether two names are of one model; the tag of a named one tells its activation, and -quickgelu adds nothing."""

    def plain(model: tuple[str, str | None]) -> list[str]:
        places = [model[0].removesuffix(QUICK), model[1] or ""]
        return [str(Path(place).resolve()) if place and Path(place).exists() else place for place in places]

    return plain(one) == plain(other)


def same_space(given: Floats, computed: Floats, folder: Path, model: str) -> float:
    """The median cosine of vectors (some, width) of a folder with those that a model gives of the same things.

    Raises:
        BadInput: they are not of that model.
    """
    if given.shape[1] != computed.shape[1]:
        raise BadInput(
            f"{folder} has vectors of width {given.shape[1]}, {model} gives {computed.shape[1]}: name the model that "
            "computed them"
        )
    cosine = float(np.median((normalized(given) * normalized(computed)).sum(axis=1)))
    if not cosine >= SAME_SPACE:
        raise BadInput(
            f"{folder} is not of {model}: the cosine of its vectors with those that this model gives of the same "
            f"pictures or texts is {cosine:.2f} (median of {len(given)}), and 1.00 is expected: name the model that "
            "computed them"
        )
    return cosine


def spread(count: int) -> Rows:
    """Places of a few things among many, from the first to the last.

    >>> spread(3).tolist(), len(spread(1000))
    ([0, 1, 2], 16)
    """
    return np.unique(np.linspace(0, count - 1, min(count, TRIED)).astype(np.int64))


def rows_of_pictures(embeddings: Embeddings, captions: CaptionSet) -> Rows:
    """The row (pictures,) that has each picture's vector, by what names it in the metadata: its id as key, its file as
    image_path, or either of them without the ending, as img2dataset's keys are.

    Raises:
        BadInput: some have none; the message names the first.
    """
    best: list[int] = []
    for rows in _ways(embeddings, captions):
        if min(rows, default=0) >= 0:
            return np.array(rows, dtype=np.int64)
        if not best or rows.count(-1) < best.count(-1):
            best = rows
    if not best:
        raise BadInput(f"{embeddings.folder} has neither of the columns key and image_path in its metadata")
    first = captions.records[best.index(-1)]
    raise BadInput(
        f"{embeddings.folder} has no row for {best.count(-1):,} of {len(best):,} pictures, the first: {first.image} "
        f"(file {first.file}): leave the embeddings out, and the pictures are encoded"
    )


def _ways(embeddings: Embeddings, captions: CaptionSet) -> Iterator[list[int]]:
    """For each way to name the pictures the row of each, -1 where there is none."""
    below = captions.images.resolve()
    by_id: list[Callable[[Record], str]] = [
        lambda record: record.image,
        lambda record: str(Path(record.image).with_suffix("")),
        lambda record: Path(record.image).stem,
    ]
    by_file: list[Callable[[Record], str]] = [lambda record: str(below / record.file), lambda record: record.file]
    for column, ways in (("key", by_id), ("image_path", [*by_file, *by_id])):
        if column not in embeddings.columns:
            continue
        row_of: dict[str, int] = {}
        for row, value in enumerate(embeddings.column(column)):
            row_of.setdefault(str(value), row)
        for way in ways:
            names = [way(record) for record in captions.records]
            if len(set(names)) == len(names):  # else two pictures would have one row
                yield [row_of.get(name, -1) for name in names]


def rows_of_captions(embeddings: Embeddings, captions: CaptionSet, pictures: Rows) -> Rows | None:
    """The row (captions,) that has each caption's vector; None where one has none.

    Args:
        pictures: (pictures,) row of each picture, whose rows are those of the same image_path or key.
    """
    if not embeddings.has_texts or "caption" not in embeddings.columns:
        return None
    name = "key" if "key" in embeddings.columns else "image_path"
    owners = embeddings.column(name)
    row_of = {pair: row for row, pair in enumerate(zip(owners, embeddings.column("caption"), strict=True))}
    pairs = (
        (owners[row], text) for row, record in zip(pictures, captions.records, strict=True) for text in record.captions
    )
    rows = [row_of.get(pair, -1) for pair in pairs]
    return None if -1 in rows else np.array(rows, dtype=np.int64)


def source_columns(embeddings: Embeddings, wanted: str | None, *, among: Sequence[str], option: str) -> str:
    """The column that tells something: the one that is wanted, or the first of several that is there.

    Raises:
        BadInput: there is none.
    """
    names = [wanted] if wanted is not None else list(among)
    for name in names:
        if name in embeddings.columns:
            return name
    raise BadInput(
        f"the metadata of {embeddings.folder} has no column {' or '.join(names)}: name one with {option}, it has "
        f"{', '.join(embeddings.columns)}"
    )
