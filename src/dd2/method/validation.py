"""How good a generator is in the eyes of its teacher: a number to watch during training, and to choose checkpoints by."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dd2.frechet import GaussianFit, fit_gaussian, frechet_distance
from dd2.processes import rank, sum_over_processes, world_size
from dd2.sampling import one_step
from dd2.student import OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.layers import layer_stacks
from dd2.training.samples import TeacherSamples

FIRST_SEED = 2**61
"""Seeds of validation images, which no evaluation draws."""


@dataclass(frozen=True)
class Look:
    """Sequences in a teacher's eyes.

    Attributes:
        fit: of their features.
        spread: variance of features within labels.
        codes: different ones among them; 0 where there are none.
    """

    fit: GaussianFit
    spread: float
    codes: int


def within_labels(features: Tensor, labels: Tensor) -> float:
    """Total variance of features (N, F) about the means of their labels (N,); about their own mean where none comes twice."""
    _, groups = labels.to(features.device).unique(return_inverse=True)
    size = int(groups.max()) + 1
    if size == len(features):
        groups, size = torch.zeros_like(groups), 1
    counts = groups.bincount(minlength=size).double()
    means = features.new_zeros(size, features.shape[1], dtype=torch.float64).index_add_(0, groups, features.double())
    means /= counts.unsqueeze(1)
    return float((features.double() - means[groups]).square().sum() / (len(features) - size))


class TeacherDistance:
    """Fréchet distance between generated and teacher sequences in the teacher's own features.

    The features are the backbone's, averaged over the positions, of the nearest codes (of the tokens themselves where there are
    none). No images and no other network are needed, so every teacher has it, and it shares nothing with the networks that
    `dd2 evaluate` measures by. Only values of one run, at one count, can be compared.

    Args:
        teacher: whose features.
        samples: its sequences; the first `count` are the reference, and their labels are those of the generated ones.
        count: sequences, at least 2; as many as there are where there are fewer.
        batch: sequences at a time.
        middle: take the features of the middle layer: those of the last are trained on (`dd2.method.match`). A backbone without a
            LayerStack has only the last.
    """

    def __init__(self, teacher: Teacher, samples: TeacherSamples, count: int, batch: int, *, middle: bool = False) -> None:
        self.teacher, self.samples = teacher, samples
        stacks = layer_stacks(teacher.backbone) if middle else []
        self._stack = stacks[0] if stacks else None
        self.count = min(count, len(samples)) // world_size() * world_size()
        own = torch.arange(self.count).tensor_split(world_size())[rank()]  # equally many for each, as sharded networks need
        self.batches = own.split(batch)

    @cached_property
    def reference(self) -> "Look":
        """Of the teacher's sequences."""
        return self._look(lambda rows, labels: self.samples.take(rows)[0])

    def __call__(self, generator: OneStepNetwork) -> dict[str, float]:
        """A generator now, by the same images each time. All processes must ask; each draws its share.

        Returns:
            "validation" (the distance), "spread" (variance within the labels as a share of the teacher's own) and, where there
            are codes, "codes_used" (as a share of those in as many of the teacher's sequences).
        """

        def drawn(rows: Tensor, labels: Tensor) -> Tensor:
            seeds = [FIRST_SEED + row for row in rows.tolist()]
            return self.teacher.snap(one_step(generator, self.teacher.conditions(labels), seeds).float())

        found, reference = self._look(drawn), self.reference
        numbers = {"validation": frechet_distance(found.fit, reference.fit)}
        if reference.spread > 0:
            numbers["spread"] = found.spread / reference.spread
        if reference.codes:
            numbers["codes_used"] = found.codes / reference.codes
        return numbers

    @torch.no_grad()
    def _look(self, tokens_of: Callable[[Tensor, Tensor], Tensor]) -> "Look":
        """All rows' tokens, given (rows, labels), in the teacher's features."""
        device = self.teacher.device
        codes = self.teacher.num_codes if isinstance(self.teacher, CodeTeacher) else 0
        features, counts = torch.zeros(self.count, 0, device=device), torch.zeros(codes, device=device)
        for rows in self.batches:
            labels = self.samples.labels[rows].to(device)
            tokens, cond = tokens_of(rows, labels), self.teacher.conditions(labels)
            found = self._features(tokens, cond).float().mean(1)
            if not features.shape[1]:
                features = features.new_zeros(self.count, found.shape[1])  # an inner layer may have another width
            features[rows] = found
            if isinstance(self.teacher, CodeTeacher):
                counts += self.teacher.ids(tokens).flatten().bincount(minlength=codes)
        sum_over_processes([features, counts])
        return Look(fit_gaussian([features]), within_labels(features, self.samples.labels[: self.count]), int((counts > 0).sum()))

    def _features(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, positions, D) of the layer that is looked at."""
        if self._stack is None:
            return self.teacher.features(tokens, cond)
        kept: list[Tensor] = []
        stack, layer = self._stack, self._stack[len(self._stack) // 2]
        usual = stack.call

        def watched(called: nn.Module, *arguments: Any) -> Tensor:
            found = usual(called, *arguments)
            if called is layer:
                kept.append(found)
            return found

        stack.call = watched  # not a hook: those inside a compiled layer are never run
        try:
            self.teacher.features(tokens, cond)
        finally:
            stack.call = usual
        return kept[0]
