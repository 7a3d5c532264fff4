"""What training may do to a backbone's layers: compute them again instead of keeping their activations, and compile them."""

import torch

from dd2.teachers.base import Backbone, call_layer


def prepare_layers(backbone: Backbone, recompute: bool, compiled: bool, compiler: str = "inductor") -> None:
    """Set how a backbone's layers run from now on; results stay the same up to rounding.

    Args:
        backbone: of any trained or frozen network.
        recompute: activation checkpointing: the backward pass runs each layer a second time, and between the passes only
            what goes into the layers is kept.
        compiled: torch.compile of one layer, shared by all, since whole transformers take minutes to compile. Passes with a
            key/value cache stay as they are: every step has another length.
        compiler: torch.compile's backend.
    """
    backbone.recompute = recompute
    if compiled:
        backbone.layer_call = torch.compile(call_layer, backend=compiler)
