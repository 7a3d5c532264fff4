"""Configurations as YAML: a file as flat fields, and fields as a file."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import yaml

from dd2.errors import InputError
from dd2.fields import flatten, plain

MOST_FIELDS = 1000
"""Fields of a file: a few lines of YAML can stand for more than any memory holds."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which lets the last of equal keys win without a word, but for that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and name in seen:
                raise yaml.YAMLError(f"{name} stands there twice (line {key.start_mark.line + 1}); keep one of them")
            seen.add(name if isinstance(name, str) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file as a flat {"section.field": value} mapping.

    Raises:
        InputError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)  # a safe one; with or without a byte-order mark
    except OSError as error:
        raise InputError(f"configuration {file} cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"configuration {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"configuration {file} must be a mapping of fields to values, not a {type(content).__name__}")
    try:
        found = list(itertools.islice(flatten(content), MOST_FIELDS + 1))
    except RecursionError:
        raise InputError(f"configuration {file} refers to itself; write its fields out") from None
    if len(found) > MOST_FIELDS:
        raise InputError(f"configuration {file} has more than {MOST_FIELDS:,} fields; write it without aliases")
    fields = dict(found)
    if len(fields) < len(found):
        names = [name for name, _ in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"configuration {file} is not valid YAML: {twice} stands there twice; keep one of them")
    return fields


def to_yaml(config: Any) -> str:
    """A configuration as YAML with every field resolved; reading it back gives the same configuration."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)
