"""How good a generator is in the eyes of its teacher: a number to watch during training, and to choose checkpoints by."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from dd2.evaluation.frechet import GaussianFit, fit_gaussian, frechet_distance
from dd2.sampling import one_step
from dd2.student import OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.tokenizers.base import nearest_ids
from dd2.training.samples import TeacherSamples

FIRST_SEED = 2**61
"""Seeds of validation images, which no evaluation draws."""


class TeacherDistance:
    """Fréchet distance between generated and teacher sequences in the teacher's own features.

    The features are the backbone's, averaged over the positions, of the nearest codes. No images and no other network are
    needed, so every teacher has it, and it shares nothing with the networks that `dd2 evaluate` measures by. Only values of one
    run, at one count, can be compared.

    Args:
        teacher: whose features.
        samples: its sequences; the first `count` are the reference, and their labels are those of the generated ones.
        count: sequences, at least 2; as many as there are where there are fewer.
        batch: sequences at a time.
    """

    def __init__(self, teacher: Teacher, samples: TeacherSamples, count: int, batch: int) -> None:
        self.teacher, self.samples = teacher, samples
        self.batches = torch.arange(min(count, len(samples.ids))).split(batch)

    @cached_property
    def reference(self) -> GaussianFit:
        """Of the teacher's sequences."""
        return fit_gaussian(self._features(*self.samples.take(rows, self._device)) for rows in self.batches)

    def __call__(self, generator: OneStepNetwork) -> float:
        """The distance of a generator now, of the same images each time."""
        return frechet_distance(fit_gaussian(self._generated(generator)), self.reference)

    def _generated(self, generator: OneStepNetwork) -> Iterator[Tensor]:
        for rows in self.batches:
            _, labels = self.samples.take(rows, self._device)
            seeds = [FIRST_SEED + row for row in rows.tolist()]
            tokens = one_step(generator, self.teacher.backbone.conditions(labels), seeds)
            yield self._features(nearest_ids(tokens.float(), self.teacher.codebook), labels)

    @property
    def _device(self) -> torch.device:
        return self.teacher.codebook.device

    @torch.no_grad()
    def _features(self, ids: Tensor, labels: Tensor) -> Tensor:
        """(B, n) ids -> (B, D)."""
        cond = self.teacher.backbone.conditions(labels)
        return self.teacher.features(self.teacher.codebook[ids], cond).float().mean(1)
