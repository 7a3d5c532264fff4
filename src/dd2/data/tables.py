"""Records in the formats that lists of texts come in: .jsonl, .csv, .tsv."""

import csv
import io
from typing import Any

from dd2.errors import InputError
from dd2.records import parsed_text

TEXT_KEYS = ("prompt", "caption", "text")
"""What the field calls the text in records; the first that is there counts."""


def is_text(text: str) -> bool:
    """Whether it can be written: JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def records_of(text: str, name: str, place: str) -> list[dict[str, Any]]:
    """The records of a file.

    Args:
        text: its content.
        name: its name, whose ending says the format.
        place: where it is, for messages.

    Raises:
        InputError: it is no such file.
    """
    if name.lower().endswith(".jsonl"):
        found = [json_of(line, place) for line in text.split("\n") if line.strip()]
    else:
        try:
            found = list(csv.DictReader(io.StringIO(text), delimiter="\t" if name.lower().endswith(".tsv") else ","))
        except csv.Error as error:
            raise InputError(f"{place} cannot be read as a table ({error}); write it again") from error
    if not all(isinstance(record, dict) for record in found):
        raise InputError(f"{place} holds something else than records ({{…}}), one a line; write it again")
    return found


def json_of(text: str, place: str) -> Any:
    """What JSON says.

    Raises:
        InputError: it is none.
    """
    try:
        return parsed_text(text)
    except ValueError as error:
        raise InputError(f"{place} is not valid JSON ({error}); write it again") from error
