"""Labelled images to train tokenizers and teachers on: the embedded digits, or the user's folder or zip."""

import io
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dd2.data import digits
from dd2.data.idx import IdxImages
from dd2.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT_EVERY = 20
"""One image in this many is kept from training, where no folders train and test (or val) say which."""

Item = tuple[str, int]
"""Name and class of an image."""


class Pictures:
    """The picture files of a directory or a zip, by name.

    Raises:
        zipfile.BadZipFile: the path is a file, but no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        names = self._zip.namelist() if self._zip else [str(file.relative_to(path)) for file in path.rglob("*")]
        self.names = sorted(name for name in names if name.lower().endswith(SUFFIXES))

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()


class ImageData(Protocol):
    """Images with class labels, split into "train" and "test"."""

    num_classes: int

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random augmented images (size, channels, H, W) in [-1, 1] and labels (size,)."""
        ...


class Digits:
    """The embedded digits."""

    num_classes = digits.NUM_CLASSES

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return digits.batch(split, size, random)


class ImageFolder:
    """Images in one folder per class, in a directory or a zip; centre-cropped, resized, mirrored at random.

    Args:
        path: directory or .zip.
        image_size: height and width to give.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        InputError: there is no such path, or it holds no class folders with images.
    """

    def __init__(self, path: Path, image_size: int, channels: int) -> None:
        self.path, self.image_size, self.mode = path, image_size, {1: "L", 3: "RGB"}.get(channels)
        if self.mode is None:
            raise InputError(f"images from {path} can have 1 or 3 channels, not {channels}; set tokenizer.image_channels")
        if not path.exists():
            raise InputError(f"data {path} does not exist; give a folder or zip of CLASS/IMAGE files, or 'digits'")
        try:
            self._pictures = Pictures(path)
        except zipfile.BadZipFile as error:
            raise InputError(f"data {path} is neither a folder nor a zip file") from error
        names = [name for name in self._pictures.names if "/" in name]
        names = [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
        classes = sorted({name.split("/")[-2] for name in names})
        if not classes:
            raise InputError(f"data {path} holds no CLASS/IMAGE files ({', '.join(SUFFIXES)})")
        self.num_classes = len(classes)
        items = [(name, classes.index(name.split("/")[-2])) for name in names]
        self._items = _published_split(items) or _own_split(items)

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        items = self._items[split]
        rows = torch.randint(len(items), (size,), generator=random).tolist()
        mirror = (torch.rand(size, generator=random) < 0.5) & (split == "train")
        images = torch.stack([self._image(items[row][0]) for row in rows])
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, torch.tensor([items[row][1] for row in rows])

    def _image(self, name: str) -> Tensor:
        try:
            with Image.open(io.BytesIO(self._pictures.read(name))) as file:
                image = file.convert(self.mode)
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise InputError(f"{self.path}: {name} cannot be read as an image; remove or replace it") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return pixels.view(self.image_size, self.image_size, -1).permute(2, 0, 1)


def _published_split(items: list[Item]) -> dict[str, list[Item]]:
    """TRAIN/CLASS/IMAGE and TEST/CLASS/IMAGE, if all files lie in such folders; else nothing."""
    names = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    for name, label in items:
        parts = name.lower().split("/")
        split = names.get(parts[-3]) if len(parts) > 2 else None
        if split is None:
            return {}
        splits[split].append((name, label))
    return splits if splits["train"] and splits["test"] else {}


def _own_split(items: list[Item]) -> dict[str, list[Item]]:
    """One image in `HELD_OUT_EVERY` is for tests."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(1, len(items) // HELD_OUT_EVERY)
    return {
        "test": [items[index] for index in order[:held_out]],
        "train": [items[index] for index in order[held_out:]] or items,
    }


def open_data(name: str, image_size: int, channels: int) -> ImageData:
    """The data that a configuration names: "digits", or the path of a folder or zip of pictures or of MNIST's files."""
    if name == "digits":
        if (image_size, channels) != (digits.SIZE, 1):
            raise InputError(f"the digits are 1 x {digits.SIZE} x {digits.SIZE}, not {channels} x {image_size} x {image_size}")
        return Digits()
    if IdxImages.found_in(Path(name)):
        if channels != 1:
            raise InputError(f"data {name} is grey; set tokenizer.image_channels to 1")
        return IdxImages(Path(name), image_size)
    return ImageFolder(Path(name), image_size, channels)
