"""What training may do to a network's layers: compute them again instead of keeping their activations, and compile them."""

import torch
from torch import nn

from dd2.teachers.layers import call_layer, layer_stacks


def prepare_layers(network: nn.Module, recompute: bool, compiled: bool, compiler: str = "inductor") -> None:
    """Set how the layers of a network run from now on; results stay the same up to rounding.

    Args:
        network: any trained or frozen network.
        recompute: activation checkpointing: the backward pass runs each layer a second time, and between the passes only
            what goes into the layers is kept.
        compiled: torch.compile of one layer, shared by all, since whole transformers take minutes to compile. Passes with a
            key/value cache stay as they are: every step has another length.
        compiler: torch.compile's backend.
    """
    for stack in layer_stacks(network):
        stack.recompute = recompute
        if compiled:
            stack.call = torch.compile(call_layer, backend=compiler)
