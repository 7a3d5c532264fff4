"""What a pass of a network costs, found out without computing it: floating-point operations and bytes kept for backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Footprint:
    """Of one pass.

    Attributes:
        flops: floating-point operations forward (a multiplication and an addition are two).
        backward: floating-point operations backward, into weights and activations.
        saved: bytes that autograd keeps for the backward pass, weights aside.
    """

    flops: float
    backward: float
    saved: int


def footprint(call: Callable[[], Tensor], *networks: nn.Module) -> Footprint:
    """Run a call on tensors of the meta device and count.

    Attention counts as a fused kernel, which keeps no L x L matrix.

    Args:
        call: the pass.
        networks: whose weights are not counted among what is kept.
    """
    weights = {_storage(p) for network in networks for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in weights:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    attention = _FusedAttention()
    with FlopCounterMode(display=False) as counter, hooks, attention:
        result = call()
    forward = counter.get_total_flops() + attention.flops[0]
    attention.flops[0] = 0.0
    with FlopCounterMode(display=False) as counter:
        if result.requires_grad:
            result.sum().backward()
    backward = counter.get_total_flops() + attention.flops[0]
    for network in networks:
        network.zero_grad(set_to_none=True)
    return Footprint(forward, backward, sum(kept.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, flops: float, total: list[float]) -> Tensor:  # pyright: ignore
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.flops, ctx.total = flops, total
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.total[0] += 2.5 * ctx.flops  # two products more than forward has, and the weights again
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


class _FusedAttention(TorchFunctionMode):
    """While it is active, attention is `_Attention`; `flops` adds up its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = [0.0]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, is_causal: bool = False, **named: Any) -> Tensor:
        flops = 4.0 * q.numel() * k.shape[-2] * (0.5 if is_causal else 1.0)
        self.flops[0] += flops
        return _Attention.apply(q, k, v, flops, self.flops)  # pyright: ignore[reportReturnType]
