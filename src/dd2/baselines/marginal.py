"""onestep*: every position drawn on its own from its marginal code frequency, per class (METHOD 7, App. E.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dd2.seeding import image_uniforms
from dd2.teachers.filtering import draw


class MarginalSampler:
    """Code frequencies per (class, position), counted on teacher samples.

    Args:
        ids: (N, n) code ids.
        labels: (N,) classes of them.
        codebook_size: V.
    """

    def __init__(self, ids: Tensor, labels: Tensor, codebook_size: int) -> None:
        classes = int(labels.max()) + 1
        counts = torch.zeros(classes, ids.shape[1], codebook_size)
        position = torch.arange(ids.shape[1]).expand_as(ids)
        ones = torch.ones(ids.shape)
        counts.index_put_((labels.unsqueeze(1).expand_as(ids).long(), position, ids.long()), ones, accumulate=True)
        self.log_p = (counts / counts.sum(-1, keepdim=True)).log()

    def sample(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Ids (B, n), one seed per image."""
        uniforms = image_uniforms(seeds, (self.log_p.shape[1],))
        return draw(self.log_p[labels.cpu()], uniforms).to(labels.device)
