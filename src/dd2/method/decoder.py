"""The tokenizer's decoder trained so that a frozen generator's images match a reference (FDDA), beyond the paper.

Fréchet distances in the features of frozen networks; neither generator nor codes change, and no image needs to be real.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.frechet import GaussianFit
from dd2.generator import Generator
from dd2.losses import Losses
from dd2.method.moments import RememberedMoments
from dd2.processes import rank, world_size
from dd2.sampling import one_step
from dd2.tokenizers.base import Tokenizer
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update
from dd2.training.timing import part

FIRST_SEED = 5 * 2**60
"""Seeds of the images that a memory begins with, which nothing else draws."""


@dataclass(frozen=True)
class DecoderConfig:
    """How a decoder is trained; the defaults are FDDA's."""

    iterations: int = 10_000
    """Optimiser steps."""
    batch: int = 32
    """Images per micro-batch, each generated anew."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    beta: float = 0.999
    """Share of the memory in the generated images' moments; as low as 0, none."""
    prime: int = 50_000
    """Images that the memory begins with; more than the features have channels."""
    epsilon: float = 0.01
    """Added to a distance before it divides itself: those below count less."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, decay="cosine", warmup=500))
    """Optimiser."""

    def __post_init__(self) -> None:
        """Refuse counts below 1 and shares outside [0, 1)."""
        for name in ("iterations", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"decoder.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.beta < 1 or self.prime < 2 or not self.epsilon > 0:
            raise InputError(
                f"decoder.beta must be in [0, 1), decoder.prime at least 2 and decoder.epsilon above 0, got {self.beta}, "
                f"{self.prime} and {self.epsilon}"
            )


Read = Callable[[Tensor], Tensor]
"""Images (B, channels, H, W) in [-1, 1] to features (B, F), differentiable."""


class DecoderMatch(nn.Module):
    """Fréchet distances of decoded images to references, in several networks' features; their memories are in the checkpoint.

    Args:
        networks: name -> features.
        references: name -> what is matched.
        config: memory and scale.
        device: where it runs.
    """

    def __init__(
        self, networks: Mapping[str, Read], references: Mapping[str, GaussianFit], config: DecoderConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.networks, self.epsilon = dict(networks), config.epsilon
        self.means = {name: references[name].mean.to(device) for name in self.networks}
        self.centred = {
            name: GaussianFit(torch.zeros_like(mean), references[name].covariance.to(device)) for name, mean in self.means.items()
        }
        sizes = [len(mean) for mean in self.means.values()]
        self.memories = [RememberedMoments(size, config.beta, device) for size in sizes]
        self.moments = nn.ModuleList(self.memories)  # part of the checkpoint
        self._begun = False

    def features(self, images: Tensor) -> list[Tensor]:
        """Of each network, about the reference's mean, where a covariance of float64 moments loses nothing."""
        with full_precision(images.device):
            inside = images.float().clamp(-1, 1)
            return [read(inside).double() - self.means[name] for name, read in self.networks.items()]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the distances, each over its own value plus epsilon, and the distances themselves."""
        found = {}
        with full_precision(images.device):
            for name, moments, values in zip(self.networks, self.memories, self.features(images), strict=True):
                found[name] = moments.distance(values, self.centred[name])
        loss = sum(distance / (distance.detach().clamp_min(0) + self.epsilon) for distance in found.values())
        return torch.as_tensor(loss).float(), {name: distance.detach() for name, distance in found.items()}

    def remember(self) -> None:
        """The iteration is over. All processes must call it."""
        for moments in self.memories:
            moments.remember()

    @torch.no_grad()
    def prime(self, images: Callable[[Tensor], Tensor], count: int, batch: int) -> None:
        """At the first call, begin with `count` images, of which `images` draws those of an index (B,), unless the checkpoint's
        memories are filled.
        """
        if self._begun:  # and a GPU is asked nothing
            return
        self._begun = True
        if all(bool(moments.primed) for moments in self.memories):
            return
        count = -(-count // world_size()) * world_size()
        kept: list[list[Tensor]] = [[] for _ in self.memories]
        for rows in torch.arange(count).tensor_split(world_size())[rank()].split(batch):
            for values, own in zip(self.features(images(rows)), kept, strict=True):
                own.append(values.float())
        for moments, own in zip(self.memories, kept, strict=True):
            moments.prime(own, count)


def trainable_decoder(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer of which nothing but the decoder is trained.

    Raises:
        InputError: dd2 does not know its decoder.
    """
    copied = copy.deepcopy(tokenizer).requires_grad_(False)
    if not copied.decoding:
        raise InputError(
            f"a {type(tokenizer).__name__} does not say what its decoder is (Tokenizer.decoding); give another teacher"
        )
    for module in copied.decoding:
        module.requires_grad_(True)
    return copied


def decoder_stage(
    generator: Generator, tokenizer: Tokenizer, samples: TeacherSamples, match: DecoderMatch, config: DecoderConfig
) -> Stage:
    """The stage that trains a decoder.

    Args:
        generator: frozen; draws.
        tokenizer: from `trainable_decoder`; decodes what it draws.
        samples: whose labels the images get.
        match: the distances.
        config: see there.
    """
    student, conditions = generator.student, generator.conditions
    device = student.backbone.device

    def decoded(tokens: Tensor) -> Tensor:
        return tokenizer.decode_tiled(student.backbone.to_codes(tokens))

    def drawn(rows: Tensor) -> Tensor:
        cond = conditions(samples.labels[rows % len(samples)]).to(device)
        return decoded(one_step(student, cond, [FIRST_SEED + row for row in rows.tolist()]).float())

    def loss(random: torch.Generator) -> Losses:
        match.prime(drawn, config.prime, config.batch)
        with part("generator"), torch.no_grad():
            cond = conditions(samples.random_labels(config.batch, random)).to(device)
            noise = torch.randn((config.batch, *student.backbone.token_shape), generator=random, device=device)
            tokens = student.as_generator(noise, cond).float()
        total, distances = match(decoded(tokens))
        return total, {f"distance in {name}": value for name, value in distances.items()}

    shown = torch.arange(min(24, len(samples)))
    trained = [parameter for module in tokenizer.decoding for parameter in module.parameters()]
    return Stage(
        "decoder",
        config.iterations,
        [Update("decoder", trained, config.optim, loss, accumulate=config.accumulate)],
        {"tokenizer": tokenizer, "match": match},
        after=lambda step: match.remember(),
        preview=torch.no_grad()(lambda: drawn(shown)),
    )
