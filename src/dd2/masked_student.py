"""Generator and guidance network of a masked teacher: copies of it, diffusion head and all (MAR; beyond the paper).

As guidance network it reads a known set and predicts the noise of the other tokens. As generator it reads noise at every
position, as if all were known, and its head gives each position's token from its own noise at one noise level.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.student import ArDiffusion
from dd2.teachers.base import Teacher
from dd2.teachers.diffusion import STEPS
from dd2.teachers.diffusion_score import COSINE, DiffusionScore
from dd2.teachers.masked import MaskedBackbone


@dataclass(frozen=True)
class MaskedStudentConfig:
    """What a teacher's sizes do not say of a `MaskedStudent`."""

    level: int = 928
    """Noise level of the generator's head, of 0 … 999. Errors of its prediction are multiplied by t / (1 - t): 9 at 928
    (t = 0.9), 20,000 at the last."""

    def __post_init__(self) -> None:
        """Refuse other levels."""
        if not 0 <= self.level < STEPS:
            raise InputError(f"networks.level must be in 0 to {STEPS - 1}, got {self.level}")


class MaskedStudent(ArDiffusion):
    """A masked model in both roles.

    Args:
        backbone: usually a copy of a teacher's.
        config: the noise level.
    """

    def __init__(self, backbone: MaskedBackbone, config: MaskedStudentConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config

    @classmethod
    def from_teacher(cls, teacher: Teacher, config: MaskedStudentConfig) -> "MaskedStudent":
        """A student that starts as the teacher.

        Raises:
            InputError: the teacher has an order.
        """
        backbone = teacher.student_backbone()
        if not isinstance(backbone, MaskedBackbone):
            raise InputError(f"a {type(teacher).__name__} has no masked network of which a one-step generator could be a copy")
        return cls(backbone, config).requires_grad_(True)

    @property
    def masked(self) -> MaskedBackbone:
        """The backbone as what it is."""
        assert isinstance(self.backbone, MaskedBackbone)
        return self.backbone

    def given(self, tokens: Tensor, cond: Tensor, known: Tensor | None = None) -> DiffusionScore:
        if known is None:
            raise ValueError("a masked network needs to be told which tokens are known (Teacher.known_sets)")
        return DiffusionScore(self.masked, self.masked.features_given(tokens, known, cond), known)

    def with_fresh_head(self) -> "MaskedStudent":
        """The same layers under a head that has learned nothing."""
        student = copy.deepcopy(self)
        student.masked.forget_head()
        return student

    def as_generator(self, noise: Tensor, cond: Tensor) -> Tensor:
        """One pass: noise (B, n, C), cond (B, ...) -> clean tokens, the head's posterior mean at each position's own noise."""
        features = self.backbone(noise, cond)
        index = torch.full(noise.shape[:-1], self.config.level, device=noise.device)
        eps, _ = self.masked.head(noise, index, features)
        return COSINE.clean(noise, index, eps)
