"""What a tokenizer is: images to code ids and back."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dd2.device import DECODED_AT_ONCE
from dd2.distribution import closeness
from dd2.errors import InputError
from dd2.precision import in_precision


@dataclass(frozen=True)
class Quantised:
    """One training pass of a tokenizer over images.

    Attributes:
        reconstruction: (B, channels, H, W), with gradients that pass straight through the quantisation.
        commitment: scalar, the squared distance that pulls encoder outputs towards their codes.
        codebook: scalar, the same distance, pulling the codes.
        ids: (B, n) codes that were chosen.
        vectors: (rows, C) detached vectors that were quantised, where dead codes may settle.
    """

    reconstruction: Tensor
    commitment: Tensor
    codebook: Tensor
    ids: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class DecoderAlignment:
    """How a decoder came to differ from the one that its encoder was trained with (dd2 align-decoder).

    Attributes:
        reference: what its images were matched to.
        features: networks in whose features; a distance in these has been trained on.
        digests: of the networks.
        iterations: of training.
    """

    reference: str
    features: tuple[str, ...]
    digests: tuple[str, ...]
    iterations: int

    def __str__(self) -> str:
        """As tables name it."""
        return f"aligned to {self.reference} in {', '.join(self.features)} ({self.iterations:,} iterations)"


class Tokenizer(nn.Module, ABC):
    """A trained autoencoder between images and n tokens of C channels each.

    Images are (B, channels, H, W) floats in [-1, 1]; tokens come in the AR order of the teachers that use it.

    Attributes:
        aligned: how its decoder was trained on after the rest; None for the one that it was trained with.
    """

    aligned: DecoderAlignment | None = None

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
        """Images to what `decode` reads: ids (B, n), or continuous tokens (B, n, C)."""

    def encode_for_training(self, images: Tensor, random: torch.Generator) -> Tensor:
        """The same for a teacher to learn from; where a tokenizer has a distribution over tokens, a draw from it."""
        return self.encode(images)

    @abstractmethod
    def decode(self, encoded: Tensor) -> Tensor:
        """What `encode` gives to images (B, channels, H, W)."""

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Tokens (B, n, C) in the tokenizer's space to images (B, channels, H, W)."""

    @abstractmethod
    def shares_tokens_with(self, other: "Tokenizer") -> bool:
        """Whether tokens of one are tokens of the other, whatever their decoders make of them."""

    @property
    def decoding(self) -> list[nn.Module]:
        """The modules that take tokens to images and do nothing else, which `dd2 align-decoder` may train; none by default."""
        return []

    @property
    def largest_activation(self) -> int:
        """Numbers in the largest tensor that decoding one image makes, about."""
        return 64 * math.prod(self.image_shape)

    def decode_tiled(self, codes: Tensor) -> Tensor:
        """As `decode_codes`, float32, as many images at a time as memory is meant for."""
        if torch.compiler.is_compiling():  # a graph is for any number of images: who runs it chooses
            return self.decode_codes(codes).float()
        limit = DECODED_AT_ONCE["cuda" if codes.device.type == "cuda" else "cpu"]
        tiles = codes.split(max(1, limit // self.largest_activation))
        return torch.cat([self.decode_codes(tile).float() for tile in tiles])

    def in_precision(self, dtype: torch.dtype) -> "Tokenizer":
        """As `dd2.precision.in_precision`, laid out as convolutions run fastest."""
        return in_precision(self, dtype, channels_last=True)

    def check_images(self, images: Tensor) -> None:
        """Refuse images of another shape than the tokenizer's."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(f"the tokenizer reads images (B, {self.image_shape}), got {tuple(images.shape)}")


class CodeTokenizer(Tokenizer):
    """A vector-quantised one: every token is a code of its codebook, ids are (B, n)."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(V, C) codes in the tokenizer's own space."""

    def shares_tokens_with(self, other: Tokenizer) -> bool:
        return isinstance(other, CodeTokenizer) and torch.equal(self.codebook, other.codebook)

    def decode(self, encoded: Tensor) -> Tensor:
        """Ids (B, n) to images (B, channels, H, W)."""
        return self.decode_tiled(self.codebook[encoded])

    def decode_first(self, codes: Tensor, missing: Tensor) -> Tensor:
        """Images of sequences that end early.

        Args:
            codes: (B, p, C) the first tokens, whole AR steps.
            missing: (C,) the code that stands for each missing token, where tokens are places of the image.
        """
        rest = missing.expand(len(codes), self.num_positions - codes.shape[1], -1)
        return self.decode_tiled(torch.cat([codes, rest], 1))


class TrainableTokenizer(CodeTokenizer):
    """A tokenizer that `dd2 train-tokenizer` can train; its codes are the rows of `embedding`."""

    decoder: nn.Module
    post_quant_conv: nn.Module

    @property
    def decoding(self) -> list[nn.Module]:
        return [self.post_quant_conv, self.decoder]

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The table whose rows become the codes."""

    @abstractmethod
    def quantise(self, images: Tensor) -> Quantised:
        """The training pass: images (B, channels, H, W) in [-1, 1] to reconstruction and losses."""


def nearest_ids(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each token, in float32 whatever the autocast: (..., C), (V, C) -> (...) int64.

    Distances to all V codes exist for a tile of tokens at a time.
    """
    rows = tokens.reshape(-1, tokens.shape[-1]).float()
    return torch.cat([close.argmax(-1) for _, close in closeness(rows, codebook.float())]).view(tokens.shape[:-1])
