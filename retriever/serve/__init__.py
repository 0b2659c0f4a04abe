"""The search page and its JSON endpoint; `python -m retriever.serve` is its door."""
