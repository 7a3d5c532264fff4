"""Ways to draw tokens: one step, one step refined by the teacher (Alg. 4), and AR-diffusion (stage 1's own sampler).

All return standardised tokens (B, n, C) and take one seed per image.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.order import Order
from dd2.seeding import image_noise
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import nearest_ids


def token_noise(student: OneStepNetwork, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    """The noise of all tokens, (B, n, C), image i's from seeds[i] alone."""
    if len(seeds) != len(cond):
        raise ValueError(f"one seed per condition is needed: {len(cond)} conditions, {len(seeds)} seeds")
    shape = (student.backbone.order.n, student.backbone.token_mean.shape[0])
    return image_noise(seeds, shape).to(student.backbone.token_mean.device)


@torch.no_grad()
def one_step(generator: OneStepNetwork, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    """The whole image in one forward pass: G(eps) (B, n, C)."""
    return generator.as_generator(token_noise(generator, cond, seeds), cond)


@torch.no_grad()
def two_passes(generator: OneStepNetwork, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    """The whole image in two forward passes of the generator itself, for methods that have them (DD1): (B, n, C)."""
    return generator.two_passes(token_noise(generator, cond, seeds), cond)


@torch.no_grad()
def refine(
    generator: OneStepNetwork, teacher: Teacher, cond: Tensor, sampling: Sampling, seeds: Sequence[int], steps: int
) -> Tensor:
    """Few steps with the teacher (Alg. 4): one generator pass, then the teacher redraws the last steps - 1 AR steps.

    The teacher reads the kept prefix snapped to the nearest codes, which is what it was trained on; the result holds it
    as the generator gave it.

    Raises:
        InputError: steps is not in 1 … S + 1.
    """
    order = teacher.order
    first_step = first_redrawn_step(order, steps)
    tokens = one_step(generator, cond, seeds)
    if first_step == order.num_steps:
        return tokens
    codebook = teacher.codebook
    kept = tokens[:, : order.steps[first_step].start]
    prefix = codebook[nearest_ids(kept, codebook)]
    ids = teacher.generate(cond, sampling, seeds, prefix=prefix, first_step=first_step)
    return torch.cat([kept, codebook[ids]], 1)


def first_redrawn_step(order: Order, steps: int) -> int:
    """The AR step at which the teacher takes over when `steps` passes are allowed in all (Alg. 4).

    Raises:
        InputError: steps is not in 1 … S + 1.
    """
    if not 1 <= steps <= order.num_steps + 1:
        raise InputError(f"steps must be 1 (the generator alone) to {order.num_steps + 1} (every AR step redrawn), got {steps}")
    return order.num_steps - (steps - 1)


@torch.no_grad()
def ar_diffusion(student: Student, cond: Tensor, seeds: Sequence[int], euler_steps: int = 10) -> Tensor:
    """Step by step along the AR order, each token by Euler steps from t = 1 to 0 through the head (Sec. 6).

    This samples the stage-1 model: the quality it reaches bounds what stage 2 starts from.
    """
    if euler_steps < 1:
        raise InputError(f"euler_steps must be at least 1, got {euler_steps}")
    noise = token_noise(student, cond, seeds)
    levels = torch.linspace(1, 0, euler_steps + 1).tolist()
    cache = student.backbone.new_cache()
    tokens = noise[:, :0]
    for step in student.backbone.order.steps:
        features = student.backbone.next_features(cache, tokens, cond)
        x = noise[:, step]
        for level, following in itertools.pairwise(levels):
            v = student.velocity(x, x.new_full(x.shape[:-1], level), features)
            x = x - (level - following) * v
        tokens = torch.cat([tokens, x], 1)
    return tokens
