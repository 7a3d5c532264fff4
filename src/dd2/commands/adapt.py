"""dd2 adapt: stage 0, a continuous input layer for a LlamaGen teacher (App. E.4)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dd2.checkpoints.native import save_teacher
from dd2.checkpoints.runs import open_teacher
from dd2.commands.run_folder import start_run
from dd2.data.source import open_data
from dd2.data.tokenise import tokenise
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.losses import Losses
from dd2.method.adapt import adapt_loss, compare, fit_loss
from dd2.method.config import AdaptConfig
from dd2.processes import say
from dd2.teachers.adaptation import adapted_copy, input_layer, require_table, table_of
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher, require_codes
from dd2.teachers.conditions import CaptionLabels, Conditions
from dd2.teachers.filtering import Sampling
from dd2.text.prompts import Prompts
from dd2.training.health import loss_rises
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples
from dd2.training.stage import Stage, Update

HELD_OUT = 1024
"""Sequences of the original teacher on which the two are compared; never trained on."""


@dataclass(frozen=True)
class AdaptRunConfig:
    """Give a LlamaGen teacher a continuous input layer in place of its embedding table (stage 0).

    Fits an MLP to the table, then trains the whole model on its own samples with its own distribution as the target, or on real
    images. Writes OUT/teacher/ and metrics.jsonl, and reports the KL divergence to the original before and after.
    dd2 distill does the same by itself when its teacher needs it.
    """

    teacher: str
    """Teacher folder, from dd2 convert llamagen."""
    captions: str = ""
    """Captions of a text-conditional teacher, which its labels count: a list of prompts (a file, or "scenes"), which the encoder
    that the teacher remembers reads, or their features from dd2 text-features."""
    text_encoder: str = ""
    """Where the text encoder of a text-conditional teacher lies on this machine, if not where the teacher says."""
    out: Path = Path("runs/adapt")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the samples and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Stage 0."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""


def adapt_run(config: AdaptRunConfig) -> Path:
    """Run stage 0, or what is left of it.

    Returns:
        The adapted teacher's folder.
    """
    device = pick_device(config.device)
    original = require_codes(open_teacher(config.teacher, device, config.captions, text_encoder=config.text_encoder), "dd2 adapt")
    check_adaptation(original, config.adapt)
    hint = start_run(config.out, config, "adapt")
    adapt(original, config.adapt, Trainer(config.out, config.seed, config.loop, device, hint), config.text_encoder)
    say(f"wrote teacher folder {config.out / 'teacher'}")
    return config.out / "teacher"


def check_adaptation(original: Teacher, config: AdaptConfig) -> None:
    """Refuse what stage 0 cannot use, before a run folder exists.

    Raises:
        InputError: the teacher needs no adaptation, its captions are missing, or the images do not go with it.
    """
    require_table(original)
    original.conditions.digest()  # refuses missing captions
    if config.data == "teacher":
        return
    channels, size, _ = original.tokenizer.image_shape
    data = open_data(config.data, size, channels, quiet=True)
    if isinstance(original.conditions, CaptionLabels):
        if not data.captions:
            raise InputError(f"adapt.data {config.data} has classes, and the teacher reads captions: give pictures with theirs")
        if original.conditions.encoder is None:
            raise InputError(
                f"adapt.data {config.data} has captions, and the teacher does not say which text encoder reads them "
                "(text_encoder in its config.json); leave adapt.data at teacher"
            )
        return
    labels, names = original.conditions.num_labels, original.conditions.class_names
    if data.captions or data.num_classes != labels:
        what = "captions" if data.captions else f"{data.num_classes} classes"
        raise InputError(f"adapt.data {config.data} has {what}, the teacher has {labels} classes: they must be the same classes")
    if names and data.class_names and (other := [pair for pair in zip(data.class_names, names, strict=True) if len({*pair}) > 1]):
        raise InputError(
            f"adapt.data {config.data} has the class {other[0][0]} where the teacher has {other[0][1]}; rename its folders"
        )


def adapt(original: CodeTeacher, config: AdaptConfig, trainer: Trainer, text_encoder: str = "") -> tuple[CodeTeacher, float]:
    """Stage 0 inside a run folder: both parts, the comparison, and teacher/.

    Args:
        original: a teacher with an embedding table.
        config: sizes, data and optimisers.
        trainer: the run.
        text_encoder: where that of a text-conditional teacher lies, if not where it says; it reads the data's captions.

    Returns:
        The adapted teacher, and the seconds spent on training it over all sessions.
    """
    out, seed, device = trainer.folder, trainer.seed, trainer.device
    wanted = HELD_OUT + (config.sequences if config.data == "teacher" else 0)
    own = TeacherSamples.prepare(
        out / "adapt_samples", original, original.usually(Sampling(), Sampling()), wanted, seed, config.batch
    )
    torch.manual_seed(seed)
    adapted = adapted_copy(original, config.hidden)
    held_out = own.kept[:HELD_OUT].long().to(device), original.conditions(own.labels[:HELD_OUT].to(device))
    ids, labels, conditions = _sequences(original, own, config, seed, device, text_encoder)
    layer, codebook, table = input_layer(adapted), original.tokenizer.codebook.detach(), table_of(original)

    def fit(random: torch.Generator) -> Losses:
        rows = torch.randperm(len(codebook), generator=random, device=device)[: config.fit_batch]
        return fit_loss(layer, codebook[rows], table[rows])

    def train(random: torch.Generator) -> Losses:
        rows = torch.randint(len(ids), (config.batch,), generator=random, device=device).to(ids.device)
        cond = conditions(labels[rows].to(device))
        target = original if config.data == "teacher" else None
        return adapt_loss(adapted, target, ids[rows].long().to(device), cond, config.class_dropout, random)

    update = Update("input", list(layer.parameters()), config.fit, fit, replicated=True)
    seconds = trainer.run(Stage("adapt_input", config.fit_iterations, [update], {"input": layer}))
    before = compare(adapted, original, *held_out, config.batch)
    trained = [*adapted.backbone.parameters(), *adapted.output.parameters()]
    update = Update("teacher", trained, config.optim, train, accumulate=config.accumulate)
    modules = {"backbone": adapted.backbone, "output": adapted.output}
    adapted.train()
    seconds += trainer.run(Stage("adapt", config.iterations, [update], modules, signs=(loss_rises("teacher/loss"),)))
    adapted.eval().requires_grad_(False)
    after = compare(adapted, original, *held_out, config.batch)
    _report(out, config.iterations, before, after)
    save_teacher(out / "teacher", adapted)
    return adapted, seconds


def _sequences(
    original: CodeTeacher, own: TeacherSamples, config: AdaptConfig, seed: int, device: torch.device, text_encoder: str
) -> tuple[Tensor, Tensor, Conditions]:
    """Ids (N, n) and labels (N,) of part (b), and what the labels stand for."""
    known = original.conditions
    if config.data == "teacher":
        return own.kept[HELD_OUT:].int(), own.labels[HELD_OUT:], known
    channels, size, _ = original.tokenizer.image_shape
    data = open_data(config.data, size, channels)
    if data.captions:
        known = known.of_texts(Prompts(data.captions, config.data), text_encoder, device)
    ids, labels = tokenise(original.tokenizer, data, "train", config.sequences, seed, device)
    return ids, labels, known


def _report(out: Path, step: int, before: dict[str, float], after: dict[str, float]) -> None:
    log = MetricsLog(out / "metrics.jsonl")
    log.rewind("adapt_report", -1)
    row = {f"{name}_{when}": value for when, numbers in (("before", before), ("after", after)) for name, value in numbers.items()}
    log.append({"stage": "adapt_report", "step": step, **row})
    say(
        "continuous input layer, nats per token on held-out samples of the original teacher:\n"
        f"  KL to the original {before['kl']:.4f} after part (a), {after['kl']:.4f} after part (b)\n"
        f"  NLL {before['nll']:.4f} and {after['nll']:.4f}; the original's own {after['nll_original']:.4f}"
    )
