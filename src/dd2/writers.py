"""Images to files as they are drawn: a folder of PNGs, an .npz, or one grid. What was handed over is kept whatever follows."""

import contextlib
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dd2.files import write_atomic
from dd2.images import byte_levels, one_picture, picture, png

ENCODERS = 8
"""Threads that compress PNGs, at most; zlib works without Python's lock."""


class ImageWriter(ABC):
    """A destination for images, one batch after the other; what is written is whole whenever it ends.

    A thread of its own writes a batch while the next one is drawn. Left by an exception, it still finishes what it was given.

    Attributes:
        count: images written.
    """

    def __init__(self) -> None:
        self.count = 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def add(self, images: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
        """Images (B, channels, H, W) in [-1, 1] on any device, with a label and a seed each."""
        pixels = byte_levels(images.detach()).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        self._wait()  # at most one batch waits, so that memory is bounded
        self._pending = self._thread.submit(self._written, pixels, labels, seeds)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._wait()
            if self.count:
                self._finish()
        finally:
            self._thread.shutdown()
            self._discard()

    def _written(self, pixels: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self._write(pixels.cpu().numpy(), labels, seeds)
        self.count += len(pixels)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()  # raises what writing raised

    @abstractmethod
    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        """One batch, uint8 (B, H, W, channels)."""

    def _finish(self) -> None:  # noqa: B027  (a folder needs none)
        """Once, after the last batch."""

    def _discard(self) -> None:  # noqa: B027
        """Clear away what was only needed on the way."""


class FolderWriter(ImageWriter):
    """One PNG per image, named by its number, label and seed.

    Args:
        folder: where to.
        first: number of the first image.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        super().__init__()
        self.folder, self._next = folder, first
        self._encoders = ThreadPoolExecutor(min(ENCODERS, os.cpu_count() or 1))

    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        def write(index: int) -> None:
            name = f"{self._next + index:06d}_label{labels[index]}_seed{seeds[index]}.png"
            write_atomic(self.folder / name, png(picture(pixels[index])))

        list(self._encoders.map(write, range(len(pixels))))
        self._next += len(pixels)

    def _discard(self) -> None:
        self._encoders.shutdown()


class NpzWriter(ImageWriter):
    """`arr_0` uint8 NHWC (the ADM evaluator's key), with labels and seeds beside it; it is there, whole, at the end.

    Pixels go to a file beside it first, as the number of images stands at the head of an array and may turn out smaller.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._raw = path.with_name(f".{path.name}.{os.getpid()}.raw")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._raw.open("wb")
        self._labels: list[int] = []
        self._seeds: list[int] = []
        self._shape: tuple[int, ...] = ()

    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self._file.write(pixels.tobytes())
        self._shape = pixels.shape[1:]
        self._labels += labels
        self._seeds += seeds

    def _finish(self) -> None:
        self._file.close()
        with zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member, self._raw.open("rb") as raw:
                head = {"descr": "|u1", "fortran_order": False, "shape": (len(self._labels), *self._shape)}
                np.lib.format.write_array_header_1_0(member, head)
                shutil.copyfileobj(raw, member, 2**24)
            for name, values in {"labels": self._labels, "seeds": self._seeds}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(values))
        os.replace(self._temporary, self.path)

    def _discard(self) -> None:
        self._file.close()
        for path in (self._raw, self._temporary):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


class GridWriter(ImageWriter):
    """All images as one PNG, about square."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._parts: list[np.ndarray] = []

    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self._parts.append(pixels)

    def _finish(self) -> None:
        write_atomic(self.path, png(one_picture(np.concatenate(self._parts))))


def open_writer(out: Path, first: int = 0) -> ImageWriter:
    """The writer that a path asks for: .npz, .png (one grid), or a folder.

    Args:
        out: where to; its folder must exist.
        first: number of the first image.
    """
    if out.suffix == ".npz":
        return NpzWriter(out)
    return GridWriter(out) if out.suffix == ".png" else FolderWriter(out, first)
