"""VAR's tokenizer: an image as token maps of growing side, each coding what the earlier ones left over."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.tokenizers.autoencoder import Decoder, Encoder, VQConfig
from dd2.tokenizers.base import Quantised, TrainableTokenizer, nearest_ids
from dd2.tokenizers.pyramid import accumulate, phi, shared_phi, to_finest, to_maps


@dataclass(frozen=True)
class MultiScaleConfig(VQConfig):
    """Sizes of a multi-scale tokenizer; the defaults are VAR's at 256 px."""

    codebook_size: int = 4096
    code_dim: int = 32
    channels: int = 160
    z_channels: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side of each scale's token map, growing to the side of the feature map."""
    phi: int = 4
    """Convolutions φ shared among the scales."""

    def __post_init__(self) -> None:
        """Refuse scales that do not grow to the feature map."""
        super().__post_init__()
        sides = self.patch_nums
        if not sides or sides[0] < 1 or list(sides) != sorted(set(sides)):
            raise InputError(f"patch_nums must be growing positive integers, got {list(sides)}")
        if sides[-1] != self.grid:
            raise InputError(
                f"the last of patch_nums is {sides[-1]}, but images of {self.image_size} pixels halved "
                f"{len(self.multipliers) - 1} times have features of side {self.grid}: they must be equal"
            )
        if self.phi < 1:
            raise InputError(f"phi must be at least 1, got {self.phi}")


class Phi(nn.Conv2d):
    """The trainable φ of some scales."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return phi(input, self.weight, self.bias)


class MultiScaleQuantizer(nn.Module):
    """Codebook and convolutions φ; names follow VAR's files."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.phi = nn.ModuleList(Phi(config.code_dim) for _ in range(config.phi))
        self.phi_of = shared_phi(len(config.patch_nums), config.phi)

    def apply_phi(self, h: Tensor, scale: int) -> Tensor:
        """φ of one scale, (B, C, H, W) to the same."""
        return self.phi[self.phi_of[scale]](h)


class MultiScaleTokenizer(TrainableTokenizer):
    """Encoder, residual quantiser over scales, decoder. Ids are ordered scale by scale, row by row."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 3, padding=1)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.quantize.embedding

    @property
    def num_positions(self) -> int:
        return sum(side**2 for side in self.config.patch_nums)

    @property
    def largest_activation(self) -> int:
        return self.config.largest_activation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.image_channels, self.config.image_size, self.config.image_size

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self._quantise_features(self.quant_conv(self.encoder(images)))[0]

    def f_hat(self, codes: Tensor) -> Tensor:
        """Tokens (B, n, C), or those of the first scales, to the features that are decoded, (B, C, side, side)."""
        sides = self.config.patch_nums
        return list(accumulate(to_maps(codes, sides), sides, self.quantize.apply_phi))[-1]

    def decode_codes(self, codes: Tensor) -> Tensor:
        with full_precision(codes.device):  # a sum over many scales
            f_hat = self.f_hat(codes.float())
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    def decode_first(self, codes: Tensor, missing: Tensor) -> Tensor:
        return self.decode_tiled(codes)  # a sum over scales: those that are missing add nothing

    def quantise(self, images: Tensor) -> Quantised:
        f = self.quant_conv(self.encoder(images))
        ids, vectors, partial_sums = self._quantise_features(f)
        distances = [(f_hat - f.detach()).square().sum(1).mean() for f_hat in partial_sums]
        commitments = [(f_hat.detach() - f).square().sum(1).mean() for f_hat in partial_sums]
        straight_through = f + (partial_sums[-1] - f).detach()
        return Quantised(
            reconstruction=self.decoder(self.post_quant_conv(straight_through)),
            commitment=torch.stack(commitments).mean(),
            codebook=torch.stack(distances).mean(),
            ids=ids,
            vectors=vectors,
        )

    def _quantise_features(self, f: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Features (B, C, H, W) to ids (B, n), the vectors quantised (rows, C), and f_hat after each scale.

        Gradients of f_hat reach the codebook and φ; the residuals that choose the codes are detached.
        """
        residual = f.detach().clone()
        ids, vectors, partial_sums = [], [], []
        for scale, side in enumerate(self.config.patch_nums):
            small = residual if side == f.shape[-1] else F.interpolate(residual, size=(side, side), mode="area")
            flat = small.flatten(2).transpose(1, 2)  # (B, side^2, C)
            chosen = nearest_ids(flat, self.codebook.detach())
            codes = self.embedding(chosen).transpose(1, 2).unflatten(2, (side, side))
            added = self.quantize.apply_phi(to_finest(codes, self.config.patch_nums), scale)
            residual = residual - added.detach()
            ids.append(chosen)
            vectors.append(flat.flatten(0, 1))
            partial_sums.append(added if not partial_sums else partial_sums[-1] + added)
        return torch.cat(ids, 1), torch.cat(vectors), partial_sums
