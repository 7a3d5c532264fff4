"""Stage 1: turn the copied backbone and a fresh head into an AR-diffusion model of the teacher (Eq. 6, Alg. 2)."""

import torch
from torch import Tensor

from dd2.losses import Losses, fcs_loss, gts_loss, noised
from dd2.method.config import TuneConfig
from dd2.scores import HeadScore
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.training.timing import part


def tune_loss(
    student: Student,
    teacher: Teacher,
    tokens: Tensor,
    cond: Tensor,
    config: TuneConfig,
    random: torch.Generator,
    *,
    head_only: bool = False,
) -> Losses:
    """Velocity regression on teacher samples, `config.draws` noise draws that share one backbone pass (App. C.2).

    Args:
        student: what is trained.
        teacher: the frozen AR model.
        tokens: (B, n, C) standardised tokens sampled from the teacher.
        cond: (B, ...) their conditions.
        config: the target ("gts" regresses the teacher's own velocity, Eq. 6; "diffusion" the Monte-Carlo eps - x_0, Table 7),
            the teacher's distribution, draws and noise levels.
        random: random stream of this step.
        head_only: leave the backbone as it is.
    """
    with torch.set_grad_enabled(not head_only), part("student"):
        features = student.features(tokens, cond)
    t = config.noise_level.draw((config.draws, *tokens.shape[:-1]), random)
    eps = torch.randn((config.draws, *tokens.shape), generator=random, device=tokens.device)
    given = HeadScore(student.head, features)
    if config.loss == "diffusion":
        with part("student"):
            return fcs_loss(given, tokens, t, eps), {}
    x_t = noised(tokens, t, eps)
    with part("student"):
        v = given.velocity(x_t, t)
    with torch.no_grad():
        with part("teacher"):
            wanted = teacher.given(tokens, cond, config.sampling)
        with part("eq1"):
            target = wanted.velocity(x_t, t)
    return gts_loss(v, target), {}
