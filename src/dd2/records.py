"""Reading the JSON that dd2 writes: a file that was cut, edited or is another one gets one line, wherever it is read."""

import json
from pathlib import Path
from typing import Any

from dd2.errors import InputError

Shape = type | dict[Any, "Shape"] | list["Shape"]
"""What a value must be: a type (float takes whole numbers too, object takes anything); {"name": shape} an object with these
entries, {"name?": shape} perhaps with it, {str: shape} with any others; [shape] a list of such."""


def parsed(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or deeper than anybody writes.
    """
    return parsed_text(file.read_text(encoding="utf-8"))


def parsed_text(text: str) -> Any:
    """What JSON says. Errors as `parsed`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_record(file: Path, shape: dict[Any, Shape], remedy: str) -> dict[str, Any]:
    """A JSON object that has what its readers need.

    Args:
        file: where it is.
        shape: what it must hold, and may hold more of.
        remedy: what the user can do if it does not.

    Raises:
        InputError: it cannot be read, is no JSON, or an entry is missing or of another type; the message names it.
    """
    found = _read(file, remedy)
    if wrong := _wrong(found, shape, ""):
        raise InputError(f"{file} is damaged or of another dd2 ({wrong}); {remedy}")
    return found


def _read(file: Path, remedy: str) -> Any:
    try:
        found = parsed(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{file} cannot be read ({why}); {remedy}") from error
    return found


def read_list(file: Path, shape: Shape, remedy: str) -> list[Any]:
    """As `read_record`, of a JSON list whose entries have a shape."""
    found = _read(file, remedy)
    if wrong := _wrong(found, [shape], ""):
        raise InputError(f"{file} is of another kind ({wrong}); {remedy}")
    return found


def _wrong(value: Any, shape: Shape, where: str) -> str:
    """What is wrong with a value; empty where nothing is."""
    here = where or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{here} is no object"
        for key, inner in shape.items():
            if key is str:
                wrong = [_wrong(entry, inner, f"{where}.{name}".strip(".")) for name, entry in value.items()]
            else:
                name = key.removesuffix("?")
                if name not in value:
                    wrong = [] if key.endswith("?") else [f"{where}.{name} is missing".strip(".")]
                else:
                    wrong = [_wrong(value[name], inner, f"{where}.{name}".strip("."))]
            if any(wrong):
                return next(filter(None, wrong))
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{here} is no list"
        return next(filter(None, (_wrong(entry, shape[0], f"{where}[{index}]") for index, entry in enumerate(value))), "")
    if shape is object:
        return ""
    allowed = (int, float) if shape is float else (shape,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and shape is not bool):
        return f"{here} is {str(value)[:40]!r}, not of type {shape.__name__}"
    return ""
