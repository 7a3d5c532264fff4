"""Between the stages, beyond the paper: the generator first regresses the teacher's own map from noise to data.

Stage 1 makes a network that draws token by token; in one pass it gives noise. Stage 2 can pull it from there to the
teacher's distribution, but which noise becomes which image is then settled early and by chance. Started from the ODE's map
(what DD1 trains, and what DMD was regularised by), the generator's later tokens agree with its earlier ones from the
beginning, in the teacher's own coupling, and stage 2 has the regression's blur left to remove.
"""

from torch import Tensor

from dd2.losses import Losses
from dd2.student import Student
from dd2.teachers.code import CodeTeacher
from dd2.training.timing import part


def regress_loss(generator: Student, teacher: CodeTeacher, noise: Tensor, ids: Tensor, cond: Tensor) -> Losses:
    """Mean squared error between the generator's tokens and the ODE's data of the same noise.

    Args:
        generator: what is trained.
        teacher: whose codes the ids are.
        noise: (B, n, C) standard normal.
        ids: (B, n) the ODE's data (`dd2.trajectory`).
        cond: (B, ...) conditions.

    Returns:
        The loss, and the share of tokens whose nearest code is the right one.
    """
    with part("generator"):
        q = generator.as_generator(noise, cond).float()
    right = (teacher.ids(q.detach()) == ids).float().mean()
    return (q - teacher.codebook[ids]).square().mean(), {"right_codes": right}
