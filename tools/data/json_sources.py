"""Captions in one JSON file: Karpathy's, COCO's, the published `<dataset>_split_captions.json`, plain dictionaries.

An entry that cannot be read is a problem with its place. No key and no id may stand twice.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import read_json
from .found import Found, bad, picture_of

Reader = Callable[[Path, Any], Iterator[Found]]


class Doubled(dict[str, Any]):
    """A JSON object in which a key stands twice."""

    key = ""
    """The first such key."""
    keys_twice: frozenset[str] = frozenset()
    """All of them."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs; `Doubled` where a key stands twice, of which the last would win unseen."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    doubled = Doubled(found)
    doubled.key, doubled.keys_twice = twice[0], frozenset(twice)
    return doubled


def stated_captions(row: dict[str, Any]) -> list[Any] | None:
    """What `captions` of an object hold, and what `caption` adds to them; None where it has neither.

    >>> stated_captions({"captions": ["one", "two"], "caption": "three"}), stated_captions({"caption": None})
    (['one', 'two', 'three'], None)
    """
    stated = [row[key] for key in ("captions", "caption") if row.get(key) is not None]
    found: list[Any] = []
    for value in stated:
        texts = value if isinstance(value, list) else [value]
        found = found + [text for text in texts if text not in found] if found else list(texts)
    return found if stated else None


def read_value(path: Path) -> Any:
    """The value of a JSON file, with its doubled keys marked."""
    try:
        return read_json(path, object_pairs_hook=once)
    except BadInput as error:
        if "(Extra data)" not in str(error):
            raise
        raise BadInput(f"{error}: where each line holds an object, name the file *.jsonl") from None


def read_karpathy(path: Path, value: Any) -> Iterator[Found]:
    """Karpathy and Fei-Fei's `dataset_flickr30k.json`, `dataset_coco.json`."""
    for number, row in enumerate(_list(path, value, "images", "karpathy")):
        where = f"{path.name}, images[{number}]"
        if isinstance(row, Doubled):
            yield bad(f"{where}: {row.key}", "key that stands twice")
            continue
        try:
            file = str(Path(row.get("filepath") or "") / row["filename"])
            captions = [sentence["raw"] for sentence in row["sentences"]]
            split = row["split"]
        except KeyError as error:
            yield bad(where, f"entry without {error}, which Karpathy's files have")
        except (TypeError, AttributeError):
            yield bad(where, "entry that is not as in Karpathy's files")
        else:
            yield Found(row["filename"], file, split, captions, where)


def read_published(path: Path, value: Any) -> Iterator[Found]:
    """The `<dataset>_split_captions.json` of the method's authors: file name -> {"split", "caption": [...]}; or file
    name -> captions."""
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not of format published, it holds no object: name another --format")
    twice = value.keys_twice if isinstance(value, Doubled) else frozenset()
    for file, row in value.items():
        where = f'{path.name}, entry "{file}"'
        if file in twice:
            yield bad(where, "key that stands twice")
        elif isinstance(row, Doubled):
            yield bad(f"{where}: {row.key}", "key that stands twice")
        elif isinstance(row, dict):
            captions = stated_captions(row)
            if captions is None:
                yield bad(where, 'entry without "caption"')
            else:
                yield picture_of(file, captions, where, row.get("split"))
        else:
            yield picture_of(file, row if isinstance(row, list) else [row], where)


def read_coco(path: Path, value: Any) -> Iterator[Found]:
    """COCO's `captions_*.json`: `images` (id, file_name) and `annotations` (image_id, caption)."""
    images = _list(path, value, "images", "coco")
    counts = Counter(_hashable(row.get("id")) for row in images if isinstance(row, dict))
    captions: dict[Any, list[Any]] = {}
    for number, row in enumerate(_list(path, value, "annotations", "coco")):
        where = f"{path.name}, annotations[{number}]"
        if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
            yield bad(where, "annotation without image_id or caption")
        elif isinstance(row, Doubled):
            yield bad(f"{where}: {row.key}", "key that stands twice")
        elif _hashable(row["image_id"]) not in counts:
            yield bad(
                f"{where}: image_id {json.dumps(row['image_id'])}",
                "annotation of an image that is not among the images",
            )
        else:
            captions.setdefault(_hashable(row["image_id"]), []).append(row["caption"])
    for number, row in enumerate(images):
        where = f"{path.name}, images[{number}]"
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("file_name"), str):
            yield bad(where, "entry without id or file_name")
        elif isinstance(row, Doubled):
            yield bad(f"{where}: {row.key}", "key that stands twice")
        elif counts[_hashable(row["id"])] > 1:
            yield bad(f"{where}: id {row['id']}", "several images have one id")
        else:  # without an annotation it can be found and trains nothing
            yield picture_of(row["file_name"], captions.get(_hashable(row["id"]), []), where)


def _hashable(value: Any) -> Any:
    """An id as a key: 1 and "1" and true are different, and so are lists."""
    return (type(value).__name__, json.dumps(value, sort_keys=True))


def _list(path: Path, value: Any, key: str, kind: str) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise BadInput(f"{path} is not of format {kind}, it has no list of {key}: name another --format")
    if isinstance(value, Doubled):
        raise BadInput(f"{path}: the key {value.key} stands twice: leave one of them")
    return list(value[key])
