"""Images as files: grids for people, folders and npz for tools."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.files import write_atomic


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, channels, H, W) in [-1, 1] to uint8 NHWC, round(127.5 x + 127.5) clamped."""
    return byte_levels(images.detach().cpu()).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def byte_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to whole numbers 0 to 255 in float32: the one rounding of files and of metrics."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255)


def grid(images: Tensor, columns: int = 0, padding: int = 2, zoom: int = 0) -> Image.Image:
    """One picture of all images (N, channels, H, W) in [-1, 1].

    Args:
        images: what to show, row by row.
        columns: images per row; 0 makes the grid about square.
        padding: pixels between images, before zooming.
        zoom: whole-number enlargement; 0 brings small images to about 48 pixels.
    """
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    zoom = zoom or max(1, 48 // height)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8)
    for index, image in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        sheet[top : top + height, left : left + width] = image
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    return _pil(sheet)


def save_grid(images: Tensor, path: Path, columns: int = 0) -> None:
    """Write `grid` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, png(grid(images, columns)))


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_folder(images: Tensor, folder: Path, labels: list[int], seeds: list[int]) -> None:
    """One PNG per image, named by index, label and seed."""
    for index, pixels in enumerate(to_uint8(images)):
        name = f"{index:06d}_label{labels[index]}_seed{seeds[index]}.png"
        write_atomic(folder / name, png(_pil(pixels)))


def save_npz(images: Tensor, path: Path, labels: list[int], seeds: list[int]) -> None:
    """`arr_0` uint8 NHWC (the ADM evaluator's key), with labels and seeds beside it."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=to_uint8(images), labels=np.asarray(labels), seeds=np.asarray(seeds))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def export_npz(path: Path, order: Tensor, batch: int, draw: Callable[[Tensor], Tensor]) -> None:
    """Write `arr_0` uint8 NHWC without holding the images in memory.

    Args:
        path: the .npz.
        order: (N,) indices of images in the order of the file.
        batch: images at a time.
        draw: indices -> images (B, channels, H, W) in [-1, 1].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            for index, part in enumerate(order.split(batch)):
                pixels = to_uint8(draw(part))
                if index == 0:
                    shape = (len(order), *pixels.shape[1:])
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.write(pixels.tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
