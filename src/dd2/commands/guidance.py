"""A run's guidance network as the AR model that it is: what it knows of the generator can be looked at (App. C.3)."""

import copy
from pathlib import Path

from dd2.checkpoints.foreign_file import read_file
from dd2.checkpoints.native import network_of
from dd2.checkpoints.runs import FinishedRun
from dd2.code_student import CodeGuidance, has_own_classifier
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.training.checkpoint import load_network, steps

STAGES = ("csd_aligned", "csd")
"""Stages that train a guidance network, the later one first."""


def guidance_of(path: Path, run: FinishedRun) -> Teacher:
    """The guidance network of a run's newest checkpoint, as a teacher that draws step by step.

    Args:
        path: the run's folder.
        run: what is open of it.

    Raises:
        InputError: no checkpoint is kept, or a network of this kind cannot draw by itself.
    """
    folders = [path / "checkpoints" / stage / f"{max(found):08d}" for stage in STAGES if (found := _steps(path, stage))]
    if not folders:
        raise InputError(f"{path} keeps no checkpoint of stage 2, so its guidance network is gone; leave out --guidance")
    file = folders[0] / "guidance.safetensors"
    if any(name.startswith("head.") for name in read_file(file, "meta")):  # a velocity network, rather than one over codes
        sizes = run.record.masked or run.record.head
        student = None if sizes is None else network_of(run.teacher, sizes)
        if not isinstance(student, Student):
            raise InputError(f"{path}: its guidance network has no order to draw in by itself; leave out --guidance")
        load_network(file, student)
        return Generator.of(student.eval(), run.teacher).as_teacher.to(run.teacher.device)
    codes = require_codes(run.teacher, "a guidance network over codes")
    if not has_own_classifier(codes):
        raise InputError(f"{path}: a guidance network beside such a teacher cannot draw by itself; leave out --guidance")
    guidance = CodeGuidance.from_teacher(codes)
    load_network(file, guidance)
    drawing = copy.copy(codes)  # its order, tokenizer and ways, with the weights of the other
    drawing._modules = {**codes._modules, "backbone": guidance.backbone, "output": guidance.output}
    return drawing.eval().requires_grad_(False).to(run.teacher.device)


def _steps(path: Path, stage: str) -> list[int]:
    folder = path / "checkpoints" / stage
    return [step for step in steps(folder) if (folder / f"{step:08d}" / "guidance.safetensors").is_file()]
