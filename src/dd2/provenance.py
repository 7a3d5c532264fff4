"""What made a result: versions, source and machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import dd2
from dd2.processes import world_size
from dd2.records import read_record


def provenance(command: str, device: torch.device) -> dict[str, Any]:
    """Content of a run's versions.json.

    Args:
        command: of dd2 that is running; its arguments are taken from the command line.
        device: that it runs on.
    """
    return {
        "dd2": dd2.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "command": [command, *sys.argv[2:]],
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def read_versions(file: Path) -> dict[str, Any]:
    """versions.json of a run.

    Raises:
        InputError: it is missing or damaged.
    """
    remedy = "delete it, and start the run's command again, which writes it"
    return read_record(file, {"threads": int, "resumed?": [dict]}, remedy)


def machine(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a {platform.machine()} CPU with {os.cpu_count()} cores"


def commit() -> str:
    """Of the repository that dd2's files belong to, "-dirty" where files of it differ; empty where they belong to none."""
    here = Path(__file__)
    if not _git(here, "ls-files", here.name):  # installed, perhaps inside of somebody's repository
        return ""
    return _git(here, "describe", "--always", "--dirty")


def _git(file: Path, *words: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
