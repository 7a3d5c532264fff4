"""A distilled generator as it is shipped: the network and what turns labels into conditions and tokens into images."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.precision import in_precision
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.conditions import Conditions
from dd2.teachers.head import HeadTeacher
from dd2.tokenizers.base import CodeTokenizer, Tokenizer, nearest_ids


@dataclass(frozen=True)
class Generator:
    """A one-step network with its tokenizer and its labels.

    Attributes:
        student: the network.
        tokenizer: tokens to images.
        conditions: what labels stand for.
        teacher: a teacher of the user's own code, whose ways to decode and to snap the network's tokens have; None where the
            tokenizer is all there is to know.
    """

    student: OneStepNetwork
    tokenizer: Tokenizer
    conditions: Conditions
    teacher: Teacher | None = None

    @classmethod
    def of(cls, student: OneStepNetwork, teacher: Teacher) -> "Generator":
        """A network distilled from a teacher."""
        return cls(student, teacher.tokenizer, teacher.conditions, teacher if teacher.code else None)

    @property
    def code(self) -> str:
        """The module:function that a folder must name to be opened again; empty where it says all by itself."""
        return "" if self.teacher is None else self.teacher.code

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.student.backbone.device

    def to(self, device: torch.device) -> "Generator":
        """The same on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, student=self.student.to(device), tokenizer=self.tokenizer.to(device), teacher=teacher)

    def in_precision(self, dtype: torch.dtype) -> "Generator":
        """The same for drawing in `dtype`, under autocast; weights that need none are shared (`dd2.precision`)."""
        return replace(self, student=in_precision(self.student, dtype), tokenizer=self.tokenizer.in_precision(dtype))

    def in_rounds(self, rounds: int) -> "Generator":
        """The same with a pass of so many rounds (`OneStepNetwork.in_rounds`); 0 is as it was trained.

        Raises:
            InputError: it was not trained in rounds.
        """
        return replace(self, student=self.student.in_rounds(rounds)) if rounds else self

    @property
    def as_teacher(self) -> HeadTeacher:
        """The network as the AR-diffusion model that it is, if it comes from stage 1.

        Raises:
            InputError: it is another method's, which cannot be sampled step by step.
        """
        if not isinstance(self.student, Student):
            raise InputError(
                f"a {type(self.student).__name__} is no AR-diffusion model; ar_diffusion/ of a run of dd2 distill is"
            )
        teacher = self.student.as_teacher(self.tokenizer, self.conditions)
        teacher.code = self.code
        return teacher

    def snap(self, tokens: Tensor) -> Tensor:
        """The nearest codes, as standardised tokens (..., C); the tokens themselves where there are no codes."""
        if self.teacher is not None:
            return self._standardised(self.teacher).snap(tokens)
        if not isinstance(self.tokenizer, CodeTokenizer):
            return tokens
        to_tokens, codes = self.student.backbone.to_tokens, self.tokenizer.codebook
        return to_tokens(codes[nearest_ids(tokens, to_tokens(codes))])

    def decode(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Standardised tokens (B, n, C), drawn under cond (B, ...), to images (B, channels, H, W) in about [-1, 1]."""
        if self.teacher is not None:
            return self._standardised(self.teacher).decode(tokens, cond)
        return self.tokenizer.decode_tiled(self.student.backbone.to_codes(tokens))

    def _standardised(self, teacher: Teacher) -> Teacher:
        """The teacher in the standardisation of the network."""
        if torch.compiler.is_compiling():  # it was set by a call before, and a graph holds no writing
            return teacher
        teacher.backbone.normalise_by(self.student.backbone.token_mean, self.student.backbone.token_std)
        return teacher
