"""Text-to-image retrieval as generation: the search with a retriever that was trained and exported before.

    from avg import Retriever
    retriever = Retriever.from_pretrained(folder)  # or "owner/name" on the Hugging Face Hub
    for found in retriever.search(["a dog"], k=10)[0]:
        print(found.score, found.file)

On the command line: `avg search FOLDER "a dog"` and `avg serve FOLDER`. This package is made of the repository's rooms
`models`, `tools` and `retriever` (package/build.py). Training is done in the repository.
"""

from typing import TYPE_CHECKING, Any

from tools.errors import BadInput

if TYPE_CHECKING:
    from retriever import Found, Retriever

__all__ = ["BadInput", "Found", "Retriever"]


def __getattr__(name: str) -> Any:
    """`Retriever` and `Found` on first use, so that `avg --help` does not load PyTorch."""
    if name in __all__:
        import retriever as room

        return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
