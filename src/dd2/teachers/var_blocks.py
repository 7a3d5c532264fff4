"""VAR's sizes, and the blocks that its transformer is made of; module names follow the official checkpoints."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.order import Attend
from dd2.teachers.cache import KVCache

LARGEST_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a VAR transformer; the defaults are VAR-d16. The scales are the tokenizer's."""

    depth: int = 16
    """Transformer blocks."""
    width: int = 1024
    """Channels D of the residual stream (official models: 64 times the depth)."""
    heads: int = 16
    """Attention heads (official models: as many as blocks)."""
    mlp_ratio: float = 4.0
    """Hidden channels of the feed-forward part as a multiple of the width."""
    num_classes: int = 1000
    """Class labels; label num_classes is the null class of classifier-free guidance. Unused with captions."""
    caption_dim: int = 0
    """Channels of caption features; 0 is a class-conditional model, as VAR's own are."""
    caption_length: int = 120
    """Positions of a caption, which stand before the first scale. Unused without captions."""
    attn_l2_norm: bool = True
    """Unit-norm queries and keys with a learned scale per head."""
    shared_aln: bool = False
    """One adaLN projection for all blocks, plus a learned offset in each (VAR-d36)."""
    drop_path: float = 0.0
    """Stochastic depth of the last block while training, growing linearly from 0 (VAR: depth / 240)."""
    class_dropout: float = 0.1
    """Probability of training on the null class, which classifier-free guidance needs."""

    def __post_init__(self) -> None:
        """Refuse sizes that no such transformer has."""
        for field in ("depth", "width", "heads", "num_classes"):
            if getattr(self, field) < 1:
                raise InputError(f"var {field} must be at least 1, got {getattr(self, field)}")
        if self.width % self.heads:
            raise InputError(f"var width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.mlp_ratio <= 0:
            raise InputError(f"var mlp_ratio must be positive, got {self.mlp_ratio}")
        if not (0 <= self.drop_path < 1 and 0 <= self.class_dropout < 1):
            raise InputError("var drop_path and class_dropout must be in [0, 1)")
        if self.caption_dim < 0 or self.caption_length < 1:
            raise InputError("var caption_dim must not be negative, caption_length at least 1")

    @property
    def condition_positions(self) -> int:
        """Positions that the condition takes before the first scale: those of a caption, none of a class."""
        return self.caption_length if self.caption_dim else 0


class Attention(nn.Module):
    """Multi-head attention, with biases on queries and values only."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.mat_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.proj = nn.Linear(config.width, config.width)
        self.scale = 0.25 / math.sqrt(config.width // config.heads)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4)))

    def forward(self, x: Tensor, attend: Attend, cache: KVCache | None, layer: int) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        if hasattr(self, "scale_mul_1H11"):
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(LARGEST_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
        else:
            q = q * self.scale
        # The scale is in q now, where `attend` divides by sqrt(head_dim).
        q = (q * math.sqrt(q.shape[-1])).to(v.dtype)
        k = k.to(v.dtype)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), GELU in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block, scaled, shifted and gated by the class (adaLN)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        self.width, self.drop_path = config.width, drop_path
        self.attn = Attention(config)
        self.ffn = FeedForward(config.width, round(config.width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / math.sqrt(config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, cond: Tensor, attend: Attend, cache: KVCache | None, layer: int) -> Tensor:
        """X (B, L, D); cond (B, D), or the shared projection (B, 1, 6, D)."""
        modulation = self.ada_gss + cond if hasattr(self, "ada_gss") else self.ada_lin(cond).view(-1, 1, 6, self.width)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + self._drop(self.attn(_norm(x) * (scale1 + 1) + shift1, attend, cache, layer) * gate1)
        return x + self._drop(self.ffn(_norm(x) * (scale2 + 1) + shift2) * gate2)

    def branch_ends(self) -> tuple[nn.Module, nn.Module]:
        """As `ResidualLayer.branch_ends`."""
        return self.attn.proj, self.ffn.fc2

    def _drop(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class HeadNorm(nn.Module):
    """The last normalisation, scaled and shifted by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond).view(x.shape[0], 1, 2, -1).unbind(2)
        return _norm(x) * (scale + 1) + shift


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=1e-6)
