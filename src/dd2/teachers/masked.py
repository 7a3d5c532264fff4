"""How a masked AR model fills an image: sets of positions of a random order, their sizes by a cosine, one after the other."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.order import Order
from dd2.teachers.base import Backbone


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


def known_before(n: int, steps: int) -> list[int]:
    """How many of n positions are known before each step. Errors as `masked_after`."""
    return [0, *(n - left for left in masked_after(n, steps)[:-1])]


class MaskedOrder(Order):
    """Positions that may be known in any order, a new one for every image: a step is a number of positions, not which ones.

    Args:
        n: positions.
        steps: of the sampler, whose sizes are a cosine's.
    """

    def __init__(self, n: int, steps: int) -> None:
        known = [*known_before(n, steps), n]
        super().__init__([after - before for before, after in itertools.pairwise(known)])

    def inputs(self, codes: Tensor) -> NoReturn:
        raise TypeError("a masked model reads tokens at their own positions, in no fixed order")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
        raise TypeError("a masked model's positions see all that are known, in no fixed order")


class MaskedBackbone(Backbone):
    """A transformer without an order: it reads any known set, and a diffusion head of its own draws what is not known.

    Args:
        n: positions.
        steps: of its sampler.
        width: D, the channels of the features.
        code_dim: C, the channels of a token.
    """

    def __init__(self, n: int, steps: int, width: int, code_dim: int) -> None:
        super().__init__(MaskedOrder(n, steps), width, code_dim)

    @abstractmethod
    def features_given(self, tokens: Tensor, known: Tensor | None, cond: Tensor) -> Tensor:
        """Features (B, n, D) of the positions that are not known.

        Args:
            tokens: (B, n, C); what stands where nothing is known does not matter.
            known: (B, n) booleans; as many in every row, or not. None where all are.
            cond: (B, ...) conditions.
        """

    @abstractmethod
    def head(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The head's noise prediction and variance, (..., C) each.

        Args:
            x: (..., C) noised tokens, variance-preserving.
            index: (...) noise levels, 0 … 999.
            features: (..., D), broadcast to x.
        """

    @abstractmethod
    def condition_features(self, features: Tensor, cond: Tensor) -> Tensor:
        """As `Backbone.condition_features`; the first position's features know all that is known."""

    @abstractmethod
    def forget_head(self) -> None:
        """Give the head the weights that training starts with."""

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features of all positions where every token is known, as the generator's noise is."""
        return self.features_given(tokens, None, cond)

    def new_cache(self) -> NoReturn:
        raise TypeError("a masked model has no key/value cache: every step reads everything again")

    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> NoReturn:
        self.new_cache()
