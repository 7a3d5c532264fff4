"""MAR's diffusion of one token: the cosine schedule with learned variances, fewer of its steps, and the head that predicts noise.

Noised tokens here are variance-preserving, x = sqrt(abar) x_0 + sqrt(1 - abar) e. dd2's RectFlow tokens are the same up to a
factor: with a = sqrt(abar), s = sqrt(1 - abar), x_t = x / (a + s) lies at t = s / (a + s).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.teachers.layers import xavier_linears

STEPS = 1000
"""Of training; the head knows noise levels by these indices, 0 … 999."""
LARGEST_BETA = 0.999


@dataclass(frozen=True)
class DiffusionSchedule:
    """A chain of noise levels, all of them or some, in float64.

    Attributes:
        indices: (S,) which of the `STEPS` levels the chain visits, ascending: what the head is told.
        alphas_cumprod: (S,) abar of each.
    """

    indices: Tensor
    alphas_cumprod: Tensor

    @classmethod
    def cosine(cls) -> "DiffusionSchedule":
        """All levels of the cosine schedule (Nichol and Dhariwal, 2021); the last beta is capped."""

        def level(u: Tensor) -> Tensor:
            return ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2

        u = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
        betas = (1 - level(u[1:]) / level(u[:-1])).clamp_max(LARGEST_BETA)
        return cls(torch.arange(STEPS), (1 - betas).cumprod(0))

    def respaced(self, steps: int, last: int = STEPS - 1) -> "DiffusionSchedule":
        """The chain that visits `steps` of the levels up to `last`, evenly, the first and the last among them.

        Raises:
            InputError: there are no such levels.
        """
        if not 2 <= steps <= last + 1 <= len(self.indices):
            raise InputError(f"diffusion_steps must be in 2 to {last + 1}, got {steps}")
        kept = torch.tensor([round(k * last / (steps - 1)) for k in range(steps)])
        return DiffusionSchedule(self.indices[kept], self.alphas_cumprod[kept])

    def to(self, device: torch.device) -> "DiffusionSchedule":
        """The same chain with its tables on a device, for loops that read them often."""
        return DiffusionSchedule(self.indices.to(device), self.alphas_cumprod.to(device))

    @cached_property
    def betas(self) -> Tensor:
        """(S,) of the chain's own steps."""
        return 1 - self.alphas_cumprod / self._previous

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """(S,) of q(x_{k-1} | x_k, x_0); at k = 0, where it is 0, that of k = 1 stands."""
        variance = self.betas * (1 - self._previous) / (1 - self.alphas_cumprod)
        return torch.cat([variance[1:2], variance[1:]]).log()

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[Tensor, Tensor]:
        """(S,) each: of x_0 and of x_k in the mean of q(x_{k-1} | x_k, x_0)."""
        rest = 1 - self.alphas_cumprod
        return self.betas * self._previous.sqrt() / rest, (1 - self._previous) * (1 - self.betas).sqrt() / rest

    @property
    def _previous(self) -> Tensor:
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def rect_flow_levels(self) -> Tensor:
        """(S,) the RectFlow level t in (0, 1) of each index."""
        a, s = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return s / (a + s)

    def noised(self, x_0: Tensor, k: Tensor, noise: Tensor) -> Tensor:
        """X at steps k (...) of the chain, of clean tokens and noise (..., C)."""
        abar = self.at(self.alphas_cumprod, k, x_0)
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * noise

    def clean(self, x: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that x (..., C) at steps k (...) and predicted noise belong to; not clipped."""
        inverse = 1 / self.alphas_cumprod
        return self.at(inverse.sqrt(), k, x) * x - self.at((inverse - 1).sqrt(), k, x) * eps

    def posterior_mean(self, clean: Tensor, x: Tensor, k: Tensor) -> Tensor:
        """Of q(x_{k-1} | x_k, x_0) at steps k (...), of clean tokens and x (..., C)."""
        of_clean, of_x = self.posterior_mean_coefficients
        return self.at(of_clean, k, x) * clean + self.at(of_x, k, x) * x

    def log_variance(self, k: Tensor, fraction: Tensor) -> Tensor:
        """The learned log-variance: between the posterior's (fraction -1) and beta (1), (..., C)."""
        share = (fraction + 1) / 2
        low, high = (self.at(table, k, fraction) for table in (self.posterior_log_variance, self.betas.log()))
        return share * high + (1 - share) * low

    def step_back(self, x: Tensor, k: Tensor, eps: Tensor, fraction: Tensor, noise: Tensor) -> Tensor:
        """One ancestral step, x_k to x_{k-1} (..., C); at k = 0 without noise.

        Args:
            x: present tokens.
            k: (...) steps of the chain.
            eps, fraction: the head's two outputs.
            noise: standard normal, times the temperature.
        """
        mean = self.posterior_mean(self.clean(x, k, eps), x, k)
        moves = (k > 0).unsqueeze(-1).to(x.dtype)
        return mean + moves * (self.log_variance(k, fraction) / 2).exp() * noise

    @staticmethod
    def at(table: Tensor, k: Tensor, like: Tensor) -> Tensor:
        """A table's numbers at steps k (...), with an axis for the channels, as `like` is."""
        return table.to(device=k.device, dtype=like.dtype)[k].unsqueeze(-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the index, then two layers."""

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, index: Tensor) -> Tensor:
        """(...) indices of 0 … 999 to (..., width)."""
        steps = torch.arange(self.FREQUENCIES, device=index.device, dtype=torch.float32) / self.FREQUENCIES
        angles = index.unsqueeze(-1).float() * torch.exp(-math.log(10000) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].get_parameter("weight").dtype))


class ResBlock(nn.Module):
    """Residual MLP, shifted, scaled and gated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(cond).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """A modulated normalisation without weights of its own, and a linear map."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """MAR's head: (noised token, index, condition) -> noise and variance; module names are those of the official files.

    Args:
        code_dim: C, channels of a token.
        feature_dim: D, channels of the condition.
        width, depth: of the residual MLP.
    """

    def __init__(self, code_dim: int, feature_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(feature_dim, width)
        self.input_proj = nn.Linear(code_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * code_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """As training starts: no noise is predicted."""
        xavier_linears(self)
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].get_parameter("weight"), std=0.02)
        modulations = [block.adaLN_modulation for block in self.res_blocks if isinstance(block, ResBlock)]
        for modulation in (*modulations, self.final_layer.adaLN_modulation):
            nn.init.zeros_(modulation[1].get_parameter("weight"))
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted noise and the variance's place between its bounds.

        Args:
            x: (..., C) noised tokens, variance-preserving.
            index: (...) noise levels, 0 … 999.
            features: (..., D), broadcast to x.

        Returns:
            (..., C) each.
        """
        cond = self.time_embed(index) + self.cond_embed(features)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, cond)
        eps, fraction = self.final_layer(x, cond).chunk(2, -1)
        return eps, fraction
