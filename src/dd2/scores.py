"""Eq. 1: the teacher's next-token probabilities as a closed-form conditional score (App. C.1).

Under RectFlow, x_t = (1 - t) x_0 + t eps, a token that is code c_j with probability p_j becomes a mixture of
Gaussians with means (1 - t) c_j and standard deviation t. Its posterior mean, velocity and score are sums over
the codebook: attention with query x_t, keys and values c, and bias log p.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_MAX_ELEMENTS = 2**26
"""Largest (rows x V) block of posterior weights: 256 MiB in float32, of which a few are alive at a time."""


class ConditionalScore(ABC):
    """p(q_i | q_<i, y) of every position i, noised by RectFlow: what a stage asks a teacher or a student for.

    Both sides of Eq. 4 are one. x_t is (..., B, n, C), any number of noise draws of the same B x n tokens in front, and
    t (..., B, n) lies in (0, 1).
    """

    @abstractmethod
    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t, q_<i], shaped like x_t; differentiable in x_t."""

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps - x_0 | x_t] = (x_t - x0_hat) / t, the RectFlow velocity (App. C.1, E.1)."""
        x0_hat = self.x0_hat(x_t, t)
        return (x_t.to(x0_hat.dtype) - x0_hat) / t.unsqueeze(-1).to(x0_hat.dtype)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t(x_t) in x_t, ((1 - t) x0_hat - x_t) / t^2 (Eq. 1)."""
        x0_hat = self.x0_hat(x_t, t)
        level = t.unsqueeze(-1).to(x0_hat.dtype)
        return ((1 - level) * x0_hat - x_t.to(x0_hat.dtype)) / level / level


class CodeMixture(ConditionalScore):
    """Eq. 1: tokens that are code c_j with probability p_j.

    The prior is looked at once, here, and not for every draw: each look waits for a GPU. Neither is t, whose noise levels
    `NoiseLevelConfig` keeps inside (0, 1); `posterior_mean` looks at both.

    Args:
        log_p: (*P, V) log-probabilities of the positions P, -inf where a code is excluded. They need not be normalised, and
            no gradient flows into them.
        codebook: (V, C) codes, in the same (standardised) space as x_t.
        max_elements: bound on rows x V of the weights computed at once, forward and backward.

    Raises:
        ValueError: shapes do not match, or a row of `log_p` excludes every code.
    """

    def __init__(self, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS) -> None:
        _check_prior(log_p, codebook, max_elements)
        self.log_p, self.codebook, self.max_elements = log_p.detach(), codebook.detach(), max_elements

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As `ConditionalScore.x0_hat`; float64 for float64 x_t and float32 otherwise.

        Differentiable once: the Jacobian is (1 - t) / t^2 Cov_w(c).

        Raises:
            ValueError: x_t is not (..., *P, C), or t has another shape than x_t without channels.
        """
        codes, channels = self.codebook.shape
        positions = self.log_p.shape[:-1]
        if x_t.ndim <= len(positions) or x_t.shape[x_t.ndim - 1 - len(positions) :] != (*positions, channels):
            expected = f"(..., {', '.join(map(str, (*positions, channels)))})"
            raise ValueError(f"x_t must be {expected}: log_p's positions by the codebook's C, got {tuple(x_t.shape)}")
        if t.shape != x_t.shape[:-1]:
            raise ValueError(f"t must have x_t's shape without channels, {tuple(x_t.shape[:-1])}, got {tuple(t.shape)}")
        dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
        rows = math.prod(positions)
        draws = math.prod(x_t.shape[: x_t.ndim - 1 - len(positions)])
        with torch.autocast(x_t.device.type, enabled=False):
            flat: Tensor = _PosteriorMean.apply(  # pyright: ignore[reportAssignmentType]
                x_t.reshape(draws, rows, channels).to(dtype),
                t.detach().reshape(draws, rows, 1).to(dtype),
                self.log_p.reshape(rows, codes),
                self.codebook.to(dtype),
                max(1, self.max_elements // codes),
            )
        return flat.view(x_t.shape)


class HeadScore(ConditionalScore):
    """A student's: a velocity head under the features of its backbone.

    Args:
        head: (x_t (..., B, n, C), t (..., B, n), features (B, n, D)) -> velocity (..., B, n, C).
        features: (B, n, D) of the clean tokens that condition each position.
    """

    def __init__(self, head: Callable[[Tensor, Tensor, Tensor], Tensor], features: Tensor) -> None:
        self.head, self.features = head, features

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The head's own output."""
        return self.head(x_t, t, self.features)

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t - t v."""
        return x_t - t.unsqueeze(-1) * self.velocity(x_t, t).float()


def posterior_mean(
    x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS
) -> Tensor:
    """E[x_0 | x_t] of a token whose prior over the codebook is p (Eq. 1).

    Args:
        x_t: (..., C) noised tokens.
        t: (...) noise level of each token, in the open interval (0, 1).
        log_p: (..., V) as in `CodeMixture`, for all of x_t or for its last dimensions.
        codebook: (V, C) codes.
        max_elements: as in `CodeMixture`.

    Returns:
        (..., C) posterior means, as `CodeMixture.x0_hat`.

    Raises:
        ValueError: as `CodeMixture`, or t leaves (0, 1).
    """
    return _checked(t, log_p, codebook, max_elements).x0_hat(x_t, t)


def velocity(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS) -> Tensor:
    """E[eps - x_0 | x_t], the RectFlow velocity (App. C.1). Arguments and errors as `posterior_mean`."""
    return _checked(t, log_p, codebook, max_elements).velocity(x_t, t)


def score(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS) -> Tensor:
    """Gradient of log p_t(x_t) in x_t (Eq. 1). Arguments and errors as `posterior_mean`."""
    return _checked(t, log_p, codebook, max_elements).score(x_t, t)


def _checked(t: Tensor, log_p: Tensor, codebook: Tensor, max_elements: int) -> CodeMixture:
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("t must lie in the open interval (0, 1); 0 is clean data and 1 pure noise, where Eq. 1 ends")
    return CodeMixture(log_p, codebook, max_elements=max_elements)


class _PosteriorMean(torch.autograd.Function):
    """Row-chunked forward and backward: the (rows, V) weights are recomputed, never stored. Draws share a row's log_p."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, rows: int) -> Tensor:
        # Centring is exact (the posterior is translation-equivariant) and keeps float32 products small.
        centre = codebook.mean(0)
        codes = codebook - centre
        x = x_t - (1 - t) * centre
        half_norms = codes.square().sum(-1) / 2
        mean = torch.empty_like(x)
        for draw, part in _chunks(x, rows):
            weights = _weights(x[draw, part], t[draw, part], log_p[part], codes, half_norms)
            torch.mm(weights, codes, out=mean[draw, part])
        ctx.save_for_backward(x, t, log_p, codes, half_norms, mean)
        ctx.rows = rows
        return mean + centre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, t, log_p, codes, half_norms, mean = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        covariance_grad = torch.empty_like(x)
        # The caller's autocast is active here, unlike in forward; half precision would be divided by t^2.
        with torch.autocast(x.device.type, enabled=False):
            for draw, part in _chunks(x, ctx.rows):
                weights = _weights(x[draw, part], t[draw, part], log_p[part], codes, half_norms)
                # Cov_w(c) g = sum_j w_j (g . (c_j - mean)) c_j: centring first avoids cancellation when w is peaked.
                g = grad[draw, part]
                along = g @ codes.T - (g * mean[draw, part]).sum(-1, keepdim=True)
                torch.mm(weights * along, codes, out=covariance_grad[draw, part])
        # Two divisions, not one by t^2, which underflows for tiny t.
        return covariance_grad * (1 - t) / t / t, None, None, None, None


def _weights(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """Posterior weights w_j (Eq. 1), (rows, V)."""
    log_p = log_p.to(x.dtype)
    energy = (1 - t) * ((x @ codes.T) - (1 - t) * half_norms)
    # energy_j = (1-t) x.c_j - (1-t)^2 |c_j|^2 / 2. The largest allowed one is taken off before dividing by t^2,
    # so that the quotient is 0 or negative, possibly -inf, but never NaN, however small t is.
    energy = energy.masked_fill(log_p == -math.inf, -math.inf)
    energy = energy - energy.amax(-1, keepdim=True)
    return torch.softmax(log_p + energy / t / t, dim=-1)


def _chunks(x: Tensor, rows: int) -> list[tuple[int, slice]]:
    """Blocks of (draws, R, C): the number of a draw, and at most `rows` of its rows."""
    draws, length, _ = x.shape
    parts = [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
    return [(draw, part) for part in parts for draw in range(draws)]


def _check_prior(log_p: Tensor, codebook: Tensor, max_elements: int) -> None:
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise ValueError(f"codebook must be (V, C) with V > 0, got {tuple(codebook.shape)}")
    if log_p.ndim < 1 or log_p.shape[-1] != len(codebook):
        raise ValueError(f"log_p must be (..., V) with the codebook's V = {len(codebook)}, got {tuple(log_p.shape)}")
    if max_elements < 1:
        raise ValueError(f"max_elements must be at least 1, got {max_elements}")
    # A maximum of -inf (all codes excluded), +inf or NaN has no posterior; amax sees all three.
    if log_p.numel() and not torch.isfinite(log_p.amax(-1)).all():
        raise ValueError("every row of log_p needs a finite maximum: a row is all -inf, or holds +inf or NaN")
