"""Training checkpoints: a folder of safetensors and one JSON, renamed into place when complete, never unpickled."""

import json
import math
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.files import atomic_folder, save_tensors
from dd2.processes import barrier, rank
from dd2.records import Shape, read_record
from dd2.training.parallel import like, load_whole_state, whole, whole_state
from dd2.training.stage import Stage

STATE_FILE = "state.json"


class CheckpointWriter:
    """Saves checkpoints of a stage and drops old ones. Used by all processes alike, as a context manager.

    The files hold whole tensors whatever the sharding, so they load on any number of processes. A process killed at any moment
    leaves the previous checkpoint loadable.

    Args:
        folder: the stage's checkpoint folder.
        keep: newest checkpoints to keep, at least 1; the one of the lowest validation value stays as well.
        background: copy everything to the main memory and write it in a thread, while training goes on.
    """

    def __init__(self, folder: Path, keep: int = 2, background: bool = False) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last checkpoint; after an exception, for this process's own work alone."""
        if kind is None:
            self.wait()
            return
        self.finish()
        if self._error:
            print(f"a checkpoint could not be written: {self._error}", file=sys.stderr)

    def save(self, stage: Stage, step: int, seconds: float, validation: float | None = None) -> Path:
        """Write the state after `step` iterations.

        Args:
            stage: networks and optimisers to save.
            step: iterations done.
            seconds: time spent on the stage so far.
            validation: how good the networks are, the lower the better.

        Returns:
            The checkpoint's folder, which in the background is there only after `wait`.

        Raises:
            OSError: this checkpoint, or the one before in the background, cannot be written.
        """
        self.wait()
        final = self.folder / f"{step:08d}"
        state = {"stage": stage.name, "step": step, "seconds": seconds, "validation": validation, "torch": str(torch.__version__)}
        files = _files(stage)  # one at a time: gathered weights of all networks at once might not fit
        if rank() != 0:
            for _ in files:
                pass
        elif self.background:
            copies = [(name, {key: value.to("cpu", copy=True) for key, value in tensors.items()}) for name, tensors in files]
            self._thread = threading.Thread(target=self._write_and_keep_error, args=(final, state, copies), name="checkpoint")
            self._thread.start()
        else:
            self._write(final, state, files)
        if not self.background:
            barrier()
        return final

    def wait(self) -> None:
        """Until what was begun is on the disk, on the first process.

        Raises:
            OSError: it could not be written.
        """
        if not self.background:
            return
        self.finish()
        if error := self._error:
            self._error = None
            raise error
        barrier()

    def finish(self) -> None:
        """Let this process's thread end, whatever became of its checkpoint."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write_and_keep_error(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(self, final: Path, state: dict[str, Any], files: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        with atomic_folder(final) as partial:
            for name, tensors in files:
                save_tensors(tensors, partial / f"{name}.safetensors")
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
        best = best_step(self.folder)
        for old in steps(self.folder)[: -self.keep]:
            if old != best:
                shutil.rmtree(self.folder / f"{old:08d}")


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


def best_step(folder: Path) -> int | None:
    """Step of the checkpoint with the lowest validation value, the earliest of equals; None where none was validated."""
    found: list[tuple[float, int]] = []
    for step in steps(folder):
        try:
            value = read_state(folder / f"{step:08d}").get("validation")
        except InputError:
            continue
        if isinstance(value, float) and math.isfinite(value):
            found.append((value, step))
    return min(found)[1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: stage, step, seconds, validation, torch.

    Raises:
        InputError: it is damaged.
    """
    shape: dict[Any, Shape] = {"stage": str, "step": int, "seconds": float, "validation?": object}
    return read_record(checkpoint / STATE_FILE, shape, "delete this checkpoint, and the one before it is taken")


def load_network(file: Path, network: nn.Module) -> None:
    """Load one network of a checkpoint in place, whole.

    Raises:
        InputError: the file is damaged, or is of another network than the run describes.
    """
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{file} does not fit the run's description ({' '.join(str(error).split())[:200]})") from error


def load(checkpoint: Path, stage: Stage) -> dict[str, Any]:
    """Load networks and optimisers in place.

    Returns:
        The saved state: stage, step, seconds, validation, torch.

    Raises:
        InputError: a file is missing, damaged or belongs to other networks.
    """
    try:
        state = read_state(checkpoint)
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
