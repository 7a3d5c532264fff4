"""Text encoders: prompts to features of their words, behind one interface; which one a teacher was trained with is part of it."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from dd2.errors import InputError

Kind = Literal["flan-t5", "wordllama"]

KINDS = get_args(Kind)

USUAL_LENGTH: dict[str, int] = {"flan-t5": 120, "wordllama": 32}
"""Positions of a caption unless told otherwise; LlamaGen's models have 120."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder makes features: what a teacher's folder remembers.

    Attributes:
        kind: its sort.
        name: folder, or name on the Hub, of its weights; empty where they come with a Python package.
        revision: on the Hub.
        length: P, positions of a caption; longer ones are cut.
        channels: of the features.
        digest: of its weights; empty where they were never seen here, as of converted teachers.
    """

    kind: Kind
    name: str = ""
    revision: str = ""
    length: int = 120
    channels: int = 1
    digest: str = ""

    def __post_init__(self) -> None:
        """Refuse encoders that there are not."""
        if self.kind not in KINDS:
            raise InputError(f"text encoder kind must be {' or '.join(KINDS)}, got {self.kind!r}")
        if self.length < 1 or self.channels < 1:
            raise InputError(f"text encoder length and channels must be at least 1, got {self.length} and {self.channels}")

    def said(self) -> str:
        """For people."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.kind}{f' {self.name}{at}' if self.name else ''}, {self.length} positions"

    def differs_from(self, other: "EncoderSpec") -> bool:
        """Whether features of the two are surely not the same; where a digest is unknown the shapes decide."""
        if (self.kind, self.length, self.channels) != (other.kind, other.length, other.channels):
            return True
        return bool(self.digest and other.digest and self.digest != other.digest)


def spec_of(text: str, length: int = 0) -> EncoderSpec:
    """The encoder that a command line names; its channels and digest are known when it is opened.

    Args:
        text: "wordllama"; or a Flan-T5: a folder, owner/name in the local cache of the Hub, or owner/name@revision, which may be
            fetched.
        length: positions; 0 is the usual number.
    """
    if text == "wordllama":
        return EncoderSpec("wordllama", length=length or USUAL_LENGTH["wordllama"])
    if Path(text).is_dir():
        return EncoderSpec("flan-t5", os.path.abspath(text), length=length or USUAL_LENGTH["flan-t5"])
    name, _, revision = text.partition("@") if HUB_NAME.fullmatch(text) else (text, "", "")
    return EncoderSpec("flan-t5", name, revision, length or USUAL_LENGTH["flan-t5"])


class TextEncoder(ABC):
    """Prompts to features.

    Attributes:
        spec: what it is, in full.
    """

    spec: EncoderSpec

    @abstractmethod
    def words(self, texts: Sequence[str]) -> list[int]:
        """How many positions each text has before it is cut."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts to features (N, P, channels) float32 and mask (N, P), 1 for a word; on the CPU, words first, at least one each.

        A text's features do not depend on the others.
        """
