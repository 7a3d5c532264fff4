"""LlamaGen's VQ model: a convolutional autoencoder over an L2-normalised codebook, tokens in raster order."""

import torch.nn.functional as F
from torch import Tensor, nn

from dd2.tokenizers.autoencoder import Decoder, Encoder, VQConfig
from dd2.tokenizers.base import Quantised, TrainableTokenizer, nearest_ids


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


class VQTokenizer(TrainableTokenizer):
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
    def embedding(self) -> nn.Embedding:
        return self.quantize.embedding

    @property
    def num_positions(self) -> int:
        return self.config.grid**2

    @property
    def largest_activation(self) -> int:
        return self.config.largest_activation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.image_channels, self.config.image_size, self.config.image_size

    def project(self, images: Tensor) -> Tensor:
        """Encoder outputs on the unit sphere, (B, n, C), before quantisation."""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return nearest_ids(self.project(images), self.codebook)

    def decode_codes(self, codes: Tensor) -> Tensor:
        grid = codes.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))
        return self.decoder(self.post_quant_conv(grid))

    def quantise(self, images: Tensor) -> Quantised:
        z = self.project(images)
        ids = nearest_ids(z.detach(), self.codebook.detach())
        codes = F.normalize(self.quantize.embedding(ids), dim=-1)
        return Quantised(
            reconstruction=self.decode_codes(z + (codes - z).detach()),
            commitment=(z - codes.detach()).square().sum(-1).mean(),
            codebook=(codes - z.detach()).square().sum(-1).mean(),
            ids=ids,
            vectors=z.detach().flatten(0, 1),
        )
