"""Images to files as they are drawn: a folder of PNGs, an .npz, or one grid."""

import os
import shutil
import signal
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from dd2.files import atomic_file, behind_links, write_atomic
from dd2.images import jpeg, one_picture, picture, pixels, png
from dd2.processes import answering, say

ENCODERS = 8
"""Threads that compress PNGs, at most; zlib works without Python's lock."""


NameOf = Callable[[int, int, int], str]
"""Number, label and seed of an image -> the name of its file."""


def numbered(number: int, label: int, seed: int) -> str:
    """The usual name, from which `dd2.evaluation.images` reads label and seed."""
    return f"{number:06d}_label{label}_seed{seed}.png"


class ImageWriter(ABC):
    """A destination for images, one batch after the other.

    A thread of its own writes a batch while the next one is drawn. Once the block is left, what was written is a whole file, or
    whole files: at its end, and with `keep_partial` also where KeyboardInterrupt ended it. Any other exception leaves what was
    there before, but for a folder's images.

    Args:
        keep_partial: keep the images that are done when KeyboardInterrupt ends the block.

    Attributes:
        kept: images that are there, once the block is left.
    """

    def __init__(self, *, keep_partial: bool = False) -> None:
        self.kept, self._written, self._keep_partial = 0, 0, keep_partial
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def add(self, images: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
        """Images (B, channels, H, W) in [-1, 1] on any device, with a label and a seed each."""
        levels = pixels(images)
        self._wait()  # at most one batch waits, so that memory is bounded
        self._pending = self._thread.submit(self._write_batch, levels, labels, seeds)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        whole = error is None or (self._keep_partial and isinstance(error, KeyboardInterrupt))
        with answering((signal.SIGINT, signal.SIGTERM), _wait_for_the_file):
            try:
                self._thread.shutdown()
                if whole:
                    self._wait()
                    if self._written:
                        self._finish()
                        self.kept = self._written
            finally:
                self._discard()

    def _write_batch(self, levels: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self._write(levels.cpu().numpy(), labels, seeds)
        self._written += len(levels)

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


def _wait_for_the_file(number: int, frame: object) -> None:
    say("finishing the file, one moment", sys.stderr)


class FolderWriter(ImageWriter):
    """One file per image.

    Args:
        folder: where to.
        first: number of the first image.
        name: (number, label, seed) -> its path in the folder, .png or .jpg; by default all three in one name, as PNG.
    """

    def __init__(self, folder: Path, first: int = 0, name: NameOf | None = None, *, keep_partial: bool = False) -> None:
        super().__init__(keep_partial=keep_partial)
        self.folder, self._next, self._name = folder, first, name or numbered
        self._encoders = ThreadPoolExecutor(min(ENCODERS, os.cpu_count() or 1))

    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        def write(index: int) -> None:
            path = self.folder / self._name(self._next + index, labels[index], seeds[index])
            if path.parent != self.folder:  # a layout's own; the folder itself was made by who asked for it
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (jpeg if path.suffix == ".jpg" else png)(picture(pixels[index])))

        list(self._encoders.map(write, range(len(pixels))))
        self._next += len(pixels)

    def _discard(self) -> None:
        self._encoders.shutdown()


class NpzWriter(ImageWriter):
    """`arr_0` uint8 NHWC (the ADM evaluator's key), with labels and seeds beside it; it is there, whole, at the end.

    Pixels go to a file beside it first, as the number of images stands at the head of an array and may turn out smaller.
    """

    def __init__(self, path: Path, *, keep_partial: bool = False) -> None:
        super().__init__(keep_partial=keep_partial)
        self.path = behind_links(path)
        self._raw = self.path.with_name(f".{self.path.name}.{os.getpid()}.raw")
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
        with atomic_file(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member, self._raw.open("rb") as raw:
                head = {"descr": "|u1", "fortran_order": False, "shape": (len(self._labels), *self._shape)}
                np.lib.format.write_array_header_1_0(member, head)
                shutil.copyfileobj(raw, member, 2**24)
            for name, values in {"labels": self._labels, "seeds": self._seeds}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(values))

    def _discard(self) -> None:
        self._file.close()
        self._raw.unlink(missing_ok=True)


class GridWriter(ImageWriter):
    """All images as one PNG, about square."""

    def __init__(self, path: Path, *, keep_partial: bool = False) -> None:
        super().__init__(keep_partial=keep_partial)
        self.path = path
        self._parts: list[np.ndarray] = []

    def _write(self, pixels: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self._parts.append(pixels)

    def _finish(self) -> None:
        write_atomic(self.path, png(one_picture(np.concatenate(self._parts))))


def open_writer(out: Path, first: int = 0, name: NameOf | None = None, *, keep_partial: bool = False) -> ImageWriter:
    """The writer that a path asks for: .npz, .png (one grid), or a folder.

    Args:
        out: where to; its folder must exist.
        first: number of the first image.
        name: of a folder's files, as `FolderWriter`.
        keep_partial: as `ImageWriter`.
    """
    if out.suffix == ".npz":
        return NpzWriter(out, keep_partial=keep_partial)
    if out.suffix == ".png":
        return GridWriter(out, keep_partial=keep_partial)
    return FolderWriter(out, first, name, keep_partial=keep_partial)
