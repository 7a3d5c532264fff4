"""Opening what commands are pointed at: teachers by name, folder or function, and finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch

from dd2.checkpoints.folder import read_kind
from dd2.checkpoints.native import load_ar_teacher, load_generator, load_teacher, teacher_from_code
from dd2.checkpoints.record import FILE, RunRecord
from dd2.errors import InputError
from dd2.external import check_trust, is_code
from dd2.generator import Generator
from dd2.teachers.base import Teacher
from dd2.teachers.conditions import CaptionLabels, Conditions
from dd2.teachers.filtering import Sampling
from dd2.text.prompts import Prompts
from dd2.training.samples import samples_identity

Texts = str | Prompts
"""Captions by the name of a file or of an embedded list, or prompts themselves; empty: none, or a run's own."""


def embedded(name: str) -> Path:
    """Folder of an embedded digits model: "teacher" or "classifier"."""
    return Path(str(files("dd2") / "assets" / "digits" / name))


def open_teacher(
    name: str, device: torch.device, captions: Texts = "", trust: Sequence[str] = (), text_encoder: str = ""
) -> Teacher:
    """A teacher that the user names.

    Args:
        name: "digits" (embedded); a teacher folder; the ar_diffusion/ folder of a run, which is an AR model itself; or
            module:function.
        device: where to.
        captions: what the labels of a text-conditional one are to be (`Conditions.of_texts`).
        trust: modules that an ar_diffusion/ folder may import.
        text_encoder: where its text encoder lies on this machine, if not where its folder says.

    Raises:
        InputError: there is none, or the captions do not go with it.
    """
    if is_code(name):
        teacher = teacher_from_code(name)
    else:
        folder = embedded("teacher") if name == "digits" else Path(name)
        if not folder.is_dir():
            raise InputError(
                f"teacher {name} does not exist; give 'digits', a folder written by dd2 train-teacher or dd2 convert, a run's "
                "ar_diffusion folder, or module:function"
            )
        teacher = load_ar_teacher(folder, trust) if read_kind(folder) == "generator" else load_teacher(folder)
    _refuse_encoder(teacher.conditions, text_encoder)
    if captions:
        teacher.conditions = teacher.conditions.of_texts(captions, text_encoder, device)
    return teacher.to(device)


def _refuse_encoder(conditions: Conditions, text_encoder: str) -> None:
    """Refuse a place of a text encoder where none is used."""
    if text_encoder and not isinstance(conditions, CaptionLabels):
        raise InputError("text_encoder has no effect: this model is conditioned on classes; leave it out")


@dataclass(frozen=True)
class FinishedRun:
    """The networks of a distillation run.

    Attributes:
        record: what the run says of itself.
        generator: the one-step generator (EMA weights).
        ar_diffusion: the stage-1 model, or None if the run has none.
        teacher: the teacher, standardised as in the run.
    """

    record: RunRecord
    generator: Generator
    ar_diffusion: Generator | None
    teacher: Teacher

    @property
    def sampling(self) -> Sampling:
        """The teacher's distribution that the generator was distilled to."""
        return self.record.sampling


def open_generator(
    path: Path, device: torch.device, captions: Texts = "", trust: Sequence[str] = (), text_encoder: str = ""
) -> Generator:
    """The generator of a run folder, or a generator folder itself.

    Args:
        path: the folder.
        device: where to.
        captions: as `open_teacher`, by default the run's own.
        trust: modules whose code may be imported, where the generator needs some.
        text_encoder: as `open_teacher`.

    Raises:
        InputError: there is none, or it cannot be opened.
    """
    own = "" if captions or not (path / FILE).is_file() else RunRecord.read(path).captions
    return _generator(path, device, captions, own, trust, text_encoder)


def _generator(path: Path, device: torch.device, captions: Texts, own: str, trust: Sequence[str], text_encoder: str) -> Generator:
    """The generator in a folder; its run's `own` captions are looked at when a label asks for one, and given ones at once."""
    folder = path if (path / "model.safetensors").exists() or not (path / "generator").is_dir() else path / "generator"
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run folder of dd2 distill or a generator folder")
    if (path / "config.yaml").is_file() and not folder.joinpath("config.json").is_file():
        raise InputError(
            f"{path} has no generator yet: its distillation has not ended; resume it with dd2 distill {path}/config.yaml"
        )
    found = _opened(folder, device, captions, trust, text_encoder)
    if captions or not own:
        return found
    return replace(found, conditions=found.conditions.later(own, text_encoder, device))


def open_run(
    path: Path, device: torch.device, captions: Texts = "", trust: Sequence[str] = (), text_encoder: str = ""
) -> FinishedRun:
    """A run with its teacher. Arguments as `open_generator`.

    Raises:
        InputError: the folder is no run, or teacher and generator do not belong together.
    """
    record = RunRecord.read(path)
    generator = _generator(path, device, captions, record.captions, trust, text_encoder)
    teacher = open_record_teacher(record, path, device, trust)
    if captions or record.captions:
        teacher.conditions = generator.conditions  # prompts are encoded once
    made_by = samples_identity(path / "teacher_samples").get("teacher")
    if made_by is not None and made_by != teacher.fingerprint():
        raise InputError(f"{path}: the teacher named in {FILE} is not the one that was distilled; restore it")
    student = generator.student.backbone
    if not generator.code and not teacher.tokenizer.shares_tokens_with(generator.tokenizer):
        raise InputError(f"{path}: the teacher named in {FILE} has another tokenizer than the generator; restore it")
    teacher.backbone.normalise_by(student.token_mean, student.token_std)
    tuned = _opened(path / "ar_diffusion", device, "", trust) if (path / "ar_diffusion").is_dir() else None
    return FinishedRun(record, generator, tuned, teacher)


def open_record_teacher(record: RunRecord, path: Path, device: torch.device, trust: Sequence[str] = ()) -> Teacher:
    """The teacher that a run in `path` was distilled from, without captions. Arguments and errors as `open_run`."""
    adapted = path / "teacher"  # stage 0's result, where there was a stage 0
    name = str(adapted) if adapted.is_dir() else record.teacher
    if is_code(name):
        check_trust(name, trust, path)
    return open_teacher(name, device, trust=trust)


def _opened(folder: Path, device: torch.device, captions: Texts, trust: Sequence[str], text_encoder: str = "") -> Generator:
    generator = load_generator(folder, trust)
    _refuse_encoder(generator.conditions, text_encoder)
    if captions:
        generator = replace(generator, conditions=generator.conditions.of_texts(captions, text_encoder, device))
    return generator.to(device)
