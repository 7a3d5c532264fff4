"""From logits to the teacher's sampling distribution: guidance, temperature, top-k, top-p -> log p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dd2.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the teacher samples. The distribution that results is the one that is distilled."""

    cfg_scale: float | None = None
    """Classifier-free guidance in the teacher's own convention; None is no guidance and costs one teacher pass instead of
    two. LlamaGen: null + s (cond - null), so 1 is none. VAR: s = 1 + cfg_scale k / (S - 1) at scale k, so 0 is none."""
    cfg_interval: int = -1
    """LlamaGen: guide only the first token and the cfg_interval + 1 that follow, as its sampler counts; -1 guides all."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    top_k: int = 0
    """Keep the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of codes that holds this probability, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if self.cfg_scale is not None and not math.isfinite(self.cfg_scale):
            raise InputError(f"sampling.cfg_scale must be finite, got {self.cfg_scale}")
        if self.cfg_interval < -1:
            raise InputError(f"sampling.cfg_interval must be -1 (guide all tokens) or more, got {self.cfg_interval}")
        if not self.temperature > 0:
            raise InputError(f"sampling.temperature must be > 0, got {self.temperature}; for greedy use top_k 1")
        if self.top_k < 0:
            raise InputError(f"sampling.top_k must be >= 0 (0 keeps all codes), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p must be in (0, 1], got {self.top_p}")


def guided(logits: Tensor, null_logits: Tensor, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance: null + s (conditional - null), in float32; all (..., V), s broadcast to them."""
    null_logits = null_logits.float()
    return null_logits + weight * (logits.float() - null_logits)


def filtered_log_p(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities after temperature, then top-k, then top-p, as in LlamaGen's and VAR's samplers.

    Args:
        logits: (..., V), already guided.
        sampling: what to apply; its cfg_scale is not used here.

    Returns:
        (..., V) float32, normalised over the kept codes, -inf for the others.
    """
    logits = logits.float() / sampling.temperature
    codes = logits.shape[-1]
    if 0 < sampling.top_k < codes:
        threshold = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        before[..., 0] = 0  # the likeliest code always stays
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits.log_softmax(-1)


def draw(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution, so that one number per token decides.

    Args:
        log_p: (..., V) log-probabilities.
        uniforms: (...) in [0, 1).

    Returns:
        (...) int64 ids; a code of probability 0 is never drawn.
    """
    cumulative = log_p.double().exp().cumsum(-1)
    target = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return ids.clamp_max(log_p.shape[-1] - 1)
