"""Options that commands have in common, written once: a configuration derives from those it takes."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a command writes."""

    output: Path
    """Run folder to write."""
    overwrite: bool = False
    """Throw away what the output folder holds and start again."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Where a command's rows go, and of which captions they are."""

    summary: Path
    """JSON file of the dataset's results; rows of other systems in it stay."""
    name: str
    """Name of the dataset in the rows."""
    captions_per_picture: int | None = None
    """Add rows over the first so many captions of each picture (5: the 25,000 queries of papers on COCO's test split,
    which has 25,010). The rows over all captions stay, and what is chosen on val is chosen on all of them."""

    def __post_init__(self) -> None:
        if self.captions_per_picture is not None and self.captions_per_picture < 1:
            raise BadInput("`captions_per_picture` must be at least 1")
