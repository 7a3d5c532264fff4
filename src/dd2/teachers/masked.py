"""How a masked AR model fills an image: sets of positions of a random order, their sizes by a cosine, one after the other."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.order import Order


def masked_after(n: int, steps: int) -> list[int]:
    """How many of n positions are still to be drawn after each of `steps` steps, but for the last, which draws all that is left.

    Raises:
        InputError: there are more steps than positions, or none.
    """
    if not 1 <= steps <= n:
        raise InputError(f"sampling.ar_steps must be in 1 to {n}, the tokens of an image, got {steps}")
    left, found = n, []
    for step in range(steps):
        left = max(1, min(left - 1, math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps))))
        found.append(left)
    return found


@dataclass(frozen=True)
class FillStep:
    """One step.

    Attributes:
        known: (B, n) what is there before it.
        drawn: (B, n) what it draws.
        guidance: factor of classifier-free guidance.
    """

    known: Tensor
    drawn: Tensor
    guidance: float


def fill_steps(orders: Tensor, steps: int, guidance: Callable[[float], float]) -> list[FillStep]:
    """The steps that fill images along orders (B, n), permutations of the positions: from their ends to their beginnings.

    Args:
        orders: of each image.
        steps: how many.
        guidance: share of the positions that are known after a step -> its factor.

    Raises:
        InputError: as `masked_after`.
    """
    n = orders.shape[1]
    rank = torch.empty_like(orders).scatter_(1, orders, torch.arange(n, device=orders.device).expand_as(orders))
    before, found = n, []
    for step, after in enumerate(masked_after(n, steps)):
        last = step == steps - 1
        drawn = (rank < before) & (rank >= (0 if last else after))
        found.append(FillStep(rank >= before, drawn, guidance((n - after) / n)))
        before = after
    return found


class MaskedOrder(Order):
    """Positions that may be known in any order, a new one for every image: a step is a number of positions, not which ones.

    Args:
        n: positions.
        steps: of the sampler, whose sizes are a cosine's.
    """

    def __init__(self, n: int, steps: int) -> None:
        left = [n, *masked_after(n, steps)[:-1], 0]
        super().__init__([before - after for before, after in itertools.pairwise(left)])

    def inputs(self, codes: Tensor) -> NoReturn:
        raise TypeError("a masked model reads tokens at their own positions, in no fixed order")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
        raise TypeError("a masked model's positions see all that are known, in no fixed order")
