"""How a MAR is trained: random sets of known tokens, and the head's diffusion loss on the others (arXiv 2406.11838)."""

import math

import torch
from torch import Tensor

from dd2.losses import Losses
from dd2.teachers.diffusion import STEPS
from dd2.teachers.diffusion_score import COSINE
from dd2.teachers.mar import MARTeacher
from dd2.teachers.mar_network import MAR

LEAST_MASKED, MASKED_MEAN, MASKED_DEVIATION = 0.7, 1.0, 0.25
"""Of the truncated normal that the share of masked tokens comes from."""
REPEATS = 4
"""Noise levels per token and iteration: they share the transformer's pass."""


def random_known(batch: int, n: int, random: torch.Generator) -> Tensor:
    """Known sets (B, n) as in training: as many for all of a batch, at random places; at least one token is masked."""
    low = math.erf((LEAST_MASKED - MASKED_MEAN) / MASKED_DEVIATION / math.sqrt(2))
    u = torch.rand((), generator=random, device=random.device, dtype=torch.float64)
    share = MASKED_MEAN + MASKED_DEVIATION * math.sqrt(2) * torch.erfinv(low + u * (0 - low))  # cut off at the mean, 1
    masked = min(n, max(1, math.ceil(n * float(share))))
    return torch.rand(batch, n, generator=random, device=random.device).argsort(1) >= masked


def diffusion_loss(mar: MAR, tokens: Tensor, features: Tensor, index: Tensor, noise: Tensor) -> Tensor:
    """(...) loss of each token: squared error of the noise, and in bits the variational bound that trains the variance alone.

    Args:
        mar: whose head.
        tokens: (..., C) clean.
        features: (..., D) conditions.
        index: (...) noise levels, 0 … 999.
        noise: (..., C) standard normal.
    """
    x = COSINE.noised(tokens, index, noise)
    eps, fraction = mar.head(x, index, features)
    squared = (noise - eps).square().mean(-1)
    true_mean = COSINE.posterior_mean(tokens, x, index)
    mean = COSINE.posterior_mean(COSINE.clean(x, index, eps.detach()), x, index)
    true_log = COSINE.at(COSINE.posterior_log_variance, index, x)
    log = COSINE.log_variance(index, fraction)
    kl = (log - true_log + (true_log - log).exp() + (true_mean - mean).square() * (-log).exp() - 1) / 2
    bits = torch.where(index.unsqueeze(-1) > 0, kl, -_log_probability(tokens, mean, log / 2)).mean(-1) / math.log(2)
    return squared + bits


def mar_loss(teacher: MARTeacher, tokens: Tensor, labels: Tensor, class_dropout: float, random: torch.Generator) -> Losses:
    """One micro-batch: tokens (B, n, C) and labels (B,), both on the stream's device."""
    hidden = torch.rand(len(labels), generator=random, device=random.device) < class_dropout
    cond = torch.where(hidden, teacher.null_condition(labels), labels)
    known = random_known(len(labels), tokens.shape[1], random)
    features = teacher.mar.features(tokens, known, cond)[~known].repeat(REPEATS, 1)
    clean = tokens[~known].repeat(REPEATS, 1)
    index = torch.randint(STEPS, (len(clean),), generator=random, device=random.device)
    noise = torch.randn(clean.shape, generator=random, device=random.device)
    return diffusion_loss(teacher.mar, clean, features, index, noise).mean(), {}


def _log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of the interval of width 2 / 255 about x under a normal, its ends open beyond ±0.999; the integral in its tanh form."""
    inverse = (-log_scale).exp()
    upper, lower = (_integral(inverse * (x - mean + side / 255)) for side in (1, -1))
    inside = (upper - lower).clamp_min(1e-12).log()
    beyond = torch.where(x > 0.999, (1 - lower).clamp_min(1e-12).log(), inside)
    return torch.where(x < -0.999, upper.clamp_min(1e-12).log(), beyond)


def _integral(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
