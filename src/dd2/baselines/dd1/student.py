"""DD1's student: the teacher's layers, reading noise and data at their own positions, with two heads."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dd2.checkpoints.native import NETWORKS, NetworkKind
from dd2.code_student import OwnTokenStudent
from dd2.errors import InputError
from dd2.order import Order
from dd2.precision import in_float32
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.code import CodeTeacher, require_codes


@dataclass(frozen=True)
class DD1Config:
    """Which head decides which AR steps, and where a second pass starts."""

    logits_steps: int = 5
    """AR steps from the start whose codes are the classifier's most probable ones; the others come from the continuous head.
    DD1: 5 scales of VAR-d16, 4 of d20 and d24; 80 tokens of LlamaGen-B, 130 of L."""
    second_step: int = 0
    """AR step from which a second pass draws again, having read the first pass's tokens before it; 0: one pass only.
    DD1: 5 (VAR-d16), 4 (d20, d24), 80 (LlamaGen)."""

    def __post_init__(self) -> None:
        """Refuse negative steps."""
        if self.logits_steps < 0 or self.second_step < 0:
            raise InputError(f"logits_steps and second_step must not be negative, got {self.logits_steps}, {self.second_step}")

    def check(self, order: Order) -> None:
        """Refuse steps beyond an AR order's.

        Raises:
            InputError: there are fewer steps.
        """
        if self.logits_steps > order.num_steps or self.second_step >= order.num_steps:
            raise InputError(
                f"heads.logits_steps {self.logits_steps} and second_step {self.second_step} must lie within the teacher's "
                f"{order.num_steps} AR steps"
            )


class DD1Student(OwnTokenStudent):
    """The teacher's layers under another mask: position i reads its own token, data or noise, behind those of earlier steps.

    A flag tells data from noise: an embedding, added to the input and, through a linear map each, before every layer and the
    heads. The maps start at 0, so that the student starts as the teacher's layers.

    Args:
        backbone: a copy of the teacher's.
        output: a copy of its classifier, the first head.
        codebook: (V, C) codes in the tokenizer's space.
        config: the split between the heads.

    Raises:
        InputError: a step of the configuration is beyond the AR order, or the backbone cannot read a position's own token.
    """

    called = "DD1's student"

    def __init__(self, backbone: Backbone, output: nn.Module, codebook: Tensor, config: DD1Config) -> None:
        super().__init__(backbone, output, codebook)
        self.config = config
        config.check(backbone.order)
        width, channels = backbone.width, codebook.shape[1]
        self.flag = nn.Embedding(2, width)
        self.flag_maps = nn.ModuleList(nn.Linear(width, width) for _ in range(len(self.own.stack) + 1))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.continuous = nn.Linear(width, channels)
        nn.init.normal_(self.flag.weight, std=0.02)
        nn.init.normal_(self.continuous.weight, std=0.02)
        for layer in (*self.flag_maps, self.continuous):
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for layer in self.flag_maps:
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_teacher(cls, teacher: CodeTeacher, config: DD1Config) -> "DD1Student":
        """A student that starts with copies of the teacher's layers and classifier."""
        student = cls(teacher.student_backbone(), copy.deepcopy(teacher.output), teacher.tokenizer.codebook, config)
        return student.requires_grad_(True)

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """Both heads."""
        return self.output, self.continuous

    def forward(self, tokens: Tensor, data: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads at every position.

        Args:
            tokens: (B, n, C) standardised tokens where `data`, noise elsewhere.
            data: (B, n) booleans.
            cond: (B, ...) conditions.

        Returns:
            Logits (B, n, V) and continuous tokens (B, n, C), each for the token at its own position.
        """
        flags = self.flag(data.long())

        def before(index: int, x: Tensor) -> Tensor:
            given = x.shape[1] - flags.shape[1]  # the condition's positions: data
            own = torch.cat([self.flag.weight[1].expand(x.shape[0], given, -1), flags], 1)
            return x + (own if index == 0 else 0) + self.flag_maps[index](own)

        features = self.own.own_features(tokens, cond, before) + self.flag_maps[-1](flags)
        return in_float32(self.output, features), in_float32(lambda x: self.continuous(self.norm(x)), features)

    def as_generator(self, noise: Tensor, cond: Tensor) -> Tensor:
        return self._drawn(noise, torch.zeros(noise.shape[:2], dtype=torch.bool, device=noise.device), cond)

    @property
    def has_two_passes(self) -> bool:
        return self.config.second_step > 0

    def two_passes(self, noise: Tensor, cond: Tensor) -> Tensor:
        """The second pass reads the first one's tokens before `second_step` and the same noise behind them, and draws the rest
        again. Shapes and errors as `OneStepNetwork.two_passes`.
        """
        if not self.config.second_step:
            raise InputError("this DD1 student was trained for one pass; train it with --heads.second-step")
        first = self.as_generator(noise, cond)
        start = self.backbone.order.steps[self.config.second_step].start
        data = self.before(start, noise.shape[0])
        second = self._drawn(torch.where(data.unsqueeze(-1), first, noise), data, cond)
        return torch.where(data.unsqueeze(-1), first, second)

    def before(self, position: int | Tensor, batch: int) -> Tensor:
        """(batch, n) booleans: the positions before one, or before one of each row (batch,)."""
        index = torch.arange(self.backbone.order.n, device=self.codes.device)
        return index < torch.as_tensor(position, device=index.device).expand(batch).unsqueeze(1)

    def by_logits(self) -> Tensor:
        """(n,) booleans: the positions whose tokens the classifier decides."""
        return self.backbone.order.step_of < self.config.logits_steps

    def _drawn(self, tokens: Tensor, data: Tensor, cond: Tensor) -> Tensor:
        logits, continuous = self(tokens, data, cond)
        return torch.where(self.by_logits().unsqueeze(-1), self.codebook[logits.argmax(-1)], continuous)


def _build(teacher: Teacher, config: DD1Config) -> DD1Student:
    codes = require_codes(teacher, "a DD1 student")
    return DD1Student(codes.student_backbone(), codes.output, codes.tokenizer.codebook, config)


NETWORKS["dd1"] = NetworkKind(DD1Config, _build, DD1Student)
