"""LlamaGen's VQ model: a convolutional autoencoder over an L2-normalised codebook, tokens in raster order."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.tokenizers.base import Tokenizer, nearest_ids
from dd2.tokenizers.blocks import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ tokenizer; the defaults are LlamaGen's VQ-16."""

    codebook_size: int = 16384
    """V, number of codes."""
    code_dim: int = 8
    """C, channels of a code."""
    image_size: int = 256
    """Height and width of the images."""
    image_channels: int = 3
    """Colour channels of the images."""
    channels: int = 128
    """Base width of the convolutions."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each resolution as a multiple of the base; each but the last halves the resolution."""
    res_blocks: int = 2
    """Residual blocks per resolution (the decoder has one more)."""
    z_channels: int = 256
    """Channels between the convolutions and the codes."""
    groups: int = 32
    """Groups of GroupNorm."""

    def __post_init__(self) -> None:
        """Refuse sizes that no such model has."""
        for field in (
            "codebook_size",
            "code_dim",
            "image_size",
            "image_channels",
            "channels",
            "res_blocks",
            "z_channels",
            "groups",
        ):
            if getattr(self, field) < 1:
                raise InputError(f"tokenizer.{field} must be at least 1, got {getattr(self, field)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"tokenizer.multipliers must be positive integers, got {self.multipliers}")
        if any(self.channels * m % min(self.groups, self.channels * m) for m in (1, *self.multipliers)):
            raise InputError(
                f"tokenizer.channels {self.channels} times each multiplier must be a multiple of tokenizer.groups {self.groups}"
            )
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            raise InputError(
                f"tokenizer.image_size {self.image_size} cannot be halved {len(self.multipliers) - 1} times, once per "
                f"multiplier after the first"
            )

    @property
    def grid(self) -> int:
        """Tokens per row and per column."""
        return self.image_size // 2 ** (len(self.multipliers) - 1)


class Level(nn.Module):
    """The blocks of one resolution, then a change of resolution."""

    def __init__(self, res: list[nn.Module], attn: list[nn.Module]) -> None:
        super().__init__()
        self.res, self.attn = nn.ModuleList(res), nn.ModuleList(attn)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Images (B, channels, H, W) to (B, z_channels, grid, grid)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width, last = config.channels, len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(config.image_channels, width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for index, multiplier in enumerate(config.multipliers):
            res, attn = [], []
            for _ in range(config.res_blocks):
                res.append(ResnetBlock(width, config.channels * multiplier, config.groups))
                width = config.channels * multiplier
                if index == last:
                    attn.append(AttnBlock(width, config.groups))
            level = Level(res, attn)
            if index < last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(width, config.groups)
        self.norm_out = group_norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, grid, grid) to images; levels are listed from low to high resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        last = len(config.multipliers) - 1
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _middle(width, config.groups)
        self.conv_blocks = nn.ModuleList()
        for index in range(last, -1, -1):
            res, attn = [], []
            for _ in range(config.res_blocks + 1):
                res.append(ResnetBlock(width, config.channels * config.multipliers[index], config.groups))
                width = config.channels * config.multipliers[index]
                if index == last:
                    attn.append(AttnBlock(width, config.groups))
            level = Level(res, attn)
            if index > 0:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook; codes and encoder outputs are compared on the unit sphere."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.normal_(self.embedding.weight)

    @property
    def codes(self) -> Tensor:
        """(V, C) unit-norm codes."""
        return F.normalize(self.embedding.weight, dim=-1)


class VQTokenizer(Tokenizer):
    """Encoder, quantiser and decoder; state-dict keys are those of LlamaGen's vq_model.py."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.codes

    @property
    def num_positions(self) -> int:
        return self.config.grid**2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.image_channels, self.config.image_size, self.config.image_size

    def project(self, images: Tensor) -> Tensor:
        """Encoder outputs on the unit sphere, (B, n, C), before quantisation."""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(f"the tokenizer reads images (B, {self.image_shape}), got {tuple(images.shape)}")
        return nearest_ids(self.project(images), self.codebook)

    def decode_codes(self, codes: Tensor) -> Tensor:
        grid = codes.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))
        return self.decoder(self.post_quant_conv(grid))

    def quantise(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass.

        Returns:
            (z, codes, ids): encoder outputs (B, n, C) with gradient, their nearest codes (B, n, C) with gradient to
            the codebook, and ids (B, n).
        """
        z = self.project(images)
        ids = nearest_ids(z.detach(), self.codebook.detach())
        return z, F.normalize(self.quantize.embedding(ids), dim=-1), ids


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(width, width, groups), AttnBlock(width, groups), ResnetBlock(width, width, groups)])


@torch.no_grad()
def revive(quantizer: Quantizer, dead: Tensor, z: Tensor, generator: torch.Generator) -> None:
    """Put dead codes (V,) bool onto random encoder outputs z (rows, C), so that they are used again."""
    count = int(dead.sum())
    rows = torch.randint(len(z), (count,), generator=generator, device=z.device)
    quantizer.embedding.weight[dead] = z[rows].to(quantizer.embedding.weight.dtype)
