"""dd2 train-teacher: train an AR teacher on the tokens of one's own images; its kind is decided by the tokenizer."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dd2.checkpoints.native import load_tokenizer, save_teacher
from dd2.commands.run_folder import start_run
from dd2.data.source import ImageData, open_data
from dd2.data.tokenise import tokenise
from dd2.device import pick_device
from dd2.errors import InputError, TrainingFailed
from dd2.evaluation.likelihood import teacher_nll
from dd2.losses import Losses
from dd2.processes import say
from dd2.seeding import stream
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels, ClassLabels
from dd2.teachers.families import TeacherSizes
from dd2.teachers.filtering import Sampling
from dd2.teachers.train import teacher_loss
from dd2.text.captions import Captions, captions_of
from dd2.text.encoder import spec_of
from dd2.text.prompts import Prompts
from dd2.training.checkpoint import best_step, load_network
from dd2.training.health import STATE, loss_rises
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.preview import previewed
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update

HELD_OUT = 4096
"""Images that likelihood or loss is measured on at the end, held out and of the training set: a teacher whose two numbers are far
apart has memorised."""


JUDGED = 1024
"""Held-out images, at most, that a checkpoint is judged by (keep best)."""

MEMORISES = 1.15
"""Held-out images that are so much worse for a teacher than those of its training have been memorised."""

MEMORISED = (
    "held-out images are much worse than those of its training, and what is distilled from such a teacher looks broken; fewer "
    "iterations, a smaller model, more images or more augmentation"
)


@dataclass(frozen=True)
class TrainTeacherConfig(TeacherSizes):
    """Train an AR teacher. Writes OUT/teacher/ (with its tokenizer), metrics.jsonl, checkpoints/ and samples/."""

    tokenizer: Path = Path("runs/tokenizer/tokenizer")
    """Folder of a trained tokenizer."""
    data: str = "digits"
    """"digits" or "scenes" (embedded), a folder or zip of CLASS/IMAGE files, or one of pictures with captions."""
    text_encoder: str = ""
    """Of data with captions: "wordllama", or a Flan-T5 by folder, owner/name or owner/name@revision."""
    caption_length: int = 0
    """Positions of a caption; 0: the encoder's usual number (Flan-T5: 120, wordllama: 32)."""
    out: Path = Path("runs/teacher")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the weights and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    token_images: int = 100_000
    """Augmented images turned into tokens before training."""
    iterations: int = 300_000
    """Optimiser steps."""
    batch: int = 256
    """Sequences per micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    keep: Literal["last", "best"] = "last"
    """The weights that become the teacher: the last ones, or those of the checkpoint (loop.save_every) that knew held-out images
    best, which few images need."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.05))
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if min(self.token_images, self.iterations, self.batch, self.accumulate) < 1:
            raise InputError("token_images, iterations, batch and accumulate must be at least 1")


def train_teacher(config: TrainTeacherConfig) -> Path:
    """Run the training, or what is left of it.

    Returns:
        The teacher's folder.
    """
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    channels, size, _ = tokenizer.image_shape
    data = open_data(config.data, size, channels)
    captions = _captions(config, data, device)
    sizes = config.resolved(tokenizer, data.num_classes, None if captions is None else captions.encoder)
    config = replace(config, teacher=sizes.teacher, var=sizes.var, mar=sizes.mar)
    hint = start_run(config.out, config, "train-teacher")
    torch.manual_seed(config.seed)
    teacher = config.build(tokenizer).to(device)
    if data.class_names and isinstance(teacher.conditions, ClassLabels):
        teacher.conditions.call(data.class_names)
    if captions is not None and isinstance(sized := teacher.conditions, CaptionLabels):
        teacher.conditions = CaptionLabels(sized.length, sized.channels, captions, captions.encoder)
    class_dropout = config.used(tokenizer).class_dropout
    teacher.tokenizer.requires_grad_(False)
    trained = [parameter for part in teacher.stored_parts.values() for parameter in part.parameters()]
    encoded, labels = tokenise(tokenizer, data, "train", config.token_images, config.seed, device)
    held_out, held_out_labels = tokenise(tokenizer, data, "test", HELD_OUT, config.seed, device)

    def loss(random: torch.Generator) -> Losses:
        rows = torch.randint(len(encoded), (config.batch,), generator=random, device=random.device)
        return teacher_loss(teacher, encoded[rows], teacher.conditions(labels[rows]), class_dropout, random)

    shown = previewed(teacher, lambda cond, seeds: teacher.sample(cond, Sampling(), seeds))

    @torch.no_grad()
    def preview() -> Tensor:
        teacher.eval()
        images = shown()
        teacher.train()
        return images

    def held_out_now() -> dict[str, float]:
        teacher.eval()
        known = measure(teacher, held_out[:JUDGED], held_out_labels[:JUDGED], config.batch)
        teacher.train()
        return {"validation": known}

    teacher.train()
    update = Update("teacher", trained, config.optim, loss, accumulate=config.accumulate)
    stage = Stage(
        "teacher",
        config.iterations,
        [update],
        teacher.stored_parts,
        preview=preview,
        validate=held_out_now if config.keep == "best" else None,
        signs=(loss_rises("teacher/loss"),),
    )
    Trainer(config.out, config.seed, config.loop, device, hint).run(stage)
    if config.keep == "best":
        _take_best(config.out / "checkpoints" / stage.name, teacher)
    teacher.eval()
    measured, known = (
        measure(teacher, some[:HELD_OUT], of[:HELD_OUT], config.batch)
        for some, of in ((held_out, held_out_labels), (encoded, labels))
    )
    unit = "nats_per_image" if isinstance(teacher, CodeTeacher) else "loss_per_token"
    log = MetricsLog(config.out / "metrics.jsonl")
    log.rewind("held_out", -1)
    memorised = {STATE: {"memorised": MEMORISED}} if measured > MEMORISES * known else {}
    log.append({"stage": "held_out", "step": config.iterations, unit: measured, f"training_{unit}": known, **memorised})
    what, each = unit.split("_per_")
    say(f"{measured:.2f} {what} per {each} of held-out images, {known:.2f} of those of its training")
    if memorised:
        say(f"warning: memorised: {MEMORISED}", sys.stderr)
    folder = config.out / "teacher"
    save_teacher(folder, teacher)
    return folder


def _captions(config: TrainTeacherConfig, data: ImageData, device: torch.device) -> Captions | None:
    """What the text encoder makes of the data's captions, where they have such.

    Raises:
        InputError: they have, and no encoder is named, or the other way round.
    """
    if not data.captions:
        if config.text_encoder or config.caption_length:
            raise InputError(
                f"text_encoder and caption_length have no effect: {config.data} has classes, no captions; leave them out"
            )
        return None
    if not config.text_encoder:
        raise InputError(f"{config.data} has captions: name the text encoder that reads them, such as --text-encoder wordllama")
    spec = spec_of(config.text_encoder, config.caption_length)
    return captions_of(Prompts(data.captions, config.data), spec, device=device)


def _take_best(checkpoints: Path, teacher: Teacher) -> None:
    """Load the checkpoint that knew held-out images best."""
    step = best_step(checkpoints)
    if step is None:
        raise TrainingFailed(
            f"no checkpoint of {checkpoints} knows held-out images by a finite number: the training has diverged"
        )
    for name, part in teacher.stored_parts.items():
        load_network(checkpoints / f"{step:08d}" / f"{name}.safetensors", part)
    say(f"held-out images were known best at step {step:,}, whose weights are kept")


@torch.no_grad()
def measure(teacher: Teacher, encoded: Tensor, labels: Tensor, batch: int) -> float:
    """How well a teacher knows images: nats an image of codes; of continuous tokens the mean training loss, at fixed noise.

    Args:
        teacher: in evaluation mode.
        encoded, labels: of N images, as `tokenise` gives them.
        batch: images at a time.
    """
    if isinstance(teacher, CodeTeacher):
        parts = zip(encoded.split(batch), labels.split(batch), strict=True)
        return float(torch.cat([teacher_nll(teacher, some, teacher.conditions(of), batch) for some, of in parts]).mean())
    sums = 0.0
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        random = stream("measure", start, device=teacher.device)
        sums += float(teacher_loss(teacher, encoded[part], teacher.conditions(labels[part]), 0.0, random)[0]) * len(labels[part])
    return sums / len(labels)
