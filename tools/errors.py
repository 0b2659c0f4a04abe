"""The one exception a user is meant to read."""


class BadInput(Exception):
    """Something outside the code is wrong: one line that says what, where, and what to do about it."""
