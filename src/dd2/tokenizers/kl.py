"""The KL-regularised autoencoder of latent diffusion as MAR uses it (KL-16): tokens are continuous, in raster order."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.tokenizers.autoencoder import ConvConfig, Decoder, Encoder
from dd2.tokenizers.base import Tokenizer

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of the posterior's log-variance."""


@dataclass(frozen=True)
class KLConfig(ConvConfig):
    """Sizes of a KL tokenizer; the defaults are MAR's KL-16."""

    z_channels: int = 16
    """Channels of a token, C."""
    scale: float = 0.2325
    """What latents are multiplied by to have a deviation of about 1: one over that of ImageNet's."""
    encoder_attention: bool = True
    """Whether the encoder's lowest level has attention; the decoder's has none in any case."""

    def __post_init__(self) -> None:
        """Refuse a scale of 0."""
        super().__post_init__()
        if not self.scale > 0:
            raise InputError(f"tokenizer.scale must be above 0, got {self.scale}")


@dataclass(frozen=True)
class Posterior:
    """q(z | image) of a batch: a diagonal Gaussian.

    Attributes:
        mean, log_variance: (B, C, grid, grid), before `KLConfig.scale`.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, random: torch.Generator) -> Tensor:
        """A draw, shaped like the mean."""
        noise = torch.randn(self.mean.shape, generator=random, device=random.device).to(self.mean)
        return self.mean + (self.log_variance / 2).exp() * noise

    @property
    def kl(self) -> Tensor:
        """(B,) KL divergence from the standard normal, in nats an image."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return terms.sum((1, 2, 3)) / 2


class KLTokenizer(Tokenizer):
    """Encoder and decoder. Tokens are latents times `scale`, (B, grid * grid, C), row by row.

    As released, the decoder has attention in its middle alone.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.z_channels, config.encoder_attention)
        self.decoder = Decoder(config, attention=False)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    @property
    def num_positions(self) -> int:
        return self.config.grid**2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.image_channels, self.config.image_size, self.config.image_size

    @property
    def largest_activation(self) -> int:
        return self.config.largest_activation

    @property
    def decoding(self) -> list[nn.Module]:
        return [self.post_quant_conv, self.decoder]

    def shares_tokens_with(self, other: Tokenizer) -> bool:
        if not isinstance(other, KLTokenizer) or other.config.scale != self.config.scale:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.quant_conv.parameters(), other.quant_conv.parameters(), strict=True))

    def posterior(self, images: Tensor) -> Posterior:
        """q(z | image) of images (B, channels, H, W) in [-1, 1]."""
        self.check_images(images)
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE))

    def tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, C, grid, grid) to tokens (B, n, C)."""
        return (latents * self.config.scale).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean as tokens (B, n, C)."""
        return self.tokens(self.posterior(images).mean)

    def encode_for_training(self, images: Tensor, random: torch.Generator) -> Tensor:
        return self.tokens(self.posterior(images).sample(random))

    def decode(self, encoded: Tensor) -> Tensor:
        return self.decode_tiled(encoded)

    def decode_codes(self, codes: Tensor) -> Tensor:
        latents = codes.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid)) / self.config.scale
        return self.decoder(self.post_quant_conv(latents))
