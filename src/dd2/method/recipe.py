"""The recipe (Sec. 3.3, Alg. 3, App. E): which networks each stage trains, with which losses."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dd2.code_student import CodeGuidance, CodeStudent
from dd2.losses import Losses
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.method.align import load_average
from dd2.method.config import CSDConfig, NetworksConfig, RegressConfig, TuneConfig
from dd2.method.csd import Guidance, SharedBatches, generated, generator_loss, guidance_loss, match_loss
from dd2.method.match import sequence_match
from dd2.method.regress import regress_loss, regress_own_loss
from dd2.method.tune import tune_loss
from dd2.method.validation import TeacherDistance
from dd2.processes import world_size
from dd2.sampling import ar_diffusion, one_step
from dd2.seeding import stream
from dd2.student import ArDiffusion, HeadConfig, OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import HeadTeacher
from dd2.teachers.masked import MaskedBackbone
from dd2.training.ema import ema_copy, ema_lag, ema_update
from dd2.training.preview import previewed
from dd2.training.samples import LiveSamples, TeacherSamples
from dd2.training.schedule import ema_rate
from dd2.training.stage import Stage, Update
from dd2.training.timing import part
from dd2.trajectory import OdeConfig, Pairs


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


def networks_over_codes(kinds: NetworksConfig, teacher: Teacher) -> tuple[CodeStudent | None, CodeGuidance | None]:
    """Generator and guidance network as far as they are over codes: copies of a teacher that is not sharded yet.

    Raises:
        InputError: the teacher has no codes where they are needed, or its layers cannot be read that way.
    """
    generator = guidance = None
    if kinds.generator == "codes":
        generator = CodeStudent.from_teacher(require_codes(teacher, "networks.generator codes"), kinds.extra_layers)
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


def regress_stage(
    networks: Networks,
    teacher: Teacher,
    samples: TeacherSamples,
    pairs: Pairs | None,
    config: RegressConfig,
    sampling: Sampling,
) -> Stage:
    """The generator regresses the teacher's ODE, and its average with it.

    Args:
        networks: the generator and its average are trained.
        teacher: whose ODE it is.
        samples: whose labels the sequences without a pair get.
        pairs: of noise and data; None where no sequence of a batch has one.
        config: see there.
        sampling: the distribution whose ODE is solved.
    """
    without = config.own_count

    def loss(random: torch.Generator) -> Losses:
        with part("data"):
            known = None
            if pairs is not None:
                noise, data, labels = pairs.batch(config.batch - without, random)
                known = noise, data, teacher.conditions(labels)
        if known is not None and not without:
            return regress_loss(networks.generator, teacher, *known)
        cond = _conditions(teacher, samples, without, random)
        noise = torch.randn((without, *teacher.backbone.token_shape), generator=random, device=cond.device)
        codes = require_codes(teacher, "regress.own_share")
        return regress_own_loss(networks.generator, codes, known, noise, cond, sampling, config.ode)

    def average(step: int) -> None:
        ema_update(networks.ema, networks.generator, ema_rate(step, config.ema))

    update = Update("generator", list(networks.generator.parameters()), config.optim, loss, accumulate=config.accumulate)
    modules = {"generator": networks.generator, "generator_ema": networks.ema}
    return Stage("regress", config.iterations, [update], modules, after=average, preview=_preview(networks, teacher))


def match_stage(networks: Networks, teacher: Teacher, samples: TeacherSamples, config: CSDConfig, averaged: int) -> Stage:
    """After stage 2: the generator goes on by the distance between whole sequences alone. `averaged` as `csd_stage`."""
    match = sequence_match(teacher, samples, config.match, config.batch)
    optim = replace(config.generator, lr=config.generator.lr * config.match.then_lr, warmup=0)

    def loss(random: torch.Generator) -> Losses:
        match.begin(networks.generator)
        return match_loss(networks.generator, _conditions(teacher, samples, config.batch, random), random, match)

    def after(step: int) -> None:
        match.remember()
        networks.average(config.ema, averaged + step)

    distance = TeacherDistance(teacher, samples, config.validation, config.batch, middle=True)
    update = Update("generator", list(networks.generator.parameters()), optim, loss, accumulate=config.accumulate)
    return Stage(
        "match",
        config.match.then_iterations,
        [update],
        {**networks.modules(), "match": match},
        after=after,
        preview=_preview(networks, teacher),
        validate=(lambda: distance(networks.ema)) if config.validation else None,
    )


def _conditions(teacher: Teacher, samples: TeacherSamples, count: int, random: torch.Generator) -> Tensor:
    """Conditions (count, ...) of random sequences' labels."""
    with part("data"):
        # Labels, and captions, are on the CPU: what goes to a GPU from there waits for nothing.
        return teacher.conditions(samples.random_labels(count, random)).to(random.device, non_blocking=True)


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
    ode: OdeConfig | None = None,
) -> Stage:
    """Stage 2 (Alg. 1): K guidance updates, one generator update, the EMA.

    With `generator_frozen` only the guidance network learns: performance alignment (App. C.3). `averaged` is the number
    of generator updates that the EMA has seen before this stage. `ode` is what `config.regression_weight` regresses.
    """
    generator, guidance = networks.generator, networks.guidance
    matches = config.match.weight > 0 and not generator_frozen
    match = sequence_match(teacher, samples, config.match, config.batch) if matches else None
    regressed = ode if config.regression_weight else None

    shared = SharedBatches(config.accumulate // world_size() if config.share_generated else 0)

    def fresh(random: torch.Generator) -> tuple[Tensor, Tensor]:
        cond = _conditions(teacher, samples, config.batch, random)
        with torch.no_grad():
            return generated(generator, cond, random), cond

    def train_guidance(random: torch.Generator) -> Losses:
        q, cond = shared.next(lambda: fresh(random))
        return guidance_loss(guidance, q, teacher, cond, config, random)

    def train_generator(random: torch.Generator) -> Losses:
        if match is not None:
            match.begin(generator)
        cond = _conditions(teacher, samples, config.batch, random)
        return generator_loss(generator, guidance, teacher, cond, config, random, match=match, ode=regressed)

    def average(step: int) -> None:
        shared.clear()
        if match is not None:
            match.remember()
        networks.average(config.ema, averaged + step)

    distance = TeacherDistance(teacher, samples, config.validation, config.batch, middle=config.match.on)
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
        {**networks.modules(), **({} if match is None else {"match": match})},
        after=average,
        preview=_preview(networks, teacher),
        measures=lambda: {"generator/ema_lag": ema_lag(networks.ema, generator)},
        validate=(lambda: distance(networks.ema)) if validates else None,
        stream=STREAMS.get(name, name),
    )
