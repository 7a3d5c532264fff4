"""Images as bytes: the one rounding, grids for people, PNG. `dd2.writers` makes folders and .npz files of them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.errors import NumericalError
from dd2.files import write_atomic


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, channels, H, W) in [-1, 1] to uint8 NHWC, round(127.5 x + 127.5) clamped."""
    return pixels(images).cpu().numpy()


def pixels(images: Tensor) -> Tensor:
    """As `to_uint8`, where the images are."""
    levels = byte_levels(images.detach())
    if not torch.isfinite(levels).all():
        raise NumericalError("an image holds NaN or infinity, which would be black: the network that drew it is broken")
    return levels.to(torch.uint8).permute(0, 2, 3, 1)


def byte_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to whole numbers 0 to 255 in float32: the one rounding of files and of metrics."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255)


def grid(images: Tensor, columns: int = 0, padding: int = 2, zoom: int = 0) -> Image.Image:
    """As `one_picture`, of images (N, channels, H, W) in [-1, 1]."""
    return one_picture(to_uint8(images), columns, padding, zoom)


def one_picture(levels: np.ndarray, columns: int = 0, padding: int = 2, zoom: int = 0) -> Image.Image:
    """One picture of all images, uint8 (N, H, W, channels).

    Args:
        levels: what to show, row by row.
        columns: images per row; 0 makes the grid about square.
        padding: pixels between images, before zooming.
        zoom: whole-number enlargement; 0 brings small images to about 48 pixels.
    """
    count, height, width, channels = levels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    zoom = zoom or max(1, 48 // height)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8)
    for index, image in enumerate(levels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        sheet[top : top + height, left : left + width] = image
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    return picture(sheet)


def save_grid(images: Tensor, path: Path, columns: int = 0) -> None:
    """Write `grid` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, png(grid(images, columns)))


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image: Image.Image) -> bytes:
    """A picture as the bytes of a JPEG file that loses little (quality 95, colours at every pixel)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def picture(levels: np.ndarray) -> Image.Image:
    """One image uint8 (H, W, channels) of 1 or 3 channels."""
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
