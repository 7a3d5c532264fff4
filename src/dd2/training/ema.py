"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dd2.training.parallel import whole

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


@torch.no_grad()
def ema_lag(average: nn.Module, module: nn.Module) -> float:
    """How far an average is behind: |weights - average| / |weights|, over all parameters; sharded ones need all processes."""

    def norm(tensors: Iterable[Tensor]) -> Tensor:
        return whole(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])))

    behind = norm(now - kept for now, kept in zip(module.parameters(), average.parameters(), strict=True))
    return float(behind / norm(module.parameters()).clamp_min(1e-12))
