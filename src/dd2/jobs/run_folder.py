"""A run's folder: its resolved configuration, the versions that made it, and the device it runs on."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import dd2
from dd2.config import flat, read_yaml, to_yaml
from dd2.errors import InputError
from dd2.files import writable_folder, write_atomic

FREE_FIELDS = ("device", "out", "loop.")
"""Fields that may change when a run is resumed: they do not change what is computed."""


def start_run(out: Path, config: Any, command: str) -> str:
    """Prepare a new run folder, or check that an existing one belongs to the same configuration.

    Returns:
        The command that resumes the run.

    Raises:
        InputError: the folder cannot be written, or holds a run with another configuration.
    """
    writable_folder(out, "run folder")
    file = out / "config.yaml"
    if file.exists():
        before, now = read_yaml(file), flat(config)
        changed = [key for key in now if before.get(key) != now[key] and not key.startswith(FREE_FIELDS)]
        if changed:
            key = changed[0]
            raise InputError(
                f"{out} holds a run with another configuration: {key} was {before.get(key)}, now {now[key]}"
                + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
                + "; resume with the old values, or choose another --out"
            )
    write_atomic(file, to_yaml(config))
    versions = {
        "dd2": dd2.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "command": [command, *sys.argv[2:]],
        "threads": torch.get_num_threads(),
    }
    write_atomic(out / "versions.json", json.dumps(versions, indent=2) + "\n")
    return f"dd2 {command} {file}"


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
