"""What is asked of every reader: a result, or one line."""

import contextlib
from collections.abc import Iterator

import pytest

from dd2.errors import InputError


@contextlib.contextmanager
def result_or_one_line(naming: str = "") -> Iterator[None]:
    """The block ends well, or with an `InputError` of one line that names something; nothing else."""
    try:
        yield
    except InputError as error:
        if "\n" in str(error) or naming not in str(error):
            pytest.fail(f"not one line that names {naming!r}: {error}")
