"""Images as clean-fid and GigaGAN's evaluators bring them to a network's size: what decides a text-to-image FID."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.evaluation.inception import SIDE

Prepare = Callable[[np.ndarray], Tensor]
"""One image as it is stored, uint8 (H, W, 1 or 3), to what a network reads, float32 (3, h, w)."""

COCO_SIDE = 256
"""Pixels to which GigaGAN's protocol brings both sides of a comparison."""


def centre_square(image: Image.Image, side: int = COCO_SIDE) -> Image.Image:
    """The largest square in the middle, by Lanczos to side x side pixels: GigaGAN's protocol, which DMD2, LlamaGen and others
    follow.

    The offset is rounded to even halves, as torchvision's crop does.
    """
    short = min(image.size)
    left, top = (round((length - short) / 2) for length in image.size)
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def clean_resize(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """clean-fid's resize (Parmar et al., CVPR 2022): bicubic with a filter against aliasing, in floating point, each channel
    alone.

    Args:
        pixels: (H, W, 3) uint8.
        side: of the result, whatever the aspect.

    Returns:
        (side, side, 3) float32 in [0, 255], not rounded.
    """
    planes = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(3)]
    resized = [np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized, -1).clip(0, 255)


def as_stored(pixels: np.ndarray) -> Tensor:
    """For Inception: clean-fid's resize of an image as it is (its default, and MJHQ's), in [0, 255]."""
    return torch.from_numpy(clean_resize(rgb(pixels))).permute(2, 0, 1)


def as_coco(pixels: np.ndarray) -> Tensor:
    """For Inception: the middle square at 256 pixels, then clean-fid's resize (COCO-30k), in [0, 255]."""
    return as_stored(np.asarray(centre_square(Image.fromarray(rgb(pixels)))))


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey images with three equal channels."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
