"""The teacher families that dd2 knows: which configuration, builder and backbone belong together."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dd2.errors import InputError
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig, llamagen_teacher
from dd2.teachers.mar import MARBackbone, MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.var import VARBackbone, VARConfig, var_teacher
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
    """Sizes of a LlamaGen teacher, for a raster tokenizer; rows, columns and num_classes come from it and the data."""
    var: VARConfig = field(default_factory=VARConfig)
    """Sizes of a VAR teacher, for a multi-scale tokenizer; num_classes comes from the data."""

    def used(self, tokenizer: CodeTokenizer) -> LlamaGenConfig | VARConfig:
        """Those that go with a tokenizer."""
        return self.var if isinstance(tokenizer, MultiScaleTokenizer) else self.teacher

    def resolved(self, tokenizer: CodeTokenizer, num_classes: int) -> "TeacherSizes":
        """The same with what tokenizer and data decide.

        Raises:
            InputError: sizes are given for the kind of teacher that does not go with the tokenizer.
        """
        if self.teacher.caption_dim or self.teacher.input_layer != "mlp":
            raise InputError(
                "train-teacher trains class-conditional, continuous models: leave teacher.caption_dim and input_layer out"
            )
        next_scale = isinstance(tokenizer, MultiScaleTokenizer)
        unused, used = ("teacher", "var") if next_scale else ("var", "teacher")
        if getattr(self, unused) != getattr(TeacherSizes(), unused):
            kind = "multi-scale" if next_scale else "raster"
            raise InputError(f"this is a {kind} tokenizer: its teacher's sizes are {used}.*, not {unused}.*")
        if next_scale:
            return replace(self, var=replace(self.var, num_classes=num_classes))
        side = round(tokenizer.num_positions**0.5)
        return replace(self, teacher=replace(self.teacher, rows=side, columns=side, num_classes=num_classes))

    def build(self, tokenizer: CodeTokenizer) -> CodeTeacher:
        """A teacher with fresh weights."""
        if isinstance(tokenizer, MultiScaleTokenizer):
            return var_teacher(self.var, tokenizer)
        return llamagen_teacher(self.teacher, tokenizer)


def sizes_of(depth: int, width: int, heads: int, next_scale: bool) -> TeacherSizes:
    """Plain sizes for either kind of tokenizer."""
    if next_scale:
        return TeacherSizes(var=VARConfig(depth=depth, width=width, heads=heads))
    return TeacherSizes(teacher=LlamaGenConfig(depth=depth, width=width, heads=heads))
