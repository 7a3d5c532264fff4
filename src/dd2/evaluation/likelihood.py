"""Teacher NLL: how probable the teacher finds sampled sequences. It needs no feature network."""

import torch
from torch import Tensor

from dd2.teachers.code import CodeTeacher


@torch.no_grad()
def teacher_nll(teacher: CodeTeacher, ids: Tensor, cond: Tensor, batch: int = 500) -> Tensor:
    """Negative log-likelihood in nats per image under the unfiltered teacher: ids (N, n), cond (N, ...) -> (N,).

    Filtering (top-k, top-p) would make single tokens impossible and the mean infinite, so it is left out; the
    teacher's own samples, scored the same way, are the number to compare with.
    """
    nats = []
    codebook = teacher.codebook
    for part, c in zip(ids.split(batch), cond.split(batch), strict=True):
        log_p = teacher.logits(codebook[part], c).log_softmax(-1)
        nats.append(-log_p.gather(-1, part.unsqueeze(-1)).squeeze(-1).sum(-1))
    return torch.cat(nats)
