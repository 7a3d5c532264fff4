"""dd2's own model folders: config.json and model.safetensors, and the tokenizer in a folder of its own inside.

teacher/    config.json  model.safetensors  tokenizer/
generator/  config.json  model.safetensors  tokenizer/
tokenizer/  config.json  model.safetensors

A generator whose teacher came from module:function names that function instead of a family, and has no tokenizer folder:
backbone, tokenizer and conditions come from there, once the user has named it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dd2.checkpoints.folder import (
    check_sizes,
    config_of,
    construct,
    load_weights,
    names_in,
    names_said,
    read_config,
    write_model,
)
from dd2.code_student import CodeStudent, CodeStudentConfig, classifier_of
from dd2.errors import InputError
from dd2.external import check_trust, load_function
from dd2.files import atomic_folder
from dd2.generator import Generator
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.processes import first_process_only
from dd2.student import HeadConfig, OneStepNetwork, Student
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.conditions import CaptionLabels, ClassLabels, Conditions
from dd2.teachers.families import FAMILIES
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import HeadTeacher
from dd2.text.encoder import EncoderSpec
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.base import DecoderAlignment, Tokenizer
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.vq import VQTokenizer

TOKENIZERS: dict[str, tuple[type, Callable[[Any], Tokenizer]]] = {
    "vq": (VQConfig, VQTokenizer),
    "multiscale": (MultiScaleConfig, MultiScaleTokenizer),
    "kl": (KLConfig, KLTokenizer),
}
"""Family -> (configuration, class)."""

Role = Literal["generator", "ar_diffusion"]
"""What a generator folder's network was trained to be: the one-step generator, or stage 1's AR model."""


@dataclass(frozen=True)
class NetworkKind:
    """A method's network.

    Attributes:
        config: its own sizes, a dataclass.
        build: (a teacher whose modules it may take, sizes) -> the network.
        network: its class, whose `config` attribute holds the sizes.
    """

    config: type
    build: Callable[[Teacher, Any], OneStepNetwork]
    network: type[OneStepNetwork]


def code_student(teacher: Teacher, config: CodeStudentConfig) -> CodeStudent:
    """A generator over codes of the given sizes, whose weights are yet to be loaded.

    Raises:
        InputError: the teacher has no codes.
    """
    codes = require_codes(teacher, "a generator over codes")
    return CodeStudent(codes.student_backbone(), classifier_of(codes), codes.tokenizer.codebook, config)


NETWORKS = {
    "dd2": NetworkKind(HeadConfig, lambda teacher, config: Student(teacher.student_backbone(), config), Student),
    "dd2_codes": NetworkKind(CodeStudentConfig, code_student, CodeStudent),
    "dd2_masked": NetworkKind(MaskedStudentConfig, MaskedStudent.from_teacher, MaskedStudent),
}
"""By method; baselines add their own (`dd2.baselines`)."""


def network_of(teacher: Teacher, sizes: HeadConfig | CodeStudentConfig | MaskedStudentConfig) -> OneStepNetwork:
    """A network of the kind that has such sizes, whose weights are yet to be loaded. Errors as `NetworkKind.build`."""
    return next(kind for kind in NETWORKS.values() if kind.config is type(sizes)).build(teacher, sizes)


@first_process_only
def save_tokenizer(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Write a tokenizer folder; `dtype` is the storage format, loading always gives float32."""
    _write_tokenizer(folder, tokenizer, dtype)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    family = _family_of(tokenizer, {name: entry[1] for name, entry in TOKENIZERS.items()})
    config: dict[str, Any] = {"kind": "tokenizer", "family": family, "config": config_of(tokenizer)}
    if tokenizer.aligned is not None:
        config["aligned"] = asdict(tokenizer.aligned)
    with atomic_folder(folder) as partial:
        write_model(partial, tokenizer, config, dtype)


@first_process_only
def save_teacher(folder: Path, teacher: Teacher, dtype: torch.dtype = torch.float32) -> None:
    """Write a teacher folder with its tokenizer inside."""
    config: dict[str, Any] = {
        "kind": "teacher",
        "family": _backbone_family(teacher.backbone),
        "config": config_of(teacher.backbone),
    }
    config |= labels_said(teacher.conditions)
    if teacher.usual_sampling is not None:
        config["sampling"] = teacher.usual_sampling.described()
    weights = nn.ModuleDict(teacher.stored_parts)
    with atomic_folder(folder) as partial:
        write_model(partial, weights, config, dtype)
        _write_tokenizer(partial / "tokenizer", teacher.tokenizer, dtype)


@first_process_only
def save_generator(
    folder: Path,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
    *,
    role: Role = "generator",
) -> None:
    """Write a generator folder with its tokenizer inside: all that `dd2 sample --steps 1` needs.

    Args:
        folder: where to; what is there is replaced.
        generator: what is written.
        dtype: storage format.
        role: what the network is.
    """
    with atomic_folder(folder) as partial:
        write_generator(partial, generator, dtype, role)


def write_generator(folder: Path, generator: Generator, dtype: torch.dtype = torch.float32, role: Role = "generator") -> None:
    """The files of `save_generator`, into a folder that exists."""
    student, code = generator.student, generator.code
    method = _family_of(student, {name: kind.network for name, kind in NETWORKS.items()})
    config: dict[str, Any] = {"kind": "generator", "role": role, "method": method, "head": config_of(student)}
    if code:
        config["code"] = code
    else:
        config |= {"family": _backbone_family(student.backbone), "config": config_of(student.backbone)}
        config |= labels_said(generator.conditions)
    write_model(folder, student, config, dtype)
    if not code:
        _write_tokenizer(folder / "tokenizer", generator.tokenizer, dtype)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a tokenizer folder, in evaluation mode and float32.

    Raises:
        InputError: the folder is missing, damaged or holds something else.
    """
    config = read_config(folder, "tokenizer")
    config_class, build = TOKENIZERS[_known(config, TOKENIZERS, folder)]
    sizes = construct(config_class, config.get("config"), folder / "config.json")
    check_sizes(sizes, folder / "model.safetensors", folder / "config.json")
    tokenizer = build(sizes)
    load_weights(folder, tokenizer)
    if (aligned := config.get("aligned")) is not None:
        tokenizer.aligned = construct(DecoderAlignment, aligned, folder / "config.json")
    return tokenizer.eval().requires_grad_(False)


def load_teacher(folder: Path) -> Teacher:
    """Read a teacher folder, in evaluation mode and float32. Errors as `load_tokenizer`."""
    config = read_config(folder, "teacher")
    teacher = _fresh(config, folder)
    load_weights(folder, nn.ModuleDict(teacher.stored_parts))
    return teacher.eval().requires_grad_(False)


def load_generator(folder: Path, trust: Sequence[str] = ()) -> Generator:
    """Read a generator folder, in evaluation mode and float32.

    Args:
        folder: what `save_generator` wrote.
        trust: modules whose code may be imported.

    Raises:
        InputError: as `load_tokenizer`, or the folder needs code that is not trusted.
    """
    config = read_config(folder, "generator")
    method = config.get("method", "dd2")
    if not isinstance(method, str) or method not in NETWORKS:
        raise InputError(f"{folder / 'config.json'}: unknown method {method!r}; this dd2 knows {', '.join(NETWORKS)}")
    kind = NETWORKS[method]
    if code := config.get("code"):
        check_trust(str(code), trust, folder)
        teacher = teacher_from_code(str(code))
    else:
        teacher = _fresh(config, folder)
    student = kind.build(teacher, construct(kind.config, config.get("head"), folder / "config.json"))
    load_weights(folder, student)
    return Generator.of(student.eval().requires_grad_(False), teacher)


def load_ar_teacher(folder: Path, trust: Sequence[str] = ()) -> HeadTeacher:
    """Read the generator folder of a stage-1 model as the AR model that it is. Arguments and errors as `load_generator`.

    Raises:
        InputError: also where the folder holds a one-step generator, which has no next token.
    """
    config = read_config(folder, "generator")
    if config.get("role", folder.resolve().name) != "ar_diffusion":
        raise InputError(
            f"{folder} holds a one-step generator, which is no AR model and can be no teacher; a run's ar_diffusion/ folder can"
        )
    return load_generator(folder, trust).as_teacher.eval().requires_grad_(False)


def teacher_from_code(spec: str) -> Teacher:
    """The teacher that a function module:function of the user's builds, without arguments.

    Raises:
        InputError: there is no such function, or it gives something else.
    """
    teacher = load_function(spec, "teacher")()
    if not isinstance(teacher, Teacher):
        raise InputError(f"teacher {spec} must give a dd2.teachers.base.Teacher, it gave a {type(teacher).__name__}")
    teacher.code = spec
    return teacher.eval().requires_grad_(False)


def _fresh(config: dict[str, Any], folder: Path) -> Teacher:
    """A teacher of the family and sizes that a config.json describes, with the tokenizer beside it."""
    family = FAMILIES[_known(config, FAMILIES, folder)]
    sizes = construct(family.config, config.get("config"), folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if not isinstance(tokenizer, family.tokenizer):
        raise InputError(
            f"{folder}: a {type(tokenizer).__name__} does not go with family {config['family']}; restore its tokenizer/"
        )
    check_sizes(sizes, folder / "model.safetensors", folder / "config.json")
    try:
        teacher = family.build(sizes, tokenizer)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    file, labels = folder / "config.json", teacher.conditions
    if names := names_in(config, labels.num_classes if isinstance(labels, ClassLabels) else 0, file):
        labels.class_names = names
    if isinstance(labels, CaptionLabels) and (encoder := config.get("text_encoder")) is not None:
        teacher.conditions = CaptionLabels(labels.length, labels.channels, encoder=construct(EncoderSpec, encoder, file))
    if (usual := config.get("sampling")) is not None:
        teacher.usual_sampling = construct(Sampling, usual, file)
    return teacher


def labels_said(conditions: Conditions) -> dict[str, Any]:
    """What a config.json says of labels: the names of classes, or the encoder of captions; nothing where nobody said."""
    if isinstance(conditions, CaptionLabels):
        return {} if conditions.encoder is None else {"text_encoder": asdict(conditions.encoder)}
    return names_said(conditions.class_names)


def _family_of(module: nn.Module, classes: dict[str, Any]) -> str:
    for family, candidate in classes.items():
        if isinstance(module, candidate):
            return family
    raise InputError(
        f"{type(module).__name__} belongs to no known family ({', '.join(classes)}); name its teacher as module:function, or add "
        "the family (docs/add-a-model.md)"
    )


def _backbone_family(backbone: Backbone) -> str:
    return _family_of(backbone, {name: family.backbone for name, family in FAMILIES.items()})


def _known(config: dict[str, Any], families: dict[str, Any], folder: Path) -> str:
    family = config.get("family")
    if not isinstance(family, str) or family not in families:
        raise InputError(f"{folder / 'config.json'}: unknown family {family!r}; this dd2 knows {', '.join(families)}")
    return family
