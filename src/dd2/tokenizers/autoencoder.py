"""The convolutional encoder and decoder that all tokenizer families share.

LlamaGen and VAR use the same VQGAN layers under different names; ours follow LlamaGen's files.
"""

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.tokenizers.blocks import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of the convolutions; the defaults are those of the released models at 256 px."""

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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise InputError(f"tokenizer.{field.name} must be at least 1, got {value}")
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
    def largest_activation(self) -> int:
        """Numbers in the largest tensor that decoding one image makes, at full resolution."""
        return 2 * self.channels * self.image_size**2

    @property
    def grid(self) -> int:
        """Tokens per row and per column."""
        return self.image_size // 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class VQConfig(ConvConfig):
    """Sizes of a VQ tokenizer; the defaults are LlamaGen's VQ-16."""

    codebook_size: int = 16384
    """V, number of codes."""
    code_dim: int = 8
    """C, channels of a code."""


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
    """Images (B, channels, H, W) to (B, out_channels, grid, grid).

    Args:
        config: sizes.
        out_channels: z_channels unless given.
        attention: whether the lowest level has attention, as the middle has in any case.
    """

    def __init__(self, config: ConvConfig, out_channels: int = 0, attention: bool = True) -> None:
        super().__init__()
        width, last = config.channels, len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(config.image_channels, width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for index, multiplier in enumerate(config.multipliers):
            res, attn = [], []
            for _ in range(config.res_blocks):
                res.append(ResnetBlock(width, config.channels * multiplier, config.groups))
                width = config.channels * multiplier
                if index == last and attention:
                    attn.append(AttnBlock(width, config.groups))
            level = Level(res, attn)
            if index < last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(width, config.groups)
        self.norm_out = group_norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, out_channels or config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, grid, grid) to images; levels are listed from low to high resolution.

    Args:
        config: sizes.
        attention: whether the lowest level has attention, as the middle has in any case.
    """

    def __init__(self, config: ConvConfig, attention: bool = True) -> None:
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
                if index == last and attention:
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


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(width, width, groups), AttnBlock(width, groups), ResnetBlock(width, width, groups)])
