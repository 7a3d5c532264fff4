"""What a machine has run out of, said in one line with what would need less."""

import errno
import re
from pathlib import Path
from typing import Any

import torch

from dd2.fields import field_types

NO_MEMORY = re.compile(
    r"out of memory|allocate memory|not enough memory|DefaultCPUAllocator|can't start new thread", re.IGNORECASE
)
"""What errors without a class of their own say."""

KEPT = "what was saved is whole"


def is_memory(error: BaseException) -> bool:
    """Whether an error tells that there is too little memory, of the machine or of its GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def memory_said(error: BaseException, config_class: Any) -> str:
    """The line for too little memory.

    Args:
        error: as it came.
        config_class: of the command that ran, whose fields are named as what to change; None if there is none yet.
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGT]iB)|shape \([\d, ]+\)", first)
    names = [name for name, _ in field_types(config_class)] if config_class else []
    batches = sorted((name for name in names if name.split(".")[-1] in ("batch", "sample_batch")), key=_stage_2_first)
    smaller = [f"--{name.replace('_', '-')}" for name in batches]
    changes = [f"a smaller {' or '.join(smaller[:4])}"] if smaller else []
    if any(name.endswith(".accumulate") for name in names):
        changes.append("as much more of the accumulate beside it, which keeps the effective batch")
    if "loop.recompute" in names:
        changes.append("--loop.recompute, --loop.parallel fsdp2 on several GPUs")
    if "precision" in names or "loop.precision" in names:
        changes.append(f"--{'precision' if 'precision' in names else 'loop.precision'} bfloat16")
    hint = f"; what needs less: {'; '.join(changes)}" if changes else ""
    plan = ". dd2 plan tells before what fits" if "csd.batch" in names else ""
    return f"out of memory{f' ({asked[0]})' if asked else ''}; {KEPT}{hint}{plan}"


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; of a CPU, what Linux says could be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def _stage_2_first(name: str) -> bool:
    return not name.startswith("csd.")


def system_said(error: OSError) -> str:
    """The line for what the system refused."""
    where = error.filename or "the system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({where}); {KEPT}: free some space and run the same command again (loop.keep counts checkpoints)"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission ({error.strerror}: {where}); {KEPT}: choose another place, or have it made writable"
    return f"{error.strerror or error}: {where}; {KEPT}"
