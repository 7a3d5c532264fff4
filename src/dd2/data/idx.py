"""MNIST's file format: all images of a split in one gzipped array, as MNIST and Fashion-MNIST are published."""

import gzip
import struct
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.data.pictures import READ_ERRORS
from dd2.errors import InputError

FILES = {"train": "train", "test": "t10k"}
"""Split -> how its two files begin."""

IMAGES, LABELS = "-images-idx3-ubyte.gz", "-labels-idx1-ubyte.gz"


class IdxImages:
    """Grey images of the four files of MNIST, in a directory or a zip; never mirrored.

    Args:
        path: directory or .zip.
        image_size: height and width to give.

    Raises:
        InputError: a file is missing or damaged.
    """

    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    """The files have neither."""

    def __init__(self, path: Path, image_size: int) -> None:
        self.path, self.image_size = path, image_size
        self.num_classes = int(self._splits["train"][1].max()) + 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width in the files."""
        height, width = self._splits["train"][0].shape[1:]
        return height, width

    @property
    def num_training(self) -> int:
        """Images to train on."""
        return len(self._splits["train"][1])

    @staticmethod
    def found_in(path: Path) -> bool:
        """Whether a directory or zip holds such files."""
        name = FILES["train"] + IMAGES
        if path.is_dir():
            return (path / name).is_file()
        try:
            with zipfile.ZipFile(path) as archive:
                return name in archive.namelist()
        except READ_ERRORS:  # not a zip, or none that can be read, which who reads it as pictures will say
            return False

    def batch(self, split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images (size, 1, image_size, image_size) in [-1, 1] and labels (size,)."""
        images, labels = self._splits[split]
        rows = torch.randint(len(images), (size,), generator=random)
        chosen = images[rows].unsqueeze(1).float() / 127.5 - 1
        if chosen.shape[-1] != self.image_size:
            sides = (self.image_size, self.image_size)
            chosen = F.interpolate(chosen, size=sides, mode="bicubic", antialias=True).clamp(-1, 1)
        return chosen, labels[rows]

    @cached_property
    def _splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {split: (self._array(start + IMAGES), self._array(start + LABELS).long()) for split, start in FILES.items()}
        for split, (images, labels) in found.items():
            if images.ndim != 3 or labels.shape != images.shape[:1] or not images.numel():
                shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
                raise InputError(f"data {self.path}: images and labels of {split} are {shapes}, not (N, H, W) and (N,)")
        return found

    def _array(self, name: str) -> Tensor:
        """An idx file: zeros, type 8 (bytes), number of axes, their lengths as big-endian integers, the values."""
        try:
            if self.path.is_dir():
                packed = (self.path / name).read_bytes()
            else:
                with zipfile.ZipFile(self.path) as archive:
                    packed = archive.read(name)
            content = gzip.decompress(packed)
            axes = content[3]
            shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
            return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
        except READ_ERRORS as error:
            raise InputError(
                f"data {self.path}: {name} is missing or damaged ({error}); copy MNIST's four files again"
            ) from error
