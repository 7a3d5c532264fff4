"""Text conditioning: caption features, their padding, and how a transformer reads them."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dd2.errors import InputError


class Captions:
    """The captions of a run; their row numbers are its labels.

    Args:
        features: (N, P, caption_dim) features of a text encoder, padding on the left.
        mask: (N, P), 1 for a word and 0 for padding.
    """

    def __init__(self, features: Tensor, mask: Tensor) -> None:
        self.features, self.mask = features, mask

    @classmethod
    def load(cls, file: Path, length: int, channels: int) -> "Captions":
        """Read what `dd2 text-features` wrote, for a model of captions (length, channels).

        Raises:
            InputError: the file is missing or damaged, or does not fit the model.
        """
        try:
            tensors = load_file(file)
            features, mask = tensors["features"], tensors["mask"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"captions {file} cannot be read ({error}); make it with dd2 text-features") from error
        if (
            features.ndim != 3
            or tuple(features.shape[1:]) != (length, channels)
            or mask.shape != features.shape[:2]
            or not len(mask)
        ):
            raise InputError(
                f"captions {file} hold features {tuple(features.shape)} and mask {tuple(mask.shape)}; this model needs "
                f"(N, {length}, {channels}) and (N, {length}): make them with the text encoder it was trained with"
            )
        if not (features.is_floating_point() and torch.isfinite(features).all()):
            raise InputError(f"captions {file} hold features that are not finite numbers; make them again with dd2 text-features")
        words = mask.float()
        if not ((words == 0) | (words == 1)).all() or (words.diff(dim=1) < 0).any() or (words[:, -1] == 0).any():
            raise InputError(
                f"captions {file}: the mask must be 0 for padding, which comes first, and 1 for words, of which there is one at "
                "least; make it again with dd2 text-features"
            )
        return cls(features, mask)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Conditions of row numbers (B,), on their device."""
        rows = labels.cpu()
        return caption_condition(self.features[rows], self.mask[rows]).to(labels.device)

    def digest(self) -> str:
        """Hash of features and mask."""
        content = hashlib.sha256()
        for tensor in (self.features, self.mask):
            content.update(tensor.float().contiguous().numpy().tobytes())
        return content.hexdigest()


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


def caption_condition(features: Tensor, mask: Tensor) -> Tensor:
    """Features (B, P, caption_dim) and mask (B, P) as one condition tensor (B, P, caption_dim + 1)."""
    return torch.cat([features.float(), mask.float().unsqueeze(-1)], -1)


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the words of captions (B, P, caption_dim), (B, P) from the left to the right end and zero the padding: LlamaGen's
    models see a caption's last word right before the first token.
    """
    words = mask.bool().sum(1, keepdim=True)
    length = mask.shape[1]
    source = (torch.arange(length).to(mask.device) + words) % length  # (B, P)
    moved = mask.gather(1, source)
    return features.gather(1, source.unsqueeze(-1).expand_as(features)) * moved.unsqueeze(-1), moved


def attention_mask(words: Tensor, read: int, stop: int) -> Tensor:
    """Causal attention that leaves out padded caption positions, each of which sees itself all the same.

    Args:
        words: (B, P) bool of the caption, which comes first.
        read, stop: the queries are positions read … stop - 1, the keys 0 … stop - 1.

    Returns:
        (B, 1, stop - read, stop) bool.
    """
    queries = torch.arange(read, stop, device=words.device).unsqueeze(1)
    keys = torch.arange(stop, device=words.device)
    seen = F.pad(words, (0, max(stop - words.shape[1], 0)), value=True)[:, :stop]
    return ((keys <= queries) & (seen.unsqueeze(1) | (keys == queries))).unsqueeze(1)
