"""Stage 2: conditional score distillation (Alg. 2). The guidance network learns the generator's own conditional
velocity (Eq. 5); the generator is moved until teacher and guidance agree at every position (Eq. 4).
"""

import torch
from torch import Tensor

from dd2.losses import Distance, csd_loss, fcs_loss, noised
from dd2.scores import posterior_mean
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import nearest_ids
from dd2.training.schedule import NoiseLevelConfig
from dd2.training.stage import Losses
from dd2.training.timing import part


def guidance_loss(
    guidance: Student,
    generator: Student,
    cond: Tensor,
    noise_level: NoiseLevelConfig,
    random: torch.Generator,
    *,
    draws: int = 1,
    codebook: Tensor | None = None,
) -> Losses:
    """Fake Conditional Score loss on fresh generator output (Eq. 5).

    Args:
        guidance: what is trained.
        generator: gives the tokens; gets no gradient.
        cond: (B, ...) conditions.
        noise_level: how t is drawn, per token.
        random: random stream of this step.
        draws: noise draws per sequence that share one backbone pass (App. C.2).
        codebook: (V, C) standardised codes, to snap the condition q_<i to; None conditions on it as it is.
    """
    with torch.no_grad(), part("generator"):
        q = generator.as_generator(_noise_for(generator, cond, random), cond).float()
    t = noise_level.draw((draws, *q.shape[:-1]), random)
    eps = torch.randn((draws, *q.shape), generator=random, device=q.device)
    with part("guidance"):
        v = guidance.velocity(noised(q, t, eps), t, guidance.features(_condition(q, codebook), cond))
    return fcs_loss(v, q, eps), {}


def generator_loss(
    generator: Student,
    guidance: Student,
    teacher: Teacher,
    cond: Tensor,
    sampling: Sampling,
    noise_level: NoiseLevelConfig,
    random: torch.Generator,
    *,
    d: Distance = "sid",
    alpha: float = 1.0,
    weight_floor: float = 1e-2,
    draws: int = 1,
    snap_teacher: bool = False,
    snap_guidance: bool = False,
) -> Losses:
    """Conditional Score Distillation loss (Eq. 4); its gradient reaches the generator alone.

    Args:
        generator: what is trained.
        guidance, teacher: the two conditional scores; neither backbone is differentiated.
        cond: (B, ...) conditions.
        sampling: the teacher's distribution to match.
        noise_level: how t is drawn, per token.
        random: random stream of this step.
        d, alpha, weight_floor: the distance, see `csd_loss`.
        draws: noise draws per sequence that share the passes of all three backbones.
        snap_teacher, snap_guidance: condition that network on the nearest codes of q_<i instead of q_<i itself.

    Returns:
        The loss, the score difference (see `csd_loss`) and, where a condition is snapped, the root-mean-square distance of
        tokens to their nearest codes.
    """
    with part("generator"):
        q = generator.as_generator(_noise_for(generator, cond, random), cond).float()
    codebook = teacher.codebook
    with torch.no_grad():
        detached = q.detach()
        # All B x n x V distances: only where they are needed.
        snapped = codebook[nearest_ids(detached, codebook)] if snap_teacher or snap_guidance else detached
        with part("teacher"):
            log_p = teacher.log_p(snapped if snap_teacher else detached, cond, sampling)
        with part("guidance"):
            features = guidance.features(snapped if snap_guidance else detached, cond)
    t = noise_level.draw((draws, *q.shape[:-1]), random)
    eps = torch.randn((draws, *q.shape), generator=random, device=q.device)

    def teacher_x0_hat(q_t: Tensor) -> Tensor:
        with part("eq1"):
            return torch.stack([posterior_mean(q_t[i], t[i], log_p, codebook) for i in range(draws)])

    def guidance_x0_hat(q_t: Tensor) -> Tensor:
        with part("guidance"):
            return q_t - t.unsqueeze(-1) * guidance.velocity(q_t, t, features).float()

    loss, difference = csd_loss(
        q.expand(draws, *q.shape), t, eps, teacher_x0_hat, guidance_x0_hat, d=d, alpha=alpha, weight_floor=weight_floor
    )
    numbers = {"score_difference": difference}
    if snap_teacher or snap_guidance:
        numbers["to_nearest_code"] = (detached - snapped).square().mean().sqrt()
    return loss, numbers


def _noise_for(generator: Student, cond: Tensor, random: torch.Generator) -> Tensor:
    shape = (len(cond), generator.backbone.order.n, generator.backbone.token_mean.shape[0])
    return torch.randn(shape, generator=random, device=cond.device)


def _condition(q: Tensor, codebook: Tensor | None) -> Tensor:
    return q if codebook is None else codebook[nearest_ids(q, codebook)]
