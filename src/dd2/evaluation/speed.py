"""Seconds per image, measured side by side in one process."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds_per_call(functions: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
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
