"""DD1's map from noise to data: the flow-matching ODE of Eq. 1's velocity, solved token by token in AR order.

Its training code was never released; this follows the paper's text (METHOD 2 and 7).
"""

import itertools
from typing import Literal

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.scores import velocity
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling

Solver = Literal["euler", "heun"]

START = 1 - 2**-20
"""Noise level where the ODE starts. Eq. 1 needs t < 1, and at t = 1 the velocity is its limit, x - E[c]."""


@torch.no_grad()
def data_of_noise(
    teacher: Teacher, noise: Tensor, cond: Tensor, sampling: Sampling, *, steps: int = 50, solver: Solver = "heun"
) -> Tensor:
    """The sequence that the ODE makes of each noise: a deterministic map whose images of normal noise follow the teacher.

    Step by step along the AR order with the key/value cache, all positions of a step at once, each conditioned on the codes that
    the earlier steps ended at.

    Args:
        teacher: the frozen AR model.
        noise: (B, n, C) standard normal.
        cond: (B, ...) conditions.
        sampling: the distribution whose ODE is solved.
        steps: ODE steps per token, of equal length from t = 1 to 0.
        solver: Euler, or Heun's second-order steps (two velocities each; the last one is Euler's, as the velocity ends at t = 0).

    Returns:
        (B, n) ids.
    """
    codebook = teacher.codebook
    return teacher.walk(
        cond, sampling, lambda step, log_p: flow_to_codes(noise[:, step], log_p, codebook, steps=steps, solver=solver)
    )


def flow_to_codes(noise: Tensor, log_p: Tensor, codebook: Tensor, *, steps: int, solver: Solver) -> Tensor:
    """The code at which each token's ODE ends.

    Args:
        noise: (..., C) where it starts.
        log_p: (..., V) log-probabilities of the codes.
        codebook: (V, C) standardised codes.
        steps, solver: as `data_of_noise`.

    Returns:
        (...) ids, never of a code that `log_p` excludes.

    Raises:
        InputError: steps below 1, or another solver.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise InputError(f'the ODE needs at least 1 step and solver "euler" or "heun", got {steps} and {solver!r}')
    x = noise.float()

    def v(x: Tensor, level: float) -> Tensor:
        return velocity(x, x.new_full(x.shape[:-1], min(level, START)), log_p, codebook)

    for level, following in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        slope = v(x, level)
        if solver == "heun" and following > 0:
            slope = (slope + v(x + (following - level) * slope, following)) / 2
        x = x + (following - level) * slope
    return _nearest_allowed(x, log_p, codebook)


def _nearest_allowed(x: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    closeness = x @ codebook.T - codebook.square().sum(-1) / 2
    return closeness.masked_fill(log_p == -torch.inf, -torch.inf).argmax(-1)
