"""Text conditioning: how a transformer reads the features of captions (`dd2.text.captions`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1 x)), GELU in its tanh form."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Caption features to the transformer's width, and the learned features of the empty caption; official names."""

    def __init__(self, length: int, channels: int, width: int) -> None:
        super().__init__()
        self.uncond_embedding = nn.Parameter(torch.randn(length, channels) / channels**0.5)
        self.cap_proj = CaptionProjection(channels, width)

    def forward(self, cond: Tensor) -> Tensor:
        """Conditions (B, P, caption_dim [+ 1]) -> (B, P, D)."""
        features = cond[..., : self.uncond_embedding.shape[1]].to(self.uncond_embedding.dtype)
        return self.cap_proj(features)

    def words(self, cond: Tensor) -> Tensor | None:
        """(B, P) bool, False where a caption is padded; None if the condition tells of no padding."""
        channels = self.uncond_embedding.shape[1]
        return cond[..., channels] > 0 if cond.shape[-1] > channels else None

    def null_condition(self, cond: Tensor) -> Tensor:
        """The empty caption, padded like the given one, as the official sampler has it."""
        channels = self.uncond_embedding.shape[1]
        empty = self.uncond_embedding.detach().to(cond.dtype).expand(len(cond), -1, -1)
        return torch.cat([empty, cond[..., channels:]], -1)


def attention_mask(words: Tensor, read: int, stop: int) -> Tensor:
    """Causal attention that leaves out padded caption positions, each of which sees itself all the same.

    Args:
        words: (B, P) bool of the caption, which comes first.
        read, stop: the queries are positions read … stop - 1, the keys 0 … stop - 1.

    Returns:
        (B, 1, stop - read, stop) bool.
    """
    keys = torch.arange(stop, device=words.device)
    return seen_words(keys <= keys[read:].unsqueeze(1), words)


def seen_words(mask: Tensor, words: Tensor) -> Tensor:
    """A mask of attention that leaves out padded caption positions, each of which sees itself all the same.

    Args:
        mask: (L, T) or (1, L, T) bool; the keys begin with the caption's positions, the queries are the last L of all.
        words: (B, P) bool of the caption.

    Returns:
        (B, 1, L, T) bool.
    """
    length, keys = mask.shape[-2:]
    seen = F.pad(words, (0, keys - words.shape[1]), value=True).unsqueeze(1)  # (B, 1, T)
    itself = torch.eye(keys, dtype=torch.bool, device=mask.device)[keys - length :]
    return ((mask & seen) | itself).unsqueeze(1)
