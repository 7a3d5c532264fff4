"""The recipe (Sec. 3.3, Alg. 3, App. E): which networks each stage trains, with which losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dd2.losses import Losses
from dd2.method.align import load_average
from dd2.method.config import CSDConfig, RegressConfig, TuneConfig
from dd2.method.csd import SharedBatches, generated, generator_loss, guidance_loss
from dd2.method.regress import regress_loss
from dd2.method.tune import tune_loss
from dd2.method.validation import TeacherDistance
from dd2.processes import world_size
from dd2.sampling import ar_diffusion, one_step
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.training.ema import ema_copy, ema_lag, ema_update
from dd2.training.preview import previewed
from dd2.training.samples import LiveSamples, TeacherSamples
from dd2.training.schedule import ema_rate
from dd2.training.stage import Stage, Update
from dd2.training.timing import part
from dd2.trajectory import Pairs


@dataclass
class Networks:
    """The trained networks of stage 2."""

    generator: Student
    guidance: Student
    ema: Student
    further: dict[float, Student] = field(default_factory=dict)
    """Further averages by the limit of their rates."""

    @classmethod
    def from_tuned(cls, student: Student) -> "Networks":
        """Generator and guidance both start from the stage-1 model."""
        return cls.starting_from(student, student, "both")

    @classmethod
    def starting_from(cls, tuned: Student, fresh: Student, initialised: str, further: Sequence[float] = ()) -> "Networks":
        """From the stage-1 model or fresh: "both", "guidance", "generator" or "neither" names those from stage 1 (Table 4)."""
        generator = tuned if initialised in ("both", "generator") else fresh
        guidance = tuned if initialised in ("both", "guidance") else fresh
        averages = {limit: ema_copy(generator) for limit in further}
        trained = [ema_copy(network).requires_grad_(True) for network in (generator, guidance)]
        return cls(trained[0], trained[1], ema_copy(generator), averages)

    def placed(self, place: Callable[[Student], Student]) -> "Networks":
        """Every network as `place` gives it."""
        averages = {limit: place(average) for limit, average in self.further.items()}
        return Networks(place(self.generator), place(self.guidance), place(self.ema), averages)

    def restart_from_average(self) -> None:
        """Give the generator, and the further averages, the weights of the average."""
        for network in (self.generator, *self.further.values()):
            load_average(network, self.ema)

    def modules(self) -> dict[str, torch.nn.Module]:
        """By checkpoint file name."""
        averages = {average_name(limit): average for limit, average in self.further.items()}
        return {"generator": self.generator, "guidance": self.guidance, "generator_ema": self.ema, **averages}


def average_name(limit: float) -> str:
    """Checkpoint file of a further average."""
    return f"generator_ema_{limit:g}"


def tune_stages(student: Student, teacher: Teacher, samples: TeacherSamples | LiveSamples, config: TuneConfig) -> list[Stage]:
    """Stage 1: the head alone for `head_iterations`, then everything (Alg. 2)."""

    def loss(random: torch.Generator, head_only: bool) -> Losses:
        with part("data"):
            tokens, labels = samples.batch(config.batch, random)
            cond = teacher.conditions(labels)
        return tune_loss(student, teacher, tokens, cond, config, random, head_only=head_only)

    preview = previewed(teacher, lambda cond, seeds: ar_diffusion(student, cond, seeds))
    stages = []
    for name, iterations in (("tune_head", config.head_iterations), ("tune", config.iterations)):
        head_only = name == "tune_head"
        trained = list((student.head if head_only else student).parameters())
        update = Update("student", trained, config.optim, lambda r, h=head_only: loss(r, h), accumulate=config.accumulate)
        if iterations:
            stages.append(Stage(name, iterations, [update], {"student": student}, preview=preview))
    return stages


def regress_stage(networks: Networks, teacher: CodeTeacher, pairs: Pairs, config: RegressConfig) -> Stage:
    """The generator regresses the teacher's ODE, and its average with it."""

    def loss(random: torch.Generator) -> Losses:
        with part("data"):
            noise, ids, labels = pairs.batch(config.batch, random)
            cond = teacher.conditions(labels)
        return regress_loss(networks.generator, teacher, noise, ids, cond)

    def average(step: int) -> None:
        ema_update(networks.ema, networks.generator, ema_rate(step, config.ema))

    update = Update("generator", list(networks.generator.parameters()), config.optim, loss, accumulate=config.accumulate)
    modules = {"generator": networks.generator, "generator_ema": networks.ema}
    return Stage("regress", config.iterations, [update], modules, after=average, preview=_preview(networks, teacher))


def catching_up_stage(
    networks: Networks, teacher: Teacher, samples: TeacherSamples, csd: CSDConfig, config: RegressConfig
) -> Stage:
    """After the regression: the guidance network alone learns the generator's score, at a constant rate."""
    alone = replace(csd, iterations=config.guidance_iterations, guidance=replace(csd.guidance, decay="constant"))
    return csd_stage(networks, teacher, samples, alone, name="guidance", generator_frozen=True)


def _preview(networks: Networks, teacher: Teacher) -> Callable[[], Tensor]:
    """Images of the average generator."""
    return previewed(teacher, lambda cond, seeds: one_step(networks.ema, cond, seeds))


STREAMS = {"csd": "distill", "csd_aligned": "distill_aligned"}
"""Random streams of stages that had another name once: under it, so that the same command still gives the same numbers."""


def csd_stage(
    networks: Networks,
    teacher: Teacher,
    samples: TeacherSamples,
    config: CSDConfig,
    *,
    name: str = "csd",
    generator_frozen: bool = False,
    averaged: int = 0,
) -> Stage:
    """Stage 2 (Alg. 1): K guidance updates, one generator update, the EMA.

    With `generator_frozen` only the guidance network learns: performance alignment (App. C.3). `averaged` is the number
    of generator updates that the EMA has seen before this stage.
    """
    generator, guidance = networks.generator, networks.guidance

    def drawn_conditions(random: torch.Generator) -> Tensor:
        with part("data"):
            # Labels, and captions, are on the CPU: what goes to a GPU from there waits for nothing.
            return teacher.conditions(samples.random_labels(config.batch, random)).to(random.device, non_blocking=True)

    shared = SharedBatches(config.accumulate // world_size() if config.share_generated else 0)

    def fresh(random: torch.Generator) -> tuple[Tensor, Tensor]:
        cond = drawn_conditions(random)
        with torch.no_grad():
            return generated(generator, cond, random), cond

    def train_guidance(random: torch.Generator) -> Losses:
        q, cond = shared.next(lambda: fresh(random))
        return guidance_loss(guidance, q, teacher, cond, config, random)

    def train_generator(random: torch.Generator) -> Losses:
        return generator_loss(generator, guidance, teacher, drawn_conditions(random), config, random)

    def average(step: int) -> None:
        shared.clear()
        for limit, average in {config.ema: networks.ema, **networks.further}.items():
            ema_update(average, generator, ema_rate(averaged + step, limit))

    distance = TeacherDistance(teacher, samples, config.validation, config.batch)
    validates = config.validation and not generator_frozen
    accumulate = config.accumulate
    repeats = 1 if generator_frozen else config.k
    updates = [Update("guidance", list(guidance.parameters()), config.guidance, train_guidance, repeats, accumulate)]
    if not generator_frozen:
        trained = list(generator.parameters())
        updates.append(Update("generator", trained, config.generator, train_generator, accumulate=accumulate))
    # Alignment has given a frozen generator the average's own weights, so averaging it changes no bit.
    return Stage(
        name,
        config.iterations,
        updates,
        networks.modules(),
        after=average,
        preview=_preview(networks, teacher),
        measures=lambda: {"generator/ema_lag": ema_lag(networks.ema, generator)},
        validate=(lambda: distance(networks.ema)) if validates else None,
        stream=STREAMS.get(name, name),
    )
