"""Learning rates, noise levels and EMA rates as functions of the iteration or of an explicit random stream."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dd2.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its learning rate."""

    lr: float = 2e-4
    """Peak learning rate."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course of the rate after warm-up; cosine falls to 0 at the last iteration."""
    warmup: int = 0
    """Iterations of linear warm-up."""
    warmup_from: float = 1e-6
    """Learning rate at the start of warm-up (App. E.3)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's betas."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradient norm to clip at; 0 does not clip."""

    def __post_init__(self) -> None:
        """Refuse rates without meaning."""
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a positive number, got {self.lr}")
        if self.warmup < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise InputError("warmup, clip_norm and weight_decay must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must lie in [0, 1), got {self.betas}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of iteration `step`, counted from 0, of `total`."""
        if step < self.warmup:
            return self.warmup_from + (self.lr - self.warmup_from) * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.lr
        progress = (step - self.warmup) / max(1, total - self.warmup)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class NoiseLevelConfig:
    """How the noise level t of a token is drawn."""

    kind: Literal["uniform", "logit_normal"] = "uniform"
    """Uniform, or the logistic function of a normal variable."""
    low: float = 0.02
    """Smallest t."""
    high: float = 0.98
    """Largest t."""
    mean: float = 0.0
    """Mean of the normal variable (logit_normal)."""
    std: float = 1.0
    """Standard deviation of the normal variable (logit_normal)."""

    def __post_init__(self) -> None:
        """Refuse an interval that leaves (0, 1)."""
        if not 0 < self.low < self.high < 1:
            raise InputError(f"noise levels need 0 < low < high < 1, got low {self.low} and high {self.high}")
        if self.std <= 0:
            raise InputError(f"noise levels need std > 0, got {self.std}")

    def draw(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Noise levels of `shape`, on the stream's device."""
        if self.kind == "uniform":
            u = torch.rand(shape, generator=random, device=random.device)
            return self.low + (self.high - self.low) * u
        normal = torch.randn(shape, generator=random, device=random.device)
        return (self.mean + self.std * normal).sigmoid().clamp(self.low, self.high)


def ema_rate(step: int, limit: float) -> float:
    """Progressive EMA rate min(limit, (step + 1) / (step + 10)) of iteration `step` from 0 (App. E.3)."""
    return min(limit, (step + 1) / (step + 10))
