"""Generator and guidance network over codes: the teacher's layers under the teacher's own classifier.

Beyond the paper, whose networks end in a velocity head. Both start as copies of the teacher and need no stage 1. The generator
decides a code at every position; its gradient passes straight through the choice. The guidance network learns the next-token
probabilities of the generator's own sequences, and Eq. 1 makes its conditional score of them, as it does the teacher's.
"""

import copy
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.precision import in_float32
from dd2.scores import CodeMixture
from dd2.student import Drawn, OneStepNetwork
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.own_token import IsTold, ReadsOwnToken


@dataclass(frozen=True)
class CodeStudentConfig:
    """What a teacher's sizes do not say of a `CodeStudent`."""

    layers: int = 0
    """Transformer layers of a round; 0 means as many as the teacher has."""
    rounds: int = 1
    """How often a pass goes over the tokens: later rounds read what the one before has decided."""

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        if self.layers < 0 or self.rounds < 1:
            raise InputError(
                f"layers must not be negative and rounds at least 1, got layers {self.layers} and rounds {self.rounds}"
            )


class OwnTokenStudent(OneStepNetwork):
    """A teacher's layers under another mask, position i reading its own token behind those of earlier steps, and its classifier.

    Args:
        backbone: a copy of the teacher's.
        output: a copy of its classifier.
        codebook: (V, C) codes in the tokenizer's space.

    Raises:
        InputError: the backbone cannot read a position's own token.
    """

    codes: Tensor
    called: str
    """What an error calls it."""

    def __init__(self, backbone: Backbone, output: nn.Module, codebook: Tensor) -> None:
        super().__init__()
        if not isinstance(backbone, ReadsOwnToken):
            raise InputError(
                f"{self.called} reads every position's own token, which a {type(backbone).__name__} cannot: no own_features "
                "(dd2.teachers.own_token says what is expected)"
            )
        self.backbone, self.output = backbone, output
        self.register_buffer("codes", codebook.detach().clone(), persistent=False)

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The classifier."""
        return (self.output,)

    @property
    def codebook(self) -> Tensor:
        """(V, C) standardised codes."""
        return self.backbone.to_tokens(self.codes)

    @property
    def own(self) -> ReadsOwnToken:
        """The backbone in its second reading."""
        assert isinstance(self.backbone, ReadsOwnToken)
        return self.backbone


class Round(nn.Module):
    """One more round over the tokens: the teacher reads what the round before has decided, and each position its own noise.

    It starts as the teacher. Given the right earlier codes it has only the map of one token's noise to learn.

    Args:
        backbone: a copy of the teacher's.
        output: a copy of its classifier.

    Raises:
        InputError: the backbone cannot be told anything.
    """

    def __init__(self, backbone: Backbone, output: nn.Module) -> None:
        super().__init__()
        if not isinstance(backbone, IsTold):
            raise InputError(
                f"further rounds (networks.rounds) tell every position its noise, which a {type(backbone).__name__} cannot be: "
                "no told_features (dd2.teachers.own_token says what is expected)"
            )
        self.backbone, self.output = backbone, output
        channels, width = backbone.token_shape[1], backbone.width
        last = nn.Linear(width, width)
        self.told = nn.Sequential(nn.Linear(channels, width), nn.GELU(), last).to(backbone.device)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, noise: Tensor, cond: Tensor) -> Tensor:
        """Logits (B, n, V), given the tokens (B, n, C) of the round before, the noise (B, n, C) and cond (B, ...)."""
        return in_float32(self.output, self.features(tokens, noise, cond))

    def features(self, tokens: Tensor, noise: Tensor, cond: Tensor) -> Tensor:
        """What `forward` classifies, (B, n, D)."""
        assert isinstance(self.backbone, IsTold)
        return self.backbone.told_features(tokens, cond, self.told(noise).float())


class CodeStudent(OwnTokenStudent):
    """A generator whose tokens are codes: position i reads its own noise behind that of earlier steps, and a classifier decides.

    With more than one round, all of the same pass, the codes are then read and decided again: Jacobi's iteration of the teacher's
    ODE (`dd2.trajectory.data_given`), unrolled and trained. Later rounds share their weights. No gradient flows from a round into
    the one before, which has a loss of its own (`dd2.method.regress`).

    Args:
        backbone, output, codebook: as `OwnTokenStudent`.
        config: the backbone gets layers until it has as many as it says, and copies of both make the later rounds.
        again: the later rounds, where there are some already.

    Raises:
        InputError: the backbone cannot read a position's own token, or cannot be made deeper.
    """

    called = "a generator over codes (networks.generator codes)"

    def __init__(
        self, backbone: Backbone, output: nn.Module, codebook: Tensor, config: CodeStudentConfig, again: Round | None = None
    ) -> None:
        super().__init__(backbone, output, codebook)
        self.config = config
        if config.layers > len(self.own.stack):
            backbone.deepen(config.layers - len(self.own.stack))
        if config.rounds == 1:
            self.again = None
        else:
            self.again = again or Round(copy.deepcopy(backbone), copy.deepcopy(output))

    @property
    def rounds(self) -> int:
        return self.config.rounds

    def in_rounds(self, rounds: int) -> OneStepNetwork:
        """As `OneStepNetwork.in_rounds`: any number, as later rounds share their weights; fewer are faster."""
        if rounds == self.rounds or self.again is None:
            return super().in_rounds(rounds)
        config = replace(self.config, rounds=rounds)
        return CodeStudent(self.backbone, self.output, self.codes, config, self.again).train(self.training)

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The classifiers."""
        return (self.output,) if self.again is None else (self.output, self.again.output)

    @classmethod
    def from_teacher(cls, teacher: CodeTeacher, extra_layers: int = 0, rounds: int = 1) -> "CodeStudent":
        """A student that starts as the teacher's layers and classifier (`classifier_of`), with `extra_layers` in every round that
        change nothing yet.

        Raises:
            InputError: as the class.
        """
        sizes = cls.sizes(teacher, extra_layers, rounds)
        student = cls(teacher.student_backbone(), classifier_of(teacher), teacher.tokenizer.codebook, sizes)
        return student.requires_grad_(True)

    @staticmethod
    def sizes(teacher: Teacher, extra_layers: int, rounds: int = 1) -> CodeStudentConfig:
        """Of a student with that many layers more than the teacher, and that many rounds."""
        if not extra_layers or not isinstance(teacher.backbone, ReadsOwnToken):
            return CodeStudentConfig(rounds=rounds)
        return CodeStudentConfig(len(teacher.backbone.stack) + extra_layers, rounds)

    def draw(self, noise: Tensor, cond: Tensor) -> Drawn:
        """The most probable code of each position; its gradient is that of the expected code (straight through)."""
        logits = in_float32(self.output, self.own.own_features(noise, cond, lambda index, x: x))
        codes, earlier = self.codebook, []
        if self.again is not None:
            for _ in range(self.config.rounds - 1):
                if logits.requires_grad:  # for their losses; where there are none, the largest tensors of a pass are let go
                    earlier.append(logits)
                logits = self.again(codes[logits.argmax(-1)], noise, cond)
        chosen = codes[logits.argmax(-1)]
        if logits.requires_grad:
            with full_precision(logits.device):
                expected = logits.softmax(-1) @ codes
            chosen = chosen + (expected - expected.detach())
        return Drawn(chosen, logits, tuple(earlier))

    def as_generator(self, noise: Tensor, cond: Tensor) -> Tensor:
        return self.draw(noise, cond).tokens


class CodeGuidance(nn.Module):
    """The guidance network over codes: next-token probabilities of the generator's sequences.

    Args:
        backbone: a copy of the teacher's.
        output: a copy of its classifier.
        codebook: (V, C) codes in the tokenizer's space.
    """

    codes: Tensor

    def __init__(self, backbone: Backbone, output: nn.Module, codebook: Tensor) -> None:
        super().__init__()
        self.backbone, self.output = backbone, output
        self.register_buffer("codes", codebook.detach().clone(), persistent=False)

    @classmethod
    def from_teacher(cls, teacher: CodeTeacher) -> "CodeGuidance":
        """One that starts as the teacher (without guidance by the null condition), where `classifier_of` can copy it: its score
        difference is 0.
        """
        network = cls(teacher.student_backbone(), classifier_of(teacher), teacher.tokenizer.codebook)
        return network.requires_grad_(True)

    def logits(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, V) of p(. | tokens of earlier steps, cond), tokens (B, n, C)."""
        return in_float32(self.output, self.backbone(tokens, cond))

    def given(self, tokens: Tensor, cond: Tensor, known: Tensor | None = None) -> CodeMixture:
        """The conditional score at every position, given tokens (B, n, C) before it and cond (B, ...); codes have an order."""
        log_p = self.logits(tokens, cond).log_softmax(-1)
        return CodeMixture(CodeDistribution.over_all(log_p), self.backbone.to_tokens(self.codes))

    def nll(self, tokens: Tensor, ids: Tensor, cond: Tensor) -> Tensor:
        """Mean negative log-likelihood, in nats a token, of sequences ids (B, n), whose tokens (B, n, C) are read."""
        return F.cross_entropy(self.logits(tokens, cond).flatten(0, 1), ids.flatten())


def classifier_of(teacher: CodeTeacher) -> nn.Module:
    """A classifier on the features of the teacher's backbone: a copy of its own, or a fresh one where the teacher computes its
    features or logits otherwise than by backbone and output.
    """
    if has_own_classifier(teacher):
        return copy.deepcopy(teacher.output)
    return nn.Linear(teacher.backbone.width, teacher.num_codes).to(teacher.device)


def has_own_classifier(teacher: CodeTeacher) -> bool:
    """Whether a teacher's logits are those of its `output` on its backbone's features."""
    return type(teacher).features is CodeTeacher.features and type(teacher).classify is CodeTeacher.classify
