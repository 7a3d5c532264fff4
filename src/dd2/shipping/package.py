"""A folder to ship: generator, tokenizer, model card, and perhaps the teacher.

config.json  model.safetensors  tokenizer/     the generator, as `dd2.checkpoints.native` writes it
README.md    samples.png                       the card and its picture
run.json     teacher/                          with the teacher: what more than one step needs
model_index.json  pipeline.py  tokenizer/dd2_folder.py    for diffusers, which runs them only if told to trust the folder
"""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import torch

from dd2.checkpoints.native import save_generator, save_teacher, write_generator
from dd2.checkpoints.record import FILE, RunRecord
from dd2.errors import InputError
from dd2.files import atomic_folder
from dd2.generator import Generator
from dd2.images import grid, png
from dd2.sampling import Ways
from dd2.shipping.card import Card, card_text
from dd2.student import Student
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import HeadTeacher

SHOWN = 32
"""Images on the card."""

DIFFUSERS = {"pipeline.py": "pipeline.py", "dd2_folder.py": "tokenizer/dd2_folder.py"}
"""Files of `dd2/shipping/diffusers`, and where they go in a package."""


def write_package(
    folder: Path,
    generator: Generator,
    card: Card,
    dtype: torch.dtype = torch.float32,
    *,
    teacher: Teacher | None = None,
    record: RunRecord | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        folder: where to; it must not exist, or be empty.
        generator: what is shipped.
        card: what its README.md says.
        dtype: storage format.
        teacher: shipped too, so that more steps can be drawn.
        record: of the run, which knows how the teacher samples; needed with a teacher.

    Raises:
        InputError: the folder is in use, or the teacher cannot be shipped.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out {folder} exists; choose another OUT")
    if teacher is not None and teacher.code:
        raise InputError(f"the teacher is code of yours ({teacher.code}), which a folder cannot hold; ship without the teacher")
    with atomic_folder(folder) as partial:
        write_generator(partial, generator, dtype)
        if teacher is not None:
            _write_teacher(partial / "teacher", teacher, dtype)
            sampling = Sampling() if record is None else record.sampling
            _write_record(partial, record or RunRecord("distill", "teacher", "", sampling))
        if not generator.code:
            for name, place in DIFFUSERS.items():
                (partial / place).write_text((files("dd2") / "shipping" / "diffusers" / name).read_text())
            (partial / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
        if picture := _picture(generator):
            (partial / "samples.png").write_bytes(picture)
        (partial / "README.md").write_text(card_text(card, generator, has_teacher=teacher is not None, has_picture=bool(picture)))


def _write_teacher(folder: Path, teacher: Teacher, dtype: torch.dtype) -> None:
    """A teacher in its own form: one that came from stage 1 is a generator's folder whose role is another."""
    if not isinstance(teacher, HeadTeacher):
        save_teacher(folder, teacher, dtype)
        return
    student = Student.from_ar_diffusion(teacher).eval().requires_grad_(False)
    save_generator(folder, Generator(student, teacher.tokenizer, teacher.conditions), dtype, role="ar_diffusion")


MODEL_INDEX = {"_class_name": ["pipeline", "DD2Pipeline"], "tokenizer": ["dd2_folder", "Folder"]}
"""What diffusers reads. It knows no root folder, only those of components, so that one of them has to tell."""


def _write_record(folder: Path, record: RunRecord) -> None:
    """run.json with paths that hold inside the folder alone."""
    shipped = dataclasses.replace(record, teacher="teacher", captions="", from_run={"teacher": "teacher"})
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(shipped), indent=2) + "\n")


def _picture(generator: Generator) -> bytes | None:
    """Images of the first classes, or None where captions decide what is drawn."""
    try:
        labels = generator.conditions.default_labels(torch.arange(SHOWN)).tolist()
    except InputError:
        return None
    ways = Ways(generator)
    images = torch.cat([images for _, images in ways.batches(ways.one_step(), labels, range(SHOWN), 16)])
    return png(grid(images, columns=min(8, SHOWN)))
