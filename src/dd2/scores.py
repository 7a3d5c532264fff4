"""Eq. 1: the teacher's next-token probabilities as a closed-form conditional score (App. C.1).

Under RectFlow, x_t = (1 - t) x_0 + t eps, a token that is code c_j with probability p_j becomes a mixture of
Gaussians with means (1 - t) c_j and standard deviation t. Its posterior mean, velocity and score are sums over
the codebook: attention with query x_t, keys and values c, and bias log p.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd2.device import full_precision, tile_rows
from dd2.distribution import CodeDistribution

Solver = Literal["euler", "heun"]

ODE_START = 1 - 2**-20
"""Highest noise level that the ODE asks at. Eq. 1 needs t < 1, and at t = 1 the velocity is its limit, x - E[c]."""


class ConditionalScore(ABC):
    """p(q_i | q_<i, y) of every position i, noised by RectFlow: what a stage asks a teacher or a student for.

    Both sides of Eq. 4 are one. x_t is (..., B, n, C), any number of noise draws of the same B x n tokens in front, and
    t (..., B, n) lies in (0, 1).

    Attributes:
        valid: (B, n) the positions that it holds at, where they are not all: of a masked model, those that are not known.
    """

    valid: Tensor | None = None

    def levels(self, t: Tensor) -> Tensor:
        """The noise levels nearest to t (..., B, n) that it can be asked at: all of them, unless it knows some alone."""
        return t

    def denoising_error(self, x_t: Tensor, t: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
        """What its network predicts less the truth, (..., B, n, C) float32, of x_t made of x_0 and eps: here the velocity's error
        (Eq. 5); its mean square trains the network.
        """
        return self.velocity(x_t, t).float() - (eps - x_0).float()

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


def follow_ode(score: ConditionalScore, noise: Tensor, levels: Sequence[float], solver: Solver) -> Tensor:
    """Where the flow-matching ODE dx/dt = velocity leads from noise.

    Args:
        score: of the tokens.
        noise: (..., C) standard normal.
        levels: of the steps, falling from about 1 to 0.
        solver: Euler, or Heun's second-order steps (two velocities each; the last one is Euler's, as the velocity ends at t = 0).

    Returns:
        (..., C) tokens.
    """

    def v(x: Tensor, level: float) -> Tensor:
        return score.velocity(x, x.new_full(x.shape[:-1], min(level, ODE_START)))

    x = levels[0] * noise.float()
    for level, following in itertools.pairwise(levels):
        slope = v(x, level)
        if solver == "heun" and following > 0:
            slope = (slope + v(x + (following - level) * slope, following)) / 2
        x = x + (following - level) * slope
    return x


class CodeMixture(ConditionalScore):
    """Eq. 1: tokens that are code c_j with probability p_j.

    Sums run over the codes that can be drawn, tile by tile: no (positions x V) tensor exists, forward or backward.

    Nothing is looked at here that a GPU would have to wait for: t is kept inside (0, 1) by `NoiseLevelConfig`, and a position
    without any code comes out as NaN. `posterior_mean` looks at both.

    Args:
        prior: p at the positions P; no gradient flows into it.
        codebook: (V, C) codes, in the same (standardised) space as x_t.
        max_elements: bound on the numbers of a tile's temporaries, about; None is `tile_rows`.

    Raises:
        ValueError: shapes do not match.
    """

    def __init__(self, prior: CodeDistribution, codebook: Tensor, *, max_elements: int | None = None) -> None:
        if codebook.ndim != 2 or codebook.shape[0] == 0:
            raise ValueError(f"codebook must be (V, C) with V > 0, got {tuple(codebook.shape)}")
        if prior.num_codes != len(codebook):
            expected = f"log_p must be (..., V) with the codebook's V = {len(codebook)}"
            raise ValueError(f"{expected}, got {prior.num_codes} codes")
        if max_elements is not None and max_elements < 1:
            raise ValueError(f"max_elements must be at least 1, got {max_elements}")
        codes, channels = codebook.shape
        # Fewer rows than channels would read the codebook more often than they use it.
        by_cache = max(tile_rows(codes, codebook.device), channels)
        self.rows = by_cache if max_elements is None else max(1, max_elements // codes)
        self.prior, self.codebook = prior, codebook.detach()
        self._codes: dict[torch.dtype, _Codes] = {}

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As `ConditionalScore.x0_hat`; float64 for float64 x_t and float32 otherwise.

        Differentiable once: the Jacobian is (1 - t) / t^2 Cov_w(c).

        Raises:
            ValueError: x_t is not (..., *P, C), or t has another shape than x_t without channels.
        """
        channels, positions = self.codebook.shape[1], self.prior.positions
        if x_t.ndim <= len(positions) or x_t.shape[x_t.ndim - 1 - len(positions) :] != (*positions, channels):
            expected = f"(..., {', '.join(map(str, (*positions, channels)))})"
            raise ValueError(f"x_t must be {expected}: log_p's positions by the codebook's C, got {tuple(x_t.shape)}")
        if t.shape != x_t.shape[:-1]:
            raise ValueError(f"t must have x_t's shape without channels, {tuple(x_t.shape[:-1])}, got {tuple(t.shape)}")
        dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
        if dtype not in self._codes:
            self._codes[dtype] = _Codes(self.codebook.to(dtype))
        rows = math.prod(positions)
        draws = math.prod(t.shape[: t.ndim - len(positions)])
        prior = self.prior if len(positions) == 1 else self.prior.view(rows)
        with full_precision(x_t.device):
            mean: Tensor = _PosteriorMean.apply(  # pyright: ignore[reportAssignmentType]
                x_t.reshape(draws, rows, channels).to(dtype),
                t.detach().reshape(draws, rows, 1).to(dtype),
                prior.log_p.detach().to(dtype),
                prior.ids,
                self._codes[dtype],
                self.rows,
            )
        return mean.view(x_t.shape)


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
    x_t: Tensor, t: Tensor, log_p: Tensor | CodeDistribution, codebook: Tensor, *, max_elements: int | None = None
) -> Tensor:
    """E[x_0 | x_t] of a token whose prior over the codebook is p (Eq. 1).

    Args:
        x_t: (..., C) noised tokens.
        t: (...) noise level of each token, in the open interval (0, 1).
        log_p: (..., V) log-probabilities, -inf where a code is excluded; they need not be normalised. For all of x_t or for its
            last dimensions. Or a distribution over the codes that are kept.
        codebook: (V, C) codes.
        max_elements: as in `CodeMixture`.

    Returns:
        (..., C) posterior means, as `CodeMixture.x0_hat`.

    Raises:
        ValueError: as `CodeMixture`, or t leaves (0, 1), or a row of `log_p` excludes every code.
    """
    return _checked(t, log_p, codebook, max_elements).x0_hat(x_t, t)


def velocity(
    x_t: Tensor, t: Tensor, log_p: Tensor | CodeDistribution, codebook: Tensor, *, max_elements: int | None = None
) -> Tensor:
    """E[eps - x_0 | x_t], the RectFlow velocity (App. C.1). Arguments and errors as `posterior_mean`."""
    return _checked(t, log_p, codebook, max_elements).velocity(x_t, t)


def score(
    x_t: Tensor, t: Tensor, log_p: Tensor | CodeDistribution, codebook: Tensor, *, max_elements: int | None = None
) -> Tensor:
    """Gradient of log p_t(x_t) in x_t (Eq. 1). Arguments and errors as `posterior_mean`."""
    return _checked(t, log_p, codebook, max_elements).score(x_t, t)


def _checked(t: Tensor, log_p: Tensor | CodeDistribution, codebook: Tensor, max_elements: int | None) -> CodeMixture:
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("t must lie in the open interval (0, 1); 0 is clean data and 1 pure noise, where Eq. 1 ends")
    if isinstance(log_p, Tensor):
        if log_p.ndim < 1:
            raise ValueError("log_p must be (..., V), got a number")
        log_p = CodeDistribution.over_all(log_p)
    mixture = CodeMixture(log_p, codebook, max_elements=max_elements)
    # A maximum of -inf (all codes excluded), +inf or NaN has no posterior; amax sees all three.
    if log_p.log_p.numel() and not torch.isfinite(log_p.log_p.amax(-1)).all():
        raise ValueError("every row of log_p needs a finite maximum: a row is all -inf, or holds +inf or NaN")
    return mixture


class _Codes:
    """A codebook, and sums over the codes of each row: all V of them, or the K whose ids are given.

    Codes are centred, which is exact (the posterior is translation-equivariant) and keeps float32 products small. Products with
    all V codes are taken densely, as V x C is little, and then those of the K codes that count are picked: reading K rows of the
    codebook for each position would cost more.

    Args:
        codebook: (V, C).
    """

    def __init__(self, codebook: Tensor) -> None:
        self.centre = codebook.mean(0)
        self.codes = codebook - self.centre
        self._energy = torch.cat([self.codes, self.codes.square().sum(1, keepdim=True) / 2], 1).T

    def weights(self, x: Tensor, t: Tensor, log_p: Tensor, ids: Tensor | None) -> Tensor:
        """Posterior weights w_j (Eq. 1), (..., R, K), of x (..., R, C) and t (..., R, 1) under log_p (R, K)."""
        # log w_j = log p_j + (1 - t) / t^2 (x . c_j - (1 - t) |c_j|^2 / 2) but for a constant; the bracket is one product.
        energy = _picked(torch.cat([x - (1 - t) * self.centre, t - 1], -1) @ self._energy, ids)
        torch.addcmul(log_p, energy, _sharpness(t), out=energy)  # in place: a tile stays in the cache
        return torch.softmax(energy, -1, out=energy)

    def covariance(self, weights: Tensor, grad: Tensor, mean: Tensor, ids: Tensor | None) -> Tensor:
        """Cov_w(c) g = sum_j w_j (g . (c_j - mean)) (c_j - mean), (..., R, C); changes the weights.

        Both factors are centred: what rounding leaves of sum_j w_j (g . (c_j - mean)), which is 0, would otherwise be multiplied
        by the codes, and where w is peaked nothing else is left.
        """
        along = _picked(grad @ self.codes.T, ids).sub_((grad * mean).sum(-1, keepdim=True))
        weights *= along
        return self.mixed(weights, ids) - weights.sum(-1, keepdim=True) * mean

    def mixed(self, weights: Tensor, ids: Tensor | None) -> Tensor:
        """Sum over centred codes of weights (..., R, K), (..., R, C)."""
        if ids is None:
            return weights @ self.codes
        bags = ids.expand(weights.shape).reshape(-1, ids.shape[-1])
        mixed = F.embedding_bag(bags, self.codes, per_sample_weights=weights.reshape(bags.shape), mode="sum")
        return mixed.view(*weights.shape[:-1], self.codes.shape[1])


def _sharpness(t: Tensor) -> Tensor:
    """(1 - t) / t^2, so far bounded that nothing overflows, however small t is: the posterior is one code long before."""
    return ((1 - t) / t / t).clamp_max(1e25)


def _picked(products: Tensor, ids: Tensor | None) -> Tensor:
    """Those of (..., R, V) at the ids (R, K)."""
    return products if ids is None else products.gather(-1, ids.long().expand(*products.shape[:-1], -1))


class _PosteriorMean(torch.autograd.Function):
    """Forward and backward tile by tile: unless one tile is all, weights are computed again, never stored.

    Draws share a row's prior.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, log_p: Tensor, ids: Tensor | None, codes: _Codes, rows: int) -> Tensor:
        ctx.codes, ctx.rows = codes, rows
        if len(x) * x.shape[1] <= rows:
            weights = codes.weights(x, t, log_p, ids)
            mean = codes.mixed(weights, ids)
        else:
            weights, mean = None, torch.empty_like(x)
            for draw, part in _tiles(x, rows):
                kept = None if ids is None else ids[part]
                mean[draw, part] = codes.mixed(codes.weights(x[draw, part], t[draw, part], log_p[part], kept), kept)
        ctx.save_for_backward(x, t, log_p, ids, mean, weights)
        return mean + codes.centre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, t, log_p, ids, mean, weights), codes = ctx.saved_tensors, ctx.codes
        grad = grads[0].to(x.dtype)
        # The caller's autocast is active here, unlike in forward; half precision would be divided by t^2.
        with full_precision(x.device):
            if weights is not None:
                found = codes.covariance(weights.clone(), grad, mean, ids)
            else:
                found = torch.empty_like(x)
                for draw, part in _tiles(x, ctx.rows):
                    kept = None if ids is None else ids[part]
                    weights = codes.weights(x[draw, part], t[draw, part], log_p[part], kept)
                    found[draw, part] = codes.covariance(weights, grad[draw, part], mean[draw, part], kept)
        return found * _sharpness(t), None, None, None, None, None


def _tiles(x: Tensor, rows: int) -> list[tuple[slice, slice]]:
    """Blocks of (draws, R, C), of at most `rows` rows: some of the draws, and some of their rows."""
    draws, length, _ = x.shape
    together = max(1, rows // max(length, 1))
    parts = [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
    return [(slice(draw, draw + together), part) for part in parts for draw in range(0, draws, together)]
