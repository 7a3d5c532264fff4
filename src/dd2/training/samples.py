"""The training data of stage 1: sequences sampled from the teacher, kept on disk as code ids."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.processes import barrier, rank, world_size
from dd2.progress import progress
from dd2.seeding import seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling

SHARD = 4096
"""Sequences per file; an interruption loses less than one file's work."""

Draw = Callable[[Tensor, list[int]], Tensor]
"""Conditions (B, ...) and B seeds -> ids (B, n)."""


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
        cls,
        folder: Path,
        teacher: Teacher,
        sampling: Sampling,
        count: int,
        seed: int,
        batch: int = 64,
        draw: Draw | None = None,
        how: dict[str, object] | None = None,
        title: str = "teacher samples",
    ) -> "TeacherSamples":
        """Sample what is missing in `folder` and load all of it. Called by all processes of a job: each makes its share.

        Sequence i has a seed of its own (`sample_seed`), so the result does not depend on batches, processes or interruptions.
        Files carry a checksum: a torn or altered one is made again.

        Args:
            folder: where the shards are.
            teacher: what to sample.
            sampling: its sampling distribution.
            count: N, number of sequences.
            seed: the run's seed.
            batch: sequences sampled at a time.
            draw: another way to draw than the teacher's own sampling.
            how: what that way is, as it decides the sequences.
            title: shown beside the progress bar.

        Raises:
            InputError: the folder holds samples of another teacher, sampling, seed or way.
        """
        if count < 1:
            raise InputError(f"the number of teacher samples must be at least 1, got {count}")
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"teacher": fingerprint(teacher), "sampling": asdict(sampling), "seed": seed, **(how or {})}
        if captions := teacher.backbone.captions_digest():
            identity["captions"] = captions
        if rank() == 0:
            _same_or_new(folder / "samples.json", identity)
        barrier()
        draw = draw or (lambda cond, seeds: teacher.generate(cond, sampling, seeds))
        spans = [(start, min(SHARD, count - start)) for start in range(0, count, SHARD)]
        own = spans[rank() :: world_size()]
        with progress(title, sum(size for _, size in own), "seq") as bar:
            for start, size in own:
                file = _file(folder, start, size)
                if _read(file, size, teacher.order.n) is None:
                    write_atomic(file, _sealed(_sample(teacher, draw, start, size, seed, batch)))
                bar.update(size)
        barrier()
        return cls._joined([_whole(_file(folder, start, size)) for start, size in spans])

    @classmethod
    def _joined(cls, shards: list[dict[str, Tensor]]) -> "TeacherSamples":
        return cls(torch.cat([s["ids"] for s in shards]), torch.cat([s["labels"] for s in shards]))

    @classmethod
    def load(cls, folder: Path) -> "TeacherSamples":
        """What `prepare` left in `folder`.

        Raises:
            InputError: there is nothing, or a file is damaged.
        """
        shards = [_whole(file) for file in sorted(folder.glob("*.safetensors"))]
        if not shards:
            raise InputError(f"{folder} holds no teacher samples; it is written by dd2 distill")
        return cls._joined(shards)

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random sequences: ids (size, n) int64 and labels (size,), on `device`."""
        return self.take(self.random_rows(size, generator), device)

    def random_rows(self, size: int, generator: torch.Generator) -> Tensor:
        """Numbers (size,) of random sequences."""
        return torch.randint(len(self.ids), (size,), generator=generator, device=generator.device).cpu()

    def take(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids (B, n) int64 and labels (B,) of the sequences of given numbers (B,), on `device`."""
        return self.ids[rows].long().to(device), self.labels[rows].to(device)


class LiveSamples:
    """Sequences drawn from the teacher anew for every batch: nothing on disk, and none is seen twice.

    Args:
        teacher: what to sample.
        sampling: its sampling distribution.
    """

    def __init__(self, teacher: Teacher, sampling: Sampling) -> None:
        self.teacher, self.sampling = teacher, sampling

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """As `TeacherSamples.batch`, but of random labels; all randomness is the generator's."""
        labels, seeds = (
            torch.randint(limit, (size,), generator=generator, device=generator.device)
            for limit in (self.teacher.backbone.num_labels, 2**62)
        )
        cond = self.teacher.backbone.conditions(labels.to(device))
        with full_precision(device):  # as the samples on disk
            return self.teacher.generate(cond, self.sampling, seeds.tolist()), labels.to(device)


def sample_seed(seed: int, row: int) -> int:
    """Seed of the sequence of one number in a run of one seed."""
    return seed_of("teacher samples", seed, row)


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


def _sample(teacher: Teacher, draw: Draw, start: int, size: int, seed: int, batch: int) -> dict[str, Tensor]:
    device = teacher.codebook.device
    index = torch.arange(start, start + size)
    labels = teacher.backbone.default_labels(index)
    parts = []
    for rows in index.split(batch):
        seeds = [sample_seed(seed, int(row)) for row in rows]
        cond = teacher.backbone.conditions(labels[rows - start].to(device))
        parts.append(draw(cond, seeds).cpu())
    dtype = torch.uint16 if len(teacher.codebook) <= 2**16 else torch.int32
    return {"ids": torch.cat(parts).to(dtype), "labels": labels}


def _file(folder: Path, start: int, size: int) -> Path:
    return folder / f"{start:09d}-{start + size:09d}.safetensors"


def _sealed(shard: dict[str, Tensor]) -> bytes:
    return save(shard, metadata={"sha256": _digest(shard)})


def _digest(shard: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(shard):
        content.update(name.encode() + shard[name].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _open(file: Path) -> dict[str, Tensor] | None:
    """A shard whose checksum is right, or None."""
    try:
        with safe_open(file, "pt") as opened:
            shard = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            sealed = (opened.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return shard if sealed == _digest(shard) else None


def _whole(file: Path) -> dict[str, Tensor]:
    shard = _open(file)
    if shard is None:
        raise InputError(f"{file} is damaged, or of an older dd2; run the command that wrote it again to redo it")
    return shard


def _read(file: Path, size: int, positions: int) -> dict[str, Tensor] | None:
    """A whole shard of the right size, or None if it has to be made (again)."""
    shard = _open(file)
    if shard is None or not {"ids", "labels"} <= shard.keys():
        return None
    return shard if tuple(shard["ids"].shape) == (size, positions) and len(shard["labels"]) == size else None


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
