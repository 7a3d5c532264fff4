"""A distilled generator as it is shipped: the network and what turns labels into conditions and tokens into images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.student import OneStepNetwork, Student
from dd2.teachers.conditions import Conditions
from dd2.teachers.head import HeadTeacher
from dd2.tokenizers.base import Tokenizer, nearest_ids


@dataclass(frozen=True)
class Generator:
    """A one-step network with its tokenizer and its labels.

    Attributes:
        student: the network.
        tokenizer: tokens to images.
        conditions: what labels stand for.
    """

    student: OneStepNetwork
    tokenizer: Tokenizer
    conditions: Conditions

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.student.backbone.device

    def to(self, device: torch.device) -> "Generator":
        """The same on a device."""
        return Generator(self.student.to(device), self.tokenizer.to(device), self.conditions)

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
        return self.student.as_teacher(self.tokenizer, self.conditions)

    def snap(self, tokens: Tensor) -> Tensor:
        """The tokenizer's nearest codes, as standardised tokens (..., C)."""
        to_tokens, codes = self.student.backbone.to_tokens, self.tokenizer.codebook
        return to_tokens(codes[nearest_ids(tokens, to_tokens(codes))])

    def decode(self, tokens: Tensor) -> Tensor:
        """Standardised tokens (B, n, C) to images (B, channels, H, W) in about [-1, 1]."""
        return self.tokenizer.decode_codes(self.student.backbone.to_codes(tokens))
