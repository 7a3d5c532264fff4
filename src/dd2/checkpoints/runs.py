"""Opening what commands are pointed at: teachers by name or folder, and finished runs."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from dd2.checkpoints.native import Generator, load_generator, load_teacher
from dd2.config import read_yaml
from dd2.errors import InputError
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.training.samples import fingerprint, samples_identity


def embedded(name: str) -> Path:
    """Folder of an embedded digits model: "teacher" or "classifier"."""
    return Path(str(files("dd2") / "assets" / "digits" / name))


def open_teacher(name: str, device: torch.device, captions: str = "") -> Teacher:
    """The embedded teacher ("digits") or a teacher folder; `captions` names the file of a text-conditional one's captions."""
    folder = embedded("teacher") if name == "digits" else Path(name)
    if not folder.is_dir():
        raise InputError(f"teacher {name} does not exist; give 'digits' or a folder written by dd2 train-teacher or dd2 convert")
    teacher = load_teacher(folder).to(device)
    if captions:
        teacher.backbone.use_captions(Path(captions))
    return teacher


@dataclass(frozen=True)
class FinishedRun:
    """The networks of a distillation run.

    Attributes:
        generator: the one-step generator (EMA weights).
        ar_diffusion: the stage-1 model, or None if the run has none.
        teacher: the teacher, standardised as in the run.
        sampling: the teacher's distribution that the generator was distilled to.
    """

    generator: Generator
    ar_diffusion: Generator | None
    teacher: Teacher
    sampling: Sampling


def open_generator(path: Path, device: torch.device, captions: str = "") -> Generator:
    """The generator of a run folder, or a generator folder itself; `captions` as `open_teacher`, by default the run's own."""
    folder = path if (path / "model.safetensors").exists() or not (path / "generator").is_dir() else path / "generator"
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run folder of dd2 distill or a generator folder")
    if (path / "config.yaml").is_file() and not folder.joinpath("config.json").is_file():
        raise InputError(
            f"{path} has no generator yet: its distillation has not ended; resume it with dd2 distill {path}/config.yaml"
        )
    generator = load_generator(folder)
    captions = captions or _captions_of(path)
    if captions:
        generator.student.backbone.use_captions(Path(captions))
    return Generator(generator.student.to(device), generator.tokenizer.to(device))


def open_run(path: Path, device: torch.device, captions: str = "") -> FinishedRun:
    """A run with its teacher; `captions` as `open_generator`.

    Raises:
        InputError: the folder is no run, or teacher and generator do not belong together.
    """
    captions = captions or _captions_of(path)
    generator = open_generator(path, device, captions)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} has no config.yaml, so its teacher is unknown; give the run folder of dd2 distill")
    config = read_yaml(path / "config.yaml")
    adapted = path / "teacher"  # stage 0's result, where there was a stage 0
    teacher = open_teacher(str(adapted if adapted.is_dir() else config.get("teacher")), device, captions)
    made_by = samples_identity(path / "teacher_samples").get("teacher")
    if made_by is not None and made_by != fingerprint(teacher):
        raise InputError(f"{path}: the teacher named in config.yaml is not the one that was distilled; restore it")
    student, backbone = generator.student.backbone, teacher.backbone
    if not torch.equal(teacher.tokenizer.codebook, generator.tokenizer.codebook):
        raise InputError(f"{path}: the teacher named in config.yaml has another codebook than the generator; restore it")
    backbone.token_mean.copy_(student.token_mean)
    backbone.token_std.copy_(student.token_std)
    tuned = open_generator(path / "ar_diffusion", device, captions) if (path / "ar_diffusion").is_dir() else None
    prefix = "distill.sampling." if "distill.sampling.top_k" in config else "sampling."  # the latter: dd2 dd1
    sampling = Sampling(**{k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)})
    return FinishedRun(generator, tuned, teacher, sampling)


def _captions_of(run: Path) -> str:
    """The captions file that a run was distilled with; empty if it had none, or is no run."""
    file = run / "config.yaml"
    return str(read_yaml(file).get("captions") or "") if file.is_file() else ""
