"""Rows of tensors on disk, in files with checksums: teacher samples, ODE pairs, features.

Each file's content depends on the numbers of its rows alone, so it does not matter which process makes it, or when: an
interruption loses less than one file's work, and a torn or altered file is made again.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.processes import barrier, rank, world_size
from dd2.progress import progress

Make = Callable[[Tensor], dict[str, Tensor]]
"""Numbers (B,) of rows -> what is kept of them, each (B, …) on the CPU."""


def taken(stored: Tensor, index: Any) -> Tensor:
    """`stored[index]`; ids of 16 bits without a sign by way of those with one, as older versions of PyTorch cannot index them."""
    if stored.dtype == torch.uint16:
        return stored.view(torch.int16)[index].view(torch.uint16)
    return stored[index]


class Store:
    """Named tensors of N rows each.

    Args:
        files: in the order of their rows.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._verified: set[Path] = set()

    @classmethod
    def filled(cls, folder: Path, count: int, shard: int, batch: int, make: Make, title: str, unit: str) -> "Store":
        """Make what is missing. Called by all processes of a job, each of which makes its share.

        Args:
            folder: where the files are.
            count: rows.
            shard: rows per file.
            batch: rows made at a time.
            make: makes them.
            title, unit: of the progress bar.
        """
        folder.mkdir(parents=True, exist_ok=True)
        spans = [(start, min(start + shard, count)) for start in range(0, count, shard)]
        files = [folder / f"{start:09d}-{stop:09d}.safetensors" for start, stop in spans]
        own = list(zip(files, spans, strict=True))[rank() :: world_size()]
        with progress(title, sum(stop - start for _, (start, stop) in own), unit) as bar:
            for file, (start, stop) in own:
                found = _open(file)
                if found is None or any(len(rows) != stop - start for rows in found.values()):
                    parts = [make(index) for index in torch.arange(start, stop).split(batch)]
                    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                    write_atomic(file, save(rows, metadata={"sha256": _digest(rows)}))
                bar.update(stop - start)
        barrier()
        return cls(files)

    @classmethod
    def existing(cls, folder: Path) -> "Store":
        """What `filled` left in a folder.

        Raises:
            InputError: files of different counts lie beside each other.
        """
        files = sorted(folder.glob("*.safetensors"))
        spans = [file.stem.partition("-") for file in files]
        if any(stop != start for (_, _, stop), (start, _, _) in itertools.pairwise(spans)):
            raise InputError(f"{folder} holds files of different counts beside each other; delete it, and have it made again")
        return cls(files)

    @property
    def count(self) -> int:
        """N, from the files' names."""
        return int(self.files[-1].stem.partition("-")[2])

    def names(self) -> set[str]:
        """What is kept."""
        if not self.files:
            return set()
        with self._opened(self.files[0]) as rows:
            return set(rows.keys())

    def load(self, name: str) -> Tensor:
        """One kept thing of all rows.

        Raises:
            InputError: a file is damaged.
        """
        return torch.cat(list(self.stream(name)))

    def stream(self, name: str) -> Iterator[Tensor]:
        """One kept thing, file by file. Errors as `load`."""
        for file in self.files:
            with self._opened(file) as rows:
                yield rows.get_tensor(name)

    def _opened(self, file: Path) -> Any:
        """A file, whose checksum has been looked at once."""
        if file not in self._verified:
            _whole(file)
            self._verified.add(file)
        return safe_open(file, "pt")


def _digest(rows: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(rows):
        content.update(name.encode() + rows[name].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _open(file: Path) -> dict[str, Tensor] | None:
    """A file whose checksum is right, or None."""
    try:
        with safe_open(file, "pt") as opened:
            rows = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            sealed = (opened.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return rows if sealed == _digest(rows) else None


def _whole(file: Path) -> dict[str, Tensor]:
    rows = _open(file)
    if rows is None:
        raise InputError(f"{file} is damaged, or of an older dd2; run the command that wrote it again to redo it")
    return rows
