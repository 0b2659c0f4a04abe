"""Splits: their names in other projects, and the rule for sources that have none."""

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..captions import SPLITS
from ..errors import BadInput

NAMES = {
    "training": "train",
    "restval": "train",  # COCO's val pictures that Karpathy and Fei-Fei train on
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
}


def split_named(value: Any) -> Any:
    """The split that a name means, None for an empty one; a name that is unknown stays as it is.

    >>> [split_named(name) for name in ("Train", "validation", " dev ", "restval", "holdout", " ")]
    ['train', 'val', 'val', 'train', 'holdout', None]
    """
    if not isinstance(value, str):
        return value
    name = value.strip().casefold()
    if not name:
        return None
    return name if name in SPLITS else NAMES.get(name, value)


def split_in_path(path: Path) -> str | None:
    """The split that a data file's name or folder begins with, as in the files of `datasets`.

    >>> split_in_path(Path("data/validation-00000-of-00002.parquet")), split_in_path(Path("trainable.parquet"))
    ('val', None)
    """
    for word in (path.stem, path.parent.name):
        name = split_named(re.split(r"[-_.]", word)[0])
        if name in SPLITS:
            return str(name)
    return None


def rule_for(path: Path, rules: str) -> Callable[[str], str]:
    """The split rule of one source, as a function of the image id.

    Raises:
        BadInput: there is no rule for the source.
    """
    rule = rules
    for part in rules.split(";"):
        name, equals, own = part.partition("=")
        if equals and name.strip() in (path.name, path.stem):
            rule = own.strip()
        elif equals and rule == rules:
            rule = ""
    if rule in SPLITS:
        return lambda image: rule
    kind, _, shares = rule.partition(":")
    try:
        train, val, test = (float(share) for share in shares.split(","))
    except ValueError:
        kind = ""
    if kind != "random" or not abs(train + val + test - 1) < 1e-6 or min(train, val, test) < 0:
        raise BadInput(
            f"--split-rule {rules!r} gives no rule for {path.name}: write train, val or test, or "
            '"random:0.8,0.1,0.1" with shares that sum to 1, or "FILE=RULE;FILE=RULE"'
        )
    return partial(random_split, bounds=(train, train + val))


def random_split(image: str, bounds: tuple[float, float]) -> str:
    """A split drawn by the hash of an image id; `bounds` are where val and test begin, in [0, 1]."""
    draw = int.from_bytes(hashlib.blake2b(image.encode(errors="surrogatepass"), digest_size=8).digest(), "big") / 2**64
    return "train" if draw < bounds[0] else "val" if draw < bounds[1] else "test"
