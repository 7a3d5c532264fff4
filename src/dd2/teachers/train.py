"""Training a teacher of any kind; of one over codes by cross-entropy of the next token, with class dropout for guidance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.losses import Losses
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher, require_codes
from dd2.teachers.mar import MARTeacher
from dd2.teachers.mar_train import mar_loss


def teacher_loss(teacher: Teacher, encoded: Tensor, cond: Tensor, class_dropout: float, random: torch.Generator) -> Losses:
    """One micro-batch of what the teacher's tokenizer made of images (`dd2.data.tokenise`): `ar_loss`, or MAR's.

    Raises:
        InputError: it is none that can be trained.
    """
    if isinstance(teacher, MARTeacher):
        return mar_loss(teacher, encoded, cond, class_dropout, random)
    return ar_loss(require_codes(teacher, "training"), encoded, cond, class_dropout, random)


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
