"""What the loop runs: a stage is a list of updates per iteration, each a loss for one network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dd2.losses import Losses
from dd2.training.health import Sign
from dd2.training.schedule import OptimConfig


@dataclass
class Update:
    """One optimiser step on one network.

    Attributes:
        name: appears in metrics and errors, e.g. "guidance".
        parameters: what is trained; gradients reach nothing else.
        optim: Adam's settings.
        loss: one micro-batch's loss, all its randomness taken from the given stream.
        repeats: optimiser steps per iteration (K for the guidance network).
        accumulate: micro-batches per optimiser step, shared out over the processes.
        replicated: every process computes all of them, for updates too small to share.
    """

    name: str
    parameters: list[nn.Parameter]
    optim: OptimConfig
    loss: Callable[[torch.Generator], Losses]
    repeats: int = 1
    accumulate: int = 1
    replicated: bool = False
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        """Make the optimiser."""
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.optim.lr,
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
            fused=True,
        )


@dataclass
class Stage:
    """A named part of training.

    Attributes:
        name: folder of its checkpoints and tag of its metrics.
        iterations: how many to run.
        updates: done in order, every iteration.
        modules: networks whose weights are saved, by file name.
        after: called with the iteration (from 0) once its updates are done, e.g. for the EMA.
        preview: images (N, channels, H, W) in [-1, 1] that show the present state.
        measures: numbers worth logging that no loss gives, e.g. the lag of the average; asked for when a row is logged.
        validate: how good the networks are now: "validation", the lower the better, and what else it tells; asked for at every
            checkpoint, whose best is kept.
        stream: names the stage's random streams; the stage's name unless given.
        signs: that it has failed, looked for whenever it logs.
    """

    name: str
    iterations: int
    updates: list[Update]
    modules: Mapping[str, nn.Module]
    after: Callable[[int], None] = lambda step: None
    preview: Callable[[], Tensor] | None = None
    measures: Callable[[], Mapping[str, float]] = dict
    validate: Callable[[], Mapping[str, float]] | None = None
    stream: str = ""
    signs: Sequence[Sign] = ()
