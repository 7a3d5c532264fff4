"""Backbones whose layers can also be run with every position knowing something of its own: what students over codes need."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.order import Attend, Order
from dd2.teachers.layers import BeforeLayer, LayerStack


@runtime_checkable
class ReadsOwnToken(Protocol):
    """A backbone with a second reading of the same layers (arXiv 2412.17153)."""

    @property
    def stack(self) -> LayerStack:
        """The layers that `own_features` runs."""
        ...

    def own_features(self, tokens: Tensor, cond: Tensor, before: BeforeLayer) -> Tensor:
        """Features of the same layers when every position also reads its own token.

        Args:
            tokens: (B, n, C), each embedded as it is, at its own position behind the condition; no sums over scales.
            cond: (B, ...) conditions.
            before: changes the stream before each layer.

        Returns:
            (B, n, D). Position i sees the condition, the tokens of earlier steps, and token i.
        """
        ...


@runtime_checkable
class IsTold(Protocol):
    """A backbone whose usual reading can be told something of every position: what further rounds of a generator need."""

    def told_features(self, tokens: Tensor, cond: Tensor, told: Tensor) -> Tensor:
        """Features of the usual reading, where every position is told something besides.

        Args:
            tokens, cond: as `Backbone.forward`.
            told: (B, n, D), added to the stream before the first layer where position i's token is predicted.

        Returns:
            (B, n, D), `Backbone.forward`'s where told is 0. Position i sees the condition, the tokens of earlier steps, and
            what positions of steps up to its own are told.
        """
        ...


def own_token_mask(order: Order, given: int) -> Tensor:
    """Which positions see which when every token is read at its own position, (given + n, given + n) booleans.

    The `given` positions of the condition come first and are seen by all; a token sees those of earlier steps and itself.
    """
    level = torch.cat([order.step_of.new_full((given,), -1), order.step_of])
    earlier = level[:, None] > level
    earlier[:given, :given] = True
    return earlier | torch.eye(len(level), dtype=torch.bool, device=level.device)


def masked_attention(mask: Tensor) -> Attend:
    """Attention under a mask (L, T) of booleans."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
