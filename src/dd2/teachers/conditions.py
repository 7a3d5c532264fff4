"""What an image is conditioned on: integer labels for people, condition tensors for transformers."""

import difflib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.processes import note
from dd2.text.captions import Captions, captions_of
from dd2.text.encoder import EncoderSpec
from dd2.text.prompts import Prompts


class Conditions(ABC):
    """Labels 0 … num_labels - 1 and the condition that each stands for. Opaque to everything but the teacher.

    Attributes:
        class_names: what the labels are called, in order: classes, or captions as texts; empty where nobody said.
    """

    class_names: tuple[str, ...] = ()

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Labels that can be asked for: classes, or captions."""

    @abstractmethod
    def __call__(self, labels: Tensor) -> Tensor:
        """Integer labels (B,) to conditions (B, ...), on their device."""

    @abstractmethod
    def empty(self, count: int, device: torch.device | str) -> Tensor:
        """Conditions (count, ...) of the right shape and type and of any content: to plan with."""

    def default_labels(self, indices: Tensor) -> Tensor:
        """Labels of images of the given indices (N,) when the user names none: balanced, in turn."""
        return indices % self.num_labels

    def default(self, count: int, device: torch.device) -> Tensor:
        """Conditions of the first `count` images when the user names no labels."""
        return self(self.default_labels(torch.arange(count, device=device)))

    def label(self, wanted: int | str) -> int:
        """The label that somebody names: a number, in digits or not, or the name of a class, in any case.

        Raises:
            InputError: there is no such label.
        """
        text = str(wanted).strip()
        if re.fullmatch("[+-]?[0-9]+", text):
            if 0 <= int(text) < self.num_labels:
                if text in self.class_names and self.class_names[int(text)] != text:
                    note(f"label {text} is a number here, that of the class called {self.class_names[int(text)]}")
                return int(text)
            raise InputError(f"label {text} is not a class of this model; its classes are 0 to {self.num_labels - 1}")
        names = [name.casefold() for name in self.class_names]
        if names.count(text.casefold()) == 1:
            return names.index(text.casefold())
        if text in self.class_names:
            return self.class_names.index(text)
        if not names:
            raise InputError(
                f"label {text!r} is no number, and this model has no names of classes; give 0 to {self.num_labels - 1}"
            )
        close = difflib.get_close_matches(text.casefold(), names, n=1)
        nearest = self.class_names[names.index(close[0])] if close else ""
        hint = f"did you mean {nearest}?" if nearest else f"they are {', '.join(self.class_names[:5])}" + ", …" * (len(names) > 5)
        raise InputError(f"label {text!r} is not a class of this model; {hint}")

    def of_texts(self, source: str | Prompts, place: str = "", device: torch.device | None = None) -> "Conditions":
        """The same with other captions for labels, of a text-conditional model.

        Args:
            source: as `dd2.text.captions.captions_of`: prompts, or the name of a list of them or of a file of features.
            place, device: of the text encoder, as there.

        Raises:
            InputError: the model is not text-conditional, or they do not fit it.
        """
        named = source if isinstance(source, str) else source.source
        raise InputError(
            f"captions ({named}) were given, but this model is conditioned on classes: leave them out, or name labels"
        )

    def later(self, source: str, place: str = "", device: torch.device | None = None) -> "Conditions":
        """As `of_texts`, of captions that may be looked at when a label is first asked for."""
        return self.of_texts(source, place, device)

    def digest(self) -> str:
        """Hash of what the labels stand for; empty where that is fixed.

        Raises:
            InputError: it has not been given yet.
        """
        return ""


class ClassLabels(Conditions):
    """Classes: the condition is the label.

    Args:
        num_classes: how many there are.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def call(self, names: Sequence[str]) -> None:
        """Name the classes.

        Raises:
            InputError: there are not as many names as classes, or they are no texts.
        """
        if len(names) != self.num_classes or not all(isinstance(name, str) for name in names):
            raise InputError(f"class_names must be {self.num_classes} texts, one for each class, got {len(names)}")
        self.class_names = tuple(names)

    @property
    def num_labels(self) -> int:
        return self.num_classes

    def __call__(self, labels: Tensor) -> Tensor:
        return labels

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=device)


class CaptionLabels(Conditions):
    """Captions, given by `of_texts`: a label is the number of a row.

    Args:
        length: positions P of a caption.
        channels: of their features.
        captions: if they are known already, or how they are got when somebody asks for one.
        encoder: that the model was trained with; None where nobody said.

    Raises:
        InputError: the captions do not fit the model.
    """

    def __init__(
        self,
        length: int,
        channels: int,
        captions: Captions | Callable[[], Captions] | None = None,
        encoder: EncoderSpec | None = None,
    ) -> None:
        self.length, self.channels, self.encoder, self._captions = length, channels, encoder, captions
        if encoder is not None and (encoder.length, encoder.channels) != (length, channels):
            raise InputError(
                f"the text encoder {encoder.said()} of {encoder.channels} channels, does not go with this model, which reads "
                f"{length} positions of {channels}"
            )
        if isinstance(captions, Captions):
            self._fitting(captions)

    @property
    def num_labels(self) -> int:
        return len(self._known)

    def __call__(self, labels: Tensor) -> Tensor:
        return self._known[labels]

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        return torch.empty(count, self.length, self.channels, device=device)

    @property
    def class_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return () if self._captions is None else self._known.texts

    def of_texts(self, source: str | Prompts, place: str = "", device: torch.device | None = None) -> "CaptionLabels":
        found = captions_of(source, self.encoder, place, device)
        known = self.encoder if self.encoder is not None and self.encoder.digest else found.encoder or self.encoder
        return CaptionLabels(self.length, self.channels, found, known)

    def later(self, source: str, place: str = "", device: torch.device | None = None) -> "CaptionLabels":
        made = functools.partial(captions_of, source, self.encoder, place, device)
        return CaptionLabels(self.length, self.channels, made, self.encoder)

    def digest(self) -> str:
        return self._known.digest

    @property
    def _known(self) -> Captions:
        if self._captions is None:
            raise InputError(
                "this model is conditioned on captions: give prompts, a list of them (--prompts FILE), or in training --captions"
            )
        if not isinstance(self._captions, Captions):
            self._captions = self._fitting(self._captions())
        return self._captions

    def _fitting(self, captions: Captions) -> Captions:
        if (captions.length, channels := captions.words.shape[1]) != (self.length, self.channels):
            raise InputError(
                f"the captions' features are of {captions.length} positions and {channels} channels; this model needs "
                f"{self.length} and {self.channels}: make them with the text encoder that it was trained with"
            )
        return captions


class Sizes(Protocol):
    """What the sizes of a transformer say of its condition."""

    @property
    def num_classes(self) -> int: ...
    @property
    def caption_dim(self) -> int: ...
    @property
    def caption_length(self) -> int: ...


def conditions_of(sizes: Sizes) -> Conditions:
    """Classes, or captions that are yet to be given."""
    return CaptionLabels(sizes.caption_length, sizes.caption_dim) if sizes.caption_dim else ClassLabels(sizes.num_classes)
