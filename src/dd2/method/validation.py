"""How good a generator is in the eyes of its teacher: a number to watch during training, and to choose checkpoints by."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dd2.frechet import GaussianFit, fit_gaussian, frechet_distance
from dd2.processes import rank, sum_over_processes, world_size
from dd2.sampling import one_step
from dd2.student import OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.teachers.layers import layer_stacks
from dd2.training.samples import TeacherSamples

FIRST_SEED = 2**61
"""Seeds of validation images, which no evaluation draws."""


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
    def reference(self) -> GaussianFit:
        """Of the teacher's sequences."""
        return self._fit(lambda rows, labels: self.samples.take(rows)[0])

    def __call__(self, generator: OneStepNetwork) -> float:
        """The distance of a generator now, of the same images each time. All processes must ask; each draws its share."""

        def drawn(rows: Tensor, labels: Tensor) -> Tensor:
            seeds = [FIRST_SEED + row for row in rows.tolist()]
            return self.teacher.snap(one_step(generator, self.teacher.conditions(labels), seeds).float())

        return frechet_distance(self._fit(drawn), self.reference)

    @torch.no_grad()
    def _fit(self, tokens_of: Callable[[Tensor, Tensor], Tensor]) -> GaussianFit:
        """Of the features of all rows' tokens, given (rows, labels)."""
        device = self.teacher.device
        features = torch.zeros(self.count, 0, device=device)
        for rows in self.batches:
            labels = self.samples.labels[rows].to(device)
            tokens, cond = tokens_of(rows, labels), self.teacher.conditions(labels)
            found = self._features(tokens, cond).float().mean(1)
            if not features.shape[1]:
                features = features.new_zeros(self.count, found.shape[1])  # an inner layer may have another width
            features[rows] = found
        sum_over_processes([features])
        return fit_gaussian([features])

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
