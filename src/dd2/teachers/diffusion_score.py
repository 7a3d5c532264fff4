"""The conditional score of a diffusion head: its noise prediction in RectFlow's terms, at the levels that it knows."""

from functools import lru_cache

import torch
from torch import Tensor

from dd2.scores import ConditionalScore
from dd2.teachers.diffusion import STEPS, DiffusionSchedule
from dd2.teachers.filtering import guided
from dd2.teachers.masked import MaskedBackbone

COSINE = DiffusionSchedule.cosine()


class DiffusionScore(ConditionalScore):
    """p(x_i | known tokens, y) of the positions that are not known.

    Args:
        backbone: whose head.
        features: (B, n, D), under the condition.
        known: (B, n) the positions that are known; it holds at the others.
        null_features: features without the condition, for guidance, or None.
        guidance: (B, 1) factors, where there is guidance.
    """

    def __init__(
        self,
        backbone: MaskedBackbone,
        features: Tensor,
        known: Tensor,
        null_features: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> None:
        self.backbone, self.features, self.null_features, self.guidance = backbone, features, null_features, guidance
        self.valid = ~known

    def levels(self, t: Tensor) -> Tensor:
        """The nearest of the head's own levels: it was trained at integers alone, between which its embedding turns."""
        return level_of(index_of(t))

    def eps(self, x: Tensor, index: Tensor) -> Tensor:
        """Guided noise prediction of variance-preserving tokens (..., B, n, C) at levels (..., B, n) of 0 … 999."""
        found, _ = self.backbone.head(x, index, self.features)
        if self.null_features is None or self.guidance is None:
            return found
        null, _ = self.backbone.head(x, index, self.null_features)
        return guided(found, null, self.guidance.unsqueeze(-1))

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        size = _size(t)
        x, a, s = x_t / size, (1 - t).unsqueeze(-1) / size, t.unsqueeze(-1) / size
        return (x - s * self.eps(x, index_of(t))) / a

    def denoising_error(self, x_t: Tensor, t: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
        """Of the noise, as the head is trained: the velocity's error is 1 / (1 - t) times as large."""
        return self.eps(x_t / _size(t), index_of(t)).float() - eps.float()


def _size(t: Tensor) -> Tensor:
    """RectFlow's tokens at t (...) over variance-preserving ones, (..., 1)."""
    return ((1 - t).square() + t.square()).sqrt().unsqueeze(-1)


@lru_cache(maxsize=8)
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1000,) RectFlow levels of the head's, once on each device."""
    return COSINE.rect_flow_levels.to(device, dtype)


def index_of(t: Tensor) -> Tensor:
    """The head's level nearest to RectFlow levels t (...) in (0, 1)."""
    levels = _levels(t.device, t.dtype)
    above = torch.searchsorted(levels, t.contiguous()).clamp(1, STEPS - 1)
    return above - (t - levels[above - 1] < levels[above] - t).long()


def level_of(index: Tensor) -> Tensor:
    """RectFlow levels t (...) of the head's levels 0 … 999, float32."""
    return _levels(index.device, torch.float32)[index]
