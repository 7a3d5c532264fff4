"""The comparison of a distilled run with its teacher: every number of metrics.json."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dd2.evaluation import reference as references
from dd2.evaluation.bank import feature_bank
from dd2.evaluation.clip import CLIP_SCORES, ClipScore
from dd2.evaluation.features import FeatureNetwork, pictures, read_features
from dd2.evaluation.likelihood import teacher_nll
from dd2.evaluation.methods import Method
from dd2.evaluation.metrics import MetricConfig, mean_with_interval, scores, within_class_spread
from dd2.evaluation.neighbours import nearest_distance
from dd2.evaluation.path_length import path_length
from dd2.evaluation.reference import Reference
from dd2.files import weights_digest
from dd2.frechet import fit_gaussian, frechet_distance
from dd2.generator import Generator
from dd2.seeding import seed_of
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.filtering import Sampling
from dd2.text.prompts import typed
from dd2.training.store import Store

SHOWN = 40
"""Images of each method that are kept for the pictures."""

PROMPTS_SHOWN, EACH = 12, 6
"""Prompts that are shown with their images, and how many of each."""


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
        precision: that the methods draw in; what scores them is float32.
        metrics: what is computed.
        clips: CLIP scores, of models that are conditioned on texts.
        groups: of each label the category it belongs to, where prompts have such; else empty.
    """

    teacher: Teacher
    network: FeatureNetwork
    sampling: Sampling
    count: int
    batch: int
    seed: int
    banks: Path
    precision: str = "float32"
    metrics: MetricConfig = field(default_factory=MetricConfig)
    clips: Sequence[ClipScore] = ()
    groups: tuple[str, ...] = ()

    def teacher_reference(self, teacher: Method) -> Reference:
        """As many other samples of the teacher; its own row is then the floor of every distance."""
        bank = self.bank("reference (teacher)", "teacher", teacher, "reference")
        found = references.of_bank(bank, {"reference": "teacher", "count": self.count})
        known = self.groups and found.pool is not None and len(found.pool) == self.count
        return replace(found, groups=self._groups) if known else found

    def drawn(self, methods: dict[str, Method]) -> dict[str, Store]:
        """Everything that is scored. All processes draw their share."""
        return {name: self.bank(name, name, method, _seeds_of(method)) for name, method in methods.items()}

    def numbers(self, methods: dict[str, Method], banks: dict[str, Store], reference: Reference) -> dict[str, Any]:
        """Score everything, in one process.

        Args:
            methods: what is compared.
            banks: from `drawn`.
            reference: what to compare with.

        Returns:
            Content of metrics.json, by metric and method.
        """
        found: dict[str, dict[str, float]] = {}
        distinct: dict[str, int] = {}
        for name, bank in banks.items():
            found[name] = scores(bank, reference, self.metrics, self.seed)
            found[name] |= likelihood_and_accuracy(bank, self.network.knows_labels) | text_scores(bank)
            if "ids" in bank.names():
                distinct[name] = len(torch.unique(bank.load("ids"), dim=0))
            pool = bank.load("pool")
            found[name]["within_class_spread"] = within_class_spread(pool, bank.load("labels"))
            if reference.pool is not None and reference.described.get("reference") != "teacher":
                found[name]["nearest_reference_image"] = float(nearest_distance(pool, reference.pool).mean())
        return _by_metric(found) | {
            "methods": {name: method.title for name, method in methods.items()},
            "metrics": found,
            "ar_steps": self.teacher.num_steps(self.sampling),
            "distinct_sequences": distinct,
            **self._by_group(banks, reference),
        }

    def _by_group(self, banks: dict[str, Store], reference: Reference) -> dict[str, Any]:
        """Distance and scores of each category of the prompts, where the reference has images of the same ones."""
        if not self.groups or reference.pool is None or not {*self.groups} <= {*reference.groups}:
            return {}
        of_reference = np.array(reference.groups)
        known = {group: reference.pool[of_reference == group] for group in sorted({*self.groups})}
        shown = np.array(self._groups)
        rows_of = {group: torch.from_numpy(np.flatnonzero(shown == group)) for group in known}
        several = [group for group in known if min(len(known[group]), len(rows_of[group])) > 1]  # one image has no spread
        fits = {group: fit_gaussian([known[group]]) for group in several}
        found: dict[str, dict[str, dict[str, float]]] = {group: {} for group in several}
        for name, bank in banks.items():
            pool = bank.load("pool")
            for group in several:
                rows = rows_of[group]
                distance = frechet_distance(fit_gaussian([pool[rows]]), fits[group])
                found[group][name] = {"frechet": distance, "count": len(rows), **text_scores(bank, rows)}
        return {"groups": found}

    @property
    def _groups(self) -> tuple[str, ...]:
        """Of each image of a method, which has the same label in all of them."""
        return tuple(self.groups[label] for label in self.labels(torch.arange(self.count)).tolist())

    def bank(self, title: str, name: str, method: Method, seeds_of: str) -> Store:
        """Draw `count` samples of one method, or what is missing of them; `seeds_of` names the family of seeds."""

        @torch.inference_mode()
        def make(index: Tensor) -> dict[str, Tensor]:
            labels = self.labels(index)
            images, tokens = method.draw(labels, self.seeds(seeds_of, index))
            found = {**read_features(self.network, images), "labels": labels.cpu()}
            if texts := [self.teacher.conditions.class_names[label] for label in labels.tolist() if self._by_text]:
                if self.network.agrees is not None:
                    found["agreement"] = self.network.agrees(found, texts).float()
                if seeds_of != "reference":  # whose scores nobody reads
                    found |= {clip.name: clip(pictures(images), texts) for clip in self.clips}
            if tokens is not None and isinstance(self.teacher, CodeTeacher):
                ids = self.teacher.ids(tokens)
                nll = teacher_nll(self.teacher, ids, self.teacher.conditions(labels))
                found |= {"nll": nll.cpu(), "ids": ids.int().cpu()}
            return found

        return feature_bank(self.banks, title, self._identity(name, method, seeds_of), self.count, self.batch, make)

    @torch.inference_mode()
    def shown(self, methods: dict[str, Method]) -> dict[str, Tensor]:
        """The first images of every method, at the same labels."""
        index = torch.arange(min(SHOWN, self.count))
        labels = self.labels(index)
        return {name: method.draw(labels, self.seeds(_seeds_of(method), index))[0].cpu() for name, method in methods.items()}

    @torch.inference_mode()
    def shown_prompts(self, methods: dict[str, Method]) -> tuple[list[str], dict[str, Tensor]]:
        """Some prompts, evenly chosen, and images of each by teacher and generator, at the same seeds: title -> (N, k, channels,
        H, W). Nothing where labels are no texts.
        """
        if not self._by_text:
            return [], {}
        names = self.teacher.conditions.class_names
        rows = torch.linspace(0, len(names) - 1, min(PROMPTS_SHOWN, len(names))).long()
        labels, index = rows.repeat_interleave(EACH).to(self.teacher.device), torch.arange(len(rows) * EACH)
        drawn = {}
        for name in ("teacher", "generator"):
            parts = zip(labels.split(self.batch), index.split(self.batch), strict=True)
            images = [methods[name].draw(some, self.seeds("prompts", of))[0].cpu() for some, of in parts]
            drawn[methods[name].title] = torch.cat(images)
        return [names[int(row)] for row in rows], {title: images.unflatten(0, (-1, EACH)) for title, images in drawn.items()}

    def path_length(self, generator: Generator, paths: int, epsilon: float) -> dict[str, dict[str, float]]:
        """Perceptual path length of the generator, decoded as it is and, where there are codes, at the nearest (Table 5).

        In float32 whatever the precision: half precision rounds by more than ε.
        """
        index = torch.arange(paths)
        labels = self.labels(index)
        snaps = {"generator": False} | ({"generator_nearest": True} if isinstance(self.teacher, CodeTeacher) else {})
        found = {}
        for name, snap in snaps.items():

            @torch.inference_mode()
            def features_of(noise: Tensor, labels: Tensor, snap: bool = snap) -> Tensor:
                cond = self.teacher.conditions(labels)
                tokens = generator.student.as_generator(noise, cond)
                tokens = self.teacher.snap(tokens) if snap else tokens
                images = generator.decode(tokens, cond).float().clamp(-1, 1)
                return self.network.read(images)["pool"]  # not rounded to bytes: ε is small

            mean, error = path_length(
                features_of,
                generator.student.backbone.token_shape,
                labels,
                self.seeds("path length", index),
                epsilon=epsilon,
                batch=max(1, self.batch // 2),
            )
            found[name] = {"mean": mean, "standard_error": error, "epsilon": epsilon, "paths": paths, "precision": "float32"}
        return found

    def labels(self, index: Tensor) -> Tensor:
        """Labels of images by index, in turn, on the teacher's device."""
        return self.teacher.conditions.default_labels(index).to(self.teacher.device)

    def seeds(self, family: str, index: Tensor) -> list[int]:
        """One seed per image; training never uses these streams."""
        return [seed_of("evaluate", family, self.seed, int(i)) for i in index]

    @property
    def _by_text(self) -> bool:
        """Whether labels are captions whose texts are known."""
        conditions = self.teacher.conditions
        return isinstance(conditions, CaptionLabels) and bool(conditions.class_names)

    @cached_property
    def _teacher_digest(self) -> str:
        """Of what its samples depend on: once, not once per method."""
        return self.teacher.fingerprint() + weights_digest(self.teacher.tokenizer)

    def _identity(self, name: str, method: Method, seeds_of: str) -> dict[str, Any]:
        """Everything that decides the images of a method and their features."""
        return {
            "method": name,
            "decides": method.decides,
            "teacher": self._teacher_digest,
            "captions": self.teacher.conditions.digest(),
            "sampling": self.sampling.described(),
            "seeds": [seeds_of, self.seed],
            "precision": self.precision,
            "network": [self.network.name, self.network.digest],
            **({"texts": typed(self.teacher.conditions.class_names).digest()} if self._by_text else {}),
            **({"clips": [clip.digest for clip in self.clips]} if self.clips and seeds_of != "reference" else {}),
        }


def text_scores(bank: Store, rows: Tensor | slice = slice(None)) -> dict[str, float]:
    """Means over some rows of a bank, with their intervals, of what says how well images go with their captions."""
    found: dict[str, float] = {}
    for name in ("agreement", *CLIP_SCORES):
        if name in bank.names():
            found |= mean_with_interval(name, bank.load(name)[rows].double())
    return found


def likelihood_and_accuracy(bank: Store, knows_labels: bool) -> dict[str, float]:
    """Means over the images of a bank, with their intervals: of the teacher's likelihood and, where the feature network knows the
    labels, of the accuracy.
    """
    found: dict[str, float] = {}
    if "nll" in bank.names():
        found |= mean_with_interval("teacher_nll", bank.load("nll").double())
    if knows_labels:
        right = (bank.load("probabilities").argmax(1) == bank.load("labels")).double()
        found |= mean_with_interval("accuracy", right)
    return found


def gap_closed(distance: float, floor: float, worst: float) -> float:
    """How far a distance is on the way from independent tokens' (0) to the teacher's own (1)."""
    return (worst - distance) / (worst - floor) if worst != floor else float("nan")


def _seeds_of(method: Method) -> str:
    return "floor" if method.floor else "methods"


def _by_metric(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The headline numbers by metric, the teacher's distance as "floor", and how far the generator got towards it."""
    frechet = {("floor" if name == "teacher" else name): values["frechet"] for name, values in found.items()}
    return {
        "frechet": frechet,
        "gap_closed": gap_closed(frechet["generator"], frechet["floor"], frechet["onestep_marginal"]),
        **{
            key: {name: values[key] for name, values in found.items() if key in values}
            for key in ("teacher_nll", "teacher_nll_95", "accuracy", "agreement")
            if key != "agreement" or any(key in values for values in found.values())
        },
    }
