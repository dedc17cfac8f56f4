"""DataError: what the user can mend about the data."""

from __future__ import annotations


class DataError(Exception):
    """Something about the data that the user can mend. Its message says what is wrong, where, and what to do."""
