"""Whole sequences matched to the teacher's samples in the frozen teacher's own features, beyond the paper: Fréchet distance with
remembered moments (FD-loss, arXiv 2604.28190), or maximum mean discrepancy (RDM, arXiv 2607.02375).

Scores of single positions say nothing of how late tokens agree with early ones; statistics of whole sequences do. The reference
is the teacher's samples, so no data are needed. Alone, at high rates, such a distance is gamed: it falls while others rise.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.frechet import GaussianFit, fit_gaussian
from dd2.method.config import MatchConfig
from dd2.method.moments import RIDGE, RememberedMoments
from dd2.processes import rank, world_size
from dd2.sampling import one_step
from dd2.seeding import stream
from dd2.student import OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.training.samples import TeacherSamples

CONDITION_CHANNELS = 32
CONDITION_WEIGHT = 3.0
"""Of the condition's features beside the others, whose deviation is 1."""
FIRST_SEED = 3 * 2**60
"""Seeds of the sequences that a memory begins with, which nothing else draws."""
PRIMED_AT_ONCE = 64


def channels_read(teacher: Teacher) -> dict[str, int]:
    """Channels that each kind of projected features is made of."""
    positions, channels = teacher.backbone.token_shape
    width = teacher.backbone.width
    return {"projected": positions * width, "tokens": positions * channels, "condition": width}


def feature_sizes(teacher: Teacher, config: MatchConfig) -> dict[str, int]:
    """Channels of each kind of features, in the order of the configuration."""
    wanted = {"projected": config.projections, "tokens": config.projections, "condition": CONDITION_CHANNELS}
    sizes = {"mean": teacher.backbone.width}
    sizes |= {name: min(wanted[name], channels) for name, channels in channels_read(teacher).items()}
    return {name: sizes[name] for name in config.features}


def check_reference(teacher: Teacher, config: MatchConfig, samples: int) -> None:
    """Refuse a reference that is too small for the distance.

    Raises:
        InputError: there are fewer teacher samples than it needs.
    """
    features, count = sum(feature_sizes(teacher, config).values()), min(config.reference, samples)
    # A covariance without an inverse is no reference; landmarks are sequences of it.
    needed = {"frechet": features + 1, "mmd": 2, "nystrom": max(2, config.landmarks)}[config.distance]
    if count < needed:
        raise InputError(
            f"csd.match compares {features} features by {count} teacher samples; at least {needed} are needed: give more "
            "teacher_samples (and csd.match.reference), or fewer csd.match.projections, features or landmarks"
        )


class SequenceFeatures:
    """Features (B, F) of sequences, by the teacher's backbone: differentiable in the tokens.

    Args:
        teacher: whose backbone.
        config: which features.
    """

    def __init__(self, teacher: Teacher, config: MatchConfig) -> None:
        self.teacher, self.config = teacher, config
        read, sizes = channels_read(teacher), feature_sizes(teacher, config)
        self._projections = {name: self._projection(name, read[name], sizes[name]) for name in config.features if name in read}

    def __call__(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Tokens (B, n, C), cond (B, ...) -> (B, F) float32."""
        found = self.teacher.features(tokens, cond).float()
        with full_precision(found.device):  # bfloat16 sums of many features would differ by more than the distances
            return self._chosen(tokens.float(), found, cond)

    def _chosen(self, tokens: Tensor, found: Tensor, cond: Tensor) -> Tensor:
        of_condition = self.teacher.backbone.condition_features
        kinds = {
            "mean": lambda: found.mean(1),
            "projected": lambda: found.flatten(1) @ self._projections["projected"],
            "tokens": lambda: tokens.flatten(1) @ self._projections["tokens"],
            "condition": lambda: of_condition(found, cond).detach().float() @ self._projections["condition"],
        }
        return torch.cat([kinds[name]() for name in self.config.features], 1)

    @cached_property
    def weights(self) -> Tensor:
        """(F,) of the features beside each other."""
        sizes = feature_sizes(self.teacher, self.config)
        parts = [torch.full((size,), CONDITION_WEIGHT if name == "condition" else 1.0) for name, size in sizes.items()]
        return torch.cat(parts).to(self.teacher.device)

    def _projection(self, name: str, channels: int, wanted: int) -> Tensor:
        """(channels, wanted), a fixed draw; the identity where all channels are wanted."""
        device = self.teacher.device
        if channels == wanted:
            return torch.eye(channels, device=device)
        random = stream("match", name, 0, device=torch.device("cpu"))
        return (torch.randn(channels, wanted, generator=random) / math.sqrt(channels)).to(device)


class SequenceMatch(nn.Module, ABC):
    """A distance between the generator's sequences and the teacher's samples.

    Args:
        features: of sequences.
        samples: the reference.
        config: its size.
        batch: sequences of the reference at a time.

    Raises:
        InputError: the reference has fewer sequences than the distance needs.
    """

    def __init__(self, features: SequenceFeatures, samples: TeacherSamples, config: MatchConfig, batch: int) -> None:
        super().__init__()
        check_reference(features.teacher, config, len(samples))
        self.features, self.samples, self.config, self.batch = features, samples, config, batch
        self._scaling: tuple[Tensor, Tensor] | None = None
        self._begun = False

    @abstractmethod
    def set_reference(self, reference: Tensor) -> None:
        """Take the reference's scaled features (N, F)."""

    @abstractmethod
    def distance(self, found: Tensor) -> Tensor:
        """From scaled features (B, F) of the generator's sequences, with gradient, to the reference."""

    def begin(self, generator: OneStepNetwork) -> None:
        """Before every update; does something at the first alone, so that a stage that has ended costs nothing. All processes
        must call it. Errors as `learn_reference`.
        """
        if not self._begun:
            self._begun = True
            self.learn_reference()
            self.fill_memory(generator)

    def learn_reference(self) -> None:
        """Look at the teacher's samples.

        Raises:
            InputError: they are all the same.
        """
        reference = self._of_samples(min(self.config.reference, len(self.samples)))
        mean, deviation = reference.mean(0), reference.std(0)
        if not deviation.max() > 0:
            raise InputError("csd.match cannot compare with teacher samples that are all the same; look at csd.sampling")
        # A channel that hardly varies would count for as much as the others by its noise alone.
        self._scaling = mean, self.features.weights / deviation.clamp_min(1e-3 * deviation.max())
        self.set_reference(self._scaled(reference))

    def fill_memory(self, generator: OneStepNetwork) -> None:
        """Take in how the generator starts, where the distance remembers it."""

    def remember(self) -> None:
        """The iteration is over. All processes must call it."""

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """The distance of generated tokens (B, n, C), drawn under cond (B, ...)."""
        scaled = self.scaled(tokens, cond)
        with full_precision(scaled.device):
            return self.distance(scaled)

    def scaled(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features (B, F) on the reference's scale, which is known once the distance has begun."""
        return self._scaled(self.features(tokens, cond))

    def _scaled(self, features: Tensor) -> Tensor:
        assert self._scaling is not None
        mean, scale = self._scaling
        return (features - mean) * scale

    @torch.no_grad()
    def _of_samples(self, count: int) -> Tensor:
        parts = []
        for rows in torch.arange(count).split(self.batch):  # every process alike, as sharded teachers need
            tokens, labels = self.samples.take(rows)
            parts.append(self.features(tokens, self.features.teacher.conditions(labels)))
        return torch.cat(parts)


class FrechetMatch(SequenceMatch):
    """Fréchet distance of Gaussians, the generator's side of it remembered; the memory is part of the checkpoint."""

    def __init__(self, features: SequenceFeatures, samples: TeacherSamples, config: MatchConfig, batch: int) -> None:
        super().__init__(features, samples, config, batch)
        size = sum(feature_sizes(features.teacher, config).values())
        moments = RememberedMoments(size, config.beta, features.teacher.device)
        for name, buffer in moments.named_buffers():  # in checkpoints under their own names, as ever
            self.register_buffer(name, buffer)
        self._unregistered = (moments,)

    @property
    def moments(self) -> RememberedMoments:
        """The memory, whose buffers are also this module's."""
        return self._unregistered[0]

    def set_reference(self, reference: Tensor) -> None:
        found = fit_gaussian([reference])
        self._reference = GaussianFit(*(x.to(reference.device) for x in (found.mean, found.covariance)))

    @torch.no_grad()
    def fill_memory(self, generator: OneStepNetwork) -> None:
        """With `config.prime` fresh sequences, unless the checkpoint's memory is filled."""
        if bool(self.moments.primed):
            return
        teacher = self.features.teacher
        count = -(-self.config.prime // world_size()) * world_size()

        def scaled(rows: Tensor) -> Tensor:
            cond = teacher.conditions(self.samples.labels[rows % len(self.samples)].to(teacher.device))
            drawn = one_step(generator, cond, [FIRST_SEED + row for row in rows.tolist()]).float()
            return self.scaled(drawn, cond)

        own = torch.arange(count).tensor_split(world_size())[rank()]
        self.moments.prime(map(scaled, own.split(PRIMED_AT_ONCE)), count)

    def distance(self, found: Tensor) -> Tensor:
        return self.moments.distance(found, self._reference)

    def remember(self) -> None:
        self.moments.remember()


class KernelMatch(SequenceMatch):
    """Squared maximum mean discrepancy with a Gaussian kernel, of the width of the reference's median distance; biased estimate.

    Against all N sequences of the reference, or (nystrom) against landmarks Z with weights K_ZZ^-1 mu, mu the reference's mean
    kernel with each landmark.
    """

    def set_reference(self, reference: Tensor) -> None:
        some = reference[: min(len(reference), 2048)]
        self._width = torch.pdist(some).median()
        points, weights = reference, reference.new_full((len(reference),), 1 / len(reference))
        if self.config.distance == "nystrom":
            points = reference[torch.linspace(0, len(reference) - 1, self.config.landmarks, device=reference.device).long()]
            mean = self._kernel(points, reference).mean(1).double()
            gram = self._kernel(points, points).double() + RIDGE * torch.eye(len(points), device=points.device)
            weights = torch.linalg.solve(gram, mean).float()
        self._points, self._weights = points, weights
        mean = sum(self._weights[rows] @ (self._kernel(points[rows], points) @ weights) for rows in _rows(len(points), points))
        self._constant = torch.as_tensor(mean)

    def distance(self, found: Tensor) -> Tensor:
        cross = self._kernel(found, self._points) @ self._weights
        return (self._kernel(found, found).mean() - 2 * cross.mean() + self._constant).clamp_min(0)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        return (-squared.clamp_min(0) / (2 * self._width.square())).exp()


def sequence_match(teacher: Teacher, samples: TeacherSamples, config: MatchConfig, batch: int) -> SequenceMatch:
    """The distance that a configuration names. Arguments and errors as `SequenceMatch`."""
    kind = FrechetMatch if config.distance == "frechet" else KernelMatch
    return kind(SequenceFeatures(teacher, config), samples, config, batch)


def self_normalised(distance: Tensor) -> Tensor:
    """The distance divided by its own value, so that its gradient has about the same size however near the goal is."""
    return (distance / distance.detach().clamp_min(1e-8)).float()


def _rows(count: int, like: Tensor) -> tuple[Tensor, ...]:
    return torch.arange(count, device=like.device).split(1024)
