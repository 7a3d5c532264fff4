"""Anybody's images: a folder, a zip or an .npz, read one at a time."""

import hashlib
import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.data.source import SUFFIXES, Pictures
from dd2.errors import InputError
from dd2.files import file_digest

READ_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
"""What reading a damaged, encrypted or foreign picture or archive raises."""


class ImageSet:
    """Images of one size by index.

    Args:
        path: a folder or zip of images (in any subfolders), or an .npz with `arr_0`, uint8 NHWC.

    Attributes:
        shape: (H, W, channels) of the first; grey ones among colour images are spread to three channels.
        seeds, labels: of images that dd2 sample wrote, else None.

    Raises:
        InputError: there are no images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seeds: list[int] | None = None
        self.labels: list[int] | None = None
        self._array: np.ndarray | None = None
        self._pictures: Pictures | None = None
        self._names: list[str] = []
        if not path.exists():
            raise InputError(f"images {path} do not exist; give a folder, a zip or an .npz")
        if path.suffix == ".npz":
            self._open_npz()
        else:
            self._open_names()
        if not len(self):
            raise InputError(f"images {path}: there are none in it ({', '.join(SUFFIXES)}, or arr_0 of an .npz)")
        first = np.array(self._array[0]) if self._array is not None else self._decode(self._names[0])
        self.shape: tuple[int, ...] = first.shape

    def __len__(self) -> int:
        return len(self._array) if self._array is not None else len(self._names)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1] of indices (B,).

        Raises:
            InputError: one cannot be read, or their sizes differ.
        """
        if self._array is not None:
            pixels = [np.array(self._array[int(i)]) for i in index]
        else:
            pixels = [self._decode(self._names[int(i)]) for i in index]
        height, width, channels = self.shape
        for i, p in zip(index, pixels, strict=True):
            if p.shape[:2] != (height, width):
                size, first = f"{p.shape[1]} x {p.shape[0]}", f"{width} x {height}"
                raise InputError(
                    f"images {self.path} differ in size: number {int(i)} is {size}, the first {first}; bring them to one"
                )
        pixels = [np.broadcast_to(p, (height, width, channels)) if channels == 3 else p for p in pixels]
        if any(p.shape[2] != channels for p in pixels):
            raise InputError(f"images {self.path}: the first is grey, others are in colour; make all of them colour")
        stacked = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
        return stacked.permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of the file, or of the names and contents of a folder."""
        if self.path.is_file():
            return file_digest(self.path)
        content = hashlib.sha256()
        for name in self._names:
            content.update(f"{name} {file_digest(self.path / name)}\n".encode())
        return content.hexdigest()

    def _open_npz(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                if "arr_0.npy" not in archive.namelist():
                    raise InputError(f"images {self.path}: no arr_0 in it, only {archive.namelist()}")
                entry = archive.getinfo("arr_0.npy")
                self.seeds, self.labels = _integers(archive, "seeds.npy"), _integers(archive, "labels.npy")
            stored = entry.compress_type == zipfile.ZIP_STORED
            array = _mapped(self.path, entry) if stored else np.load(self.path, allow_pickle=False)["arr_0"]
        except InputError:
            raise
        except READ_ERRORS as error:
            raise InputError(f"images {self.path} cannot be read ({error}); give an .npz with arr_0, uint8 NHWC") from error
        shape, kind = array.shape, array.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
            raise InputError(f"images {self.path}: arr_0 is {kind} {shape}, it must be uint8 (N, H, W, 1 or 3)")
        self._array = array

    def _open_names(self) -> None:
        try:
            self._pictures = Pictures(self.path)
        except zipfile.BadZipFile as error:
            raise InputError(f"images {self.path} are neither a folder, a zip nor an .npz") from error
        self._names = [name for name in self._pictures.names if not Path(name).name.startswith(".")]
        marks = [found for name in self._names if (found := re.search(r"_label(\d+)_seed(\d+)\.png$", name))]
        if marks and len(marks) == len(self._names):
            self.labels, self.seeds = [int(mark[1]) for mark in marks], [int(mark[2]) for mark in marks]

    def _decode(self, name: str) -> np.ndarray:
        assert self._pictures is not None
        try:
            with Image.open(io.BytesIO(self._pictures.read(name))) as file:
                if file.mode.startswith("I"):
                    raise InputError(f"images {self.path}: {name} has 16 bits a channel; convert it to 8")
                image = file if file.mode in ("L", "RGB") else file.convert("RGB")
                pixels = np.array(image)
        except InputError:
            raise
        except READ_ERRORS as error:
            raise InputError(f"images {self.path}: {name} cannot be read as an image; remove or replace it") from error
        return pixels[..., None] if pixels.ndim == 2 else pixels


def _integers(archive: zipfile.ZipFile, name: str) -> list[int] | None:
    if name not in archive.namelist():
        return None
    with archive.open(name) as file:
        return [int(value) for value in np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)]


def _check_sum(file: BinaryIO, entry: zipfile.ZipInfo) -> None:
    """Refuse an entry whose bytes are not those that were written: mapped, nothing else would look.

    Raises:
        ValueError: its checksum is another.
    """
    found, left = 0, entry.file_size
    while left and (part := file.read(min(left, 2**24))):
        found, left = zlib.crc32(part, found), left - len(part)
    if found != entry.CRC:
        raise ValueError("its checksum is wrong: it is damaged, fetch it again")


def _mapped(path: Path, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array of an uncompressed .npz entry, mapped: 50,000 images of 256 pixels would be 10 GB."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        file.seek(entry.header_offset + 30 + name_length + extra_length)
        _check_sum(file, entry)
        file.seek(entry.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read_header(file)
        return np.memmap(path, dtype=kind, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")
