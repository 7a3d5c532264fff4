"""Anybody's images: a folder, a zip or an .npz, read one at a time."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dd2.data.pictures import Pictures
from dd2.errors import InputError
from dd2.evaluation.npz import read_npz
from dd2.files import file_digest


class ImageSet:
    """Images of one size by index.

    Args:
        path: a folder or zip of images (in any subfolders), or an .npz with `arr_0`, uint8 NHWC.
        what: they are to the user ("images", "reference"), for messages.

    Attributes:
        shape: (H, W, channels) of the first; grey ones among colour images are spread to three channels.
        seeds, labels: of images that dd2 sample wrote, else None.

    Raises:
        InputError: there are no images.
    """

    def __init__(self, path: Path, what: str = "images") -> None:
        self.path, self.what = path, what
        self.seeds: list[int] | None = None
        self.labels: list[int] | None = None
        self._array: np.ndarray | None = None
        self._pictures: Pictures | None = None
        if not path.exists():
            raise InputError(f"{what} {path}: there is no such folder, zip or .npz")
        if path.suffix == ".npz" and path.is_file():
            self._array, self.labels, self.seeds = read_npz(path, what)
        else:
            self._pictures = Pictures(path, what)
            self._read_names()
        if not len(self):
            raise self._pictures.none() if self._pictures else InputError(f"{what} {path}: arr_0 holds no images")
        first = np.array(self._array[0]) if self._array is not None else self._decode(0)
        self.shape: tuple[int, ...] = first.shape
        if len(self) < 2:
            raise InputError(f"{what} {path}: there is one image in it, and a distance needs at least 2")

    def said(self) -> str:
        """What was found."""
        height, width, channels = self.shape
        found = self._pictures.said() if self._pictures else f"{len(self):,} images"
        return f"{self.what} {self.path}: {found}, {width} x {height} {'grey' if channels == 1 else 'colour'}"

    def __len__(self) -> int:
        return len(self.names) if self._array is None else len(self._array)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1] of indices (B,).

        Raises:
            InputError: one cannot be read, or their sizes differ.
        """
        pixels = self.pictures(index)
        height, width, channels = self.shape
        for i, p in zip(index, pixels, strict=True):
            if p.shape[:2] != (height, width):
                size, first = f"{p.shape[1]} x {p.shape[0]}", f"{width} x {height}"
                raise InputError(
                    f"{self.what} {self.path} differ in size: number {int(i)} is {size}, the first {first}; bring them to one"
                )
        pixels = [np.broadcast_to(p, (height, width, channels)) if channels == 3 else p for p in pixels]
        if any(p.shape[2] != channels for p in pixels):
            raise InputError(f"{self.what} {self.path}: the first is grey, others are in colour; make all of them colour")
        stacked = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
        return stacked.permute(0, 3, 1, 2)

    def pictures(self, index: Tensor) -> list[np.ndarray]:
        """Images of indices (B,) as they are stored, each uint8 (H, W, 1 or 3), of any sizes.

        Raises:
            InputError: one cannot be read.
        """
        if self._array is not None:
            return [np.array(self._array[int(i)]) for i in index]
        return [self._decode(int(i)) for i in index]

    @property
    def names(self) -> list[str]:
        """Of the files in order, with folders; none of an .npz."""
        return self._pictures.names if self._pictures else []

    def digest(self) -> str:
        """SHA-256 of the file, or of the names and contents of a folder."""
        if self.path.is_file():
            return file_digest(self.path)
        content = hashlib.sha256()
        for name in self.names:
            assert self._pictures is not None
            known = hashlib.sha256(self._pictures.read(name)).hexdigest()
            content.update(os.fsencode(f"{name} {known}\n"))
        return content.hexdigest()

    def _read_names(self) -> None:
        """Labels and seeds, where all names say them."""
        marks = [found for name in self.names if (found := re.search(r"_label(\d+)_seed(\d+)\.png$", name))]
        if marks and len(marks) == len(self.names):
            self.labels, self.seeds = [int(mark[1]) for mark in marks], [int(mark[2]) for mark in marks]

    def _decode(self, index: int) -> np.ndarray:
        assert self._pictures is not None
        pixels = np.array(self._pictures.image(self.names[index]))
        return pixels[..., None] if pixels.ndim == 2 else pixels
