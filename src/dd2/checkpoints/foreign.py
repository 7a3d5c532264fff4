"""Reading other projects' checkpoints: files to state dicts, and state dicts to ours with every tensor accounted for."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dd2.checkpoints.foreign_file import read_file
from dd2.errors import InputError
from dd2.processes import note

Source = str | Path | Mapping[str, Any]
"""A file (.pth, .pt, .safetensors), or a state dict in memory."""

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DDP, torch.compile, FSDP and checkpoint wrappers put before the names inside them, wherever one of them stands."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours comes from: an official key, whole or one of `parts` equal slices along its first axis."""

    key: str
    part: int = 0
    parts: int = 1


def read_state(source: Source, nests: Iterable[tuple[str, ...]], device: str = "cpu") -> dict[str, Tensor]:
    """The state dict of a file or of a checkpoint dictionary. Arguments and errors as `read_nested`."""
    return read_nested(source, nests, device)[0]


def read_nested(source: Source, nests: Iterable[tuple[str, ...]], device: str = "cpu") -> tuple[dict[str, Tensor], str]:
    """The state dict of a file or of a checkpoint dictionary, and where it lay: the keys with dots between, or nothing.

    Args:
        source: what to read.
        nests: paths of keys under which the state dict may lie, tried in order; the top level comes last.
        device: "cpu", or "meta" to learn names and shapes without reading the numbers.

    Raises:
        InputError: the file is missing, damaged, holds more than tensors, or no state dict.
    """
    content = source if isinstance(source, Mapping) else read_file(Path(source), device)
    name = "the given dictionary" if isinstance(source, Mapping) else str(source)
    nests = tuple(nests)
    states = {".".join(nest): found for nest in (*nests, ()) if _is_state(found := _under(content, nest))}
    if states:
        place, *others = states
        if others:
            note(f"{name} holds several sets of weights; those under {place} are taken, not {', '.join(others)}")
        return _unwrapped({str(key): value for key, value in states[place].items()}, name), place
    places = ", ".join(".".join(nest) for nest in nests)
    raise InputError(f"{name} holds no state dict (looked at its top level and under {places}); its keys are {_some(content)}")


def _under(content: Any, nest: tuple[str, ...]) -> Any:
    for key in nest:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def take(
    state: Mapping[str, Tensor],
    origins: Mapping[str, Origin],
    shapes: Shapes,
    ignored: Callable[[str], bool],
    what: str,
    cause: Callable[[str], str],
) -> dict[str, Tensor]:
    """Our state dict from an official one; nothing may be missing, left over or of another shape.

    Args:
        state: the official tensors.
        origins: for each of our keys, where it comes from.
        shapes: for each of our keys, its shape.
        ignored: whether an official key holds nothing that is needed (a buffer that the class builds itself).
        what: names the model in errors.
        cause: the likely cause and the fix for a key that does not fit.

    Raises:
        InputError: a key is missing, extra or mis-shaped.
    """
    expected = official_shapes(origins, shapes)
    found = {key: tuple(value.shape) for key, value in state.items() if not ignored(key)}
    for key in expected:
        if key not in found:
            raise InputError(f"{what}: key {key} is missing; {cause(key)}")
        if found[key] != expected[key]:
            raise InputError(f"{what}: key {key} has shape {found[key]}, expected {expected[key]}; {cause(key)}")
        _check_numbers(state[key], key, what)
    extra = [key for key in found if key not in expected]
    if extra:
        raise InputError(f"{what}: key {extra[0]} is not part of such a model ({len(extra)} keys too many); {cause(extra[0])}")
    return {
        key: state[origin.key].chunk(origin.parts)[origin.part].float().reshape(shapes[key]).contiguous()
        for key, origin in origins.items()
    }


def _check_numbers(values: Tensor, key: str, what: str) -> None:
    """Refuse what is no set of weights as the models have them."""
    if values.layout != torch.strided or values.is_nested or values.is_meta:
        raise InputError(f"{what}: key {key} is no plain tensor (it is sparse, nested or empty); save it as one")
    if not values.is_floating_point() or values.element_size() < 2:
        kind = str(values.dtype).removeprefix("torch.")
        raise InputError(f"{what}: key {key} holds {kind}: quantised weights need scales that nobody reads; give the original")
    if not torch.isfinite(values.float()).all():
        raise InputError(f"{what}: key {key} holds NaN or infinity; the file is damaged, or its training had diverged")


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    origins: Callable[[Shapes], Mapping[str, Origin]],
    ignored: Callable[[str], bool],
    what: str,
    cause: Callable[[str], str],
) -> None:
    """Load an official state dict into a module of ours, `take`'s way; a teacher's tokenizer has a file of its own.

    Args:
        module: a tokenizer, or a teacher.
        origins: our shapes -> where each tensor comes from; what it leaves out keeps its value.
        state, ignored, what, cause: as in `take`.
    """
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if not key.startswith("tokenizer.")}
    module.load_state_dict(take(state, origins(shapes), shapes, ignored, what, cause), strict=False)


def official_shapes(origins: Mapping[str, Origin], shapes: Shapes) -> Shapes:
    """Every official key that `origins` reads, and its shape."""
    table: Shapes = {}
    for key, origin in origins.items():
        first, *rest = shapes[key]
        table[origin.key] = (first * origin.parts, *rest)
    return table


def numbered(state: Iterable[str], before: str, after: str = ".") -> int:
    """How many indices N appear in keys `before`N`after`…"""
    seen = {key[len(before) :].split(after)[0] for key in state if key.startswith(before)}
    return len({index for index in seen if index.isdigit()})


def need(state: Mapping[str, Tensor], key: str, what: str, cause: str, ndim: int) -> Tensor:
    """A tensor from which sizes are read.

    Raises:
        InputError: it is missing, or has another number of dimensions.
    """
    if key in state and state[key].ndim != ndim:
        raise InputError(f"{what}: key {key} has shape {tuple(state[key].shape)}, expected {ndim} dimensions; {cause}")
    if key not in state:
        raise InputError(f"{what}: key {key} is missing; {cause} (its keys are {_some(state)})")
    return state[key]


def parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    """Numbers held by tensors of the given shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _unwrapped(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same under the names that the model itself gives: without what wrappers put before and between them, which is said.

    Raises:
        InputError: two tensors would then have one name.
    """
    plain: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for key, value in state.items():
        parts = key.split(".")
        dropped |= set(parts) & WRAPPERS
        inner = ".".join(part for part in parts if part not in WRAPPERS)
        if inner in plain:
            raise InputError(f"{name} holds {inner} twice, once as {key}; save the state dict of the model itself")
        plain[inner] = value
    # What Lightning and others call the model that they hold. (A list's numbers must not become the first part of names.)
    while len(plain) > 1 and len({key.split(".")[0] for key in plain}) == 1 and all("." in key for key in plain):
        shorter = {key.partition(".")[2]: value for key, value in plain.items()}
        if any(key[:1].isdigit() for key in shorter):
            break
        dropped.add(next(iter(plain)).split(".")[0])
        plain = shorter
    if dropped:
        note(f"{name}: names of tensors are read without {', '.join(sorted(dropped))}, which a wrapper put there")
    return plain


def _some(content: Mapping[str, Any]) -> str:
    keys = [str(key) for key in content]
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") if keys else "none"
