"""Choosing the device by name."""

import torch

from dd2.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is CUDA where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available here; use auto, cpu, or cuda on a machine with a GPU") from error
    return device
