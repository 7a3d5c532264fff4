"""The processes of one job, as torchrun starts them; a plain start is one process."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dd2.errors import PeerLost

BUCKET = 2**25
"""Numbers summed over the processes in one call: 128 MiB."""

F = TypeVar("F", bound=Callable[..., Any])


JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process. Some of it alone is left over from another program, and this is no job of several."""


def rank() -> int:
    """Number of this process, from 0."""
    return _place()[0]


def world_size() -> int:
    """How many processes there are."""
    return _place()[1]


def _place() -> tuple[int, int]:
    """Number of this process and of all."""
    told = [os.environ.get(name, "") for name in JOB]
    if not all(told) or not all(text.isascii() and text.isdigit() for text in (told[0], told[1], told[3])):
        return 0, 1
    number, size = int(told[0]), int(told[1])
    return (number, size) if number < size else (0, 1)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line for the whole job: its first process does. `file` is the standard output unless given."""
    if rank() == 0:
        print(text, file=file, flush=True)


@functools.cache
def note(text: str) -> None:
    """Say once what was guessed or left out, beside the output."""
    say(f"note: {text}", sys.stderr)


@contextlib.contextmanager
def answering(numbers: Sequence[int], answer: Callable[[int, object], None]) -> Iterator[None]:
    """While it lasts, signals are answered by a function; in another thread than the main one they are none of its business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, answer) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def connect() -> None:
    """Join the other processes, once: gloo for the CPU, and NCCL beside it where there are GPUs."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if world_size() == 1:  # sharding needs a group even of one
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            # Processes are as fast as their share of the images, and torchrun ends those that lost another: waiting is no fault.
            dist.init_process_group(backend, timeout=timedelta(days=1))


def barrier() -> None:
    """Wait for all processes.

    Raises:
        PeerLost: another one has ended.
    """
    if world_size() > 1:
        # Not dist.barrier, which with NCCL would guess this process's GPU.
        any_of(False)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process; all must ask."""
    if world_size() == 1:
        return flag
    connect()
    found = torch.tensor([int(flag)])
    lost_means(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
    return bool(found.item())


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Sum tensors of one dtype and device over all processes, in place."""
    if world_size() == 1 or not tensors:
        return
    connect()
    start = 0
    while start < len(tensors):
        stop, size = start, 0
        while stop < len(tensors) and (stop == start or size + tensors[stop].numel() <= BUCKET):
            size += tensors[stop].numel()
            stop += 1
        part = tensors[start:stop]
        flat = torch.cat([tensor.flatten() for tensor in part])
        lost_means(lambda flat=flat: dist.all_reduce(flat))
        for tensor, summed in zip(part, flat.split([t.numel() for t in part]), strict=True):
            tensor.copy_(summed.view_as(tensor))
        start = stop


def lost_means(call: Callable[[], Any]) -> Any:
    """Run what talks to other processes.

    Raises:
        PeerLost: one of them has ended, or does not answer.
    """
    try:
        return call()
    except RuntimeError as error:
        if is_lost(error):
            raise PeerLost(
                f"process {rank()}: another process of this job has ended or does not answer; what was saved is whole: start the "
                "job again to go on"
            ) from error
        raise


def is_lost(error: RuntimeError) -> bool:
    """Whether an error tells that another process is gone."""
    known = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Timed out")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in known)


def first_process_only(function: F) -> F:
    """A function that writes: it runs on process 0 alone, and the others wait until it has."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named) if rank() == 0 else None
        barrier()
        return result

    return wrapped  # pyright: ignore[reportReturnType]
