"""DD1's training: regress the ODE's data from its noise, in one pass or with part of the data already known."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.baselines.dd1.student import DD1Student
from dd2.errors import InputError
from dd2.losses import Losses
from dd2.sampling import one_step
from dd2.teachers.code import CodeTeacher
from dd2.training.ema import ema_copy, ema_update
from dd2.training.health import loss_rises
from dd2.training.preview import previewed
from dd2.training.schedule import OptimConfig, ema_rate
from dd2.training.stage import Stage, Update
from dd2.trajectory import Pairs


@dataclass(frozen=True)
class DD1TrainConfig:
    """DD1's training. The paper's LPIPS loss is a squared error of tokens here: LPIPS needs a network of its own."""

    iterations: int = 100_000
    """Optimiser steps."""
    batch: int = 512
    """Sequences per micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    regression_weight: float = 1.0
    """Weight of the continuous head's squared error, beside the classifier's cross-entropy."""
    ema: float = 0.9999
    """Limit of the progressive EMA rate; the average is the result."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    """Optimiser."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        if min(self.iterations, self.batch, self.accumulate) < 1:
            raise InputError("train.iterations, batch and accumulate must be at least 1")
        if not 0 <= self.ema < 1 or self.regression_weight <= 0:
            raise InputError(
                f"train.ema must be in [0, 1) and regression_weight positive, got {self.ema} and {self.regression_weight}"
            )


def dd1_loss(student: DD1Student, ids: Tensor, noise: Tensor, cond: Tensor, random: torch.Generator, weight: float) -> Losses:
    """Each head against the ODE's data, at the positions it decides and that are not given.

    Args:
        student: what is trained. If it has a second pass, half of the sequences give it the data before `second_step`.
        ids: (B, n) the ODE's data.
        noise: (B, n, C) its noise.
        cond: (B, ...) conditions.
        random: random stream of this step.
        weight: of the continuous head's squared error.

    Returns:
        The loss; cross-entropy and squared error apart, where a head decides anything.
    """
    tokens = student.codebook[ids]
    second = student.config.second_step
    given = torch.rand(len(ids), generator=random, device=random.device) < (0.5 if second else 0.0)
    data = student.before(given * student.backbone.order.steps[second].start, len(ids))
    logits, continuous = student(torch.where(data.unsqueeze(-1), tokens, noise), data, cond)
    by_logits, numbers = ~data & student.by_logits(), {}
    by_value = ~data & ~student.by_logits()
    loss = logits.new_zeros(())
    if by_logits.any():
        numbers["cross_entropy"] = F.cross_entropy(logits[by_logits], ids[by_logits])
        loss = loss + numbers["cross_entropy"]
    if by_value.any():
        numbers["squared_error"] = F.mse_loss(continuous[by_value], tokens[by_value])
        loss = loss + weight * numbers["squared_error"]
    return loss, {name: value.detach() for name, value in numbers.items()}


def dd1_stage(student: DD1Student, teacher: CodeTeacher, pairs: Pairs, config: DD1TrainConfig) -> tuple[Stage, DD1Student]:
    """The training of a student on pairs, and the average that it ends with."""
    average = ema_copy(student)

    def loss(random: torch.Generator) -> Losses:
        noise, ids, labels = pairs.batch(config.batch, random)
        return dd1_loss(student, ids, noise, teacher.conditions(labels), random, config.regression_weight)

    update = Update("student", list(student.parameters()), config.optim, loss, accumulate=config.accumulate)
    modules = {"student": student, "student_ema": average}
    preview = previewed(teacher, lambda cond, seeds: one_step(average, cond, seeds))

    def after(step: int) -> None:
        ema_update(average, student, ema_rate(step, config.ema))

    signs = (loss_rises("student/loss"),)
    return Stage("dd1", config.iterations, [update], modules, after=after, preview=preview, signs=signs), average
