"""Precision, recall, density and coverage: metrics by nearest neighbours, in blocks so that no N x N matrix is held."""

import torch
from torch import Tensor

from dd2.errors import InputError

BLOCK = 2048
"""Rows of a distance block."""


def neighbour_scores(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, Tensor]:
    """All four, from features real (N, F) and fake (M, F).

    A point is inside another's ball if it is nearer than that one's k-th neighbour within its own set (itself not counted).
    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage: Naeem et al. 2020 (2002.09797).

    Args:
        real, fake: features of the same network.
        k: neighbours; the papers of VAR, LlamaGen and ADM use 3.

    Returns:
        The values whose means are "precision" and "density" (M,) and "recall" and "coverage" (N,), float32; in [0, 1], density's
        mean possibly above 1.

    Raises:
        InputError: a set has no k-th neighbour, or the features differ in size.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise InputError(f"features of different size: {tuple(real.shape[1:])} against {tuple(fake.shape[1:])}")
    if min(len(real), len(fake)) <= k:
        raise InputError(
            f"precision and recall with k = {k} need more than {k} images of each kind, got {len(real)} and {len(fake)}"
        )
    real_radius, fake_radius = kth_distance(real, k), kth_distance(fake, k)
    inside_real = torch.zeros(len(fake))  # real balls that hold each fake point
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(fake), BLOCK):
        rows = slice(start, start + BLOCK)
        for first in range(0, len(real), BLOCK):
            columns = slice(first, first + BLOCK)
            distance = squared_distances(fake[rows], real[columns])
            inside = distance < real_radius[columns]
            inside_real[rows] += inside.sum(1)
            covered[columns] |= inside.any(0)
            recalled[columns] |= (distance < fake_radius[rows].unsqueeze(1)).any(0)
    return {
        "precision": (inside_real > 0).float(),
        "recall": recalled.float(),
        "density": inside_real / k,
        "coverage": covered.float(),
    }


def kth_distance(features: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point, (N,)."""
    found = []
    for start in range(0, len(features), BLOCK):
        block = features[start : start + BLOCK]
        nearest = torch.full((len(block), 0), 0.0)
        for first in range(0, len(features), BLOCK):
            distance = squared_distances(block, features[first : first + BLOCK])
            if first == start:
                distance.fill_diagonal_(-1)  # itself comes first, whatever rounding says
            both = torch.cat([nearest, distance], 1)
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values
        found.append(nearest.max(1).values)
    return torch.cat(found)


def nearest_distance(features: Tensor, to: Tensor) -> Tensor:
    """Distance of each of (N, F) to its nearest of (M, F): are training images being copied?"""
    best = torch.full((len(features),), torch.inf)
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        for first in range(0, len(to), BLOCK):
            best[rows] = torch.minimum(best[rows], squared_distances(features[rows], to[first : first + BLOCK]).min(1).values)
    return best.sqrt()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, F), (M, F) -> (N, M), never negative."""
    a, b = a.float(), b.float()
    centre = b.mean(0)  # distances do not change, and the cancellation below loses fewer digits
    a, b = a - centre, b - centre
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_min_(0)
