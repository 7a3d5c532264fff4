"""The trained networks of stage 2, and what they start as."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dd2.code_student import CodeGuidance, CodeStudent, CodeStudentConfig
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.method.align import load_average
from dd2.method.config import CSDConfig, NetworksConfig
from dd2.method.csd import Guidance
from dd2.seeding import stream
from dd2.student import ArDiffusion, HeadConfig, OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.head import HeadTeacher
from dd2.teachers.masked import MaskedBackbone
from dd2.training.ema import ema_copy, ema_update
from dd2.training.schedule import ema_rate


@dataclass
class Networks:
    """The trained networks of stage 2."""

    generator: OneStepNetwork
    guidance: Guidance
    ema: OneStepNetwork
    further: dict[float, OneStepNetwork] = field(default_factory=dict)
    """Further averages by the limit of their rates."""

    @classmethod
    def from_tuned(cls, student: ArDiffusion) -> "Networks":
        """Generator and guidance both start from the stage-1 model."""
        return cls.starting_from(student, student)

    @classmethod
    def starting_from(cls, generator: OneStepNetwork, guidance: Guidance, further: Sequence[float] = ()) -> "Networks":
        """Copies of both, averages of the generator, and further ones by their limits."""
        averages = {limit: ema_copy(generator) for limit in further}
        trained = ema_copy(generator).requires_grad_(True), ema_copy(guidance).requires_grad_(True)
        return cls(*trained, ema_copy(generator), averages)

    def placed(self, place: Callable[[Any], Any]) -> "Networks":
        """Every network as `place` gives it."""
        averages = {limit: place(average) for limit, average in self.further.items()}
        return Networks(place(self.generator), place(self.guidance), place(self.ema), averages)

    def average(self, limit: float, seen: int) -> None:
        """Take the generator into all averages, of which `limit` is the first one's, after `seen` updates before."""
        for bound, average in {limit: self.ema, **self.further}.items():
            ema_update(average, self.generator, ema_rate(seen, bound))

    def restart_from_average(self) -> None:
        """Give the generator, and the further averages, the weights of the average."""
        for network in (self.generator, *self.further.values()):
            load_average(network, self.ema)

    def modules(self) -> dict[str, torch.nn.Module]:
        """By checkpoint file name."""
        averages = {average_name(limit): average for limit, average in self.further.items()}
        return {"generator": self.generator, "guidance": self.guidance, "generator_ema": self.ema, **averages}


def is_ar_diffusion(teacher: Teacher) -> bool:
    """Whether it draws continuous tokens by a head of its own, which `copied_student` copies: then there is no stage 1."""
    return isinstance(teacher, HeadTeacher) or isinstance(teacher.backbone, MaskedBackbone)


def copied_student(teacher: Teacher, kinds: NetworksConfig) -> ArDiffusion | None:
    """A network in both roles that starts as the AR-diffusion model that the teacher is; None of a teacher over codes, of which
    stage 1 makes one.

    Raises:
        InputError: its head cannot be copied.
    """
    if isinstance(teacher, HeadTeacher):
        return Student.from_ar_diffusion(teacher)
    return MaskedStudent.from_teacher(teacher, MaskedStudentConfig(kinds.level)) if is_ar_diffusion(teacher) else None


def fresh_student(teacher: Teacher, copied: ArDiffusion | None, head: HeadConfig) -> ArDiffusion:
    """The teacher's layers under a head that has learned nothing."""
    return copied.with_fresh_head() if isinstance(copied, MaskedStudent) else Student.from_teacher(teacher, head)


def sizes_over_codes(kinds: NetworksConfig, teacher: Teacher) -> CodeStudentConfig | None:
    """Of the generator, where it is over codes."""
    return CodeStudent.sizes(teacher, kinds.extra_layers, kinds.rounds) if kinds.generator == "codes" else None


def networks_over_codes(kinds: NetworksConfig, teacher: Teacher) -> tuple[CodeStudent | None, CodeGuidance | None]:
    """Generator and guidance network as far as they are over codes: copies of a teacher that is not sharded yet.

    Raises:
        InputError: the teacher has no codes where they are needed, or its layers cannot be read that way.
    """
    generator = guidance = None
    if kinds.generator == "codes":
        generator = CodeStudent.from_teacher(require_codes(teacher, "networks.generator codes"), kinds.extra_layers, kinds.rounds)
    if kinds.guidance == "codes":
        guidance = CodeGuidance.from_teacher(require_codes(teacher, "networks.guidance codes"))
    return generator, guidance


def starting_networks(
    config: CSDConfig,
    tuned: ArDiffusion | None,
    fresh: ArDiffusion | None,
    over_codes: tuple[CodeStudent | None, CodeGuidance | None] = (None, None),
    seed: int = 0,
) -> Networks:
    """Both networks as they start: over codes, or from stage 1, or without it, as `config.initialised` says (Table 4).

    Args:
        config: which start from stage 1, and the further averages.
        tuned: the stage-1 model.
        fresh: what stage 1 started from.
        over_codes: generator and guidance network, where they are of that kind.
        seed: of random weights, which are the same for both networks.
    """

    def started(role: str) -> ArDiffusion:
        student = tuned if config.initialised in ("both", role) else fresh
        assert student is not None
        return _random_weights(student, seed) if config.initialised == "random" else student

    generator, guidance = over_codes
    return Networks.starting_from(
        started("generator") if generator is None else generator,
        started("guidance") if guidance is None else guidance,
        config.further_emas,
    )


@torch.no_grad()
def _random_weights(student: ArDiffusion, seed: int) -> ArDiffusion:
    """The same network with nothing of the teacher's in its layers: N(0, 0.02²), as AR transformers usually start; gains at 1."""
    student = copy.deepcopy(student)
    for name, parameter in student.backbone.named_parameters():
        if parameter.dim() > 1:
            random = stream(seed, "random weights", name)  # on every process, and after every interruption, the same
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return student


def average_name(limit: float) -> str:
    """Checkpoint file of a further average."""
    return f"generator_ema_{limit:g}"
