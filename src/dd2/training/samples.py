"""The training data of stage 1: sequences sampled from the teacher, kept on disk as code ids."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.progress import progress
from dd2.seeding import seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling

SHARD = 4096
"""Sequences per file; an interruption loses less than one file's work."""


class TeacherSamples:
    """Sequences of one teacher under one sampling distribution.

    Attributes:
        ids: (N, n) code ids, uint16 where V allows it.
        labels: (N,) labels of their conditions; in turn, so that they are balanced.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels = ids, labels

    @classmethod
    def prepare(
        cls, folder: Path, teacher: Teacher, sampling: Sampling, count: int, seed: int, batch: int = 64
    ) -> "TeacherSamples":
        """Sample what is missing in `folder` and load all of it.

        Sequence i has a seed of its own, so the result does not depend on batches or interruptions.

        Args:
            folder: where the shards are.
            teacher: what to sample.
            sampling: its sampling distribution.
            count: N, number of sequences.
            seed: the run's seed.
            batch: sequences sampled at a time.

        Raises:
            InputError: the folder holds samples of another teacher, sampling or seed.
        """
        if count < 1:
            raise InputError(f"the number of teacher samples must be at least 1, got {count}")
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"teacher": fingerprint(teacher), "sampling": asdict(sampling), "seed": seed}
        if captions := teacher.backbone.captions_digest():
            identity["captions"] = captions
        _same_or_new(folder / "samples.json", identity)
        shards: list[dict[str, Tensor]] = []
        with progress("teacher samples", count, "seq") as bar:
            for start in range(0, count, SHARD):
                size = min(SHARD, count - start)
                file = folder / f"{start:09d}-{start + size:09d}.safetensors"
                shard = _read(file, size, teacher.order.n)
                if shard is None:
                    shard = _sample(teacher, sampling, start, size, seed, batch)
                    write_atomic(file, save(shard))
                shards.append(shard)
                bar.update(size)
        return cls(torch.cat([s["ids"] for s in shards]), torch.cat([s["labels"] for s in shards]))

    @classmethod
    def load(cls, folder: Path) -> "TeacherSamples":
        """What `prepare` left in `folder`.

        Raises:
            InputError: there is nothing, or a file is damaged.
        """
        try:
            shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        except SafetensorError as error:
            raise InputError(f"{folder} holds a damaged file ({error}); run dd2 distill again to redo it") from error
        if not shards:
            raise InputError(f"{folder} holds no teacher samples; it is written by dd2 distill")
        return cls(torch.cat([s["ids"] for s in shards]), torch.cat([s["labels"] for s in shards]))

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random sequences: ids (size, n) int64 and labels (size,), on `device`."""
        rows = torch.randint(len(self.ids), (size,), generator=generator, device=generator.device).cpu()
        return self.ids[rows].long().to(device), self.labels[rows].to(device)


def fingerprint(teacher: Teacher) -> str:
    """Hash of the weights that decide what a teacher samples."""
    # The standardisation is set from the samples, not the other way round.
    return weights_digest(teacher.backbone, teacher.output, without="token_")


def weights_digest(*modules: nn.Module, without: str = "\0") -> str:
    """Hash of the modules' tensors, leaving out those whose names start with `without`."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in sorted(module.state_dict().items()):
            if not key.startswith(without):
                digest.update(key.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def samples_identity(folder: Path) -> dict[str, object]:
    """What a folder's samples were made of: teacher (fingerprint), sampling, seed; empty if that is unknown."""
    try:
        return json.loads((folder / "samples.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _sample(teacher: Teacher, sampling: Sampling, start: int, size: int, seed: int, batch: int) -> dict[str, Tensor]:
    device = teacher.codebook.device
    index = torch.arange(start, start + size)
    labels = teacher.backbone.default_labels(index)
    parts = []
    for rows in index.split(batch):
        seeds = [seed_of("teacher samples", seed, int(row)) for row in rows]
        cond = teacher.backbone.conditions(labels[rows - start].to(device))
        parts.append(teacher.generate(cond, sampling, seeds).cpu())
    dtype = torch.uint16 if len(teacher.codebook) <= 2**16 else torch.int32
    return {"ids": torch.cat(parts).to(dtype), "labels": labels}


def _read(file: Path, size: int, positions: int) -> dict[str, Tensor] | None:
    """A whole shard, or None if it has to be made (again)."""
    try:
        shard = load_file(file)
    except (OSError, SafetensorError):
        return None
    whole = {"ids", "labels"} <= shard.keys() and tuple(shard["ids"].shape) == (size, positions)
    return shard if whole and len(shard["labels"]) == size else None


def _same_or_new(file: Path, identity: dict[str, object]) -> None:
    if not file.exists():
        write_atomic(file, json.dumps(identity, indent=2))
        return
    found = samples_identity(file.parent)
    wrong = [key for key, value in identity.items() if found.get(key) != value]
    if wrong:
        raise InputError(
            f"{file.parent} holds samples of another {' and '.join(wrong)}; give another --out, or delete the folder"
        )
