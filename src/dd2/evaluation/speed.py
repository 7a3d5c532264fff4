"""Seconds per image, measured side by side in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dd2.evaluation.methods import Method
from dd2.sampling import Ways

SPEED_BATCHES = (16, 1, 256)
"""Batches at which speed is measured; the first one's ratio is speedup_vs_teacher."""


@torch.inference_mode()
def speed_numbers(ways: Ways, methods: Mapping[str, Method], largest: int) -> dict[str, Any]:
    """Whole images, decoding included: the teacher, with the cache that it has, against one step and every other method, same
    batch and process.

    The ratio falls as the batch grows: at large batches both are bound by arithmetic, of which one pass has hardly
    less than n cached steps; at small ones the teacher waits n times for the next token. Batches above `largest`, the
    evaluation's own, are left out: they may not fit.
    """
    sizes = [size for size in SPEED_BATCHES if size <= max(largest, 1)]
    by_batch = {size: _seconds(ways, methods, size) for size in sizes}
    return {
        "speedup_vs_teacher": by_batch[sizes[0]]["teacher"] / by_batch[sizes[0]]["generator"],
        "speedup_batch": sizes[0],
        "speed": [
            {"batch": size, "speedup": taken["teacher"] / taken["generator"], "seconds_per_image": taken}
            for size, taken in by_batch.items()
        ],
    }


def _seconds(ways: Ways, methods: Mapping[str, Method], size: int) -> dict[str, float]:
    teacher = ways.known_teacher
    labels = teacher.conditions.default_labels(torch.arange(size)).to(teacher.device)
    cond, seeds = teacher.conditions(labels), list(range(size))
    tokens = torch.zeros(size, *teacher.backbone.token_shape, device=teacher.device)
    timed: dict[str, Callable[[], object]] = {
        name: lambda method=method: method.draw(labels, seeds)
        for name, method in methods.items()
        if name not in ("onestep_marginal", "generator_nearest")
    }
    taken = seconds_per_call(timed | {"decoding_alone": lambda: ways.decode(tokens, cond)})
    return {name: seconds / size for name, seconds in taken.items()}


def seconds_per_call(functions: Mapping[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Median seconds of each function, the functions taking turns so that a busy machine slows all alike.

    Args:
        functions: what to time; each is called once beforehand to warm up.
        repeats: timed calls of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            _synchronise()
            start = time.perf_counter()
            function()
            _synchronise()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
