"""The words of the preflight: what is needed, and what was found."""

from typing import NamedTuple

OK, MISSING, UNKNOWN = "ok", "MISSING", "unknown"


class Need(NamedTuple):
    """Something that a stage will ask for."""

    kind: str
    """Which check looks at it"""
    stage: str
    values: dict[str, str]
    """What that check has to know"""


class Finding(NamedTuple):
    """A line of the list."""

    stage: str
    what: str
    state: str
    """OK, MISSING (it will stop the chain) or UNKNOWN"""
    advice: str
    """What to do unless it is OK"""
