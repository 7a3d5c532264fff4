"""onestep*: every position drawn on its own from its marginal code frequency, per class (METHOD 7, App. E.5)."""

from collections.abc import Sequence

from torch import Tensor

from dd2.errors import InputError
from dd2.seeding import image_uniforms


class MarginalSampler:
    """Independent positions with the frequencies of teacher samples, per class.

    Each position takes its code from a teacher sample of the class, drawn anew for every position: the marginal
    frequencies exactly, without a table of classes x positions x V.

    Args:
        ids: (N, n) code ids.
        labels: (N,) classes of them.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids = ids
        self.counts = labels.bincount()
        self.rows = labels.argsort(stable=True)  # grouped by class
        self.starts = self.counts.cumsum(0) - self.counts

    def sample(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Ids (B, n), one seed per image.

        Raises:
            InputError: there is no teacher sample of a class.
        """
        own = labels.cpu()
        if int(own.max()) >= len(self.counts) or (self.counts[own] == 0).any():
            raise InputError("onestep* needs teacher samples of every class; distil with more --teacher-samples")
        uniforms = image_uniforms(seeds, (self.ids.shape[1],))
        chosen = (uniforms * self.counts[own].unsqueeze(1)).long().clamp_max(self.counts[own].unsqueeze(1) - 1)
        rows = self.rows[self.starts[own].unsqueeze(1) + chosen]
        return self.ids.long().gather(0, rows).to(labels.device)
