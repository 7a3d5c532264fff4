"""The ways to draw tokens: one step, one step refined by the teacher (Alg. 4), AR-diffusion, the teacher itself.

All return standardised tokens (B, n, C) and take one seed per image; the command line, the evaluation and the pipeline draw by
`Ways` alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.generator import Generator
from dd2.precision import autocast
from dd2.seeding import one_each
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.conditions import Conditions
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import EULER_STEPS, draw_by_head, token_noise

Draw = Callable[[Tensor, Sequence[int]], Tensor]
"""Conditions (B, ...) and B seeds to tokens (B, n, C)."""

Prefix = Literal["snapped", "generated"]
"""What the teacher reads of the generator's tokens when it draws the rest (Alg. 4)."""


def _noise(backbone: Backbone, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    one_each(cond, seeds)
    return token_noise(backbone, seeds)


@torch.no_grad()
def one_step(generator: OneStepNetwork, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    """The whole image in one forward pass: G(eps) (B, n, C)."""
    return generator.as_generator(_noise(generator.backbone, cond, seeds), cond)


@torch.no_grad()
def two_passes(generator: OneStepNetwork, cond: Tensor, seeds: Sequence[int]) -> Tensor:
    """The whole image in two forward passes of the generator itself, for methods that have them (DD1): (B, n, C)."""
    return generator.two_passes(_noise(generator.backbone, cond, seeds), cond)


@torch.no_grad()
def refine(
    generator: OneStepNetwork,
    teacher: Teacher,
    cond: Tensor,
    sampling: Sampling,
    seeds: Sequence[int],
    steps: int,
    prefix: Prefix = "snapped",
) -> Tensor:
    """Few steps with the teacher (Alg. 4): one generator pass, then the teacher redraws the last steps - 1 AR steps.

    Alg. 4 conditions the teacher on the prefix as the generator gave it ("generated"); "snapped" takes it to the nearest codes
    first, which is what a teacher over codes was trained on. The result holds the prefix as the generator gave it, either way.

    Raises:
        InputError: steps is not in 1 … S + 1.
    """
    first_step = first_redrawn_step(teacher, sampling, steps)
    tokens = one_step(generator, cond, seeds)
    if first_step == teacher.num_steps(sampling):
        return tokens
    read = teacher.snap(tokens) if prefix == "snapped" else tokens
    return teacher.redrawn(tokens, read, cond, sampling, seeds, first_step)


def first_redrawn_step(teacher: Teacher, sampling: Sampling, steps: int) -> int:
    """The AR step at which the teacher takes over when `steps` passes are allowed in all (Alg. 4).

    Raises:
        InputError: steps is not in 1 … S + 1.
    """
    most = teacher.num_steps(sampling)
    if not 1 <= steps <= most + 1:
        raise InputError(f"steps must be 1 (the generator alone) to {most + 1} (every AR step redrawn), got {steps}")
    return most - (steps - 1)


def ar_diffusion(student: Student, cond: Tensor, seeds: Sequence[int], euler_steps: int = EULER_STEPS) -> Tensor:
    """Step by step along the AR order, each token by Euler steps from t = 1 to 0 through the head (App. B.3).

    This samples the stage-1 model: the quality it reaches bounds what stage 2 starts from.
    """
    noise = _noise(student.backbone, cond, seeds)
    return draw_by_head(student.backbone, student.head, cond, noise, euler_steps=euler_steps)


@dataclass(frozen=True)
class Ways:
    """What can be drawn from the networks of a run.

    Args:
        generator: the one-step generator.
        teacher: its teacher, standardised alike, where it is known.
        sampling: how the teacher samples.
        tuned: the stage-1 model, where there is one.
        prefix: what the teacher reads in `few_steps`.
        precision: the arithmetic that the networks draw and decode in; all tokens and images are float32.
    """

    generator: Generator
    teacher: Teacher | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tuned: Generator | None = None
    prefix: Prefix = "snapped"
    precision: torch.dtype = torch.float32

    def in_precision(self, dtype: torch.dtype) -> "Ways":
        """The same in another precision than float32; where a network is the user's own code, of which nobody knows what it does
        with half precision, the same as before (`precision` says so).
        """
        if self.generator.code or (self.teacher is not None and self.teacher.code):
            return self
        return replace(
            self,
            generator=self.generator.in_precision(dtype),
            teacher=None if self.teacher is None else self.teacher.in_precision(dtype),
            tuned=None if self.tuned is None else self.tuned.in_precision(dtype),
            precision=dtype,
        )

    def decode(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Standardised tokens (B, n, C), drawn under cond (B, ...), to images (B, channels, H, W) in about [-1, 1]."""
        with autocast(tokens.device, self.precision):
            return self.generator.decode(tokens, cond).float()

    @property
    def conditions(self) -> Conditions:
        """What labels stand for."""
        return self.generator.conditions if self.teacher is None else self.teacher.conditions

    @torch.inference_mode()
    def batches(
        self,
        draw: Draw,
        labels: Sequence[int],
        seeds: Sequence[int],
        batch: int,
        *,
        nearest: bool = False,
        conditions: Conditions | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of labels with a seed each, a batch at a time, so that memory is bounded.

        Args:
            draw: one of the ways below.
            labels, seeds: one of each per image.
            batch: images at a time; they do not depend on it, up to rounding.
            nearest: decode the nearest codes of what was drawn.
            conditions: what the labels stand for, if not what they do in the run.

        Yields:
            Standardised tokens (B, n, C) and images (B, channels, H, W) in about [-1, 1], on the device.
        """
        known = self.conditions if conditions is None else conditions
        for start in range(0, len(labels), batch):
            chosen = slice(start, start + batch)
            cond = known(torch.tensor(labels[chosen], device=self.generator.device))
            tokens = draw(cond, seeds[chosen])
            tokens = self.generator.snap(tokens) if nearest else tokens
            yield tokens, self.decode(tokens, cond)

    def one_step(self) -> Draw:
        """The generator alone."""
        return self._drawn(lambda cond, seeds: one_step(self.generator.student, cond, seeds))

    def of_noise(self, noise: Tensor, cond: Tensor) -> Tensor:
        """What the generator alone makes of noise (B, n, C) under cond (B, ...)."""
        with autocast(noise.device, self.precision):
            return self.generator.student.as_generator(noise, cond).float()

    def in_rounds(self, rounds: int) -> "Ways":
        """The same by a generator of so many rounds; 0 is as it was trained.

        Raises:
            InputError: it was not trained in rounds.
        """
        return replace(self, generator=self.generator.in_rounds(rounds))

    def two_passes(self) -> Draw:
        """The generator's own second pass."""
        return self._drawn(lambda cond, seeds: two_passes(self.generator.student, cond, seeds))

    def few_steps(self, steps: int) -> Draw:
        """The teacher redraws the last steps - 1 AR steps; 1 is `one_step`.

        Raises:
            InputError: there is no teacher, or it has fewer steps.
        """
        if steps == 1:
            return self.one_step()
        teacher = self.known_teacher
        first_redrawn_step(teacher, self.sampling, steps)
        generator = self.generator.student
        return self._drawn(lambda cond, seeds: refine(generator, teacher, cond, self.sampling, seeds, steps, self.prefix))

    def ar_diffusion(self) -> Draw:
        """The stage-1 model, step by step.

        Raises:
            InputError: there is none.
        """
        if self.tuned is None:
            raise InputError("there is no stage-1 model (ar_diffusion/) here; give a run of dd2 distill that has trained one")
        tuned = self.tuned.as_teacher
        return self._drawn(lambda cond, seeds: tuned.sample(cond, self.sampling, seeds))

    def by_teacher(self) -> Draw:
        """The teacher itself, with its key/value cache.

        Raises:
            InputError: there is none.
        """
        teacher = self.known_teacher
        return self._drawn(lambda cond, seeds: teacher.sample(cond, self.sampling, seeds))

    def _drawn(self, draw: Draw) -> Draw:
        """In the precision."""

        def drawn(cond: Tensor, seeds: Sequence[int]) -> Tensor:
            with autocast(cond.device, self.precision):
                return draw(cond, seeds).float()

        return drawn

    @property
    def known_teacher(self) -> Teacher:
        """The teacher.

        Raises:
            InputError: there is none.
        """
        if self.teacher is None:
            raise InputError("the teacher is unknown here: give the run folder of dd2 distill, not a generator alone")
        return self.teacher
