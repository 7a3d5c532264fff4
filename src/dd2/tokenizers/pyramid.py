"""VAR's pyramid: token maps of growing side whose sum, brought to the finest side, is the image's features."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def phi(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """VAR's φ on features (B, C, H, W): half its input, half a 3x3 convolution of it."""
    return (h + F.conv2d(h, weight, bias, padding=1)) / 2


def to_maps(codes: Tensor, patch_nums: Sequence[int]) -> list[Tensor]:
    """(B, p, C) tokens of the first scales to their maps, each (B, C, side, side).

    Raises:
        ValueError: p is no whole number of scales.
    """
    maps, start = [], 0
    for side in patch_nums:
        if start == codes.shape[1]:
            break
        part = codes[:, start : start + side**2]
        if part.shape[1] < side**2:
            raise ValueError(f"{codes.shape[1]} tokens are no whole number of scales {tuple(patch_nums)}")
        maps.append(part.transpose(1, 2).unflatten(2, (side, side)))
        start += side**2
    return maps


def accumulate(maps: Sequence[Tensor], patch_nums: Sequence[int], phi: Callable[[Tensor, int], Tensor]) -> Iterator[Tensor]:
    """The features f_hat (B, C, side, side) of the finest side after each of the given scales' maps.

    Args:
        maps: code maps of the first scales, each (B, C, patch_nums[k], patch_nums[k]).
        patch_nums: sides of all scales.
        phi: (features at the finest side, scale) -> what the scale adds.
    """
    f_hat: Tensor | None = None
    for scale, codes in enumerate(maps):
        added = phi(to_finest(codes, patch_nums), scale)
        f_hat = added if f_hat is None else f_hat + added
        yield f_hat


def to_finest(codes: Tensor, patch_nums: Sequence[int]) -> Tensor:
    """A scale's map (B, C, s, s) at the finest side: bicubic, the finest as it is."""
    side = patch_nums[-1]
    return codes if codes.shape[-1] == side else F.interpolate(codes, size=(side, side), mode="bicubic")


def shared_phi(scales: int, convolutions: int) -> tuple[int, ...]:
    """Which of VAR's shared convolutions each scale uses: the one whose tick is nearest to k / (S - 1).

    In numpy's float64, as the official code: two scales of ten lie halfway between ticks, and float32 rounds them to the
    other one, which garbles released weights. Ten scales, four convolutions: 0, 0, 1, 1, 1, 2, 2, 3, 3, 3.
    """
    margin = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    ticks = np.linspace(margin, 1 - margin, convolutions)
    return tuple(int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1)))) for scale in range(scales))
