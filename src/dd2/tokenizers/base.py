"""What a tokenizer is: images to code ids and back."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Tokenizer(nn.Module, ABC):
    """A trained vector-quantised autoencoder.

    Images are (B, channels, H, W) floats in [-1, 1]; ids (B, n) in the AR order of the teachers that use it.
    """

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(V, C) codes in the tokenizer's own space."""

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """n, the tokens of one image."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of the images."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images to ids (B, n)."""

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Continuous tokens (B, n, C) in the tokenizer's space to images (B, channels, H, W)."""

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, n) to images (B, channels, H, W)."""
        return self.decode_codes(self.codebook[ids])


def nearest_ids(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each token, in float32 whatever the autocast: (..., C), (V, C) -> (...) int64."""
    with torch.autocast(tokens.device.type, enabled=False):
        codes = codebook.float()
        closeness = tokens.reshape(-1, tokens.shape[-1]).float() @ codes.T - codes.square().sum(-1) / 2
    return closeness.argmax(-1).view(tokens.shape[:-1])
