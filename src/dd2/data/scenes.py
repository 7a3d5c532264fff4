"""Scenes: the embedded digits in the cells of 32 x 32 images, with captions that must be read to be drawn."""

import torch
from torch import Tensor

from dd2.data import digits
from dd2.data.scene_captions import CELL_NAMES, SIDE, captions

SIZE = SIDE * digits.SIZE
"""Pixels of a side."""

GENTLE = 0.4
"""Of the digits' augmentation: the bench is about reading, so that its digits vary less than those of the digits' own."""


class Scenes:
    """Scenes whose labels are the numbers of their captions. Those of the split "test" are of digits that are kept from training;
    captions that are kept from it, `captions("unseen")`, are in neither.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._captions = captions("seen")
        self.captions = tuple(caption.text for caption in self._captions)
        self.num_classes = len(self.captions)

    @property
    def num_training(self) -> int:
        return len(digits.load("train")[0])

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self.num_classes, (size,), generator=random)
        chosen = torch.rand(size, generator=random).tolist()
        allowed = [self._captions[label].scenes for label in labels.tolist()]
        cells = torch.tensor([scenes[int(u * len(scenes))] for u, scenes in zip(chosen, allowed, strict=True)])
        return draw(cells, split, random), labels


class SceneCells:
    """Single cells of scenes: what a classifier of them learns."""

    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = CELL_NAMES
    num_classes = len(CELL_NAMES)

    @property
    def num_training(self) -> int:
        return len(digits.load("train")[0])

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self.num_classes, (size,), generator=random)
        return _cell(labels, split, random), labels


def draw(cells: Tensor, split: str, random: torch.Generator) -> Tensor:
    """Scenes (B, 1, 32, 32) in [-1, 1] of what their cells (B, 4) hold, by digits of a split, drawn anew for each."""
    parts = _cell(cells.flatten(), split, random).view(len(cells), SIDE, SIDE, digits.SIZE, digits.SIZE)
    return parts.transpose(2, 3).reshape(len(cells), 1, SIZE, SIZE)


def cut(images: Tensor, side: int = SIDE) -> Tensor:
    """Cells (B * side^2, channels, H / side, W / side), row by row, of images (B, channels, H, W)."""
    batch, channels, height, width = images.shape
    parts = images.reshape(batch, channels, side, height // side, side, width // side).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(batch * side**2, channels, height // side, width // side)


def _cell(held: Tensor, split: str, random: torch.Generator) -> Tensor:
    """Cells (N, 1, 16, 16) of what they hold (N,)."""
    images, labels = digits.load(split)
    of_digit = labels.argsort(stable=True)
    counts = labels.bincount(minlength=digits.NUM_CLASSES)
    wanted = (held - 1).clamp_min(0) % digits.NUM_CLASSES
    among = (torch.rand(len(held), generator=random) * counts[wanted]).long()
    rows = of_digit[(counts.cumsum(0) - counts)[wanted] + among]
    drawn = digits.augment(images[rows], random, tilted=held > digits.NUM_CLASSES, strength=GENTLE)
    return torch.where((held > 0).view(-1, 1, 1, 1), drawn, torch.full_like(drawn, -1))
