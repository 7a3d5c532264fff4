"""Devices: choosing one by name, switching autocast off on it, and how much memory a temporary may take there."""

import contextlib
import os

import torch

from dd2.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device that a configuration names, made the current one; "auto" is CUDA where there is one.

    Each process of torchrun has its own GPU: "auto" and "cuda" are the one of its local rank.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not available here; use auto, cpu, or cuda on a machine with a GPU") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is none that dd2 runs on; use auto, cpu, or cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events, synchronisation and NCCL refer to the current one
    return device


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Float32 whatever the autocast around it; the meta device knows none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


DECODED_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}
"""Numbers of the largest activation when images are decoded; a few of them are alive at a time."""


def tile_rows(columns: int, device: torch.device) -> int:
    """Rows of a temporary (rows, columns) in work that goes tile by tile: what a CPU's cache holds, or what fills a GPU.

    Args:
        columns: numbers in a row.
        device: where the tile is.
    """
    elements = 2**26 if device.type == "cuda" else 2**19
    return max(1, elements // max(columns, 1))
