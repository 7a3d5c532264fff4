"""Devices: choosing one by name, and switching autocast off on it."""

import contextlib
import os

import torch

from dd2.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is CUDA where there is one, and each process of torchrun its own.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not available here; use auto, cpu, or cuda on a machine with a GPU") from error
    return device


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Float32 whatever the autocast around it; the meta device knows none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
