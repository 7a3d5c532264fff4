"""Fréchet distance between Gaussians fitted to features: the formula of FID, for any feature network."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dd2.errors import InputError


@dataclass(frozen=True)
class GaussianFit:
    """Mean (F,) and unbiased covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance, computed once: a reference is compared with many times."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T


class FeatureStatistics:
    """Streaming float64 sums of features (N, F), so that no set of images need be held in memory."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._outer: Tensor | None = None
        self._origin: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Count a batch of features (N, F).

        Raises:
            InputError: a feature is not finite.
        """
        values = features.detach().double().cpu()
        if values.ndim != 2:
            raise InputError(f"a feature network must give (B, F), got {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise InputError("features hold NaN or infinity; the images or the feature network are broken")
        if self._origin is None:
            # Sums about the first batch's mean: the covariance then loses no digits to a large mean.
            self._origin = values.mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._outer = torch.zeros(len(self._origin), len(self._origin), dtype=torch.float64)
        assert self._sum is not None
        assert self._outer is not None
        centred = values - self._origin
        self._sum += centred.sum(0)
        self._outer += centred.T @ centred
        self.count += len(values)

    def fit(self) -> GaussianFit:
        """Mean and covariance of everything added; needs at least two samples."""
        if self.count < 2 or self._sum is None or self._outer is None or self._origin is None:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return GaussianFit(self._origin + mean, covariance)


def fit_gaussian(parts: Iterable[Tensor]) -> GaussianFit:
    """Mean and covariance of features that come in parts (N, F)."""
    statistics = FeatureStatistics()
    for part in parts:
        statistics.add(part)
    return statistics.fit()


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2); symmetric, and cheaper for a `b` that is used again.

    The trace of the root is the sum of the square roots of the eigenvalues of B^1/2 A B^1/2, which is symmetric and
    positive semi-definite: singular covariances need no special treatment.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features of different size: {tuple(a.mean.shape)} against {tuple(b.mean.shape)}")
    return float(distance_between(a.mean, a.covariance, b).clamp_min(0))


def distance_between(mean: Tensor, covariance: Tensor, reference: GaussianFit, ridge: float = 0.0) -> Tensor:
    """The same as a tensor, differentiable in mean (F,) and covariance (F, F).

    Args:
        mean, covariance: float64.
        reference: what they are compared with.
        ridge: added to the eigenvalues before their root is taken: the root's slope is infinite at 0.
    """
    product = reference.root @ covariance @ reference.root
    cross = (torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0) + ridge).sqrt().sum()
    return (mean - reference.mean).square().sum() + covariance.trace() + reference.covariance.trace() - 2 * cross
