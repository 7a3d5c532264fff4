"""dd2's own model folders: config.json and model.safetensors, and the tokenizer in a folder of its own inside.

teacher/    config.json  model.safetensors  tokenizer/
generator/  config.json  model.safetensors  tokenizer/
tokenizer/  config.json  model.safetensors
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dd2.baselines.dd1.student import DD1Config, DD1Student
from dd2.errors import InputError
from dd2.files import atomic_folder, save_tensors
from dd2.processes import first_process_only
from dd2.student import HeadConfig, OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig, llamagen_teacher
from dd2.teachers.var import VARBackbone, VARConfig, var_teacher
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.base import Tokenizer, nearest_ids
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.vq import VQTokenizer

TOKENIZERS = {"vq": (VQConfig, VQTokenizer), "multiscale": (MultiScaleConfig, MultiScaleTokenizer)}
TEACHERS = {
    "llamagen": (LlamaGenConfig, llamagen_teacher, LlamaGenBackbone),
    "var": (VARConfig, var_teacher, VARBackbone),
}
"""Family -> (configuration, builder, backbone class). A new family is one line here."""

NETWORKS = {
    "dd2": (HeadConfig, lambda teacher, config: Student(teacher.backbone, config), Student),
    "dd1": (
        DD1Config,
        lambda teacher, config: DD1Student(teacher.backbone, teacher.output, teacher.tokenizer.codebook, config),
        DD1Student,
    ),
}
"""Method -> (configuration, builder from a teacher whose modules it may take, class)."""


@dataclasses.dataclass(frozen=True)
class Generator:
    """A distilled generator as it is shipped: one network and the tokenizer that turns its tokens into images."""

    student: OneStepNetwork
    tokenizer: Tokenizer

    @property
    def ar_student(self) -> Student:
        """The network as an AR-diffusion model.

        Raises:
            InputError: it is another method's, which cannot be sampled step by step.
        """
        if not isinstance(self.student, Student):
            raise InputError(
                f"a {type(self.student).__name__} is no AR-diffusion model; ar_diffusion/ of a run of dd2 distill is"
            )
        return self.student

    def decode(self, tokens: torch.Tensor, nearest: bool = False) -> torch.Tensor:
        """Standardised tokens (B, n, C) to images, as they are or snapped to their nearest codes."""
        backbone = self.student.backbone
        if nearest:
            return self.tokenizer.decode(nearest_ids(tokens, backbone.to_tokens(self.tokenizer.codebook)))
        return self.tokenizer.decode_codes(backbone.to_codes(tokens))


@first_process_only
def save_tokenizer(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Write a tokenizer folder; `dtype` is the storage format, loading always gives float32."""
    _write_tokenizer(folder, tokenizer, dtype)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    family = _family_of(tokenizer, {name: entry[1] for name, entry in TOKENIZERS.items()})
    config = {"kind": "tokenizer", "family": family, "config": _config_of(tokenizer)}
    with atomic_folder(folder) as partial:
        write_model(partial, tokenizer, config, dtype)


@first_process_only
def save_teacher(folder: Path, teacher: Teacher, dtype: torch.dtype = torch.float32) -> None:
    """Write a teacher folder with its tokenizer inside."""
    config = {
        "kind": "teacher",
        "family": _backbone_family(teacher.backbone),
        "config": _config_of(teacher.backbone),
    }
    weights = nn.ModuleDict({"backbone": teacher.backbone, "output": teacher.output})
    with atomic_folder(folder) as partial:
        write_model(partial, weights, config, dtype)
        _write_tokenizer(partial / "tokenizer", teacher.tokenizer, dtype)


@first_process_only
def save_generator(folder: Path, generator: Generator, dtype: torch.dtype = torch.float32) -> None:
    """Write a generator folder with its tokenizer inside: all that `dd2 sample --steps 1` needs."""
    student = generator.student
    config = {
        "kind": "generator",
        "family": _backbone_family(student.backbone),
        "config": _config_of(student.backbone),
        "method": _family_of(student, {name: entry[2] for name, entry in NETWORKS.items()}),
        "head": _config_of(student),
    }
    with atomic_folder(folder) as partial:
        write_model(partial, student, config, dtype)
        _write_tokenizer(partial / "tokenizer", generator.tokenizer, dtype)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a tokenizer folder, in evaluation mode and float32.

    Raises:
        InputError: the folder is missing, damaged or holds something else.
    """
    config = read_config(folder, "tokenizer")
    config_class, build = TOKENIZERS[_known(config, TOKENIZERS, folder)]
    tokenizer = build(construct(config_class, config.get("config"), folder))
    load_weights(folder, tokenizer)
    return tokenizer.eval().requires_grad_(False)


def load_teacher(folder: Path) -> Teacher:
    """Read a teacher folder, in evaluation mode and float32. Errors as `load_tokenizer`."""
    config = read_config(folder, "teacher")
    config_class, build, _ = TEACHERS[_known(config, TEACHERS, folder)]
    teacher = build(construct(config_class, config.get("config"), folder), load_tokenizer(folder / "tokenizer"))
    load_weights(folder, nn.ModuleDict({"backbone": teacher.backbone, "output": teacher.output}))
    return teacher.eval().requires_grad_(False)


def load_generator(folder: Path) -> Generator:
    """Read a generator folder, in evaluation mode and float32. Errors as `load_tokenizer`."""
    config = read_config(folder, "generator")
    config_class, build, _ = TEACHERS[_known(config, TEACHERS, folder)]
    method = config.get("method", "dd2")
    if method not in NETWORKS:
        raise InputError(f"{folder / 'config.json'}: unknown method {method!r}; this dd2 knows {', '.join(NETWORKS)}")
    tokenizer = load_tokenizer(folder / "tokenizer")
    teacher = build(construct(config_class, config.get("config"), folder), tokenizer)
    head_class, network, _ = NETWORKS[method]
    student = network(teacher, construct(head_class, config.get("head"), folder))
    load_weights(folder, student)
    return Generator(student.eval().requires_grad_(False), tokenizer)


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """config.json of a model folder that must hold a `kind`.

    Raises:
        InputError: it is missing, is not JSON, or describes another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a {kind} folder: it has no config.json; give a folder written by dd2")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); restore the folder from where it came") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise InputError(f"{folder} holds {found or 'something else'}, where a {kind} was expected")
    return config


def write_model(folder: Path, module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json into an existing folder."""
    tensors = {key: value.detach().to(dtype).contiguous() for key, value in module.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_weights(folder: Path, module: nn.Module) -> None:
    """Load model.safetensors of a folder into `module`, as float32 and with every tensor accounted for."""
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is missing or damaged: copy it again") from error
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        first = wrong[0]
        raise InputError(
            f"{file} does not fit its config.json: {len(wrong)} tensors differ, first {first}: expected "
            f"{expected.get(first, 'no such tensor')}, found {found.get(first, 'none')}"
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{file} holds NaN or infinity in {broken[0]}; the training that wrote it had diverged")
    module.load_state_dict({key: value.float() for key, value in tensors.items()})


def _config_of(module: nn.Module) -> dict[str, Any]:
    return dataclasses.asdict(module.config)  # pyright: ignore[reportArgumentType]


def _family_of(module: nn.Module, classes: dict[str, Any]) -> str:
    for family, candidate in classes.items():
        if isinstance(module, candidate):
            return family
    raise InputError(
        f"{type(module).__name__} belongs to no known family ({', '.join(classes)}): add its own to "
        "dd2.checkpoints.native before saving or loading"
    )


def _backbone_family(backbone: nn.Module) -> str:
    return _family_of(backbone, {name: entry[2] for name, entry in TEACHERS.items()})


def _known(config: dict[str, Any], families: dict[str, Any], folder: Path) -> str:
    family = config.get("family")
    if family not in families:
        raise InputError(f"{folder / 'config.json'}: unknown family {family!r}; this dd2 knows {', '.join(families)}")
    return family


def construct(config_class: type, values: Any, folder: Path) -> Any:
    """A configuration from a folder's config.json.

    Raises:
        InputError: the values do not make one.
    """
    try:
        config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()})
        for field in dataclasses.fields(config_class):
            if type(getattr(config, field.name)) is not type(field.default):
                raise TypeError(f"{field.name} is {getattr(config, field.name)!r}, not of type {type(field.default).__name__}")
        return config
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a {config_class.__name__}: {error}") from error
