"""dd2 bench eq1: the closed-form score against the same formula in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd2.commands.bench import BenchConfig, peak_of_tensors, write_results
from dd2.device import pick_device
from dd2.distribution import CodeDistribution
from dd2.evaluation.columns import Column
from dd2.evaluation.speed import seconds_per_call
from dd2.processes import say
from dd2.scores import CodeMixture
from dd2.seeding import stream
from dd2.teachers.filtering import Sampling, filtered


@dataclass(frozen=True)
class Shape:
    """One case: positions (batch x n), V, C, how many codes are kept (0: all), and noise draws."""

    rows: int
    codes: int
    channels: int
    top_k: int
    draws: int = 1


SHAPES = {
    "LlamaGen, top-k 900": Shape(512, 16384, 8, 900),
    "LlamaGen, top-k 8000": Shape(512, 16384, 8, 8000),
    "LlamaGen, nothing cut": Shape(512, 16384, 8, 0),
    "VAR, top-k 900": Shape(1360, 4096, 32, 900),
    "VAR, nothing cut": Shape(1360, 4096, 32, 0),
    "digits, 4 draws": Shape(1024, 64, 8, 0, 4),
}
"""Of a batch of 2 (digits: 64)."""


@dataclass(frozen=True)
class BenchEq1Config(BenchConfig):
    """Time and memory of Eq. 1, forward and backward in x_t, beside the formula written out in plain torch on all codes.

    Both get what they need beforehand: plain torch a dense log p and the codes' norms, ours the kept codes. Errors are relative
    to plain torch in float64, the larger one of posterior mean and gradient.
    """

    out: Path = Path("bench_eq1")
    """OUT.json and OUT.md are written."""
    repeats: int = 9
    """Timed calls of each, in turns; the median counts."""


def bench_eq1(config: BenchEq1Config) -> None:
    """Measure all shapes and write the table."""
    device = pick_device(config.device)
    rows = []
    for name, shape in SHAPES.items():
        rows.append({"case": name, **vars(shape), **_measured(shape, config, device)})
        say(f"{name}: {rows[-1]['faster']:.1f} times plain torch's speed")
    columns = {
        "case": Column("case", ""),
        "plain_ms": Column("plain torch (ms)", ".2f"),
        "dd2_ms": Column("dd2 (ms)", ".2f"),
        "faster": Column("faster", ".1f"),
        "plain_mb": Column("plain torch (MB)", ".1f"),
        "dd2_mb": Column("dd2 (MB)", ".1f"),
        "plain_error": Column("error of plain torch", ".0e"),
        "dd2_error": Column("error of dd2", ".0e"),
    }
    write_results(config, "eq1", device, rows, columns)


def _measured(shape: Shape, config: BenchEq1Config, device: torch.device) -> dict[str, Any]:
    random = stream("bench", config.seed, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    codebook = normal(shape.codes, shape.channels)
    prior = filtered(3 * normal(shape.rows, shape.codes), Sampling(top_k=shape.top_k))
    x_t, grad = normal(shape.draws, shape.rows, shape.channels), normal(shape.draws, shape.rows, shape.channels)
    t = torch.rand(shape.draws, shape.rows, generator=random, device=device) * 0.96 + 0.02
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def call(name: str, mean_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf = x_t.clone().requires_grad_()
            mean = mean_of(leaf)
            mean.backward(grad)
            assert leaf.grad is not None
            found[name] = mean.detach(), leaf.grad

        return run

    mixture = CodeMixture(prior, codebook)
    calls = {"plain": call("plain", plain_torch(prior, codebook, t)), "dd2": call("dd2", lambda x: mixture.x0_hat(x, t))}
    seconds = seconds_per_call(calls, config.repeats)
    peaks = {name: peak_of_tensors(run, device) for name, run in calls.items()}
    exact = CodeDistribution(prior.log_p.double(), prior.num_codes, prior.ids)
    x_t, grad = x_t.double(), grad.double()
    call("exact", plain_torch(exact, codebook.double(), t.double()))()
    errors = {}
    for name in calls:
        pairs = zip(found[name], found["exact"], strict=True)
        errors[f"{name}_error"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return {
        **errors,
        **{f"{name}_ms": 1000 * value for name, value in seconds.items()},
        **{f"{name}_mb": value / 1e6 for name, value in peaks.items()},
        "faster": seconds["plain"] / seconds["dd2"],
    }


def plain_torch(prior: CodeDistribution, codebook: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    """Eq. 1 as a user would write it: x_t (draws, R, C) to posterior means."""
    log_p, half_norms, level = prior.dense(), codebook.square().sum(-1) / 2, t.unsqueeze(-1)

    def mean_of(x_t: Tensor) -> Tensor:
        energy = ((1 - level) * (x_t @ codebook.T) - (1 - level) ** 2 * half_norms) / level**2
        return torch.softmax(log_p + energy, -1) @ codebook

    return mean_of
