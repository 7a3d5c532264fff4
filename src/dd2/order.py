"""The AR order of a token sequence: which positions each step holds, and what a step may see.

An order is all that the rest of the library knows about raster (LlamaGen) against next-scale (VAR) models.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class Order(ABC):
    """n positions in S steps; positions of one step are independent given all earlier steps.

    Attributes:
        steps: the positions of each step, as slices that partition range(n) in order.
    """

    steps: tuple[slice, ...]

    @property
    def n(self) -> int:
        """Number of positions of a sequence."""
        return self.steps[-1].stop

    @property
    def num_steps(self) -> int:
        """Number of sequential steps of the teacher."""
        return len(self.steps)

    @abstractmethod
    def inputs(self, codes: Tensor) -> Tensor:
        """What the transformer reads at every position after the first step (teacher forcing).

        Args:
            codes: (B, p, C) tokens in the tokenizer's own space: all n, or those of the first steps.

        Returns:
            (B, m, C) for the m positions that follow the first step and are determined by the given tokens. The
            generator's noise goes through the same function.
        """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in which each query sees the keys of its own and earlier steps.

        Args:
            q: (B, heads, L, head_dim) queries, of the last L of the T positions.
            k, v: (B, heads, T, head_dim).
        """


class RasterOrder(Order):
    """Row by row, one token a step; the input at a position is the previous token."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.steps = tuple(slice(i, i + 1) for i in range(rows * columns))

    def inputs(self, codes: Tensor) -> Tensor:
        return codes[:, : self.n - 1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[-2], k.shape[-2]
        if queries == 1:  # the newest position sees everything
            return F.scaled_dot_product_attention(q, k, v)
        if queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
