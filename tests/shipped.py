"""Packages of tiny models, with their teachers: what a finished run ships, without the run."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dd2.checkpoints.record import RunRecord
from dd2.code_student import CodeStudent
from dd2.generator import Generator
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.shipping.card import Card
from dd2.shipping.package import write_package
from dd2.student import HeadConfig, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import ClassLabels
from dd2.teachers.filtering import Sampling
from dd2.teachers.masked import MaskedBackbone
from models import TINY_HEAD, tiny_teacher

NAMES = ("ant", "bee", "cat")


def tiny_generator(teacher: Teacher, *, codes: bool = False) -> Generator:
    """A generator with random weights; with codes it has the teacher's classifier, of a masked teacher its own head."""
    if isinstance(teacher.backbone, MaskedBackbone):
        return Generator.of(MaskedStudent.from_teacher(teacher, MaskedStudentConfig()).eval().requires_grad_(False), teacher)
    if codes:
        assert isinstance(teacher, CodeTeacher)
        return Generator.of(CodeStudent.from_teacher(teacher).eval().requires_grad_(False), teacher)
    student = Student.from_teacher(teacher, TINY_HEAD).eval().requires_grad_(False)
    nn.init.normal_(student.head.output.weight, std=0.1)
    return Generator.of(student, teacher)


def tiny_package(
    folder: Path, teacher: Teacher | None = None, *, codes: bool = False, card: Card | None = None, names: Sequence[str] = NAMES
) -> Path:
    """A folder with generator and teacher, whose three classes have names."""
    made = teacher or tiny_teacher()
    if isinstance(made.conditions, ClassLabels):
        made.conditions.call(names)
    record = RunRecord("distill", "teacher", "", Sampling(), HeadConfig())
    write_package(folder, tiny_generator(made, codes=codes), card or Card(), teacher=made, record=record)
    return folder
