"""dd2 dd1: the baseline that the paper compares with, Distilled Decoding 1, trained in full."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dd2.baselines.dd1.student import DD1Config, DD1Student
from dd2.baselines.dd1.train import DD1TrainConfig, dd1_stage
from dd2.checkpoints.native import save_generator
from dd2.checkpoints.record import RunRecord
from dd2.checkpoints.runs import open_teacher
from dd2.commands.run_folder import read_seconds, start_run, write_seconds
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples
from dd2.trajectory import OdeConfig, Pairs


@dataclass(frozen=True)
class DD1RunConfig:
    """Distil a teacher by Distilled Decoding 1 (arXiv 2412.17153), the baseline of the paper's tables.

    Solves the flow-matching ODE of many noises in AR order (pairs, kept on disk), then trains a student to give the data of a
    noise in one pass. Writes OUT/generator/, which dd2 sample and dd2 evaluate read as any other, teacher_samples/ (the pairs),
    metrics.jsonl, checkpoints/, samples/, config.yaml and versions.json. Run the same command again to resume.
    """

    teacher: str = "digits"
    """"digits" (embedded), a teacher folder, or module:function of yours: a teacher over codes."""
    captions: str = ""
    """Captions of a text-conditional teacher, which its labels count: a list of prompts (a file, or "scenes"), which the encoder
    that the teacher remembers reads, or their features from dd2 text-features."""
    text_encoder: str = ""
    """Where the text encoder of a text-conditional teacher lies on this machine, if not where the teacher says."""
    out: Path = Path("runs/dd1")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the pairs and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    pairs: int = 1_000_000
    """Pairs of noise and data."""
    sample_batch: int = 64
    """Pairs made at a time."""
    ode: OdeConfig = field(default_factory=OdeConfig)
    """From noise to data."""
    sampling: Sampling = field(default_factory=lambda: Sampling(cfg_scale=2.0, top_k=8000))
    """The teacher's distribution whose ODE is solved."""
    standardise_samples: int = 2048
    """Sequences of the teacher that give the mean and deviation of tokens; the noise and the ODE are on that scale."""
    heads: DD1Config = field(default_factory=DD1Config)
    """What each head decides, and the second pass."""
    train: DD1TrainConfig = field(default_factory=DD1TrainConfig)
    """Training of the student."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if min(self.pairs, self.sample_batch, self.standardise_samples) < 1:
            raise InputError("pairs, sample_batch and standardise_samples must be at least 1")


def distil_dd1(config: DD1RunConfig) -> dict[str, float]:
    """Make the pairs and train the student, or what is left of it.

    Returns:
        Seconds of "samples" (the pairs) and "dd1" over all sessions.
    """
    device = pick_device(config.device)
    teacher = require_codes(open_teacher(config.teacher, device, config.captions, text_encoder=config.text_encoder), "dd2 dd1")
    config = replace(config, sampling=teacher.usually(config.sampling, DD1RunConfig().sampling))
    teacher.conditions.digest()  # refuses missing captions, and the next lines what else cannot be used,
    teacher.check(config.sampling)  # before a run folder exists
    if not teacher.backbone.continuous:
        raise InputError(
            f"teacher {config.teacher} reads exact codes only; give it a continuous input layer with dd2 adapt first"
        )
    config.heads.check(teacher.order)
    record = RunRecord("dd1", config.teacher, config.captions, config.sampling)
    trainer = Trainer(config.out, config.seed, config.loop, device, start_run(config.out, config, "dd1", record))
    seconds, start = read_seconds(config.out), time.perf_counter()
    some = TeacherSamples.prepare(
        config.out / "standardise_samples",
        teacher,
        config.sampling,
        config.standardise_samples,
        config.seed,
        config.sample_batch,
    )
    teacher.standardise(some.kept)
    pairs = Pairs(
        config.out / "teacher_samples",
        teacher,
        config.sampling,
        config.ode,
        config.pairs,
        config.seed,
        batch=config.sample_batch,
        standardised_by=config.standardise_samples,
    )
    seconds |= {"samples": seconds.get("samples", 0.0) + time.perf_counter() - start, "dd1": 0.0}
    write_seconds(config.out, seconds)
    torch.manual_seed(config.seed)
    student = DD1Student.from_teacher(teacher, config.heads).to(device)
    stage, average = dd1_stage(student, teacher, pairs, config.train)
    seconds["dd1"] = trainer.run(stage)
    write_seconds(config.out, seconds)
    save_generator(config.out / "generator", Generator.of(average, teacher))
    return seconds
