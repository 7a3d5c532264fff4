"""Stage 1: turn the copied backbone and a fresh head into an AR-diffusion model of the teacher (Eq. 6, Alg. 1)."""

from typing import Literal

import torch
from torch import Tensor

from dd2.losses import fcs_loss, gts_loss, noised
from dd2.scores import velocity
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.training.schedule import NoiseLevelConfig
from dd2.training.stage import Losses
from dd2.training.timing import part


def tune_loss(
    student: Student,
    teacher: Teacher,
    tokens: Tensor,
    cond: Tensor,
    sampling: Sampling,
    noise_level: NoiseLevelConfig,
    generator: torch.Generator,
    *,
    draws: int = 1,
    loss: Literal["gts", "diffusion"] = "gts",
    head_only: bool = False,
) -> Losses:
    """Velocity regression on teacher samples.

    Args:
        student: what is trained.
        teacher: the frozen AR model.
        tokens: (B, n, C) standardised tokens sampled from the teacher.
        cond: (B, ...) their conditions.
        sampling: the teacher's distribution to regress.
        noise_level: how t is drawn, per token.
        generator: random stream of this step.
        draws: noise draws per sequence that share one backbone pass (App. C.2).
        loss: "gts" regresses the closed-form velocity (Eq. 6), "diffusion" the Monte-Carlo eps - x_0 (Table 7).
        head_only: leave the backbone as it is.
    """
    with torch.set_grad_enabled(not head_only), part("student"):
        features = student.features(tokens, cond)
    t = noise_level.draw((draws, *tokens.shape[:-1]), generator)
    eps = torch.randn((draws, *tokens.shape), generator=generator, device=tokens.device)
    x_t = noised(tokens, t, eps)
    with part("student"):
        v = student.velocity(x_t, t, features)
    if loss == "diffusion":
        return fcs_loss(v, tokens, eps), {}
    with torch.no_grad():
        with part("teacher"):
            log_p, codebook = teacher.log_p(tokens, cond, sampling), teacher.codebook
        with part("eq1"):
            target = torch.stack([velocity(x_t[i], t[i], log_p, codebook) for i in range(draws)])
    return gts_loss(v, target), {}
