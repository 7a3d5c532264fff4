"""Training tokenizers: with codes by reconstruction, codebook and commitment losses and revival of dead codes; KL ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.losses import Losses
from dd2.processes import rank, sum_over_processes, world_size
from dd2.tokenizers.base import TrainableTokenizer
from dd2.tokenizers.kl import KLTokenizer


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
    """EMA of each code's share of the tokens, (V,); saved with the training state so that resume is exact.

    Losses only say what they saw (`saw`). Once an optimiser step is done, `settle` counts it, over all micro-batches and
    processes, and revives dead codes: the same codes with the same vectors on every process.
    """

    share: Tensor
    updates: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._counts = torch.zeros(codebook_size)
        self._vectors: list[Tensor] = []

    @torch.no_grad()
    def saw(self, ids: Tensor, vectors: Tensor) -> None:
        """Note one micro-batch: the codes (B, n) that were chosen, and the vectors (rows, C) that were quantised."""
        counts = torch.bincount(ids.flatten(), minlength=len(self.share)).to(self.share)
        self._counts = self._counts.to(counts.device) + counts
        self._vectors.append(vectors.detach())

    @torch.no_grad()
    def settle(self, embedding: nn.Embedding, config: VQLossConfig, random: torch.Generator) -> None:
        """After an optimiser step: count what the losses saw, and put dead codes onto vectors that were quantised.

        Args:
            embedding: the table whose rows are the codes.
            config: the rule for dead codes.
            random: random stream of this step, the same on every process.
        """
        counts, vectors = self._counts, self._vectors
        self._counts, self._vectors = torch.zeros_like(counts), []
        sum_over_processes([counts])
        self.share.lerp_(counts / counts.sum(), 1 - config.usage_rate)
        self.updates += 1
        dead = self.dead(config)
        if config.revive_every and int(self.updates) % config.revive_every == 0 and bool(dead.any()):
            embedding.weight[dead] = _chosen(vectors, int(dead.sum()), random).to(embedding.weight.dtype)
            self.share[dead] = 1 / len(self.share)

    def dead(self, config: VQLossConfig) -> Tensor:
        """(V,) booleans: codes that hardly any token uses."""
        return self.share < config.dead_below / len(self.share)

    @property
    def perplexity(self) -> Tensor:
        """Exp of the entropy of the shares: the number of codes in effective use, 1 … V."""
        p = self.share / self.share.sum()
        return torch.special.entr(p).sum().exp()


def _chosen(vectors: list[Tensor], count: int, random: torch.Generator) -> Tensor:
    """Random vectors (count, C) of the whole step: number k of all micro-batches' rows in their order, whoever computed them."""
    rows, channels = vectors[0].shape
    picked = torch.randint(rows * len(vectors) * world_size(), (count,), generator=random, device=vectors[0].device)
    micro = picked // rows  # micro-batch number m was the process m % P's own, its (m // P)th
    own = micro % world_size() == rank()
    chosen = vectors[0].new_zeros(count, channels)
    chosen[own] = torch.stack(vectors)[micro[own] // world_size(), picked[own] % rows]
    sum_over_processes([chosen])
    return chosen


def vq_loss(tokenizer: TrainableTokenizer, usage: CodeUsage, images: Tensor, config: VQLossConfig) -> Losses:
    """Loss of one batch of images (B, channels, H, W) in [-1, 1]; `usage` notes which codes it chose.

    Returns:
        The loss, and the reconstruction error, codes in use (fraction) and perplexity before this batch.
    """
    out = tokenizer.quantise(images)
    reconstruction = F.mse_loss(out.reconstruction, images)
    usage.saw(out.ids, out.vectors)
    loss = reconstruction + config.commitment * out.commitment + config.codebook * out.codebook
    return loss, {
        "reconstruction": reconstruction.detach(),
        "usage": 1 - usage.dead(config).float().mean(),
        "perplexity": usage.perplexity,
    }


def kl_loss(tokenizer: KLTokenizer, images: Tensor, weight: float, random: torch.Generator) -> Losses:
    """Loss of one batch of images (B, channels, H, W) in [-1, 1]: squared error of decoded draws, and the posteriors' divergence.

    Args:
        tokenizer: what is trained.
        images: the batch.
        weight: of the divergence, in nats a number of the image.
        random: random stream of this step.

    Returns:
        The loss, and the reconstruction error and the divergence in nats an image.
    """
    posterior = tokenizer.posterior(images)
    reconstruction = F.mse_loss(tokenizer.decode_codes(tokenizer.tokens(posterior.sample(random))), images)
    divergence = posterior.kl.mean()
    loss = reconstruction + weight * divergence / images[0].numel()
    return loss, {"reconstruction": reconstruction.detach(), "kl": divergence.detach()}


@torch.no_grad()
def measured_deviation(tokenizer: KLTokenizer, images: Tensor) -> float:
    """Of all numbers of the latents of images, drawn from nothing: of the posteriors' means and variances together."""
    mean, variance = [], []
    for part in images.split(32):
        posterior = tokenizer.posterior(part)
        mean.append(posterior.mean.flatten())
        variance.append(posterior.log_variance.exp().flatten())
    return float((torch.cat(mean).var() + torch.cat(variance).mean()).sqrt())
