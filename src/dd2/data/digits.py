"""The embedded data: scikit-learn's 1,797 handwritten digits (8x8, grey), brought to 16x16 and augmented.

Without augmentation a teacher memorises them and every later stage looks broken; small random affine maps make it
generalise.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
NUM_CLASSES = 10
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TILT = math.pi * 2 / 9
"""Angle of a tilted digit: 40 degrees."""

HELD_OUT = 297
"""Images kept from all training, for honest accuracies and likelihoods."""


@functools.cache
def load(split: str = "train") -> tuple[Tensor, Tensor]:
    """Raw digits of one split.

    Args:
        split: "train" (1,500 images) or "test" (297); the same shuffled split every time.

    Returns:
        images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,) int64.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(targets, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    keep = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    return images[keep], labels[keep]


def enlarge(images: Tensor) -> Tensor:
    """(N, 1, 8, 8) to (N, 1, 16, 16), without augmentation."""
    return _warp(images, torch.eye(2).expand(len(images), 2, 2), torch.zeros(len(images), 2))


def augment(images: Tensor, random: torch.Generator, tilted: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """(N, 1, 8, 8) to (N, 1, 16, 16) under random affine maps.

    Rotation within 9 degrees, scale 0.92 to 1.08 per axis, shear within 0.1, shift within 1 pixel of 16, all times `strength`.
    Those of `tilted` (N,) are turned further, by `TILT` to either side, and are smaller, so that their corners stay inside.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=random) * (high - low) + low

    turn, lean, size, far = (strength * most for most in (math.pi / 20, 0.1, 0.08, 1.0))
    angle, shear = uniform(-turn, turn), uniform(-lean, lean)
    scale_x, scale_y = uniform(1 - size, 1 + size), uniform(1 - size, 1 + size)
    if tilted is not None:
        side = torch.where(torch.rand(n, generator=random) < 0.5, -TILT, TILT)
        angle, small = angle + side * tilted, torch.where(tilted, 0.8, 1.0)
        scale_x, scale_y = scale_x * small, scale_y * small
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos / scale_x, (shear * cos - sin) / scale_x, sin / scale_y, (shear * sin + cos) / scale_y], 1)
    shift = torch.stack([uniform(-far, far), uniform(-far, far)], 1) * 2 / SIZE
    return _warp(images, matrix.view(n, 2, 2), shift)


def batch(split: str, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random augmented batch: images (size, 1, 16, 16) in [-1, 1] and labels (size,)."""
    images, labels = load(split)
    rows = torch.randint(len(images), (size,), generator=random)
    return augment(images[rows], random), labels[rows]


def _warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    theta = torch.cat([matrix, shift.unsqueeze(-1)], -1)
    grid = F.affine_grid(theta, [len(images), 1, SIZE, SIZE], align_corners=False)
    # The background is -1, which grid_sample's zero padding becomes after the shift by one.
    return (F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1).clamp(-1, 1)
