"""Eq. 1: the teacher's next-token probabilities as a closed-form conditional score (App. C.1).

Under RectFlow, x_t = (1 - t) x_0 + t eps, a token that is code c_j with probability p_j becomes a mixture of
Gaussians with means (1 - t) c_j and standard deviation t. Its posterior mean, velocity and score are sums over
the codebook: attention with query x_t, keys and values c, and bias log p.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_MAX_ELEMENTS = 2**26
"""Largest (rows x V) block of posterior weights: 256 MiB in float32, of which a few are alive at a time."""


def posterior_mean(
    x_t: Tensor,
    t: Tensor,
    log_p: Tensor,
    codebook: Tensor,
    *,
    max_elements: int = DEFAULT_MAX_ELEMENTS,
) -> Tensor:
    """E[x_0 | x_t] of a token whose prior over the codebook is p (Eq. 1).

    Args:
        x_t: (..., C) noised tokens.
        t: (...) noise level of each token, in the open interval (0, 1).
        log_p: (..., V) log-probabilities, -inf where a code is excluded. They need not be normalised, and
            no gradient flows into them.
        codebook: (V, C) codes, in the same (standardised) space as `x_t`.
        max_elements: bound on rows x V of the weights computed at once, forward and backward.

    Returns:
        (..., C) posterior means, float64 for float64 `x_t` and float32 otherwise; differentiable once in `x_t`:
        the Jacobian is (1 - t) / t^2 Cov_w(c).

    Raises:
        ValueError: shapes do not match, t leaves (0, 1), or a row of `log_p` excludes every code.
    """
    _check(x_t, t, log_p, codebook, max_elements)
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    channels, codes = x_t.shape[-1], codebook.shape[0]
    rows = max(1, max_elements // codes)
    with torch.autocast(x_t.device.type, enabled=False):
        flat: Tensor = _PosteriorMean.apply(  # pyright: ignore[reportAssignmentType]
            x_t.reshape(-1, channels).to(dtype),
            t.detach().reshape(-1, 1).to(dtype),
            log_p.detach().reshape(-1, codes),
            codebook.detach().to(dtype),
            rows,
        )
    return flat.view(x_t.shape)


def velocity(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS) -> Tensor:
    """E[eps - x_0 | x_t] = (x_t - x0_hat) / t, the RectFlow velocity (App. C.1). Arguments as `posterior_mean`."""
    x0_hat = posterior_mean(x_t, t, log_p, codebook, max_elements=max_elements)
    return (x_t.to(x0_hat.dtype) - x0_hat) / t.unsqueeze(-1).to(x0_hat.dtype)


def score(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, *, max_elements: int = DEFAULT_MAX_ELEMENTS) -> Tensor:
    """Gradient of log p_t(x_t) in x_t, ((1 - t) x0_hat - x_t) / t^2 (Eq. 1). Arguments as `posterior_mean`."""
    x0_hat = posterior_mean(x_t, t, log_p, codebook, max_elements=max_elements)
    level = t.unsqueeze(-1).to(x0_hat.dtype)
    return ((1 - level) * x0_hat - x_t.to(x0_hat.dtype)) / level / level


class _PosteriorMean(torch.autograd.Function):
    """Row-chunked forward and backward: the (rows, V) weights are recomputed, never stored."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, rows: int) -> Tensor:
        # Centring is exact (the posterior is translation-equivariant) and keeps float32 products small.
        centre = codebook.mean(0)
        codes = codebook - centre
        x = x_t - (1 - t) * centre
        half_norms = codes.square().sum(-1) / 2
        mean = torch.empty_like(x)
        for part in _chunks(len(x), rows):
            weights = _weights(x[part], t[part], log_p[part], codes, half_norms)
            torch.mm(weights, codes, out=mean[part])
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
            for part in _chunks(len(x), ctx.rows):
                weights = _weights(x[part], t[part], log_p[part], codes, half_norms)
                # Cov_w(c) g = sum_j w_j (g . (c_j - mean)) c_j: centring first avoids cancellation when w is peaked.
                along = grad[part] @ codes.T - (grad[part] * mean[part]).sum(-1, keepdim=True)
                torch.mm(weights * along, codes, out=covariance_grad[part])
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


def _chunks(length: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _check(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor, max_elements: int) -> None:
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise ValueError(f"codebook must be (V, C) with V > 0, got {tuple(codebook.shape)}")
    codes, channels = codebook.shape
    if x_t.ndim < 1 or x_t.shape[-1] != channels:
        raise ValueError(f"x_t must be (..., C) with the codebook's C = {channels}, got {tuple(x_t.shape)}")
    if t.shape != x_t.shape[:-1]:
        raise ValueError(f"t must have x_t's shape without channels, {tuple(x_t.shape[:-1])}, got {tuple(t.shape)}")
    if log_p.shape != (*x_t.shape[:-1], codes):
        raise ValueError(
            f"log_p must be {(*x_t.shape[:-1], codes)}: x_t's positions by the codebook's V, got {tuple(log_p.shape)}"
        )
    if max_elements < 1:
        raise ValueError(f"max_elements must be at least 1, got {max_elements}")
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("t must lie in the open interval (0, 1); 0 is clean data and 1 pure noise, where Eq. 1 ends")
    # A maximum of -inf (all codes excluded), +inf or NaN has no posterior; amax sees all three.
    if log_p.numel() and not torch.isfinite(log_p.amax(-1)).all():
        raise ValueError("every row of log_p needs a finite maximum: a row is all -inf, or holds +inf or NaN")
