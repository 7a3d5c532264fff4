"""dd2 train-tokenizer: a tokenizer of one's own images, raster (LlamaGen's kind), multi-scale (VAR's) or continuous (MAR's)."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dd2.checkpoints.native import save_tokenizer
from dd2.commands.run_folder import start_run
from dd2.data.source import ImageData, open_data
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.losses import Losses
from dd2.processes import say
from dd2.seeding import on_cpu, stream
from dd2.tokenizers.autoencoder import ConvConfig, VQConfig
from dd2.tokenizers.base import Tokenizer, TrainableTokenizer
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.train import CodeUsage, VQLossConfig, kl_loss, measured_deviation, vq_loss
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.health import Below, Sign, loss_rises
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update

MEASURED = 512
"""Images whose latents' deviation a KL tokenizer is scaled by."""


SIGNS = (
    loss_rises("tokenizer/loss"),
    Sign(
        "dead codes",
        "tokenizer/usage",
        Below(0.5),
        "so few of the codes are in use; revive them more often (vq_loss.revive_every), or have fewer (tokenizer.codebook_size)",
    ),
)
"""That a tokenizer's training has failed."""


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a tokenizer. Writes OUT/tokenizer/, metrics.jsonl, checkpoints/ and reconstructions in samples/."""

    data: str = "digits"
    """"digits" (embedded), or a folder or zip of CLASS/IMAGE files."""
    out: Path = Path("runs/tokenizer")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the weights and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    iterations: int = 100_000
    """Optimiser steps."""
    batch: int = 64
    """Images per micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    tokenizer: VQConfig = field(default_factory=VQConfig)
    """Sizes."""
    patch_nums: tuple[int, ...] = ()
    """Sides of the token maps of a multi-scale tokenizer (VAR), the last one that of the features; none: raster (LlamaGen)."""
    latent_channels: int = 0
    """Channels of continuous tokens: a KL autoencoder (MAR's kind) in place of one with codes; 0: codes."""
    kl_weight: float = 1e-4
    """Of the KL divergence of its posteriors from the normal, in nats a number of the image."""
    vq_loss: VQLossConfig = field(default_factory=VQLossConfig)
    """Losses and revival of dead codes."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if min(self.iterations, self.batch, self.accumulate) < 1:
            raise InputError("iterations, batch and accumulate must be at least 1")
        if self.patch_nums:
            self.multiscale()  # refuses scales that do not fit
        if self.latent_channels < 0 or not self.kl_weight >= 0:
            raise InputError(
                f"latent_channels and kl_weight must not be negative, got {self.latent_channels} and {self.kl_weight}"
            )
        if self.latent_channels and self.patch_nums:
            raise InputError(
                "latent_channels makes a KL tokenizer, patch_nums one with codes at several scales; give one of them"
            )

    def multiscale(self) -> MultiScaleConfig:
        """Sizes of the multi-scale tokenizer."""
        return MultiScaleConfig(**asdict(self.tokenizer), patch_nums=self.patch_nums)

    def kl(self) -> KLConfig:
        """Sizes of the KL tokenizer, whose scale is measured at the end."""
        shared = {field.name: getattr(self.tokenizer, field.name) for field in dataclasses.fields(ConvConfig)}
        return KLConfig(**{**shared, "z_channels": self.latent_channels, "scale": 1.0})


def train_tokenizer(config: TrainTokenizerConfig) -> Path:
    """Run the training, or what is left of it.

    Returns:
        The tokenizer's folder.
    """
    device = pick_device(config.device)
    data = open_data(config.data, config.tokenizer.image_size, config.tokenizer.image_channels)
    hint = start_run(config.out, config, "train-tokenizer")
    torch.manual_seed(config.seed)
    if config.latent_channels:
        tokenizer = KLTokenizer(config.kl()).to(device)
        stage = _kl_stage(config, tokenizer, data, device)
    else:
        made = MultiScaleTokenizer(config.multiscale()) if config.patch_nums else VQTokenizer(config.tokenizer)
        tokenizer = made.to(device)
        stage = _vq_stage(config, tokenizer, data, device)
    Trainer(config.out, config.seed, config.loop, device, hint).run(stage)
    if isinstance(tokenizer, KLTokenizer):
        images, _ = data.batch("train", MEASURED, torch.Generator().manual_seed(config.seed))
        deviation = measured_deviation(tokenizer, images.to(device))
        tokenizer.config = dataclasses.replace(tokenizer.config, scale=1 / deviation)
        say(f"latents have a deviation of {deviation:.3f}: tokens are {1 / deviation:.4f} times as large")
    folder = config.out / "tokenizer"
    save_tokenizer(folder, tokenizer)
    return folder


def _vq_stage(config: TrainTokenizerConfig, tokenizer: TrainableTokenizer, data: ImageData, device: torch.device) -> Stage:
    usage = CodeUsage(config.tokenizer.codebook_size).to(device)

    def loss(random: torch.Generator) -> Losses:
        images, _ = data.batch("train", config.batch, on_cpu(random))
        return vq_loss(tokenizer, usage, images.to(device), config.vq_loss)

    def settle(step: int) -> None:
        usage.settle(tokenizer.embedding, config.vq_loss, stream(config.seed, "tokenizer", "revival", step, device=device))

    update = Update("tokenizer", list(tokenizer.parameters()), config.optim, loss, accumulate=config.accumulate)
    modules = {"tokenizer": tokenizer, "usage": usage}
    preview = _preview(config, tokenizer, data, device)
    return Stage("tokenizer", config.iterations, [update], modules, after=settle, preview=preview, signs=SIGNS)


def _kl_stage(config: TrainTokenizerConfig, tokenizer: KLTokenizer, data: ImageData, device: torch.device) -> Stage:
    def loss(random: torch.Generator) -> Losses:
        images, _ = data.batch("train", config.batch, on_cpu(random))
        return kl_loss(tokenizer, images.to(device), config.kl_weight, random)

    update = Update("tokenizer", list(tokenizer.parameters()), config.optim, loss, accumulate=config.accumulate)
    preview = _preview(config, tokenizer, data, device)
    return Stage("tokenizer", config.iterations, [update], {"tokenizer": tokenizer}, preview=preview, signs=SIGNS)


def _preview(config: TrainTokenizerConfig, tokenizer: Tokenizer, data: ImageData, device: torch.device) -> Callable[[], Tensor]:
    """Held-out images beside their reconstructions."""
    held_out, _ = data.batch("test", 24, torch.Generator().manual_seed(config.seed))

    @torch.no_grad()
    def preview() -> Tensor:
        images = held_out.to(device)
        return torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)

    return preview
