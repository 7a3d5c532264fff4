"""The arithmetic that networks draw in: float32, or half precision where it is safe.

In half precision the weights of matrix products and convolutions are kept in it, and the products are taken under autocast.
Residual streams, statistics of norms, logits, Eq. 1, noise, sums over scales and the rounding to bytes stay float32.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""What a command line says; auto is `pick_precision`'s choice."""

M = TypeVar("M", bound=nn.Module)


class Linear(nn.Linear):
    """`nn.Linear`, for layers that are called with one token of one guided image at a time.

    A CPU's library takes 2 to 3 times as long for two rows by a matrix as for the matrix by two columns (float32; the table in
    docs/results/speed.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        two = input.numel() == 2 * self.in_features and input.device.type == "cpu" and not torch.is_grad_enabled()
        if not two or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        found = (self.weight @ input.reshape(2, -1).T).T.contiguous().view(*input.shape[:-1], -1)
        return found if self.bias is None else found + self.bias


def pick_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype that a configuration names; "auto" is bfloat16 where the device computes in it, and float32 elsewhere.

    Raises:
        InputError: there is no such precision on the device.
    """
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f'precision must be "auto", "float32", "bfloat16" or "float16", got {name!r}')
    if name == "float16" and device.type != "cuda":
        raise InputError(f"precision float16 is for CUDA, and this is {device.type}; use bfloat16 or float32")
    return getattr(torch, name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 numbers; without them they are slower than float32's."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private, but nothing public says it; where a version of torch lacks one, float32 is never wrong.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(supported() for supported in asked if supported is not None)


def name_of(dtype: torch.dtype) -> str:
    """As a command line names it."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context in which networks of `in_precision` are called."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def in_float32(module: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """What a classifier or another last map makes of features (..., D), in float32 whatever the autocast around it."""
    with full_precision(features.device):
        return module(features.float())


def in_precision(module: M, dtype: torch.dtype, *, channels_last: bool = False) -> M:
    """A network whose matrix products and convolutions have their weights in `dtype`; every other tensor is shared with it.

    Args:
        module: the network, for use without gradients. What it, or a part of it, names in an attribute `float32_parts` stays as
            it is, because it is called outside of autocast.
        dtype: float32 changes no weight.
        channels_last: lay convolutions out as they run fastest.
    """
    if dtype == torch.float32 and not channels_last:
        return module
    named = [kept for part in module.modules() for kept in getattr(part, "float32_parts", ())]
    kept = {id(part) for whole in named for part in whole.modules()}
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        # Exactly these: what derives from them may compute with its weights in its own way.
        if type(part) in (nn.Linear, Linear, nn.Conv2d) and id(part) not in kept:
            for weight in part.parameters(recurse=False):
                layout = torch.channels_last if channels_last and weight.ndim == 4 else torch.preserve_format
                shared[id(weight)] = nn.Parameter(weight.detach().to(dtype, memory_format=layout), False)
    return copy.deepcopy(module, shared)  # pyright: ignore[reportArgumentType]
