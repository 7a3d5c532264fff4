"""Fréchet distances to a fixed Gaussian as losses: the generated side's moments are remembered, so that batches may be small
(FD-loss, arXiv 2604.28190).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dd2.frechet import GaussianFit, distance_between
from dd2.processes import sum_over_processes, world_size

RIDGE = 1e-6
"""Added to eigenvalues whose root is taken."""


class RememberedMoments(nn.Module):
    """First and second moments of features, m <- beta m + (1 - beta) of the batch, as buffers: part of the checkpoint, and the
    same on all processes.

    Args:
        size: F.
        beta: share of the memory.
        device: where they live.
    """

    first: Tensor
    second: Tensor
    primed: Tensor

    def __init__(self, size: int, beta: float, device: torch.device) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("first", torch.zeros(size, dtype=torch.float64, device=device))
        self.register_buffer("second", torch.zeros(size, size, dtype=torch.float64, device=device))
        self.register_buffer("primed", torch.zeros((), dtype=torch.bool, device=device))
        self._sums: tuple[Tensor, Tensor] | None = None
        self._batches = 0

    @torch.no_grad()
    def prime(self, parts: Iterable[Tensor], count: int) -> None:
        """Begin with features (B, F) of this process's share of `count` samples."""
        for part in parts:
            values = part.double()
            self.first += values.sum(0) / count
            self.second += values.T @ values / count
        sum_over_processes([self.first, self.second])
        self.primed.fill_(True)

    def distance(self, found: Tensor, reference: GaussianFit) -> Tensor:
        """From memory and batch (B, F) together to the reference; the gradient goes through the batch alone. Scalar, float64."""
        values = found.double()
        first, second = values.mean(0), values.T @ values / len(values)
        if torch.is_grad_enabled():
            new = first.detach(), second.detach()
            self._sums = new if self._sums is None else (self._sums[0] + new[0], self._sums[1] + new[1])
            self._batches += 1
        first, second = torch.lerp(first, self.first, self.beta), torch.lerp(second, self.second, self.beta)
        return distance_between(first, second - torch.outer(first, first), reference, ridge=RIDGE)

    @torch.no_grad()
    def remember(self) -> None:
        """Take the moments of all micro-batches since the last call into the memory. All processes must call it."""
        if self._sums is None:
            return
        sums, count = [part.clone() for part in self._sums], self._batches * world_size()
        sum_over_processes(sums)
        self._sums, self._batches = None, 0
        for kept, new in zip((self.first, self.second), sums, strict=True):
            kept.lerp_(new / count, 1 - self.beta)
