"""Exponential moving average of a network's weights."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(module: M) -> M:
    """A frozen copy of `module`, in evaluation mode, to hold the average."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, module: nn.Module, rate: float) -> None:
    """Average <- rate * average + (1 - rate) * module; buffers are copied."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(average.parameters()), list(module.parameters()), 1 - rate
    )
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)
