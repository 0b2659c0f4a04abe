"""Codes of pictures as a catalogue of semantic ids: a parquet file, which generative recommenders read, too.

    id         string        the picture's id
    file       string        its file
    codes      list<int32>   a code for each level, from coarse to fine
    tokens     list<string>  the same as tokens of the language model: <v0_17>, or <v_17> where one codebook serves all
    collision  int32         place among the pictures of the same codes, from 0: codes and it tell pictures apart

The file's metadata has a JSON object under the key `avg.semantic_ids`: format and version; levels, codebook_size and
shared (whether one codebook serves all levels); codebooks, the hash of the codebooks' file, by which two catalogues are
known to be of one tokenizer; resolved (whether pictures of equal codes were given others); clip (the two-tower model of
the features) and pictures, their number.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput
from .files import replacing
from .texts import plural, shortened
from .vokens import Codes, VokenSpace

KEY = b"avg.semantic_ids"
FORMAT, VERSION = "semantic-ids", 1
COLUMNS = {"id": "string", "file": "string", "codes": "list<int32>", "tokens": "list<string>", "collision": "int32"}
FACTS = ("levels", "codebook_size", "shared", "codebooks")


class Catalogue(NamedTuple):
    """What a file holds."""

    images: list[str]
    files: list[str]
    codes: Codes
    """(pictures, levels)"""
    collisions: NDArray[np.int64]
    """(pictures,)"""
    facts: dict[str, Any]

    @property
    def space(self) -> VokenSpace:
        return VokenSpace(self.facts["levels"], self.facts["codebook_size"], self.facts["shared"])


def collisions_of(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Place (pictures,) of each picture among those of its codes (pictures, levels).

    >>> collisions_of(np.array([[1, 2], [0, 2], [1, 2], [1, 2]])).tolist()
    [0, 0, 1, 2]
    """
    _, groups = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(groups.ravel(), kind="stable")
    sorted_groups = groups.ravel()[order]
    places = np.empty(len(codes), dtype=np.int64)
    places[order] = np.arange(len(codes)) - np.searchsorted(sorted_groups, sorted_groups)
    return places


def tokens_of(codes: Codes, space: VokenSpace) -> list[list[str]]:
    """Codes (pictures, levels) as tokens."""
    names = space.tokens
    return [[names[row] for row in rows] for rows in space.rows(codes).tolist()]


def schema_of(told: dict[str, Any]) -> Any:
    """The columns, and what the metadata says."""
    import pyarrow

    kinds = {"string": pyarrow.string(), "int32": pyarrow.int32()}
    kinds |= {"list<int32>": pyarrow.list_(pyarrow.int32()), "list<string>": pyarrow.list_(pyarrow.string())}
    fields = [(name, kinds[kind]) for name, kind in COLUMNS.items()]
    return pyarrow.schema(fields, metadata={KEY: json.dumps(told, ensure_ascii=False).encode()})


def write_catalogue(
    path: Path, images: Sequence[str], files: Sequence[str], codes: Codes, space: VokenSpace, facts: dict[str, Any]
) -> None:
    """Write a file, atomically.

    Args:
        codes: (pictures, levels)
        facts: what the metadata says besides the space.
    """
    import pyarrow
    from pyarrow import parquet

    told = {"format": FORMAT, "version": VERSION, **space._asdict(), **facts, "pictures": len(images)}
    collisions = collisions_of(codes).astype(np.int32)
    columns = [list(images), list(files), codes.tolist(), tokens_of(codes, space), collisions]
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(columns, schema=schema_of(told)), temporary)


def read_catalogue(path: Path) -> Catalogue:
    """Read what `write_catalogue` wrote.

    Raises:
        BadInput: the file is missing, is none, or its parts contradict each other; the message names the row.
    """
    table, facts = _opened(path)
    codes = [each or [] for each in table["codes"].to_pylist()]
    levels, size = facts["levels"], facts["codebook_size"]
    for row, each in enumerate(codes):
        if len(each) != levels or not all(code is not None and 0 <= code < size for code in each):
            raise BadInput(f"{path}, row {row}: the codes are {each}: expected {levels} of 0 to {size - 1}")
    found = Catalogue(
        table["id"].to_pylist(), table["file"].to_pylist(), np.array(codes, dtype=np.int64).reshape(-1, levels),
        np.array(table["collision"].to_pylist(), dtype=np.int64), facts,
    )  # fmt: skip
    _check(path, found, table["tokens"].to_pylist())
    return found


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """The table, and what its metadata says."""
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise BadInput(f"{path} does not exist")
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is no readable parquet file ({shortened(str(error))})") from None
    told = (table.schema.metadata or {}).get(KEY)
    if told is None:
        raise BadInput(f"{path} is no catalogue of semantic ids: its metadata has no {KEY.decode()}")
    try:
        facts = json.loads(told)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise BadInput(f"{path}: {KEY.decode()} in its metadata is no JSON object: write it again")
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        kind = f"{facts.get('format')} {facts.get('version')}"
        raise BadInput(f"{path} has format {kind}, this program reads {FORMAT} {VERSION}")
    if missing := [name for name in (*COLUMNS, *FACTS) if name not in {*table.column_names, *facts}]:
        raise BadInput(f"{path} lacks {missing[0]}: write it again")
    if wrong := [name for name in FACTS[:2] if type(facts[name]) is not int or facts[name] < 1]:
        raise BadInput(f"{path}: {wrong[0]} is {facts[wrong[0]]!r} in its metadata: write it again")
    try:
        table = table.select(list(COLUMNS)).cast(schema_of({}))
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: a column is of another type ({shortened(str(error))}): write it again") from None
    if empty := [name for name in COLUMNS if table[name].null_count]:
        raise BadInput(f"{path} has rows without {empty[0]}: write it again")
    return table, facts


def _check(path: Path, found: Catalogue, tokens: list[list[str]]) -> None:
    if len(found.images) != found.facts["pictures"]:
        told = plural(found.facts["pictures"], "picture")
        raise BadInput(f"{path} has {len(found.images):,} rows, its metadata says {told}: write it again")
    seen: dict[str, int] = {}
    for row, image in enumerate(found.images):
        if seen.setdefault(image, row) != row:
            raise BadInput(f"{path}, row {row}: row {seen[image]} has the id {image!r}, too")
    expected = tokens_of(found.codes, found.space)
    for row, (own, wanted) in enumerate(zip(tokens, expected, strict=True)):
        if own != wanted:
            raise BadInput(f"{path}, row {row}: the tokens {own} are not those of the codes, {wanted}")
    if len(different := np.flatnonzero(found.collisions != collisions_of(found.codes))):
        raise BadInput(f"{path}, row {different[0]}: collision is {found.collisions[different[0]]}: write it again")
