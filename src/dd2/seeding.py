"""Where every random number comes from: one seed per image, and one per training step.

A stream is named by the values that identify it. Images do not depend on the batch they are drawn in, nor anything on the order
in which work is done or on an interruption; a training step's draws depend on its micro-batch, so on batch and accumulate.
"""

import hashlib
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dd2.errors import InputError

SEEDS = 2**62
"""Seeds of images are below it."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the values that name a random stream, e.g. (run seed, stage, network, step, micro-batch)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` on `device` for the stream named by `parts`."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


def on_cpu(random: torch.Generator) -> torch.Generator:
    """A CPU stream for data loading, seeded from a step's own."""
    return torch.Generator().manual_seed(random.initial_seed()) if random.device.type != "cpu" else random


def one_each(cond: Tensor, seeds: Sequence[int]) -> None:
    """Refuse seeds that are not one per condition (B, ...).

    Raises:
        ValueError: there are more or fewer.
    """
    if len(seeds) != len(cond):
        raise ValueError(f"one seed per condition is needed: {len(cond)} conditions, {len(seeds)} seeds")


def image_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(seeds), *shape) float32 on the CPU; row i depends on seeds[i] alone."""
    return _per_image(seeds, "noise", lambda g: torch.randn(shape, generator=g))


def image_uniforms(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), (len(seeds), *shape) float32 on the CPU; row i depends on seeds[i] alone."""
    return _per_image(seeds, "uniform", lambda g: torch.rand(shape, generator=g))


def _per_image(seeds: Sequence[int], kind: str, draw) -> Tensor:
    random = torch.Generator()
    return torch.stack([draw(random.manual_seed(seed_of("image", kind, int(seed)))) for seed in seeds])


def seeds_of(seeds: Sequence[int] | None, random: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed per image, from seeds, from random numbers, or 0 … count - 1.

    Raises:
        InputError: they are not one per image, or out of range.
    """
    if seeds is not None and random is not None:
        raise InputError("seeds and generator both decide the noise; give one of them")
    if random is not None:
        sources = [random] * count if isinstance(random, torch.Generator) else list(random)
        found = [int(torch.randint(SEEDS, (1,), generator=source, device=source.device)) for source in sources]
    else:
        found = list(range(count)) if seeds is None else [whole_number("seeds", seed) for seed in _listed("seeds", seeds)]
    if len(found) != count:
        raise InputError(f"one seed per label is needed: {count} labels, {len(found)} seeds")
    if wrong := [seed for seed in found if not 0 <= seed < SEEDS]:
        raise InputError(f"seeds must be in 0 to 2^62 - 1, got {wrong[0]}")
    return found


def whole_number(name: str, value: object) -> int:
    """A whole number, of numpy or a tensor too."""
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise InputError(f"{name} must be whole numbers, got {value!r}") from None


def _listed(name: str, values: object) -> Iterable[object]:
    if not isinstance(values, Iterable):
        raise InputError(f"{name} must be several, one per image, got {values!r}")
    return values
