"""onestep*: every position drawn on its own from its marginal frequency (Table 1, App. E.5)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.seeding import image_uniforms
from dd2.training.samples import TeacherSamples
from dd2.training.store import taken

Over = Literal["class", "dataset"]
"""Whose frequencies: each class's own, or those of the whole data set (App. E.5)."""


class MarginalSampler:
    """Independent positions with the frequencies of teacher samples.

    Each position takes its token from a teacher sample, drawn anew for every position: the marginal frequencies exactly, without
    a table of classes x positions x V, and for continuous tokens too.

    Args:
        samples: of the teacher.
        over: "class" takes samples of the image's own label, "dataset" of any (the paper's).
    """

    def __init__(self, samples: TeacherSamples, over: Over = "class") -> None:
        self.samples, self.over = samples, over
        labels = samples.labels if over == "class" else torch.zeros_like(samples.labels)
        self.counts = labels.bincount()
        self.rows = labels.argsort(stable=True)  # grouped by class
        self.starts = self.counts.cumsum(0) - self.counts

    def kept(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sequences (B, n, …) in the form of `Teacher.stored`, one seed per image.

        Raises:
            InputError: there is no teacher sample of a class.
        """
        own = labels.cpu() if self.over == "class" else torch.zeros_like(labels.cpu())
        if int(own.max()) >= len(self.counts) or (self.counts[own] == 0).any():
            raise InputError("onestep* needs teacher samples of every class; distil with more --teacher-samples")
        kept = self.samples.kept
        uniforms = image_uniforms(seeds, (kept.shape[1],))
        chosen = (uniforms * self.counts[own].unsqueeze(1)).long().clamp_max(self.counts[own].unsqueeze(1) - 1)
        rows = self.rows[self.starts[own].unsqueeze(1) + chosen]  # (B, n)
        return taken(kept, (rows, torch.arange(kept.shape[1])))

    def draw(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Standardised tokens (B, n, C), one seed per image. Errors as `kept`."""
        return self.samples.teacher.restored(self.kept(labels, seeds))
