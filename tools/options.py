"""Options that commands have in common, written once: a configuration derives from those it takes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a command writes."""

    output: Path
    """Run folder to write."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""
