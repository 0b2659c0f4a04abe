"""What every reader of captions gives: pictures as a source names them, and what is wrong with them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ..texts import clean, is_unicode, plural, printable

EXAMPLES = 3  # named in a note
NAMED_PROBLEMS = 10


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

    @property
    def place(self) -> str:
        """Where it stands, and its file."""
        return f"{self.where}: {self.file}" if self.file not in ("", self.where) else self.where


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


def check_captions(row: Found) -> tuple[tuple[str, ...], list[Problem]]:
    """The good captions of a picture, each on one line without control characters; what is wrong with the others."""
    good, problems = [], []
    for caption in row.captions:
        if caption is not None and not isinstance(caption, str):
            problems.append(Problem(f"caption is no text but {type(caption).__name__}", row.where))
        elif not caption or not (text := clean(caption)):
            problems.append(Problem("empty caption", row.where))
        elif not is_unicode(caption):
            problems.append(Problem("caption with half a character (a lone surrogate)", row.where))
        else:
            good.append(text)
    return tuple(good), problems


def report(problems: list[Problem], images: Path) -> str:
    """Counts by kind and the first ten of them, with the way out."""
    counts = Counter(problem.kind for problem in problems)
    lines = [f"{plural(len(problems), 'problem')} in the data ({images}):"]
    lines += [f"  {count:,} × {kind}" for kind, count in counts.most_common()]
    lines += [f"  {problem.kind}: {problem.where}" for problem in problems[:NAMED_PROBLEMS]]
    return "\n".join(printable(line) for line in lines)
