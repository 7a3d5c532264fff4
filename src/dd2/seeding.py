"""Where every random number comes from: one seed per image, and one per training step.

A stream is named by the values that identify it. Images do not depend on the batch they are drawn in, nor anything on the order
in which work is done or on an interruption; a training step's draws depend on its micro-batch, so on batch and accumulate.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


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
