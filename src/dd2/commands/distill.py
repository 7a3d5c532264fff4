"""dd2 distill: from a teacher to a one-step generator (Alg. 3)."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from dd2.checkpoints.native import Role, load_generator, save_generator
from dd2.checkpoints.record import RunRecord
from dd2.checkpoints.runs import open_teacher
from dd2.commands.adapt import adapt
from dd2.commands.distill_config import DistillConfig, check, with_usual_sampling
from dd2.commands.run_folder import copy_parts, read_seconds, start_run, write_seconds
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.external import is_code
from dd2.generator import Generator
from dd2.masked_student import MaskedStudent
from dd2.method.networks import Networks, copied_student, fresh_student, networks_over_codes, sizes_over_codes, starting_networks
from dd2.method.recipe import catching_up_stage, csd_stage, match_stage, regress_stage, tune_stages
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.training.checkpoint import steps
from dd2.training.layers import prepare_layers
from dd2.training.loop import Trainer
from dd2.training.parallel import shard, shard_backbone, whole_state
from dd2.training.samples import LiveSamples, TeacherSamples, samples_identity
from dd2.trajectory import Pairs

N = TypeVar("N", bound=torch.nn.Module)


def distill(config: DistillConfig, resume: str = "") -> dict[str, float]:
    """Run the distillation, or what is left of it.

    Args:
        config: everything.
        resume: the command that resumes it, if it is not dd2 distill.

    Returns:
        Seconds of "samples", "tune" and "csd" (and "adapt", "pairs", "regress") over all sessions.
    """
    device = pick_device(config.device)
    teacher = open_teacher(config.teacher, device, config.captions, config.trust, config.text_encoder)
    config = with_usual_sampling(config, teacher)
    check(config, teacher)  # before a run folder exists
    tuned = copied_student(teacher, config.networks)
    head = tuned.config if isinstance(tuned, Student) else config.head
    masked = tuned.config if isinstance(tuned, MaskedStudent) else None
    if not config.networks.need_stage1:
        tuned = None
    codes = sizes_over_codes(config.networks, teacher)
    record = RunRecord("distill", config.teacher, config.captions, config.csd.sampling, head, codes, masked)
    hint = start_run(config.out, config, "distill", record)
    trainer = Trainer(config.out, config.seed, config.loop, device, resume or hint)
    seconds = read_seconds(config.out)
    if not teacher.backbone.continuous:
        teacher, spent = adapt(require_codes(teacher, "stage 0"), config.adapt, trainer, config.text_encoder)
        seconds["adapt"] = spent
    samples, spent = _samples(config, teacher, seconds.get("samples", 0.0))
    seconds |= {**spent, "csd": 0.0}
    write_seconds(config.out, seconds)
    teacher.standardise(samples.kept)
    pairs = _pairs(config, teacher, len(samples), seconds) if config.regress.iterations and config.regress.own_share < 1 else None
    torch.manual_seed(config.seed)
    fresh = fresh_student(teacher, tuned, head).to(device) if config.networks.need_stage1 else None
    over_codes = networks_over_codes(config.networks, teacher)
    prepare_layers(teacher, recompute=False, compiled=config.loop.compile)
    if config.loop.parallel == "fsdp2":
        shard_backbone(teacher.backbone, device)  # after the samples, of which every process makes its own number
    if isinstance(fresh, Student) and tuned is None:
        tuned, spent = _stage1(config, trainer, fresh, teacher, samples)
        seconds["tune"] += spent
    whole = starting_networks(config.csd, tuned, fresh, over_codes, config.seed)
    shipped = copy.deepcopy(whole.ema).cpu()
    networks = whole.placed(lambda network: _placed(network, config, device))
    del tuned, fresh, over_codes, whole  # whole networks, which need not lie beside their shards
    if config.regress.iterations:
        seconds["regress"] = _regress(config, trainer, networks, teacher, samples, pairs)
    seconds["csd"] += trainer.run(csd_stage(networks, teacher, samples, config.csd, ode=config.regress.ode))
    if config.align.iterations:
        seconds["csd"] += _align(config, trainer, networks, teacher, samples)
    if config.csd.match.then_iterations:
        seen = config.csd.iterations + (config.align.then_iterations if config.align.iterations else 0)
        seconds["csd"] += trainer.run(match_stage(networks, teacher, samples, config.csd, seen))
    write_seconds(config.out, seconds)
    shipped.load_state_dict(whole_state(networks.ema))
    _save(config.out / "generator", shipped, teacher, "generator")
    return seconds


def _samples(config: DistillConfig, teacher: Teacher, before: float) -> tuple[TeacherSamples, dict[str, float]]:
    """The teacher's sequences, drawn here or copied from another run, and the seconds of "samples" and "tune" so far."""
    if config.stage1:
        return _copied(Path(config.stage1), config.out, teacher)
    start = time.perf_counter()
    folder, sampling, count = config.out / "teacher_samples", config.tune.sampling, config.teacher_samples
    samples = TeacherSamples.prepare(folder, teacher, sampling, count, config.seed, config.sample_batch)
    return samples, {"samples": before + time.perf_counter() - start, "tune": 0.0}


def _stage1(
    config: DistillConfig, trainer: Trainer, fresh: Student, teacher: Teacher, samples: TeacherSamples
) -> tuple[Student, float]:
    """The stage-1 model, trained here or another run's, and the seconds that it took here."""
    if config.stage1:
        return _stage1_model(config, fresh, trainer.device), 0.0
    seconds = 0.0
    placed = _placed(copy.deepcopy(fresh), config, trainer.device)
    drawn = LiveSamples(teacher, config.tune.sampling) if config.sample_in_loop else samples
    for stage in tune_stages(placed, teacher, drawn, config.tune):
        seconds += trainer.run(stage)
    student = copy.deepcopy(fresh)
    student.load_state_dict(whole_state(placed))
    _save(config.out / "ar_diffusion", student, teacher, "ar_diffusion")
    return student, seconds


def _save(folder: Path, student: OneStepNetwork, teacher: Teacher, role: Role) -> None:
    save_generator(folder, Generator.of(student, teacher), role=role)


def _placed(network: N, config: DistillConfig, device: torch.device) -> N:
    """A network as training wants it: whole on every process, or sharded."""
    return shard(network, device) if config.loop.parallel == "fsdp2" else network


def _copied(stage1: Path, out: Path, teacher: Teacher) -> tuple[TeacherSamples, dict[str, float]]:
    """The samples and the stage-1 model of another run, copied so that this run is whole by itself, and their seconds."""
    if not (stage1 / "ar_diffusion").is_dir():
        raise InputError(f"stage1 {stage1} has no ar_diffusion/ folder; give a run of dd2 distill whose stage 1 has ended")
    if samples_identity(stage1 / "teacher_samples").get("teacher") != teacher.fingerprint():
        raise InputError(f"stage1 {stage1} was made from another teacher; give a run of the same one")
    copy_parts(stage1, out, "teacher_samples", "ar_diffusion")
    spent = read_seconds(stage1)
    return TeacherSamples.load(out / "teacher_samples", teacher), {name: spent.get(name, 0.0) for name in ("samples", "tune")}


def _stage1_model(config: DistillConfig, like: Student, device: torch.device) -> Student:
    stage1 = Path(config.stage1)
    trust = (config.teacher, *config.trust) if is_code(config.teacher) else config.trust
    student = load_generator(stage1 / "ar_diffusion", trust).student.to(device)
    if not isinstance(student, Student) or student.config != like.config:
        found = getattr(student, "config", None)
        raise InputError(f"stage1 {stage1} has the head {found}, the configuration {like.config}; give the same head.*")
    return student.requires_grad_(True)


def _pairs(config: DistillConfig, teacher: Teacher, standardised_by: int, seconds: dict[str, float]) -> Pairs:
    """The ODE's pairs of noise and data."""
    start = time.perf_counter()
    pairs = Pairs(
        config.out / "pairs",
        teacher,
        config.csd.sampling,
        config.regress.ode,
        config.regress.pairs,
        config.seed,
        batch=config.sample_batch,
        standardised_by=standardised_by,
    )
    seconds["pairs"] = seconds.get("pairs", 0.0) + time.perf_counter() - start
    write_seconds(config.out, seconds)
    return pairs


def _regress(
    config: DistillConfig, trainer: Trainer, networks: Networks, teacher: Teacher, samples: TeacherSamples, pairs: Pairs | None
) -> float:
    """The generator learns the ODE's map, then the guidance network that generator's score."""
    seconds = trainer.run(regress_stage(networks, teacher, samples, pairs, config.regress, config.csd.sampling))
    networks.restart_from_average()
    if config.regress.guidance_iterations:
        seconds += trainer.run(catching_up_stage(networks, teacher, samples, config.csd, config.regress))
    return seconds


def _align(config: DistillConfig, trainer: Trainer, networks: Networks, teacher: Teacher, samples: TeacherSamples) -> float:
    """Alignment, then stage 2 with another K (App. C.3)."""
    if not steps(trainer.folder / "checkpoints" / "align"):
        networks.restart_from_average()
    alone = replace(config.csd, iterations=config.align.iterations)
    seconds = trainer.run(csd_stage(networks, teacher, samples, alone, name="align", generator_frozen=True))
    further, seen = config.align.second_half(config.csd), config.csd.iterations
    stage = csd_stage(networks, teacher, samples, further, name="csd_aligned", averaged=seen, ode=config.regress.ode)
    return seconds + trainer.run(stage)
