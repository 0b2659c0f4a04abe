"""The pictures that are searched live: made, changed, searched and exported; `Retriever` is its door."""
