"""A run's folder: its resolved configuration, the versions that made it, and its lock."""

import fcntl
import json
import shlex
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from dd2.checkpoints.record import RunRecord
from dd2.config import RENAMED
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.external import is_code
from dd2.fields import defaults, flat, with_fields
from dd2.files import atomic_folder, writable_folder, write_atomic
from dd2.places import FIELDS, in_place, with_absolute
from dd2.processes import first_process_only
from dd2.provenance import provenance, read_versions
from dd2.records import read_record
from dd2.training.loop import LoopConfig
from dd2.yaml_files import read_yaml, to_yaml

_locks: dict[Path, IO[str]] = {}
"""Held until the process ends."""


def start_run(out: Path, config: Any, command: str, record: RunRecord | None = None) -> str:
    """Prepare a new run folder, or check that an existing one belongs to the same configuration.

    Args:
        out: the folder.
        config: everything that was asked for.
        command: that is running.
        record: what later commands need to know, of runs that they open.

    Returns:
        The command that resumes the run.

    Raises:
        InputError: the folder cannot be written, is in use, or holds a run that may not be resumed or has another configuration.
    """
    if not 0 <= config.seed < 2**63:
        raise InputError(f"seed must be in 0 to 2^63 - 1, got {config.seed}")
    _check_loop(config.loop, pick_device(config.device), command)
    _start(out, config, command, record)
    # That file says auto, whatever this command was told; code it may name, but not run.
    teacher, trust = getattr(config, "teacher", ""), getattr(config, "trust", ())
    code = f" --teacher {teacher}" if isinstance(teacher, str) and is_code(teacher) else ""
    code += f" --trust {' '.join(trust)}" if trust else ""
    return f"dd2 {command} {shlex.quote(str(out / 'config.yaml'))}{code}"


def _check_loop(loop: LoopConfig, device: torch.device, command: str) -> None:
    """Refuse what a command has no use for."""
    if command != "distill" and loop.parallel == "fsdp2":
        raise InputError(f"loop.parallel fsdp2 shards the networks of dd2 distill; dd2 {command} knows ddp alone")
    if command in ("train-tokenizer", "train-classifier") and (loop.recompute or loop.compile):
        raise InputError(f"loop.recompute and loop.compile are for transformers; dd2 {command} trains none")
    if loop.compile and device.type != "cuda":
        raise InputError("loop.compile is for CUDA: on a CPU the compiled layers are slower; leave it out")


@first_process_only
def _start(out: Path, config: Any, command: str, record: RunRecord | None) -> None:
    writable_folder(out, "run folder")
    _lock(out)
    config = in_place(config)
    file = out / "config.yaml"
    if file.exists():
        if config.loop.resume == "never":
            raise InputError(f"{out} holds a run; go on with it by --resume auto, or choose another --out")
        # A field that is missing there is younger than that run, which had its default.
        kept, now = with_absolute(read_yaml(file)), flat(config)
        if not kept:
            raise InputError(f"{file} is empty, so nobody knows what this run was; restore it, or choose another --out")
        if older := [name for name in kept if name.partition(".")[0] in RENAMED]:
            raise InputError(
                f"{out} holds a run of an older dd2 ({older[0]} has another name now), and cannot go on; choose another --out"
            )
        before = defaults(type(config)) | kept
        changed = [key for key in now if before.get(key) != now[key] and not _may_change(key)]
        if changed:
            key = changed[0]
            moved = key in FIELDS and isinstance(before.get(key), str) and not Path(before[key]).exists()
            raise InputError(
                f"{out} holds a run with another configuration: {key} was {before.get(key)}, now {now[key]}"
                + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
                + (f"; if it has moved there, say so in {file}" if moved else "; resume with the old values")
                + ", or choose another --out"
            )
    write_atomic(file, to_yaml(with_fields(config, {"loop.resume": "auto"})))
    if record is not None:
        record.write(out)
    write_atomic(out / "versions.json", json.dumps(_versions(out / "versions.json", command, config), indent=2) + "\n")


def _versions(file: Path, command: str, config: Any) -> dict[str, Any]:
    """What made a run: its first session, and under "resumed" those after it that differ from the one before."""
    now = provenance(command, pick_device(config.device))
    if not file.exists():
        return now
    first = read_versions(file)
    later: list[Any] = first.pop("resumed", [])
    if [first, *later][-1] != now:
        later.append(now)
    return first | ({"resumed": later} if later else {})


@first_process_only
def copy_parts(run: Path, out: Path, *names: str) -> None:
    """Copy folders of one run into another, so that it is whole by itself; those that are there already stay."""
    for name in names:
        if (run / name).is_dir() and not (out / name).is_dir():
            with atomic_folder(out / name) as partial:
                shutil.copytree(run / name, partial, dirs_exist_ok=True)


def read_seconds(run: Path) -> dict[str, float]:
    """Seconds per part of a run so far; empty for a new one."""
    file = run / "seconds.json"
    return read_record(file, {str: float}, "delete it: what it counted is then unknown") if file.exists() else {}


@first_process_only
def write_seconds(run: Path, seconds: dict[str, float]) -> None:
    """Keep what `read_seconds` reads."""
    write_atomic(run / "seconds.json", json.dumps(seconds, indent=2) + "\n")


def _may_change(field: str) -> bool:
    """Fields that do not change what is computed may differ when a run is resumed."""
    return field in ("out", "sample_batch", "trust") or (field.startswith("loop.") and field != "loop.precision")


def _lock(out: Path) -> None:
    """One process per run folder; the system frees the lock when the process ends, however it ends."""
    if out.resolve() in _locks:
        return
    file = open(out / ".lock", "w")  # noqa: SIM115  (kept open on purpose)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{out} is in use by another dd2; wait for it, or choose another --out") from None
    _locks[out.resolve()] = file
