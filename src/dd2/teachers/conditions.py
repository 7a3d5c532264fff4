"""What an image is conditioned on: integer labels for people, condition tensors for transformers."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.teachers.captions import Captions


class Conditions(ABC):
    """Labels 0 … num_labels - 1 and the condition that each stands for. Opaque to everything but the teacher."""

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

    def use_captions(self, file: Path) -> None:
        """Let the captions of a file (dd2 text-features) be the labels of a text-conditional model.

        Raises:
            InputError: the model is not text-conditional, or the file does not fit it.
        """
        raise InputError(f"captions {file} were given, but this model is conditioned on classes")

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

    @property
    def num_labels(self) -> int:
        return self.num_classes

    def __call__(self, labels: Tensor) -> Tensor:
        return labels

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=device)


class CaptionLabels(Conditions):
    """Captions, given by `use_captions`: a label is the number of a row.

    Args:
        length: positions P of a caption.
        channels: of their features.
        captions: if they are known already.
    """

    def __init__(self, length: int, channels: int, captions: Captions | None = None) -> None:
        self.length, self.channels, self.captions = length, channels, captions

    @property
    def num_labels(self) -> int:
        return len(self._known)

    def __call__(self, labels: Tensor) -> Tensor:
        return self._known[labels]

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        return torch.empty(count, self.length, self.channels, device=device)

    def use_captions(self, file: Path) -> None:
        self.captions = Captions.load(file, self.length, self.channels)

    def digest(self) -> str:
        return self._known.digest()

    @property
    def _known(self) -> Captions:
        if self.captions is None:
            raise InputError(
                "this model is conditioned on captions: give their features with --captions FILE (dd2 text-features makes it)"
            )
        return self.captions
