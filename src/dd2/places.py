"""Names of files and folders that outlive the working directory in which they were typed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dd2.fields import field_of, flat, with_fields

C = TypeVar("C")

KEYWORDS = ("", "digits", "scenes", "scenes-unseen", "scenes-cells", "teacher", "inception")
"""Values of such fields that are no paths, even where a folder of that name lies about."""

FIELDS = ("teacher", "captions", "stage1", "tokenizer", "data", "adapt.data", "run", "reference")
"""Fields of runs that may name a file or a folder to read."""


def absolute(name: str) -> str:
    """A path from the root, if there is something under it; whatever else a field may hold (module:function, …) as it is."""
    return name if name in KEYWORDS or not Path(name).exists() else os.path.abspath(name)


def with_absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value} with the paths that it names from the root."""
    return {name: absolute(value) if name in FIELDS and isinstance(value, str) else value for name, value in values.items()}


def in_place(config: C) -> C:
    """A configuration that means the same from every working directory."""
    typed = flat(config)
    changed = {name: value for name, value in with_absolute(typed).items() if value != typed[name]}
    return with_fields(config, {name: type(field_of(config, name))(value) for name, value in changed.items()})
