"""What the dd2 bench commands share: the machine, its matmul rate, peaks of memory, and how results are written."""

import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dd2 import __version__
from dd2.checkpoints.released import RELEASED
from dd2.checkpoints.runs import open_teacher
from dd2.config import packaged
from dd2.errors import InputError
from dd2.evaluation.columns import Column
from dd2.evaluation.speed import seconds_per_call
from dd2.files import writable_folder, write_atomic
from dd2.processes import say
from dd2.records import parsed
from dd2.teachers.code import CodeTeacher, require_codes

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class BenchConfig:
    """What every measurement is told."""

    out: Path = Path("bench")
    """OUT.json and OUT.md are written."""
    repeats: int = 3
    """Timed calls of each, in turns; the median counts."""
    seed: int = 0
    """Seed of weights, tokens and numbers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse nothing to time."""
        if self.repeats < 1:
            raise InputError(f"repeats must be at least 1, got {self.repeats}")


def bench_teacher(name: str, device: torch.device, seed: int) -> CodeTeacher:
    """The embedded digits teacher, or a released model's sizes with random weights.

    Raises:
        InputError: there is no such model, or it needs captions.
    """
    if name == "digits":
        return require_codes(open_teacher("digits", device), "dd2 bench")
    measured = [model for model in RELEASED if "t2i" not in model and not model.startswith("mar")]
    if name not in measured:
        known = ", ".join(["digits", *measured])
        raise InputError(f"there is no model {name} to measure; known are {known}")
    torch.manual_seed(seed)
    teacher = require_codes(RELEASED[name](), "dd2 bench").eval().requires_grad_(False).to(device)
    teacher.standardise()
    return teacher


def paper_recipe(name: str) -> str:
    """The configuration of a model's distillation by the paper's recipe, which is what the benches have always measured."""
    if f"{name}_paper" in packaged():
        return f"{name}_paper"
    return "var_d24_paper" if name.startswith("var") else "llamagen_l_paper"  # those nearest to what the paper has not


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = next(iter(re.findall(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo")))), platform.processor())
    return {
        "dd2": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu} ({platform.machine()})",
        "capability": "" if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the limit that shares are of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_per_call({"matmul": lambda: a @ b}, repeats=5)["matmul"]


def peak_of_tensors(call: Callable[[], object], device: torch.device) -> float:
    """Bytes of the tensors that a call makes, at most at a time."""
    if device.type == "cuda":
        return peak_of_process(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return float(max(accumulate(event.nbytes() for event in changes), default=0))  # pyright: ignore[reportAttributeAccessIssue]


def peak_of_process(call: Callable[[], object], device: torch.device) -> float:
    """Bytes that the process (on CUDA: the allocator) holds at most during a call, networks included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return float(torch.cuda.max_memory_allocated(device))
    try:
        CLEAR.write_text("5")  # the maximum begins anew
    except OSError as error:
        raise InputError(f"{CLEAR} cannot be written ({error.strerror}), so peaks of memory are unknown here") from error
    call()
    return 1024.0 * int(re.findall(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[0])


def write_results(
    config: BenchConfig, what: str, device: torch.device, rows: Sequence[dict[str, Any]], columns: dict[str, Column], **more: Any
) -> None:
    """OUT.json with everything, OUT.md with the table, and the table on the terminal.

    Args:
        config: where to.
        what: was measured.
        device: on it.
        rows: of numbers by name.
        columns: those that the table shows, by name.
        more: numbers of the whole run.
    """
    out = config.out
    writable_folder(out.parent, "output folder")
    lines = ["| " + " | ".join(column.heading for column in columns.values()) + " |"]
    lines.append("|" + "|".join("---:" if column.kind else "---" for column in columns.values()) + "|")
    lines += ["| " + " | ".join(_cell(row.get(key), column.kind) for key, column in columns.items()) + " |" for row in rows]
    table = "\n".join(lines) + "\n"
    result = {"bench": what, "machine": machine(device), "repeats": config.repeats, **more, "rows": list(rows)}
    write_atomic(out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    write_atomic(out.with_suffix(".md"), table)
    say(table)
    say(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.md')}")


def measured_rate(file: Path, model: str, precision: str) -> tuple[float, str]:
    """Operations a second of training from the results of dd2 bench train.

    Args:
        file: its OUT.json.
        model: whose row to prefer; without one the slowest row counts.
        precision: that the row must have.

    Returns:
        The rate, and what it is.

    Raises:
        InputError: the file is none of dd2 bench train, or has no row of the precision.
    """
    try:
        found = parsed(file)
        rows = [row for row in found["rows"] if row["precision"] == precision] if found["bench"] == "train" else None
        rates = {str(row["model"]): 1e9 * float(row["gflops_per_second"]) for row in rows or ()}
        device = str(found["machine"]["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"rates {file} cannot be read as results of dd2 bench train ({error!r}); give its OUT.json") from error
    if not rates:
        raise InputError(f"rates {file} hold no training in {precision}; run dd2 bench train --precision {precision}")
    chosen = model if model in rates else min(rates, key=lambda name: rates[name])
    return rates[chosen], f"measured on {device} with {chosen}"


def _cell(value: Any, kind: str) -> str:
    if value is None:
        return ""
    return format(value, kind) if kind else str(value)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
