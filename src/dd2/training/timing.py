"""Where an iteration's time goes: seconds of named parts, on CPU and GPU."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from dd2.scores import ConditionalScore

_measuring: ContextVar["PartTimes | None"] = ContextVar("_measuring", default=None)


class PartTimes:
    """Seconds of parts since the last `mean`.

    On a GPU a part is the time between two events in the stream, read when asked for, so that measuring waits for nothing.

    Args:
        device: where the parts are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """While it lasts, `part` counts here."""
        token = _measuring.set(self)
        try:
            yield
        finally:
            _measuring.reset(token)

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Count the block under a name."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def mean(self, iterations: int) -> dict[str, float]:
        """Seconds of each part per iteration, as {"seconds/part": …}, over the iterations since the last call."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        means = {f"seconds/{name}": round(total / max(iterations, 1), 6) for name, total in self._seconds.items()}
        self._seconds.clear()
        return means


def part(name: str) -> contextlib.AbstractContextManager[None]:
    """Count a block as a part of the training iteration that is running; outside of one it costs nothing."""
    times = _measuring.get()
    return times.count(name) if times else contextlib.nullcontext()


class Timed(ConditionalScore):
    """A conditional score, as `csd_loss` asks it, whose computing counts as a part.

    Args:
        score: what is computed.
        name: of the part.
    """

    def __init__(self, score: ConditionalScore, name: str) -> None:
        self.inner, self.name, self.valid = score, name, score.valid

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        with part(self.name):
            return self.inner.x0_hat(x_t, t)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        with part(self.name):
            return self.inner.velocity(x_t, t)
