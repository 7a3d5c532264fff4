"""Proposition 1 made measurable: distil a teacher whose sequences can all be enumerated."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dd2.method.config import CSDConfig, NetworksConfig, RegressConfig, TuneConfig
from dd2.method.networks import networks_over_codes, starting_networks
from dd2.method.recipe import catching_up_stage, csd_stage, regress_stage, tune_stages
from dd2.sampling import one_step
from dd2.student import HeadConfig, OneStepNetwork, Student
from dd2.teachers.table import TableTeacher, total_variation
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples
from dd2.trajectory import Pairs


def distil_table(
    run: Path,
    joint: Tensor,
    head: HeadConfig,
    tune: TuneConfig,
    csd: CSDConfig,
    *,
    regress: RegressConfig | None = None,
    kinds: NetworksConfig | None = None,
    seed: int = 0,
    measured: Callable[[int, float], None] | None = None,
    measure_every: int = 1,
) -> float:
    """Both stages on a table teacher, through the same losses and loop as every other model.

    Args:
        run: run folder.
        joint: (V, …, V) the teacher's distribution over n tokens.
        head, tune, csd: sizes and hyper-parameters.
        regress: the generator's start from the teacher's ODE; None is the paper's start.
        kinds: of both networks; None is the paper's.
        seed: seed of everything.
        measured: told the generator's total variation before stage 2 and every `measure_every` iterations; None measures the
            end alone.

    Returns:
        Total variation distance between the one-step generator's snapped sequences and `joint`, from 200,000 samples
        (its own sampling error is about 0.4 sqrt(V^n / 200,000)).
    """
    torch.manual_seed(seed)
    teacher = TableTeacher(joint)
    ids = teacher.sequences(50_000, torch.Generator().manual_seed(seed))
    samples = TeacherSamples(teacher, ids, torch.zeros(len(ids), dtype=torch.long))
    loop = LoopConfig(log_every=50, save_every=10**9, preview_every=0)
    trainer = Trainer(run, seed, loop, torch.device("cpu"), "the same command")
    kinds = kinds or NetworksConfig()
    student = Student.from_teacher(teacher, head)
    if kinds.need_stage1:
        for stage in tune_stages(student, teacher, samples, tune):
            trainer.run(stage)
    networks = starting_networks(csd, student, None, networks_over_codes(kinds, teacher))
    if regress:
        pairs = None
        if regress.own_share < 1:
            pairs = Pairs(run / "pairs", teacher, csd.sampling, regress.ode, regress.pairs, seed, batch=4096)
        trainer.run(regress_stage(networks, teacher, samples, pairs, regress, csd.sampling))
        networks.restart_from_average()
        trainer.run(catching_up_stage(networks, teacher, samples, csd, regress))
    stage = csd_stage(networks, teacher, samples, csd)
    if measured:
        average, tell = stage.after, measured
        tell(0, distance_of(networks.ema, teacher))

        def after(step: int) -> None:
            average(step)
            if (step + 1) % measure_every == 0:
                tell(step + 1, distance_of(networks.ema, teacher))

        stage.after = after
    trainer.run(stage)
    return distance_of(networks.ema, teacher)


def distance_of(generator: OneStepNetwork, teacher: TableTeacher, count: int = 200_000) -> float:
    """Total variation of `count` one-step samples."""
    found = []
    for start in range(0, count, 20_000):
        cond = torch.zeros(20_000, dtype=torch.long)
        found.append(teacher.ids(one_step(generator, cond, range(start, start + 20_000))))
    return total_variation(torch.cat(found), teacher.joint)
