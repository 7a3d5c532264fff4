"""The three losses of Distilled Decoding 2: Eq. 6 (GTS), Eq. 5 (FCS), Eq. 4 with Eq. 3 (CSD).

All reduce by the mean over batch, positions and channels; where a score holds at some positions alone (a masked model's,
given a known set), over those. The paper writes sums; under Adam the constant between them is absorbed, except in the
gradient-clipping threshold, which refers to this mean.
"""

from typing import Literal

import torch
from torch import Tensor

from dd2.scores import ConditionalScore

Distance = Literal["sid", "dmd", "sim"]

SIM_SOFTENING = 1e-5
"""r of the pseudo-Huber distance of "sim"."""

Losses = tuple[Tensor, dict[str, Tensor]]
"""What the loss of one micro-batch gives: a scalar to differentiate, and detached numbers worth logging."""


def noised(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """RectFlow's x_t = (1 - t) x_0 + t eps; x_0 and eps (..., C), t (...)."""
    level = t.unsqueeze(-1)
    return (1 - level) * x_0 + level * eps


def gts_loss(v_student: Tensor, v_teacher: Tensor) -> Tensor:
    """Ground Truth Score loss (Eq. 6): regress the teacher's closed-form velocity.

    Args:
        v_student: (..., C) the student's velocity, with gradient.
        v_teacher: (..., C) the teacher's velocity at the same x_t, t and condition; detached here.
    """
    return (v_student.float() - v_teacher.detach().float()).square().mean()


def fcs_loss(guidance: ConditionalScore, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Fake Conditional Score loss (Eq. 5): flow matching on the generator's own tokens, where the score holds.

    With teacher samples as `x_0` it is the plain diffusion loss that Table 7 compares with Eq. 6.

    Args:
        guidance: the guidance network's conditional score, with gradient.
        x_0: (B, n, C) clean tokens; detached here, so that nothing reaches the generator.
        t: (..., B, n) noise levels.
        eps: (..., B, n, C) noise.
    """
    x_0 = x_0.detach()
    return mean_at(guidance.denoising_error(noised(x_0, t, eps), t, x_0, eps).square(), guidance.valid)


def mean_at(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of values (..., B, n, C) over all but the positions where `valid` (B, n) is false."""
    if valid is None:
        return values.mean()
    return values.masked_fill(~valid.unsqueeze(-1), 0.0).sum() / _numbers_at(values, valid)


def _numbers_at(values: Tensor, valid: Tensor | None) -> Tensor | int:
    """How many of the numbers (..., B, n, C) are at valid positions, at least 1."""
    return values.numel() if valid is None else (valid.sum() * (values.numel() // valid.numel())).clamp_min(1)


def csd_loss(
    q: Tensor,
    t: Tensor,
    eps: Tensor,
    teacher: ConditionalScore,
    guidance: ConditionalScore,
    *,
    d: Distance = "sid",
    alpha: float = 1.0,
    weight_floor: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Conditional Score Distillation loss (Eq. 4), whose gradient reaches only `q`.

    With a and b the posterior means of teacher and guidance at q^t, and w = 1 / mean_C |q - a| (detached):
    "sid" (Eq. 3) is w (a - b) . ((a - q) - alpha (a - b)), differentiated through q and through a and b by way of
    q^t; "dmd" (Sec. 3.2.2) has no loss value of its own, and its gradient in q is w (b - a), the score difference; "sim" (score
    implicit matching, arXiv 2410.16794, with its pseudo-Huber distance) is u . (q - b) / s + s - r with u = b - a and s =
    sqrt(|u|^2 + r^2), differentiated as Eq. 3: as its step has unit length, it needs no w.
    The gradient in q is computed here and attached to q as a constant, so that by construction neither network
    behind the two scores receives any.

    Args:
        q: (..., C) the generator's clean tokens, with gradient.
        t: (...) noise levels in (0, 1).
        eps: (..., C) noise.
        teacher, guidance: the two conditional scores, each given tokens that the caller detached from `q` (Eq. 4's sg(q_<i)),
            the same ones: where the teacher's does not hold, q gets no gradient.
        d: the distance.
        alpha: SiD's alpha; the paper uses 1.0.
        weight_floor: lower bound of mean_C |q - a|.

    Returns:
        The loss, a scalar: for "sid" its expectation is 0 at alpha = 1 under an optimal guidance network, so it does not
        measure progress, nor that of "sim"; for "dmd" it is half the weighted squared difference of the posterior means. And the
        root mean square of a - b, detached: how far the two scores are apart, whatever the distance.
    """
    if d not in ("sid", "dmd", "sim"):
        raise ValueError(f'd must be "sid", "dmd" or "sim", got {d!r}')
    leaf = q.detach().float().requires_grad_(d != "dmd")
    with torch.set_grad_enabled(d != "dmd"):
        q_t = noised(leaf, t, eps)
        a, b = teacher.x0_hat(q_t, t).float(), guidance.x0_hat(q_t, t).float()
        weight, valid = 1 / (leaf - a).detach().abs().mean(-1, keepdim=True).clamp_min(weight_floor), teacher.valid
        if d == "sid":
            value = mean_at(weight * (a - b) * ((a - leaf) - alpha * (a - b)), valid)
            (grad,) = torch.autograd.grad(value, leaf)
        elif d == "sim":
            u = b - a
            length = (u.square().sum(-1, keepdim=True) + SIM_SOFTENING**2).sqrt()
            value = mean_at((u * (leaf - b)).sum(-1, keepdim=True) / length + length - SIM_SOFTENING, valid)
            (grad,) = torch.autograd.grad(value, leaf)
        else:
            value = mean_at(weight * (a - b).square(), valid) / 2
            grad = weight * (b - a) / _numbers_at(q, valid)
            if valid is not None:
                grad = grad.masked_fill(~valid.unsqueeze(-1), 0.0)
    surrogate = (q.float() * grad).sum()
    return value.detach() + (surrogate - surrogate.detach()), mean_at((a - b).detach().square(), valid).sqrt()
