"""Features on disk: what makes evaluation stream, resume after an interruption, and split over processes.

A bank is a folder of shards, one file per block of images; each depends on its image indices alone, so it does not matter which
process makes it, or when.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dd2.files import write_atomic
from dd2.processes import barrier, rank, world_size
from dd2.progress import progress

SHARD = 2000
"""Images per file."""

FORMAT = 1
"""Raise it when drawing or reading images changes, so that features of older code are not taken for the new code's."""

Make = Callable[[Tensor], dict[str, Tensor]]
"""Indices (B,) of images -> what is kept of them, each (B, …) on the CPU."""


class Bank:
    """What was kept of `count` images."""

    def __init__(self, files: list[Path], count: int) -> None:
        self.files, self.count = files, count

    @classmethod
    def prepare(cls, root: Path, title: str, identity: dict[str, Any], count: int, batch: int, make: Make) -> "Bank":
        """Make what is missing. Called by all processes of a job, each of which makes its share.

        Args:
            root: parent of the banks of a run.
            title: shown beside the progress bar.
            identity: everything that decides what the images and features are; another identity is another folder.
            count: images.
            batch: images at a time.
            make: draws and reduces them.
        """
        identity = {**identity, "format": FORMAT}
        key = json.dumps(identity, sort_keys=True, default=str)
        folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            write_atomic(folder / "identity.json", json.dumps(identity, indent=2, default=str) + "\n")
        spans = [(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
        files = [folder / f"{start:09d}-{stop:09d}.safetensors" for start, stop in spans]
        own = list(zip(files, spans, strict=True))[rank() :: world_size()]
        with progress(title, sum(stop - start for _, (start, stop) in own), "img") as bar:
            for file, (start, stop) in own:
                if not _whole(file):
                    parts = [make(index) for index in torch.arange(start, stop).split(batch)]
                    write_atomic(file, save({name: torch.cat([part[name] for part in parts]) for name in parts[0]}))
                bar.update(stop - start)
        barrier()
        return cls(files, count)

    def names(self) -> set[str]:
        """What is kept."""
        with safe_open(self.files[0], "pt") as file:
            return set(file.keys())

    def load(self, name: str) -> Tensor:
        """One kept thing of all images."""
        return torch.cat([_read(file, name) for file in self.files])

    def stream(self, name: str):
        """One kept thing, file by file."""
        for file in self.files:
            yield _read(file, name)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as shard:
        return shard.get_tensor(name)


def _whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as shard:
            return bool(list(shard.keys()))
    except (OSError, SafetensorError):
        return False
