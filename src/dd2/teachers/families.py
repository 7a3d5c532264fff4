"""The teacher families that dd2 knows: which configuration, builder and backbone belong together."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dd2.errors import InputError
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig, llamagen_teacher
from dd2.teachers.mar import MARBackbone, MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.var import VARBackbone, var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.text.encoder import EncoderSpec
from dd2.tokenizers.base import CodeTokenizer, Tokenizer
from dd2.tokenizers.kl import KLTokenizer
from dd2.tokenizers.multiscale import MultiScaleTokenizer


@dataclass(frozen=True)
class Family:
    """One kind of teacher.

    Attributes:
        config: its sizes, a dataclass.
        build: (sizes, tokenizer) -> a teacher with fresh weights.
        backbone: class of its backbone, whose `config` attribute holds the sizes.
        tokenizer: class of tokenizers that go with it.
    """

    config: type
    build: Callable[[Any, Any], Teacher]
    backbone: type[Backbone]
    tokenizer: type[Tokenizer]


FAMILIES = {
    "llamagen": Family(LlamaGenConfig, llamagen_teacher, LlamaGenBackbone, CodeTokenizer),
    "var": Family(VARConfig, var_teacher, VARBackbone, MultiScaleTokenizer),
    "mar": Family(MARConfig, MARTeacher, MARBackbone, KLTokenizer),
}
"""By the name in config.json. A new family is one line here."""


@dataclass(frozen=True)
class TeacherSizes:
    """Sizes of a teacher to train: the tokenizer decides whose are used."""

    teacher: LlamaGenConfig = field(default_factory=LlamaGenConfig)
    """Sizes of a LlamaGen teacher, for a raster tokenizer; rows, columns, num_classes and captions come from it
    and the data."""
    var: VARConfig = field(default_factory=VARConfig)
    """Sizes of a VAR teacher, for a multi-scale tokenizer; num_classes and captions come from the data."""

    mar: MARConfig = field(default_factory=MARConfig)
    """Sizes of a MAR teacher, for a KL tokenizer; rows, columns, code_dim and num_classes come from it and the data."""

    def used(self, tokenizer: Tokenizer) -> LlamaGenConfig | VARConfig | MARConfig:
        """Those that go with a tokenizer."""
        return getattr(self, _section(tokenizer))

    def resolved(self, tokenizer: Tokenizer, num_classes: int, encoder: EncoderSpec | None = None) -> "TeacherSizes":
        """The same with what tokenizer, data and text encoder decide.

        Raises:
            InputError: sizes are given for a kind of teacher that does not go with the tokenizer, or it reads no texts.
        """
        if self.teacher.input_layer != "mlp":
            raise InputError("train-teacher trains models that read continuous codes: leave teacher.input_layer out")
        used = _section(tokenizer)
        for unused in SECTIONS.keys() - {used}:
            if getattr(self, unused) != getattr(TeacherSizes(), unused):
                raise InputError(f"this is a {SECTIONS[used]} tokenizer: its teacher's sizes are {used}.*, not {unused}.*")
        decided: dict[str, int] = {} if encoder else {"num_classes": num_classes}
        channels = 0 if encoder is None else encoder.channels
        if (given := getattr(getattr(self, used), "caption_dim", 0)) not in (0, channels):
            raise InputError(
                f"{used}.caption_dim {given} is decided by the text encoder of data with captions (here {channels}): leave it out"
            )
        if (given := getattr(getattr(self, used), "caption_length", 120)) not in (120, encoder.length if encoder else 120):
            raise InputError(f"{used}.caption_length {given} is decided by --caption-length: give it there")
        if used != "mar":
            decided |= {"caption_dim": encoder.channels, "caption_length": encoder.length} if encoder else {"caption_dim": 0}
        elif encoder:
            raise InputError("a MAR is conditioned on classes, and these data have captions; use a tokenizer with codes")
        if used != "var":
            side = round(tokenizer.num_positions**0.5)
            decided |= {"rows": side, "columns": side}
        if isinstance(tokenizer, KLTokenizer):
            decided["code_dim"] = tokenizer.config.z_channels
        return replace(self, **{used: replace(getattr(self, used), **decided)})

    def build(self, tokenizer: Tokenizer) -> Teacher:
        """A teacher with fresh weights."""
        sizes = self.used(tokenizer)
        return next(family for family in FAMILIES.values() if family.config is type(sizes)).build(sizes, tokenizer)


SECTIONS = {"teacher": "raster", "var": "multi-scale", "mar": "KL"}
"""Section of `TeacherSizes` -> the kind of tokenizer that it is for."""


def _section(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, KLTokenizer):
        return "mar"
    return "var" if isinstance(tokenizer, MultiScaleTokenizer) else "teacher"


def sizes_of(depth: int, width: int, heads: int, next_scale: bool) -> TeacherSizes:
    """Plain sizes for either kind of tokenizer."""
    if next_scale:
        return TeacherSizes(var=VARConfig(depth=depth, width=width, heads=heads))
    return TeacherSizes(teacher=LlamaGenConfig(depth=depth, width=width, heads=heads))
