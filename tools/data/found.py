"""What every reader of captions gives: pictures as a source names them, and what is wrong with them."""

from typing import Any, NamedTuple

from ..texts import printable

EXAMPLES = 3  # named in a note


class Found(NamedTuple):
    """A picture as its source names it, before any check; split None is decided by the rule."""

    image: str
    file: str
    split: Any
    """A text, unless the source is wrong."""
    captions: list[Any]
    """Texts, unless the source is wrong."""
    where: str
    problem: str = ""
    """What is known to be wrong with it."""
    joins: bool = False
    """Whether further rows of the same picture add captions to it, as in a table of one row a caption."""


class Problem(NamedTuple):
    """What is wrong with one picture or caption, and where."""

    kind: str
    where: str


def bad(where: str, problem: str) -> Found:
    """A row of which nothing can be used."""
    return Found("", "", None, [], where, problem)


def picture_of(file: str, captions: list[Any], where: str, split: Any = None, *, joins: bool = False) -> Found:
    """A picture whose id is its file's name."""
    return Found(file, file, split, captions, where, joins=joins)


def note(line: str) -> None:
    """Say what was read in another way than it stands there, or not at all."""
    print(printable(line))


def some(names: list[str]) -> str:
    """The first few of many names.

    >>> some(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")
