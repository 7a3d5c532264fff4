"""The comparison of a distilled run with its teacher: every number of metrics.json."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dd2.baselines.marginal import MarginalSampler
from dd2.checkpoints.native import Generator
from dd2.evaluation.features import FeatureNetwork
from dd2.evaluation.frechet import FeatureStatistics, GaussianFit, frechet_distance
from dd2.evaluation.likelihood import teacher_nll
from dd2.evaluation.speed import seconds_per_call
from dd2.progress import progress
from dd2.sampling import ar_diffusion, one_step, refine
from dd2.seeding import seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import nearest_ids

SHOWN = 40
"""Images of each method that are kept for the pictures."""

SPEED_BATCHES = (16, 1, 256)
"""Batches at which speed is measured; the first one's ratio is speedup_vs_teacher."""

Method = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]
"""Labels (B,) and B seeds -> images (B, channels, H, W) and their (nearest-code) ids (B, n)."""


@dataclass
class Scored:
    """One method's samples, reduced to what is reported."""

    fit: GaussianFit
    correct: float | None
    nll: Tensor
    distinct: int
    images: Tensor


@dataclass
class Scorer:
    """Draws samples of every method at the same labels and scores them.

    Args:
        teacher: the teacher, standardised as the generator.
        network: the feature network.
        sampling: how the teacher samples here.
        count: images per method, classes in turn.
        batch: images at a time.
        seed: seed of the evaluation.
    """

    teacher: Teacher
    network: FeatureNetwork
    sampling: Sampling
    count: int
    batch: int
    seed: int

    def run(
        self, generator: Generator, tuned: Generator | None, marginal: MarginalSampler, steps: Sequence[int] = ()
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Score everything.

        Args:
            generator: the one-step generator.
            tuned: the stage-1 model, if there is one.
            marginal: onestep*.
            steps: also the generator with the teacher redrawing its last k - 1 AR steps, for each k > 1 (Alg. 4).

        Returns:
            The content of metrics.json, and images to show by method.
        """
        reference = self.score("reference (teacher)", self.teacher_images, "reference")
        floor = self.score("teacher", self.teacher_images, "floor")

        def generated(labels: Tensor, seeds: list[int]) -> Tensor:
            return one_step(generator.student, self._cond(labels), seeds)

        methods: dict[str, Method] = {
            "onestep_marginal": lambda labels, seeds: self.decoded(marginal.sample(labels, seeds)),
            "generator": lambda labels, seeds: self.continuous(generated(labels, seeds)),
            "generator_nearest": lambda labels, seeds: self.decoded(self._snapped(generated(labels, seeds))),
        }
        for k in steps:
            methods[few_steps(k)] = lambda labels, seeds, k=k: self.continuous(
                refine(generator.student, self.teacher, self._cond(labels), self.sampling, seeds, k)
            )
        if tuned is not None:
            student = tuned.student
            methods["ar_diffusion"] = lambda labels, seeds: self.continuous(ar_diffusion(student, self._cond(labels), seeds))
        scored = {name: self.score(name, method, "methods") for name, method in methods.items()}

        frechet = {name: frechet_distance(entry.fit, reference.fit) for name, entry in scored.items()}
        frechet["floor"] = frechet_distance(floor.fit, reference.fit)
        span = frechet["onestep_marginal"] - frechet["floor"]
        everything = {"teacher": floor, **scored}
        numbers = {
            "frechet": frechet,
            "gap_closed": (frechet["onestep_marginal"] - frechet["generator"]) / span,
            "teacher_nll": {name: float(entry.nll.double().mean()) for name, entry in everything.items()},
            "teacher_nll_standard_error": {name: _standard_error(entry.nll) for name, entry in everything.items()},
            "accuracy": {name: entry.correct for name, entry in everything.items() if entry.correct is not None},
            "ar_steps": self.teacher.order.num_steps,
            "distinct_sequences": {name: entry.distinct for name, entry in everything.items()},
            **self._speed(generator),
        }
        return numbers, {name: entry.images for name, entry in everything.items()}

    def teacher_images(self, labels: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """The KV-cached teacher, as a `Method`."""
        return self.decoded(self.teacher.generate(self._cond(labels), self.sampling, seeds))

    def decoded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images of ids (B, n), and the ids."""
        return self.teacher.tokenizer.decode(ids), ids

    def continuous(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images of tokens (B, n, C) as they are, and their nearest-code ids."""
        return self.teacher.decode(tokens), self._snapped(tokens)

    def _snapped(self, tokens: Tensor) -> Tensor:
        return nearest_ids(tokens, self.teacher.codebook)

    @torch.inference_mode()
    def score(self, title: str, sample: Method, seeds_of: str) -> Scored:
        """Draw and reduce `count` samples of one method; `seeds_of` names the family of seeds."""
        statistics, nll, sequences, shown = FeatureStatistics(), [], [], []
        correct, classify = 0, self.network.classify
        with progress(title, self.count, "img") as bar:
            for index, labels in self._batches():
                seeds = [seed_of("evaluate", seeds_of, self.seed, int(i)) for i in index]
                images, ids = sample(labels, seeds)
                statistics.add(self.network.features(images))
                if classify is not None:
                    correct += int((classify(images) == labels).sum())
                nll.append(teacher_nll(self.teacher, ids, self._cond(labels)).cpu())
                sequences.append(ids.to(torch.int32).cpu())
                if int(index[0]) < SHOWN:
                    shown.append(images.cpu())
                bar.update(len(index))
        distinct = len(torch.unique(torch.cat(sequences), dim=0))
        accuracy = correct / self.count if classify is not None else None
        return Scored(statistics.fit(), accuracy, torch.cat(nll), distinct, torch.cat(shown)[:SHOWN])

    @torch.inference_mode()
    def _speed(self, generator: Generator) -> dict[str, Any]:
        """Whole images, decoding included: the KV-cached teacher against one step, same batch, same process.

        The ratio falls as the batch grows: at large batches both are bound by arithmetic, of which one pass has hardly
        less than n cached steps; at small ones the teacher waits n times for the next token.
        """
        by_batch = {size: self._seconds(generator, size) for size in SPEED_BATCHES}
        return {
            "speedup_vs_teacher": by_batch[SPEED_BATCHES[0]]["teacher"] / by_batch[SPEED_BATCHES[0]]["generator"],
            "speedup_batch": SPEED_BATCHES[0],
            "speed": [
                {"batch": size, "speedup": taken["teacher"] / taken["generator"], "seconds_per_image": taken}
                for size, taken in by_batch.items()
            ],
        }

    def _seconds(self, generator: Generator, size: int) -> dict[str, float]:
        teacher = self.teacher
        labels = teacher.backbone.default_labels(torch.arange(size, device=teacher.codebook.device))
        cond = self._cond(labels)
        seeds = list(range(size))
        codes = teacher.tokenizer.codebook[:1].expand(size, teacher.order.n, -1)
        taken = seconds_per_call(
            {
                "teacher": lambda: self.teacher_images(labels, seeds),
                "generator": lambda: teacher.decode(one_step(generator.student, cond, seeds)),
                "decoding_alone": lambda: teacher.tokenizer.decode_codes(codes),
            }
        )
        return {name: seconds / size for name, seconds in taken.items()}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(self.count).split(self.batch):
            yield index, self.teacher.backbone.default_labels(index).to(self.teacher.codebook.device)

    def _cond(self, labels: Tensor) -> Tensor:
        return self.teacher.backbone.conditions(labels)


def few_steps(k: int) -> str:
    """Name of the generator with k - 1 AR steps redrawn by the teacher."""
    return f"generator_{k}_steps"


def few_steps_of(name: str) -> int:
    """The k of a name by `few_steps`, 0 for other methods."""
    found = re.fullmatch(r"generator_(\d+)_steps", name)
    return int(found[1]) if found else 0


def _standard_error(values: Tensor) -> float:
    return float(values.double().std() / len(values) ** 0.5)
