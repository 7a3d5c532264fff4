"""The comparison of a distilled run with its teacher: every number of metrics.json."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd2.baselines.marginal import MarginalSampler
from dd2.baselines.skip import skipped
from dd2.checkpoints.native import Generator
from dd2.evaluation import reference as references
from dd2.evaluation.bank import Bank
from dd2.evaluation.features import FeatureNetwork, read_features
from dd2.evaluation.likelihood import teacher_nll
from dd2.evaluation.metrics import MetricConfig, interval_of_mean, scores, within_class_spread
from dd2.evaluation.neighbours import nearest_distance
from dd2.evaluation.path_length import path_length
from dd2.evaluation.reference import Reference
from dd2.sampling import ar_diffusion, one_step, refine, two_passes
from dd2.seeding import seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import nearest_ids
from dd2.training.samples import fingerprint, weights_digest

SHOWN = 40
"""Images of each method that are kept for the pictures."""

Method = Callable[[Tensor, list[int]], tuple[Tensor, Tensor | None]]
"""Labels (B,) and B seeds -> images (B, channels, H, W) and their (nearest-code) ids (B, n); None for incomplete sequences."""


@dataclass
class Scorer:
    """Draws samples of every method at the same labels and scores them.

    Args:
        teacher: the teacher, standardised as the generator.
        network: the feature network.
        sampling: how the teacher samples here.
        count: images per method, labels in turn.
        batch: images at a time.
        seed: seed of the evaluation.
        banks: folder of the features on disk.
        metrics: what is computed.
    """

    teacher: Teacher
    network: FeatureNetwork
    sampling: Sampling
    count: int
    batch: int
    seed: int
    banks: Path
    metrics: MetricConfig = field(default_factory=MetricConfig)

    def methods(
        self,
        generator: Generator,
        tuned: Generator | None,
        marginal: MarginalSampler,
        steps: Sequence[int] = (),
        skips: Sequence[int] = (),
    ) -> dict[str, Method]:
        """What is compared, by name.

        Args:
            generator: the one-step generator.
            tuned: the stage-1 model, if there is one.
            marginal: onestep*.
            steps: also the generator with the teacher redrawing its last k - 1 AR steps, for each k > 1 (Alg. 4).
            skips: also the teacher without its last m AR steps, for each m.
        """

        def generated(labels: Tensor, seeds: list[int]) -> Tensor:
            return one_step(generator.student, self._cond(labels), seeds)

        methods: dict[str, Method] = {
            "teacher": self.teacher_images,
            "onestep_marginal": lambda labels, seeds: self.decoded(marginal.sample(labels, seeds)),
            "generator": lambda labels, seeds: self.continuous(generated(labels, seeds)),
            "generator_nearest": lambda labels, seeds: self.decoded(self._snapped(generated(labels, seeds))),
        }
        if generator.student.has_two_passes:
            methods["generator_two_passes"] = lambda labels, seeds: self.continuous(
                two_passes(generator.student, self._cond(labels), seeds)
            )
        for m in skips:
            methods[f"teacher_skip_{m}"] = lambda labels, seeds, m=m: (
                skipped(self.teacher, self._cond(labels), self.sampling, seeds, m),
                None,
            )
        for k in steps:
            methods[few_steps(k)] = lambda labels, seeds, k=k: self.continuous(
                refine(generator.student, self.teacher, self._cond(labels), self.sampling, seeds, k)
            )
        if tuned is not None:
            student = tuned.ar_student
            methods["ar_diffusion"] = lambda labels, seeds: self.continuous(ar_diffusion(student, self._cond(labels), seeds))
        return methods

    def teacher_reference(self) -> Reference:
        """As many other samples of the teacher; its own row is then the floor of every distance."""
        identity = self._identity("teacher", "reference", None)
        bank = self.bank("reference (teacher)", self.teacher_images, "reference", identity)
        return references.of_bank(bank, {"reference": "teacher", "count": self.count})

    def run(self, methods: dict[str, Method], digests: dict[str, str | None], reference: Reference) -> dict[str, Any]:
        """Score everything.

        Args:
            methods: from `methods`.
            digests: hash of the weights that a method samples from, beyond the teacher's.
            reference: what to compare with.

        Returns:
            Content of metrics.json, by metric and method.
        """
        found: dict[str, dict[str, float]] = {}
        distinct: dict[str, int] = {}
        for name, method in methods.items():
            seeds_of = "floor" if name == "teacher" else "methods"
            bank = self.bank(name, method, seeds_of, self._identity(name, seeds_of, digests.get(name)))
            found[name] = scores(bank, reference, self.metrics, self.seed)
            labels = bank.load("labels")
            if "nll" in bank.names():
                nll = bank.load("nll").double()
                found[name] |= {"teacher_nll": float(nll.mean()), "teacher_nll_95": interval_of_mean(nll)}
                distinct[name] = len(torch.unique(bank.load("ids"), dim=0))
            if self.network.knows_labels:
                right = (bank.load("probabilities").argmax(1) == labels).double()
                found[name] |= {"accuracy": float(right.mean()), "accuracy_95": interval_of_mean(right)}
            pool = bank.load("pool")
            found[name]["within_class_spread"] = within_class_spread(pool, labels)
            if reference.pool is not None and reference.described.get("reference") != "teacher":
                found[name]["nearest_reference_image"] = float(nearest_distance(pool, reference.pool).mean())
        return _by_metric(found) | {
            "metrics": found,
            "ar_steps": self.teacher.order.num_steps,
            "distinct_sequences": distinct,
        }

    def bank(self, title: str, sample: Method, seeds_of: str, identity: dict[str, Any]) -> Bank:
        """Draw `count` samples of one method, or what is missing of them; `seeds_of` names the family of seeds."""

        @torch.inference_mode()
        def make(index: Tensor) -> dict[str, Tensor]:
            labels = self.labels(index)
            images, ids = sample(labels, self.seeds(seeds_of, index))
            found = {**read_features(self.network, images), "labels": labels.cpu()}
            if ids is not None:
                found |= {"nll": teacher_nll(self.teacher, ids, self._cond(labels)).cpu(), "ids": ids.int().cpu()}
            return found

        return Bank.prepare(self.banks, title, identity, self.count, self.batch, make)

    @torch.inference_mode()
    def shown(self, methods: dict[str, Method]) -> dict[str, Tensor]:
        """The first images of every method, at the same labels."""
        index = torch.arange(min(SHOWN, self.count))
        labels = self.labels(index)
        return {
            name: method(labels, self.seeds("floor" if name == "teacher" else "methods", index))[0].cpu()
            for name, method in methods.items()
        }

    def path_length(self, generator: Generator, paths: int, epsilon: float) -> dict[str, dict[str, float]]:
        """Perceptual path length of the generator, decoded both ways (Table 5)."""
        backbone = generator.student.backbone
        index = torch.arange(paths)
        labels = self.labels(index)
        shape = (backbone.order.n, backbone.token_mean.shape[0])
        found = {}
        for name, nearest in (("generator", False), ("generator_nearest", True)):

            @torch.inference_mode()
            def features_of(noise: Tensor, labels: Tensor, nearest: bool = nearest) -> Tensor:
                tokens = generator.student.as_generator(noise, self._cond(labels))
                images = generator.decode(tokens, nearest).float().clamp(-1, 1)
                return self.network.read(images)["pool"]  # not rounded to bytes: ε is small

            mean, error = path_length(
                features_of, shape, labels, self.seeds("path length", index), epsilon=epsilon, batch=max(1, self.batch // 2)
            )
            found[name] = {"mean": mean, "standard_error": error, "epsilon": epsilon, "paths": paths}
        return found

    def labels(self, index: Tensor) -> Tensor:
        """Labels of images by index, in turn, on the teacher's device."""
        return self.teacher.backbone.default_labels(index).to(self.teacher.codebook.device)

    def seeds(self, family: str, index: Tensor) -> list[int]:
        """One seed per image; training never uses these streams."""
        return [seed_of("evaluate", family, self.seed, int(i)) for i in index]

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

    def _cond(self, labels: Tensor) -> Tensor:
        return self.teacher.backbone.conditions(labels)

    @cached_property
    def _teacher_digest(self) -> str:
        """Of what its samples depend on: once, not once per method."""
        return fingerprint(self.teacher) + weights_digest(self.teacher.tokenizer)

    def _identity(self, method: str, seeds_of: str, digest: str | None) -> dict[str, Any]:
        """Everything that decides the images of a method and their features."""
        return {
            "method": method,
            "weights": digest,
            "teacher": self._teacher_digest,
            "captions": self.teacher.backbone.captions_digest(),
            "sampling": asdict(self.sampling),
            "seeds": [seeds_of, self.seed],
            "network": [self.network.name, self.network.digest],
        }


def few_steps(k: int) -> str:
    """Name of the generator with k - 1 AR steps redrawn by the teacher."""
    return f"generator_{k}_steps"


def few_steps_of(name: str) -> int:
    """The k of a name by `few_steps`, 0 for other methods."""
    found = re.fullmatch(r"generator_(\d+)_steps", name)
    return int(found[1]) if found else 0


def skip_of(name: str) -> int:
    """The m of "teacher_skip_m", 0 for other methods."""
    found = re.fullmatch(r"teacher_skip_(\d+)", name)
    return int(found[1]) if found else 0


def _by_metric(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The headline numbers by metric, the teacher's distance as "floor", and how far the generator got towards it."""
    frechet = {("floor" if name == "teacher" else name): values["frechet"] for name, values in found.items()}
    span = frechet["onestep_marginal"] - frechet["floor"]
    return {
        "frechet": frechet,
        "gap_closed": (frechet["onestep_marginal"] - frechet["generator"]) / span if span else float("nan"),
        **{
            key: {name: values[key] for name, values in found.items() if key in values}
            for key in ("teacher_nll", "teacher_nll_95", "accuracy")
        },
    }
