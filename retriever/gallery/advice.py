"""What to do where an index cannot answer: its models or files have changed, or it keeps no features."""

from .gallery import EXPORTED, Gallery

REBUILD = "run scripts/14_build_index.sh --overwrite"


def rebuild(gallery: Gallery, then: str = "add again what was added") -> str:
    """How an index is made again.

    Args:
        then: what has to follow where it is a run folder.
    """
    if EXPORTED in gallery.facts:
        return f"copy the exported folder again, or {REBUILD} and scripts/export.sh where it was made"
    return f"{REBUILD} and {then}"
