"""One page about everything that has been run; `python -m retriever.report` is its door."""
