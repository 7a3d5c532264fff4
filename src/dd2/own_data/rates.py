"""What each stage costs on this machine: the runs themselves, a few iterations of each, timed."""

import contextlib
import io
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dd2.checkpoints.runs import open_teacher
from dd2.commands.distill import distill
from dd2.commands.needs import needs
from dd2.commands.plan_config import PlanConfig
from dd2.commands.train_classifier import train_classifier
from dd2.commands.train_teacher import HELD_OUT, train_teacher
from dd2.commands.train_tokenizer import train_tokenizer
from dd2.device import pick_device
from dd2.own_data.recipe import Counts, Runs, Sizes, Task, runs
from dd2.resources import available_memory
from dd2.training.metrics import MetricsLog

ITERATIONS = 6
"""Of every training; the first ones, which allocate, are not counted."""

USED = 0.8
"""Share of the free memory that stage 2 may plan with."""


@dataclass(frozen=True)
class Rates:
    """Seconds.

    Attributes:
        tokenizer, teacher, classifier, regress, guidance, csd: of an iteration.
        token_image: to turn an image into tokens.
        sample: to draw a sequence from the teacher.
        pair: to follow its ODE once.
        csd_start: before the first iteration of stage 2, which fills the remembered moments.
    """

    tokenizer: float
    token_image: float
    teacher: float
    classifier: float
    sample: float
    pair: float
    regress: float
    guidance: float
    csd: float
    csd_start: float = 0.0


def measured(task: Task, sizes: Sizes, batch: int, folder: Path) -> Rates:
    """Run a little of everything in a folder, which is emptied afterwards.

    Raises:
        MemoryError: stage 2 of these sizes would not fit into the memory that is free.
    """
    counts = _few(task, sizes, batch)
    chosen = runs(task, sizes, counts, folder)
    try:
        train_tokenizer(_plain(chosen.tokenizer))
        began = time.perf_counter()
        train_teacher(_plain(chosen.teacher))
        teacher = _seconds(chosen.teacher.out, "teacher")
        spent = time.perf_counter() - began - ITERATIONS * teacher
        _check_memory(chosen)
        if "classifier" in task.stages:
            train_classifier(_plain(chosen.classifier))
        parts = distill(_plain(chosen.one_step))
        return Rates(
            tokenizer=_seconds(chosen.tokenizer.out, "tokenizer"),
            token_image=max(spent, 0.0) / (counts.token_images + HELD_OUT),
            teacher=teacher,
            classifier=_seconds(chosen.classifier.out, "classifier") if "classifier" in task.stages else 0.0,
            sample=parts["samples"] / counts.samples,
            pair=parts["pairs"] / counts.samples,
            csd_start=max(0.0, _rows(chosen.one_step.out, "csd")[0] - _seconds(chosen.one_step.out, "csd")),
            **{stage: _seconds(chosen.one_step.out, stage) for stage in ("regress", "guidance", "csd")},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quietly(call: Callable[[], Rates]) -> Rates:
    """The same without its words and bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def _few(task: Task, sizes: Sizes, batch: int) -> Counts:
    """As little as still runs: matching needs more sequences than it has features."""
    samples = sizes.width + 256 + 2 * task.classes
    few = ITERATIONS
    return Counts(few, 512, few, few, samples, few, few, few, 2 * task.classes, batch)


def _plain(config: Any) -> Any:
    return replace(config, loop=replace(config.loop, log_every=1, preview_every=0, save_every=10**9, stop_on=()))


def _seconds(run: Path, stage: str) -> float:
    return statistics.median(_rows(run, stage)[2:])


def _rows(run: Path, stage: str) -> list[float]:
    """Of each iteration."""
    return [row["seconds/iteration"] for row in MetricsLog(run / "metrics.jsonl").rows() if row["stage"] == stage]


def _check_memory(chosen: Runs) -> None:
    device = pick_device(chosen.one_step.device)
    teacher = open_teacher(chosen.one_step.teacher, torch.device("cpu")).to("meta")
    planned = PlanConfig(networks=chosen.one_step.networks, csd=chosen.one_step.csd, regress=chosen.one_step.regress)
    if needs(planned, teacher).total > USED * available_memory(device):
        raise MemoryError("stage 2 does not fit")
