"""The AR order of a token sequence: which positions each step holds, and what a step may see.

An order is all that the rest of the library knows about raster (LlamaGen) against next-scale (VAR) models; VAR's stands in
`dd2.teachers.next_scale`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.device import full_precision

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values, each (B, heads, positions, head_dim), to the mixed values."""


class Order(nn.Module, ABC):
    """n positions in S steps; positions of one step are independent given all earlier steps.

    A module, because what a transformer reads may need frozen tensors (VAR's convolutions φ): they move, are saved and are
    copied with the backbone, as buffers.

    Args:
        sizes: number of positions of each step.

    Attributes:
        steps: the positions of each step, as slices that partition range(n) in order.
        step_of: (n,) the step of each position.
    """

    step_of: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        ends = list(itertools.accumulate(sizes))
        self.steps = tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
        step_of = torch.tensor([step for step, size in enumerate(sizes) for _ in range(size)])
        self.register_buffer("step_of", step_of, persistent=False)

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
            codes: (B, p, C) tokens in the tokenizer's own space: all n, or those of the first steps, whole steps only.

        Returns:
            (B, m, C) for the m positions that follow the first step and are determined by the given tokens. The
            generator's noise goes through the same function.
        """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in which each query sees the keys of its own and earlier steps.

        Args:
            q: (B, heads, L, head_dim) queries, of the last L of the T positions.
            k, v: (B, kv_heads, T, head_dim); heads is a multiple of kv_heads.
        """

    def checked_prefix(self, tokens: Tensor, first_step: int) -> Tensor:
        """The tokens (B, p, C) of the steps before `first_step`.

        Raises:
            ValueError: they are others.
        """
        start = self.steps[first_step].start if first_step < len(self.steps) else self.n
        if tokens.shape[1] != start:
            raise ValueError(f"first_step {first_step} needs a prefix of {start} tokens, got {tokens.shape[1]}")
        return tokens


class RasterOrder(Order):
    """Row by row, one token a step; the input at a position is the previous token."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__([1] * (rows * columns))
        self.rows, self.columns = rows, columns

    def inputs(self, codes: Tensor) -> Tensor:
        return codes[:, : self.n - 1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, grouped = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
        if queries == 1:  # the newest position sees everything
            if q.device.type == "cpu" and q.dtype == torch.bfloat16:
                # A CPU's kernel for bfloat16 takes 4 times as long for one query.
                with full_precision(q.device):
                    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=grouped).to(v.dtype)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        if queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
