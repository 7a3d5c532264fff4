"""What a field of a configuration may be, in a user's words: YAML has its own mind about unquoted texts."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dd2.errors import InputError

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    tuple: "a list",
    type(None): "null",
}
"""Types of fields."""

SERVES: dict[Any, set[Any]] = {int: {int, float, str, Path, tuple}, float: {float, tuple}, str: {str, Path, tuple, Literal}}
"""Type that YAML gives -> types of fields that it can be used for; others serve their own alone. One value makes a list."""


def check_value(name: str, value: Any, kind: Any, file: Path) -> None:
    """Refuse what YAML made of a value where the field is of another kind: the flag that it would become says less.

    Args:
        name: of the field.
        value: as YAML has it.
        kind: the field's type.
        file: where it stands.

    Raises:
        InputError: they differ; the message has the field, the value as YAML reads it, and what to write.
    """
    if isinstance(value, list) and any(isinstance(entry, list | dict) for entry in value):
        raise InputError(f"{file}: {name} holds a list inside of its list; give single values")
    choices = [one for part in _parts(kind) if get_origin(part) is Literal for one in get_args(part)]
    kinds = {get_origin(part) or part for part in _parts(kind)}
    if value == "" and Path in kinds:
        raise InputError(f"{file}: {name} is empty; give a path, or leave it out")
    found: Any = tuple if isinstance(value, list) else type(value)
    if kinds & SERVES.get(found, {found}) or (_number(value) is not None and kinds & {float, tuple}):
        return
    if int in kinds and isinstance(value, str) and value.strip().isdecimal():  # in quotes
        return
    wanted = f"one of {', '.join(map(str, choices))}" if choices else " or ".join(WORDS[one] for one in WORDS if one in kinds)
    raise InputError(f"{file}: {name} is {_shown(value)}, it must be {wanted}{_hint(value, kinds)}")


def _parts(kind: Any) -> list[Any]:
    """The types of a union, without what is annotated to them."""
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [part for one in get_args(kind) for part in _parts(one)]
    return [kind]


def _number(value: Any) -> float | None:
    """The number that a text is to everybody but YAML (1e3)."""
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _shown(value: Any) -> str:
    words = {"True": "true", "False": "false", "None": "null"}
    return repr(value) if isinstance(value, str) else words.get(str(value), str(value))


def _hint(value: Any, kinds: set[Any]) -> str:
    if isinstance(value, bool):
        return "; YAML reads yes, no, on and off so: put it in quotes" if kinds & {str, Path, Literal} else ""
    number = value if isinstance(value, float) else _number(value)
    return f"; write {int(number)}" if number is not None and int in kinds and number.is_integer() else ""
