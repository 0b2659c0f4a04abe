"""The pictures that are searched live: made, changed, searched and exported.

`Retriever` searches and changes them; `read_gallery` opens what an index holds.
"""

from .gallery import read_gallery

__all__ = ["read_gallery"]
