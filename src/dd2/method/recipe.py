"""The recipe (Sec. 3.3, Alg. 3, App. E): which networks each stage trains, with which losses."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dd2.losses import Losses
from dd2.method import signs
from dd2.method.config import CSDConfig, RegressConfig, TuneConfig
from dd2.method.csd import SharedBatches, generated, generator_loss, guidance_loss, match_loss
from dd2.method.match import sequence_match
from dd2.method.networks import Networks
from dd2.method.regress import regress_loss, regress_own_loss
from dd2.method.tune import tune_loss
from dd2.method.validation import TeacherDistance
from dd2.processes import world_size
from dd2.sampling import ar_diffusion, one_step
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from dd2.training.ema import ema_lag, ema_update
from dd2.training.preview import previewed
from dd2.training.samples import LiveSamples, TeacherSamples
from dd2.training.schedule import ema_rate
from dd2.training.stage import Stage, Update
from dd2.training.timing import part
from dd2.trajectory import OdeConfig, Pairs


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
            stages.append(Stage(name, iterations, [update], {"student": student}, preview=preview, signs=signs.TUNE))
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
    preview = _preview(networks, teacher)
    return Stage("regress", config.iterations, [update], modules, after=average, preview=preview, signs=signs.REGRESS)


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
        signs=signs.VALIDATION,
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
        signs=() if generator_frozen else signs.CSD,
    )
