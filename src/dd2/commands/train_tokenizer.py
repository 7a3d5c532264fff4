"""dd2 train-tokenizer: train a tokenizer on one's own images, raster (LlamaGen's kind) or multi-scale (VAR's)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dd2.checkpoints.native import save_tokenizer
from dd2.commands.run_folder import start_run
from dd2.data.source import open_data
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.losses import Losses
from dd2.seeding import on_cpu, stream
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.train import CodeUsage, VQLossConfig, vq_loss
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update


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

    def multiscale(self) -> MultiScaleConfig:
        """Sizes of the multi-scale tokenizer."""
        return MultiScaleConfig(**asdict(self.tokenizer), patch_nums=self.patch_nums)


def train_tokenizer(config: TrainTokenizerConfig) -> Path:
    """Run the training, or what is left of it.

    Returns:
        The tokenizer's folder.
    """
    device = pick_device(config.device)
    data = open_data(config.data, config.tokenizer.image_size, config.tokenizer.image_channels)
    hint = start_run(config.out, config, "train-tokenizer")
    torch.manual_seed(config.seed)
    made = MultiScaleTokenizer(config.multiscale()) if config.patch_nums else VQTokenizer(config.tokenizer)
    tokenizer = made.to(device)
    usage = CodeUsage(config.tokenizer.codebook_size).to(device)

    def loss(random: torch.Generator) -> Losses:
        images, _ = data.batch("train", config.batch, on_cpu(random))
        return vq_loss(tokenizer, usage, images.to(device), config.vq_loss)

    def settle(step: int) -> None:
        usage.settle(tokenizer.embedding, config.vq_loss, stream(config.seed, "tokenizer", "revival", step, device=device))

    held_out, _ = data.batch("test", 24, torch.Generator().manual_seed(config.seed))

    @torch.no_grad()
    def preview() -> Tensor:
        images = held_out.to(device)
        return torch.stack([images, tokenizer.decode(tokenizer.encode(images))], 1).flatten(0, 1)

    update = Update("tokenizer", list(tokenizer.parameters()), config.optim, loss, accumulate=config.accumulate)
    modules = {"tokenizer": tokenizer, "usage": usage}
    stage = Stage("tokenizer", config.iterations, [update], modules, after=settle, preview=preview)
    Trainer(config.out, config.seed, config.loop, device, hint).run(stage)
    folder = config.out / "tokenizer"
    save_tokenizer(folder, tokenizer)
    return folder
