"""The transformer layers of a backbone: the units that training may recompute, compile and shard."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dd2.errors import InputError

BeforeLayer = Callable[[int, Tensor], Tensor]
"""(index of a layer, the residual stream (B, L, D) before it) -> the stream that the layer reads."""


def call_layer(layer: nn.Module, *arguments: Any) -> Tensor:
    """A layer's output."""
    return layer(*arguments)


@runtime_checkable
class ResidualLayer(Protocol):
    """A layer that adds branches to the residual stream."""

    def branch_ends(self) -> Sequence[nn.Module]:
        """The last linear map of each branch: with zeros there the layer is the identity."""
        ...


class LayerStack(nn.ModuleList):
    """Layers that run one after the other, each called as layer(x, *arguments, cache, index).

    State-dict keys are those of the `nn.ModuleList` that it is.

    Attributes:
        recompute: compute each layer again in the backward pass instead of keeping what is inside it (activation
            checkpointing).
        call: how a layer is called where no cache is used; `dd2.training.layers.prepare_layers` sets a compiled one.
    """

    recompute: bool = False
    call: Callable[..., Tensor] = staticmethod(call_layer)

    def run(self, x: Tensor, *arguments: Any, cache: Any = None, before: BeforeLayer | None = None) -> Tensor:
        """The residual stream x (B, L, D) after all layers.

        Args:
            x: what the first layer reads.
            arguments: what every layer is given beside x.
            cache: a key/value cache, or None.
            before: changes the stream before each layer.
        """
        for index, layer in enumerate(self):
            x = before(index, x) if before else x
            x = self._layer(layer, x, *arguments, cache=cache, index=index)
        return x

    def _layer(self, layer: nn.Module, x: Tensor, *arguments: Any, cache: Any, index: int) -> Tensor:
        if cache is not None:  # a new length each step, and no gradient: neither compiled nor recomputed
            return layer(x, *arguments, cache, index)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.call, layer, x, *arguments, None, index, use_reentrant=False)  # pyright: ignore
        return self.call(layer, x, *arguments, None, index)


def add_first(told: Tensor, skipped: int) -> BeforeLayer:
    """Adds told (B, n, D) to the stream before the first layer, behind the `skipped` positions that come first."""
    return lambda index, x: x + F.pad(told, (0, 0, skipped, 0)) if index == 0 else x


def xavier_linears(network: nn.Module) -> None:
    """Give every linear map in a network Xavier's uniform weights, and zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def append_identities(stack: LayerStack, count: int) -> None:
    """Lengthen a stack by copies of its last layer that change nothing to begin with: their residual branches end in zeros.

    Args:
        stack: changed in place.
        count: layers more.

    Raises:
        InputError: its layers cannot be made identities.
    """
    for _ in range(count):
        layer = copy.deepcopy(stack[-1])
        if not isinstance(layer, ResidualLayer):
            raise InputError(
                f"a {type(layer).__name__} does not say where its residual branches end (branch_ends), so no identity can be "
                "made of it; use networks.extra_layers 0"
            )
        for end in layer.branch_ends():
            for parameter in end.parameters():
                nn.init.zeros_(parameter)
        stack.append(layer)


def layer_stacks(*networks: nn.Module) -> list[LayerStack]:
    """The stacks inside networks, in order; none in one whose layers are a plain list."""
    return [module for network in networks for module in network.modules() if isinstance(module, LayerStack)]
