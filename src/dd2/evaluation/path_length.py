"""Perceptual path length: how fast images change as the noise moves (Karras et al. 2019; the paper's Table 5)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.seeding import image_noise, image_uniforms


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Between noise vectors (B, D) along the great circle, at t (B,) in [0, 1].

    The direction turns evenly and the length is interpolated, so that points between Gaussian noise look like Gaussian noise:
    a unit-norm slerp, as for StyleGAN's latents, would leave what the generator was trained on.
    """
    a_length, b_length = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a_unit, b_unit = a / a_length, b / b_length
    cosine = (a_unit * b_unit).sum(1, keepdim=True).clamp(-1, 1)
    angle = t.unsqueeze(1) * cosine.acos()
    across = b_unit - cosine * a_unit
    across = across / across.norm(dim=1, keepdim=True).clamp_min(1e-12)
    length = a_length + t.unsqueeze(1) * (b_length - a_length)
    return length * (a_unit * angle.cos() + across * angle.sin())


@torch.no_grad()
def path_length(
    features_of: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    labels: Tensor,
    seeds: Sequence[int],
    *,
    epsilon: float = 1e-4,
    batch: int = 100,
    trim: float = 0.01,
) -> tuple[float, float]:
    """Mean of |f(z(t + ε)) - f(z(t))|² / ε² over random pairs of noise, positions t and labels.

    Args:
        features_of: noise (B, *shape) and labels (B,) to features (B, F), in float32 and without rounding of images.
        shape: of one image's noise, (n, C).
        labels: (N,) the same at both ends of a path.
        seeds: N, one per path.
        epsilon: step, as a share of the path.
        batch: paths at a time.
        trim: share of the shortest and of the longest that is left out, as in the StyleGAN code.

    Returns:
        The mean and its standard error.

    Raises:
        InputError: there are too few paths.
    """
    if len(labels) != len(seeds) or len(labels) < 3:
        raise InputError(f"a path length needs at least 3 paths and a seed for each, got {len(labels)} and {len(seeds)}")
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon must be in (0, 1), got {epsilon}")
    lengths = []
    for start in range(0, len(labels), batch):
        own, part = list(seeds[start : start + batch]), labels[start : start + batch]
        ends = image_noise(own, (2, math.prod(shape))).to(part.device)
        t = image_uniforms(own, ()).to(part.device) * (1 - epsilon)
        points = [slerp(ends[:, 0], ends[:, 1], at).view(-1, *shape) for at in (t, t + epsilon)]
        here, there = features_of(torch.cat(points), part.repeat(2)).double().chunk(2)
        lengths.append(((there - here) / epsilon).square().sum(1).cpu())
    values = torch.cat(lengths).sort().values
    dropped = int(trim * len(values))
    kept = values[dropped : len(values) - dropped]
    return float(kept.mean()), float(kept.std() / len(kept) ** 0.5)
