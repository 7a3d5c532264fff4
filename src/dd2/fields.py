"""Fields of nested dataclasses by their dotted names: "section.field"."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

C = TypeVar("C")


def field_types(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all fields, those of nested dataclasses in their place."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from field_types(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def defaults(config_class: Any) -> dict[str, Any]:
    """{"section.field": value} of the fields that have a default, in plain YAML types."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            found[field.name] = dataclasses.asdict(made) if dataclasses.is_dataclass(made) else made  # pyright: ignore
    return dict(flatten(plain(found)))


def flat(config: Any) -> dict[str, Any]:
    """A configuration as {"section.field": value} in plain YAML types."""
    return dict(flatten(plain(dataclasses.asdict(config))))


def field_of(config: Any, name: str) -> Any:
    """The value of a field by its dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def with_fields(config: C, values: dict[str, Any]) -> C:
    """A configuration with some fields changed, by dotted name."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {head: with_fields(getattr(config, head), inner) for head, inner in nested.items()}
    return dataclasses.replace(config, **own)  # pyright: ignore[reportArgumentType]


def flatten(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names and values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """A value in the types that YAML and JSON know."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
