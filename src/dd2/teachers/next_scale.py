"""VAR's AR order: one token map a step, from the coarsest to the finest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.order import Order
from dd2.tokenizers.multiscale import MultiScaleTokenizer
from dd2.tokenizers.pyramid import accumulate, phi, shared_phi, to_maps

DENSE_BELOW = 128
"""Positions up to which one masked attention call beats one call per scale."""


def order_of(tokenizer: MultiScaleTokenizer) -> "NextScaleOrder":
    """The AR order of a tokenizer's tokens, with a frozen copy of its φ."""
    convolutions = list(tokenizer.quantize.phi)
    weight = torch.stack([layer.weight for layer in convolutions])  # pyright: ignore
    bias = torch.stack([layer.bias for layer in convolutions])  # pyright: ignore
    return NextScaleOrder(tokenizer.config.patch_nums, weight, bias)


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
