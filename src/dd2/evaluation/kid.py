"""Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased at any number of images."""

import torch
from torch import Tensor

from dd2.errors import InputError


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x . y / F + 1)^3, over random subsets.

    Args:
        real, fake: features (N, F) and (M, F).
        subsets: how many pairs of subsets.
        subset_size: images in each; at most the smaller set's.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        InputError: a set has fewer than 2 images.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise InputError(f"a kernel distance needs at least 2 images of each kind, got {len(real)} and {len(fake)}")
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=random)[:size]].double()
        y = fake[torch.randperm(len(fake), generator=random)[:size]].double()
        same = _off_diagonal_sum(_kernel(x, x)) + _off_diagonal_sum(_kernel(y, y))
        values.append(same / (size * (size - 1)) - 2 * _kernel(x, y).mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_sum(matrix: Tensor) -> Tensor:
    return matrix.sum() - matrix.diagonal().sum()
