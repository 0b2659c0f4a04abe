"""Captions that are generated for pictures of the pool; `generate` is its door."""
