"""The retriever: commands from codes to ranked pictures, and `Retriever`, all of a search in one object.

from retriever import Retriever

Retriever.from_pretrained(folder).search(["a dog"], k=10)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gallery.answers import Found
    from .gallery.api import Retriever

__all__ = ["Found", "Retriever"]


def __getattr__(name: str) -> Any:
    """`Retriever` and `Found` on first use: a command that needs neither does not load what they need."""
    if name in __all__:
        from .gallery import answers, api

        return getattr(api if name == "Retriever" else answers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
