"""One model in a folder: config.json that says what it is, and model.safetensors, with every tensor accounted for."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dd2.errors import InputError
from dd2.files import save_tensors
from dd2.records import parsed


def read_kind(folder: Path) -> str:
    """What a folder's config.json says it holds; empty where it says nothing."""
    try:
        return str(parsed(folder / "config.json").get("kind", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """config.json of a model folder that must hold a `kind`.

    Raises:
        InputError: it is missing, is not JSON, or describes another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a {kind} folder: it has no config.json; give a folder written by dd2")
    try:
        config = parsed(file)
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); restore the folder from where it came") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise InputError(f"{folder} holds {found or 'something else'}, where a {kind} was expected")
    return config


def write_model(folder: Path, module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json into an existing folder."""
    tensors = {key: value.detach().to(dtype).contiguous() for key, value in module.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_weights(folder: Path, module: nn.Module) -> None:
    """Load model.safetensors of a folder into `module`, in its own dtypes and with every tensor accounted for."""
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is missing or damaged: copy it again") from error
    own = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        first = wrong[0]
        raise InputError(
            f"{file} does not fit its config.json: {len(wrong)} tensors differ, first {first}: expected "
            f"{expected.get(first, 'no such tensor')}, found {found.get(first, 'none')}"
        )
    small = {key for key, value in tensors.items() if not value.is_floating_point() or value.element_size() < 2}
    if numbers := sorted(key for key in small if own[key].is_floating_point()):
        kind = str(tensors[numbers[0]].dtype).removeprefix("torch.")
        raise InputError(f"{file} holds {kind} in {numbers[0]}, which are no weights; restore the file")
    broken = [key for key, value in tensors.items() if not torch.isfinite(value.to(own[key].dtype)).all()]
    if broken:
        raise InputError(f"{file} holds NaN or infinity in {broken[0]}; the training that wrote it had diverged")
    module.load_state_dict(tensors)


def check_sizes(sizes: Any, weights: Path, where: Path) -> None:
    """Refuse sizes of a model whose weights could not lie in a file, before memory is asked for them.

    Args:
        sizes: a dataclass.
        weights: the file of its weights.
        where: the file that says the sizes.

    Raises:
        InputError: a size is larger than the file is long.
    """
    limit = weights.stat().st_size if weights.is_file() else 0
    for name, value in dataclasses.asdict(sizes).items():
        if isinstance(value, int) and value > limit > 0:
            raise InputError(f"{where}: {name} {value:,} is more than {weights.name} can hold; one is damaged: restore it")


def names_said(names: Sequence[str]) -> dict[str, Any]:
    """What a config.json says of the names of classes; nothing where there are none."""
    return {"class_names": list(names)} if names else {}


def names_in(config: dict[str, Any], classes: int, file: Path) -> tuple[str, ...]:
    """The names of classes that a config.json holds; none where it says nothing.

    Raises:
        InputError: they are not as many texts as classes.
    """
    names = config.get("class_names")
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != classes:
        raise InputError(f"{file}: class_names must be {classes} texts, one for each class")
    return tuple(names)


def config_of(module: nn.Module) -> dict[str, Any]:
    """The sizes of a module, for `construct`."""
    return dataclasses.asdict(module.config)  # pyright: ignore[reportArgumentType]


def construct(config_class: type, values: Any, file: Path) -> Any:
    """A configuration from what a JSON file holds.

    Raises:
        InputError: the values do not make one.
    """
    try:
        config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()})
        for name, kind in get_type_hints(config_class).items():
            value, allowed = getattr(config, name), _plain_types(kind)
            if type(value) not in allowed:
                raise TypeError(f"{name} is {value!r}, not of type {' or '.join(t.__name__ for t in allowed)}")
        return config
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} does not describe a {config_class.__name__}: {error}") from error


def _plain_types(kind: Any) -> tuple[type, ...]:
    """The types that a value of an annotated field may have; whole numbers serve as floats."""
    if isinstance(kind, UnionType):
        return tuple(found for choice in get_args(kind) for found in _plain_types(choice))
    if get_origin(kind) is Literal:
        return tuple({type(choice) for choice in get_args(kind)})
    return (float, int) if kind is float else (get_origin(kind) or kind,)
