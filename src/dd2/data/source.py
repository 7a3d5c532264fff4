"""Labelled images to train tokenizers and teachers on: embedded ones, or the user's folder or zip."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.data import digits
from dd2.data.captioned import captioned_layout, captions_in
from dd2.data.idx import IdxImages
from dd2.data.layout import layout
from dd2.data.pictures import Pictures
from dd2.data.scenes import SIZE, SceneCells, Scenes
from dd2.errors import InputError
from dd2.processes import say

MODES: dict[int, Literal["L", "RGB"]] = {1: "L", 3: "RGB"}
"""Channels -> Pillow's name."""


class ImageData(Protocol):
    """Images with labels, classes or captions, split into "train" and "test".

    Attributes:
        num_classes: labels there are.
        class_names: of the labels in order; empty where they have none.
        captions: what the labels say, in order, where each is a text; else empty.
    """

    num_classes: int
    class_names: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def num_training(self) -> int:
        """Images of the split "train"."""
        ...

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random augmented images (size, channels, H, W) in [-1, 1] and labels (size,)."""
        ...


class Digits:
    """The embedded digits."""

    num_classes = digits.NUM_CLASSES
    class_names: tuple[str, ...] = digits.CLASS_NAMES
    captions: tuple[str, ...] = ()

    @property
    def num_training(self) -> int:
        return len(digits.load("train")[0])

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return digits.batch(split, size, random)


class ImageFolder:
    """Images in one folder per class, or with captions, in a directory or a zip; centre-cropped, resized. Those of classes are
    mirrored at random; captions may speak of sides.

    Args:
        path: directory or .zip, laid out as `dd2.data.captioned` or `dd2.data.layout` knows it.
        image_size: height and width to give.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        InputError: there is no such path, or it holds neither captions nor class folders with images.
    """

    def __init__(self, path: Path, image_size: int, channels: int) -> None:
        if channels not in MODES:
            raise InputError(f"images from {path} can have 1 or 3 channels, not {channels}: set image_channels")
        self.image_size, self.channels = image_size, channels
        self._pictures = Pictures(path, "data")
        if not self._pictures.names:
            raise self._pictures.none()
        self.captions: tuple[str, ...] = ()
        self.class_names: tuple[str, ...] = ()
        if (found := captions_in(self._pictures)) is not None:
            self.captions, self._items, own = captioned_layout(found)
        else:
            classes = layout(self._pictures.names, f"data {path}")
            self.class_names, self._items, own = classes.class_names, classes.items, classes.own
        self._held_out = "held out, one in 20" if own else "for tests, as its folders say"
        self.num_classes = len(self.captions or self.class_names)

    @property
    def num_training(self) -> int:
        return len(self._items["train"])

    def said(self) -> str:
        """What was found."""
        counts = {split: len(items) for split, items in self._items.items()}
        names = ", ".join(self.class_names[:4]) + (", …" if self.num_classes > 4 else "")
        classes = f"{self.num_classes:,} class{'' if self.num_classes == 1 else 'es'} ({names})"
        labels = f"{self.num_classes:,} different captions" if self.captions else classes
        left = len(self._pictures.names) - sum(counts.values())
        without = f" ({left:,} without one are left out)" if left else ""
        return (
            f"data {self._pictures.path}: {self._pictures.said()}, {labels}{without}; {counts['train']:,} to train on, "
            f"{counts['test']:,} {self._held_out}"
        )

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        items = self._items[split]
        rows = torch.randint(len(items), (size,), generator=random).tolist()
        mirror = (torch.rand(size, generator=random) < 0.5) & (split == "train" and not self.captions)
        images = torch.stack([self._image(items[row][0]) for row in rows])
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, torch.tensor([items[row][1] for row in rows])

    def _image(self, name: str) -> Tensor:
        image = self._pictures.image(name, MODES[self.channels])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return pixels.view(self.image_size, self.image_size, -1).permute(2, 0, 1)


EMBEDDED: dict[str, tuple[int, type[Digits | Scenes | SceneCells]]] = {
    "digits": (digits.SIZE, Digits),
    "scenes": (SIZE, Scenes),
    "scenes-cells": (digits.SIZE, SceneCells),
}
"""Name of embedded data -> pixels of a side, and what it is."""

LOOKED_AT = 200
"""Images whose shapes stand for all."""


def some_shapes(name: str, most: int = LOOKED_AT) -> list[tuple[int, int, int]]:
    """(channels, height, width) of images of what `open_data` opens, as they are stored: the first one, and others evenly."""
    if name in EMBEDDED:
        return [(1, EMBEDDED[name][0], EMBEDDED[name][0])]
    path = Path(name)
    if IdxImages.found_in(path):
        return [(1, *IdxImages(path, 0).stored_size)]
    pictures = Pictures(path, "data")
    if not pictures.names:
        raise pictures.none()
    found = [pictures.image(each) for each in pictures.names[:: max(1, len(pictures.names) // most)]]
    return [(len(image.getbands()), image.height, image.width) for image in found]


def first_shape(name: str) -> tuple[int, int, int]:
    """(channels, height, width) of the first image of what `open_data` opens, as it is stored."""
    return some_shapes(name, most=1)[0]


def open_data(name: str, image_size: int, channels: int, *, quiet: bool = False) -> ImageData:
    """The data that a configuration names: one of `EMBEDDED`, or the path of a folder or zip of pictures or of MNIST's files.

    What was found in a folder or zip of pictures is printed, unless `quiet`.
    """
    if name in EMBEDDED:
        size, kind = EMBEDDED[name]
        if (image_size, channels) != (size, 1):
            raise InputError(f"the {name} are 1 x {size} x {size}, not {channels} x {image_size} x {image_size}")
        return kind()
    if IdxImages.found_in(Path(name)):
        if channels != 1:
            raise InputError(f"data {name} is grey; set tokenizer.image_channels to 1")
        return IdxImages(Path(name), image_size)
    folder = ImageFolder(Path(name), image_size, channels)
    if not quiet:
        say(folder.said())
    return folder
