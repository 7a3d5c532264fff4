"""Training a VQ tokenizer: reconstruction, codebook and commitment losses, and revival of dead codes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.tokenizers.base import TrainableTokenizer
from dd2.training.stage import Losses


@dataclass(frozen=True)
class VQLossConfig:
    """Weights of the tokenizer's losses and the rule for dead codes."""

    commitment: float = 0.25
    """Weight of the pull of encoder outputs towards their codes."""
    codebook: float = 1.0
    """Weight of the pull of codes towards their encoder outputs."""
    usage_rate: float = 0.99
    """EMA rate of each code's share of the tokens."""
    dead_below: float = 0.2
    """A code is dead while its share is below this fraction of the uniform share 1 / V."""
    revive_every: int = 20
    """Iterations between revivals of dead codes; 0 never revives."""

    def __post_init__(self) -> None:
        """Refuse weights without meaning."""
        if self.commitment < 0 or self.codebook < 0 or not 0 <= self.usage_rate < 1 or self.revive_every < 0:
            raise InputError("vq_loss weights must not be negative, usage_rate must be in [0, 1)")


class CodeUsage(nn.Module):
    """EMA of each code's share of the tokens, (V,); saved with the training state so that resume is exact."""

    share: Tensor
    updates: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, ids: Tensor, rate: float) -> None:
        """Count the codes of one batch."""
        counts = torch.bincount(ids.flatten(), minlength=len(self.share)).to(self.share)
        self.share.lerp_(counts / counts.sum(), 1 - rate)
        self.updates += 1

    @property
    def perplexity(self) -> Tensor:
        """Exp of the entropy of the shares: the number of codes in effective use, 1 … V."""
        p = self.share / self.share.sum()
        return torch.special.entr(p).sum().exp()


def vq_loss(
    tokenizer: TrainableTokenizer, usage: CodeUsage, images: Tensor, config: VQLossConfig, generator: torch.Generator
) -> Losses:
    """Loss of one batch of images (B, channels, H, W) in [-1, 1]; counts code usage and revives dead codes.

    Returns:
        The loss, and the reconstruction error, codes in use (fraction) and perplexity.
    """
    out = tokenizer.quantise(images)
    reconstruction = F.mse_loss(out.reconstruction, images)
    usage.update(out.ids, config.usage_rate)
    dead = usage.share < config.dead_below / len(usage.share)
    if config.revive_every and int(usage.updates) % config.revive_every == 0 and bool(dead.any()):
        revive(tokenizer.embedding, dead, out.vectors, generator)
        usage.share[dead] = 1 / len(usage.share)
    loss = reconstruction + config.commitment * out.commitment + config.codebook * out.codebook
    return loss, {
        "reconstruction": reconstruction.detach(),
        "usage": 1 - dead.float().mean(),
        "perplexity": usage.perplexity,
    }


@torch.no_grad()
def revive(embedding: nn.Embedding, dead: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
    """Put dead codes (V,) bool onto random vectors (rows, C) that were quantised, so that they are used again."""
    rows = torch.randint(len(vectors), (int(dead.sum()),), generator=generator, device=vectors.device)
    embedding.weight[dead] = vectors[rows].to(embedding.weight.dtype)
