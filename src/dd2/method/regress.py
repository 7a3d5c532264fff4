"""Before stage 2, beyond the paper: the generator first regresses the teacher's own map from noise to data.

Stage 1 makes a network that draws token by token; in one pass it gives noise. Stage 2 can pull it from there to the
teacher's distribution, but which noise becomes which image is then settled early and by chance. Started from the ODE's map
(what DD1 trains, and what DMD was regularised by), the generator's later tokens agree with its earlier ones from the
beginning, in the teacher's own coupling, and stage 2 has the regression's blur left to remove.

Where the targets are the data of pairs, late tokens are to follow earlier ones that the generator may not have drawn. On
the generator's own tokens they are to follow those that it has: each target is the ODE's end given them
(`dd2.trajectory.data_given`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.errors import InputError
from dd2.losses import Losses
from dd2.scores import CodeMixture, ConditionalScore
from dd2.student import Drawn, OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.training.timing import part
from dd2.trajectory import OdeConfig, data_given

EARLIER = 0.5
"""Weight of the loss of each round before the last, which learns by nothing else."""


def regress_loss(generator: OneStepNetwork, teacher: Teacher, noise: Tensor, data: Tensor, cond: Tensor) -> Losses:
    """The generator's tokens against the ODE's data of the same noise.

    Args:
        generator: what is trained.
        teacher: whose ODE it is.
        noise: (B, n, C) standard normal.
        data: (B, n) ids, or of a teacher without codes (B, n, C) tokens (`dd2.trajectory`).
        cond: (B, ...) conditions.

    Returns:
        As `code_loss`, or the squared error alone.
    """
    with part("generator"):
        drawn = generator.draw(noise, cond)
    if isinstance(teacher, CodeTeacher):
        return code_loss(drawn, teacher, data)
    return (drawn.tokens.float() - data).square().mean(), {}


def regress_own_loss(
    generator: OneStepNetwork,
    teacher: CodeTeacher,
    pairs: tuple[Tensor, Tensor, Tensor] | None,
    noise: Tensor,
    cond: Tensor,
    sampling: Sampling,
    ode: OdeConfig,
) -> Losses:
    """The same of a batch whose last sequences have no data yet: their targets are where the ODE ends given the generator's own
    tokens.

    Args:
        generator: what is trained.
        teacher: whose ODE it is.
        pairs: noise (P, n, C), the ODE's data (P, n) and conditions (P, ...) of the other sequences, if there are any.
        noise, cond: (B, n, C), (B, ...) of those without.
        sampling: the distribution whose ODE is solved.
        ode: solver and steps.

    Returns:
        As `code_loss`.
    """
    known = 0 if pairs is None else len(pairs[1])
    if pairs is not None:
        noise, cond = torch.cat([pairs[0], noise]), torch.cat([pairs[2], cond])
    with part("generator"):
        drawn = generator.draw(noise, cond)
    with torch.no_grad():
        own = teacher.snap(drawn.tokens[known:].detach().float())
        with part("teacher"):
            given = teacher.given(own, cond[known:], sampling)
        with part("eq1"):
            ids = data_given(noise[known:], given, ode)
    return code_loss(drawn, teacher, ids if pairs is None else torch.cat([pairs[1], ids]))


def code_loss(drawn: Drawn, teacher: CodeTeacher, ids: Tensor) -> Losses:
    """What a generator drew against codes (B, n): cross-entropy of its classifier, with that of earlier rounds added under the
    weight `EARLIER`, or the squared error of its tokens.

    Returns:
        The loss, and the share of tokens whose (nearest) code is the right one.
    """
    if drawn.logits is not None:
        right = (drawn.logits.detach().argmax(-1) == ids).float().mean()
        loss = F.cross_entropy(drawn.logits.flatten(0, 1), ids.flatten())
        for logits in drawn.earlier:
            loss = loss + EARLIER * F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return loss, {"right_codes": right}
    q = drawn.tokens.float()
    right = (teacher.ids(q.detach()) == ids).float().mean()
    return (q - teacher.codebook[ids]).square().mean(), {"right_codes": right}


def code_mixture(score: ConditionalScore) -> CodeMixture:
    """A conditional score over codes.

    Raises:
        InputError: the teacher's tokens are no codes, so there is no such ODE.
    """
    if not isinstance(score, CodeMixture):
        raise InputError("csd.regression_weight needs a teacher over codes, with next-token probabilities")
    return score
