"""The training data of stage 1: sequences sampled from the teacher, kept on disk in the teacher's own form."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.processes import barrier, rank
from dd2.records import read_record
from dd2.seeding import on_cpu, seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.training.store import Store, taken

SHARD = 4096
"""Sequences per file."""

Draw = Callable[[Tensor, list[int]], Tensor]
"""Conditions (B, ...) and B seeds -> standardised tokens (B, n, C)."""


class TeacherSamples:
    """Sequences of one teacher under one sampling distribution.

    Args:
        teacher: whose they are.
        kept: (N, …) sequences in the form of `Teacher.stored`: ids (N, n), or latents (N, n, C).
        labels: (N,) labels of their conditions; in turn, so that they are balanced.
    """

    def __init__(self, teacher: Teacher, kept: Tensor, labels: Tensor) -> None:
        self.teacher, self.kept, self.labels = teacher, kept, labels

    def __len__(self) -> int:
        return len(self.labels)

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

        Args:
            folder: where the files are.
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
        identity = {"teacher": teacher.fingerprint(), "sampling": sampling.described(), "seed": seed, **(how or {})}
        if captions := teacher.conditions.digest():
            identity["captions"] = captions
        if rank() == 0:
            _same_or_new(folder / "samples.json", identity)
        barrier()
        drawn_by = draw or (lambda cond, seeds: teacher.sample(cond, sampling, seeds))

        def make(rows: Tensor) -> dict[str, Tensor]:
            labels = teacher.conditions.default_labels(rows)
            seeds = [sample_seed(seed, int(row)) for row in rows]
            tokens = drawn_by(teacher.conditions(labels.to(teacher.device)), seeds)
            return {teacher.stored_as: teacher.stored(tokens), "labels": labels}

        return cls._of(teacher, Store.filled(folder, count, SHARD, batch, make, title, "seq"))

    @classmethod
    def load(cls, folder: Path, teacher: Teacher) -> "TeacherSamples":
        """What `prepare` left in `folder`.

        Raises:
            InputError: there is nothing, or a file is damaged or of another kind of teacher.
        """
        store = Store.existing(folder)
        if not store.files:
            raise InputError(f"{folder} holds no teacher samples; it is written by dd2 distill")
        if teacher.stored_as not in store.names():
            raise InputError(f"{folder} holds samples of another kind of teacher than a {type(teacher).__name__}; restore it")
        return cls._of(teacher, store)

    @classmethod
    def _of(cls, teacher: Teacher, store: Store) -> "TeacherSamples":
        return cls(teacher, store.load(teacher.stored_as), store.load("labels"))

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sequences on the stream's device: tokens (size, n, C) and labels (size,)."""
        return self.take(self.random_rows(size, random))

    def random_labels(self, size: int, random: torch.Generator) -> Tensor:
        """The labels (size,) of random sequences, on the CPU."""
        return self.labels[self.random_rows(size, random)]

    def random_rows(self, size: int, random: torch.Generator) -> Tensor:
        """Numbers (size,) of random sequences, on the CPU, where the sequences are: nothing waits for a GPU."""
        return torch.randint(len(self), (size,), generator=on_cpu(random))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised tokens (B, n, C) and labels (B,) of the sequences of given numbers (B,), on the teacher's device."""
        return self.teacher.restored(taken(self.kept, rows)), self.labels[rows].to(self.teacher.device)


class LiveSamples:
    """Sequences drawn from the teacher anew for every batch: nothing on disk, and none is seen twice.

    Args:
        teacher: what to sample.
        sampling: its sampling distribution.
    """

    def __init__(self, teacher: Teacher, sampling: Sampling) -> None:
        self.teacher, self.sampling = teacher, sampling

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """As `TeacherSamples.batch`, but of random labels; all randomness is the stream's."""
        labels, seeds = (
            torch.randint(limit, (size,), generator=random, device=random.device)
            for limit in (self.teacher.conditions.num_labels, 2**62)
        )
        cond = self.teacher.conditions(labels)
        with full_precision(random.device):  # as the samples on disk
            return self.teacher.sample(cond, self.sampling, seeds.tolist()), labels


def sample_seed(seed: int, row: int) -> int:
    """Seed of the sequence of one number in a run of one seed."""
    return seed_of("teacher samples", seed, row)


def samples_identity(folder: Path) -> dict[str, object]:
    """What a folder's samples were made of: teacher (fingerprint), sampling, seed; empty if that is unknown."""
    file = folder / "samples.json"
    remedy = f"restore it, or delete {folder}, which is then made again"
    return read_record(file, {"teacher?": str}, remedy) if file.exists() else {}


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
