"""The student: a teacher's backbone with a small velocity head (Sec. 3.3, App. C.5, E.1).

One class has both roles of DD2. As guidance network it reads clean tokens and predicts the velocity of a noised token
given the earlier ones; as generator it reads noise and gives all clean tokens in one pass.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.scores import ConditionalScore, HeadScore
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.conditions import Conditions
from dd2.teachers.head import HeadTeacher
from dd2.teachers.layers import xavier_linears
from dd2.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class HeadConfig:
    """Size of the velocity head; the defaults are MAR's 3 x 1024."""

    depth: int = 3
    """Residual blocks."""
    width: int = 1024
    """Channels of the blocks."""
    frequencies: int = 128
    """Sinusoid pairs that embed the noise level t."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for field in ("depth", "width", "frequencies"):
            if getattr(self, field) < 1:
                raise InputError(f"head.{field} must be at least 1, got {getattr(self, field)}")


class HeadBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by the condition (adaLN); starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(cond).chunk(3, -1)
        hidden = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.fc2(F.silu(self.fc1(hidden))))


class VelocityHead(nn.Module):
    """MAR's adaLN residual MLP: (noised token, t, feature) -> velocity, each token on its own.

    Args:
        code_dim: C, channels of a token.
        feature_dim: D, channels of the backbone's features.
        config: size.
    """

    frequencies: Tensor

    def __init__(self, code_dim: int, feature_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.input = nn.Linear(code_dim, width)
        self.condition = nn.Linear(feature_dim, width)
        self.time1 = nn.Linear(2 * config.frequencies, width)
        self.time2 = nn.Linear(width, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, code_dim)
        steps = torch.arange(config.frequencies, dtype=torch.float32) / config.frequencies
        self.register_buffer("frequencies", 1000 * torch.exp(-math.log(10000) * steps), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        xavier_linears(self)
        for layer in (self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
        gates = [block.modulation for block in self.blocks if isinstance(block, HeadBlock)]
        for layer in (*gates, self.modulation, self.output):
            nn.init.zeros_(layer.weight)

    def forward(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x_t (..., C), t (...) in (0, 1], features (..., D) -> velocity (..., C)."""
        angles = t.unsqueeze(-1) * self.frequencies
        time = self.time2(F.silu(self.time1(torch.cat([angles.cos(), angles.sin()], -1))))
        cond = F.silu(time + self.condition(features))
        x = self.input(x_t)
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(cond).chunk(2, -1)
        return self.output(torch.addcmul(shift, self.norm(x), 1 + scale))


@dataclass(frozen=True)
class Drawn:
    """What one pass of a one-step network gives.

    Attributes:
        tokens: (B, n, C) clean standardised tokens.
        logits: (B, n, V) over the codes, from networks that decide by a classifier.
        earlier: the same of the rounds before the last, from networks of several; none where no gradient is kept.
    """

    tokens: Tensor
    logits: Tensor | None = None
    earlier: tuple[Tensor, ...] = ()


class OneStepNetwork(nn.Module, ABC):
    """What draws all tokens in one forward pass: DD2's generator, or a baseline's.

    Attributes:
        backbone: the transformer, with its AR order and standardisation.
    """

    backbone: Backbone

    @abstractmethod
    def as_generator(self, noise: Tensor, cond: Tensor) -> Tensor:
        """One pass: noise (B, n, C), cond (B, ...) -> clean standardised tokens (B, n, C)."""

    def draw(self, noise: Tensor, cond: Tensor) -> Drawn:
        """The same pass, with what else it gives."""
        return Drawn(self.as_generator(noise, cond))

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """Modules that are called in float32, whatever the autocast around them."""
        return ()

    @property
    def rounds(self) -> int:
        """How often a pass goes over the tokens."""
        return 1

    def in_rounds(self, rounds: int) -> "OneStepNetwork":
        """The network, whose weights are shared, with a pass of so many rounds.

        Raises:
            InputError: it was not trained in rounds.
        """
        if rounds == self.rounds:
            return self
        raise InputError(
            f"rounds {rounds}: this generator was trained to draw in one round (networks.rounds 1), so there are no others"
        )

    @property
    def has_two_passes(self) -> bool:
        """Whether `two_passes` can be called."""
        return False

    def two_passes(self, noise: Tensor, cond: Tensor) -> Tensor:
        """A method's own way to spend a second pass (not Alg. 4, which is the teacher's): shapes as `as_generator`.

        Raises:
            InputError: the method has none, or was not trained for it.
        """
        raise InputError(f"a {type(self).__name__} draws in one pass; --steps k lets the teacher draw the last steps again")


class ArDiffusion(OneStepNetwork):
    """A network in both roles: in one pass it draws from noise, and given clean tokens it knows the conditional score of others,
    which makes it an AR-diffusion model.
    """

    @abstractmethod
    def given(self, tokens: Tensor, cond: Tensor, known: Tensor | None = None) -> ConditionalScore:
        """The conditional score of each position.

        Args:
            tokens: (B, n, C) clean tokens.
            cond: (B, ...) conditions.
            known: (B, n) which of them are given, where the teacher has no order; else those before the position are.
        """


class Student(ArDiffusion):
    """Backbone and head; generator or guidance network, the same class in both roles.

    Args:
        backbone: features of an AR order, usually copied from a teacher.
        config: size of the head.
    """

    def __init__(self, backbone: Backbone, config: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.head = VelocityHead(backbone.token_shape[1], backbone.width, config)

    @classmethod
    def from_teacher(cls, teacher: Teacher, config: HeadConfig) -> "Student":
        """A student whose backbone is the teacher's to begin with, and whose head is fresh (its velocity is 0)."""
        return cls(teacher.student_backbone(), config).requires_grad_(True)

    @classmethod
    def from_ar_diffusion(cls, teacher: HeadTeacher) -> "Student":
        """A student that starts as a copy of an AR-diffusion teacher, head and all: stage 1 has nothing left to do.

        Raises:
            InputError: the teacher's head is none of ours.
        """
        if not isinstance(teacher.head, VelocityHead):
            raise InputError(f"a student needs a VelocityHead, the teacher has a {type(teacher.head).__name__}")
        student = cls(teacher.student_backbone(), teacher.head.config)
        student.head.load_state_dict(teacher.head.state_dict())
        return student.requires_grad_(True)

    def as_teacher(self, tokenizer: Tokenizer, conditions: Conditions) -> HeadTeacher:
        """The AR model that stage 1 makes of this network."""
        return HeadTeacher(self.backbone, self.head, tokenizer, conditions)

    def features(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C) clean tokens, or noise in the generator's role, -> (B, n, D)."""
        return self.backbone(tokens, cond)

    def given(self, tokens: Tensor, cond: Tensor, known: Tensor | None = None) -> HeadScore:
        return HeadScore(self.head, self.features(tokens, cond))

    def as_generator(self, noise: Tensor, cond: Tensor) -> Tensor:
        """One pass (App. E.1): noise (B, n, C), cond (B, ...) -> clean tokens q = eps - v (B, n, C).

        The backbone reads the noise where it otherwise reads clean tokens; the head gets each position's own noise
        at t = 1.
        """
        return noise - self.given(noise, cond).velocity(noise, noise.new_ones(noise.shape[:-1]))
