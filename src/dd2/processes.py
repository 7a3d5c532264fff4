"""The processes of one job, as torchrun starts them; a plain start is one process."""

import os
from datetime import timedelta

import torch.distributed as dist


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() == 1:
        return
    if not dist.is_initialized():
        # Processes are as fast as their share of the images: waiting long is no fault.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    dist.barrier()
