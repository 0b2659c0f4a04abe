"""Texts that pictures are searched with: checked, and told apart from what the models read of them."""

import warnings
from collections.abc import Sequence

from models.lengths import Reader, unread
from tools.errors import BadInput
from tools.texts import clean, shortened

from ..queries import LONGEST_QUERY, read_query


def check_queries(queries: Sequence[str]) -> list[str]:
    """Texts on one line each, without control characters.

    Raises:
        BadInput: one is empty; or one text is given where several are expected: its letters would be the queries.
    """
    if isinstance(queries, str):
        raise BadInput("queries must be a list of texts: write [query]")
    return [read_query(query) for query in queries]


def tell_unread(queries: Sequence[str], models: Sequence[Reader], into: list[list[str]] | None) -> None:
    """Say what of each query its models do not read, where it is long: into a list, or as warnings."""
    for query in queries:
        read = read_query(query)
        notes = [
            f"{part} of the query are not read by {model.reader}, which reads {model.most_tokens} tokens"
            for model in models
            if (part := unread(model, read)) is not None
        ]
        if not notes and clean(query[LONGEST_QUERY:]):
            notes = [f"characters {LONGEST_QUERY + 1:,} and on of the query are not read by any model"]
        if into is not None:
            into.append(notes)
        elif notes:
            warnings.warn(f'"{shortened(query)}": {"; ".join(notes)}', stacklevel=3)
