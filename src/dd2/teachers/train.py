"""Training an AR teacher: cross-entropy of the next token, with class dropout for classifier-free guidance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.losses import Losses
from dd2.teachers.code import CodeTeacher


def with_dropout(teacher: CodeTeacher, cond: Tensor, class_dropout: float, random: torch.Generator) -> Tensor:
    """Conditions (B, ...) of which each is the null condition with probability `class_dropout`."""
    dropped = torch.rand(len(cond), generator=random, device=random.device) < class_dropout
    return torch.where(dropped.view(-1, *[1] * (cond.ndim - 1)), teacher.backbone.null_condition(cond), cond)


def ar_loss(teacher: CodeTeacher, ids: Tensor, cond: Tensor, class_dropout: float, random: torch.Generator) -> Losses:
    """Mean cross-entropy in nats per token of ids (B, n) under conditions (B, ...).

    Args:
        teacher: in training mode.
        ids: (B, n) codes of real images.
        cond: (B, ...) conditions.
        class_dropout: probability that an image is trained with the null condition.
        random: random stream of this step.

    Returns:
        The loss, and the negative log-likelihood in nats per image.
    """
    cond = with_dropout(teacher, cond, class_dropout, random)
    logits = teacher.logits(teacher.codebook[ids], cond)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    return loss, {"nats_per_image": loss.detach() * ids.shape[1]}
