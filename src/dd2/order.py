"""The AR order of a token sequence: which positions each step holds, and what a step may see.

An order is all that the rest of the library knows about raster (LlamaGen) against next-scale (VAR) models.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE_BELOW = 128
"""Positions up to which one masked attention call beats one call per scale."""


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
            k, v: (B, heads, T, head_dim).
        """

    def own_token_mask(self, given: int) -> Tensor:
        """Which positions a student sees that reads every token at its own position (DD1), (given + n, given + n) booleans.

        The `given` positions of the condition come first and are seen by all; a token sees those of earlier steps and itself.
        """
        level = torch.cat([self.step_of.new_full((given,), -1), self.step_of])
        earlier = level[:, None] > level
        earlier[:given, :given] = True
        return earlier | torch.eye(len(level), dtype=torch.bool, device=level.device)


def masked_attention(mask: Tensor) -> Attend:
    """Attention under a mask (L, T) of booleans."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class RasterOrder(Order):
    """Row by row, one token a step; the input at a position is the previous token."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__([1] * (rows * columns))
        self.rows, self.columns = rows, columns

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


class NextScaleOrder(Order):
    """VAR's order: square token maps of growing side, one map a step, flattened row by row.

    The image's features are the sum over scales of φ_k(up(map_k)); what the transformer reads at a scale is that sum over
    the earlier scales, brought down to the scale's side. The sum is linear in the codes, so gradients pass, and it is
    defined for any continuous tokens, the generator's noise included.

    Args:
        patch_nums: side of each scale's map, growing.
        weight: (K, C, C, 3, 3) kernels of the K convolutions that the scales share.
        bias: (K, C) their biases.
    """

    phi_weight: Tensor
    phi_bias: Tensor

    def __init__(self, patch_nums: Sequence[int], weight: Tensor, bias: Tensor) -> None:
        super().__init__([side**2 for side in patch_nums])
        self.patch_nums = tuple(patch_nums)
        self.register_buffer("phi_weight", weight.detach().clone())
        self.register_buffer("phi_bias", bias.detach().clone())
        self.phi_of = shared_phi(len(patch_nums), len(weight))

    def inputs(self, codes: Tensor) -> Tensor:
        parts = [codes[:, :0]]
        maps = to_maps(codes, self.patch_nums)
        for f_hat, side in zip(accumulate(maps, self.patch_nums, self.phi), self.patch_nums[1:], strict=False):
            parts.append(F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2))
        return torch.cat(parts, 1)

    def phi(self, h: Tensor, scale: int) -> Tensor:
        """φ of one scale."""
        index = self.phi_of[scale]
        return phi(h, self.phi_weight[index].to(h.dtype), self.phi_bias[index].to(h.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, stop = k.shape[-2] - q.shape[-2], k.shape[-2]
        asked = [step for step in self.steps if start <= step.start and step.stop <= stop]
        if len(asked) > 1 and stop <= DENSE_BELOW:
            mask = self.step_of[start:stop, None] >= self.step_of[:stop]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # One call per scale over its prefix needs no mask: less memory than one masked call, and no slower.
        parts = [
            F.scaled_dot_product_attention(
                q[..., step.start - start : step.stop - start, :], k[..., : step.stop, :], v[..., : step.stop, :]
            )
            for step in asked
        ]
        return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


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
