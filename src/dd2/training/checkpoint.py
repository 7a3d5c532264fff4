"""Training checkpoints: a folder of safetensors and one JSON, renamed into place when complete, never unpickled."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dd2.errors import InputError
from dd2.files import atomic_folder
from dd2.processes import barrier, rank
from dd2.training.parallel import like, load_whole_state, whole, whole_state
from dd2.training.stage import Stage

STATE_FILE = "state.json"


def save(folder: Path, stage: Stage, step: int, seconds: float, keep: int = 2) -> Path:
    """Write the state after `step` iterations and drop all but the newest `keep` checkpoints.

    Called by all processes. The files hold whole tensors whatever the sharding, so they load on any number of processes.

    Args:
        folder: the stage's checkpoint folder.
        stage: networks and optimisers to save.
        step: iterations done.
        seconds: time spent on the stage so far.
        keep: checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder. A process killed at any moment leaves the previous one loadable.
    """
    final = folder / f"{step:08d}"
    state = {"stage": stage.name, "step": step, "seconds": seconds, "torch": str(torch.__version__)}
    files = _files(stage)  # one at a time: gathered weights of all networks at once might not fit
    if rank() == 0:
        with atomic_folder(final) as partial:
            for name, tensors in files:
                save_file(tensors, partial / f"{name}.safetensors")
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"{old:08d}")
    else:
        for _ in files:
            pass
    barrier()
    return final


def _files(stage: Stage) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every file's name and tensors, gathered from all processes."""
    for name, module in stage.modules.items():
        yield name, _contiguous(whole_state(module))
    for update in stage.updates:
        flat = _flatten(update.optimizer.state_dict()["state"])
        yield f"{update.name}.optimizer", _contiguous({key: whole(value) for key, value in flat.items()})


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def load(checkpoint: Path, stage: Stage) -> dict[str, Any]:
    """Load networks and optimisers in place.

    Returns:
        The saved state: stage, step, seconds, torch.

    Raises:
        InputError: a file is missing, damaged or belongs to other networks.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        for name, module in stage.modules.items():
            load_whole_state(module, load_file(checkpoint / f"{name}.safetensors"))
        for update in stage.updates:
            found = _unflatten(load_file(checkpoint / f"{update.name}.optimizer.safetensors"))
            for index, entry in found.items():
                parameter = update.parameters[index]
                found[index] = {k: like(v, parameter) if v.shape == parameter.shape else v for k, v in entry.items()}
            groups = update.optimizer.state_dict()["param_groups"]
            update.optimizer.load_state_dict({"state": found, "param_groups": groups})
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"checkpoint {checkpoint} cannot be loaded ({reason}); check that the configuration is the one that wrote it, or "
            "delete it to start this stage again"
        ) from error
    return state


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().contiguous() for key, value in tensors.items()}


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def _unflatten(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
