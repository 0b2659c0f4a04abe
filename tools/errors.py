"""The one exception a user is meant to read."""

EXIT_BAD_INPUT = 2  # status of a process that ends with a BadInput


class BadInput(Exception):
    """Something outside the code is wrong: one line that says what, where, and what to do about it."""
