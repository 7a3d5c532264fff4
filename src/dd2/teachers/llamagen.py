"""LlamaGen's transformer with a continuous input layer (App. E.4): the raster-order teacher."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.order import Order, RasterOrder
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.cache import KVCache
from dd2.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen transformer; the defaults are LlamaGen-L at 256 px."""

    depth: int = 24
    """Transformer layers."""
    width: int = 1024
    """Channels D of the residual stream."""
    heads: int = 16
    """Attention heads; the head dimension width / heads must be a multiple of 4 (2-D RoPE)."""
    kv_heads: int = 0
    """Key/value heads; 0 means as many as heads."""
    ffn_multiple: int = 256
    """The SwiGLU width is 8/3 of the width rounded up to a multiple of this."""
    rows: int = 16
    """Token rows of an image."""
    columns: int = 16
    """Token columns of an image."""
    num_classes: int = 1000
    """Class labels; label num_classes is the null class of classifier-free guidance."""
    dropout: float = 0.0
    """Dropout on the residual branches and the input while training."""
    class_dropout: float = 0.1
    """Probability of training on the null class, which classifier-free guidance needs."""

    def __post_init__(self) -> None:
        """Refuse sizes that no such transformer has."""
        for field in ("depth", "width", "heads", "ffn_multiple", "rows", "columns", "num_classes"):
            if getattr(self, field) < 1:
                raise InputError(f"llamagen {field} must be at least 1, got {getattr(self, field)}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"llamagen width / heads must be a whole multiple of 4, got {self.width} / {self.heads}: "
                "2-D RoPE turns pairs of channels, half of them by row and half by column"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.class_dropout < 1):
            raise InputError("llamagen dropout and class_dropout must be in [0, 1)")
        if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
            raise InputError(f"llamagen heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the SwiGLU block."""
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32, with LlamaGen's eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-5).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head attention with 2-D rotary positions, grouped key/value heads and a cache."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.width // config.heads
        self.wqkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, order: Order, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, width = x.shape
        qkv = self.wqkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, h + 2 kv, L, head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if self.kv_heads != self.heads:
            groups = self.heads // self.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return self.wo(order.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width)
        self.feed_forward = SwiGLU(config.width, config.ffn_width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor, order: Order, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), rope, order, cache, layer))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))


class CodeMLP(nn.Module):
    """The continuous input layer that stands in for the embedding table (App. E.4): (..., C) -> (..., D)."""

    def __init__(self, code_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(code_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, codes: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(codes)))


class LlamaGenBackbone(Backbone):
    """LlamaGen's layers over continuous codes; module names follow the official checkpoints.

    Args:
        config: sizes.
        code_dim: C, channels of a code.
        input_layer: codes (B, m, C) in the tokenizer's space -> (B, m, D); a `CodeMLP` by default.
    """

    rope: Tensor

    def __init__(self, config: LlamaGenConfig, code_dim: int, input_layer: nn.Module | None = None) -> None:
        super().__init__(RasterOrder(config.rows, config.columns), config.width, code_dim)
        self.config = config
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.tok_embeddings = input_layer or CodeMLP(code_dim, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        rope = rope_table(config.rows, config.columns, config.width // config.heads)
        self.register_buffer("rope", rope, persistent=False)
        self.apply(_init_weights)

    def null_condition(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, self.config.num_classes)

    @property
    def num_labels(self) -> int:
        return self.config.num_classes

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        return self._run(tokens, cond, None)

    def new_cache(self) -> KVCache:
        return KVCache([], [])

    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> Tensor:
        return self._run(tokens, cond, cache)[:, -1:]

    def _run(self, tokens: Tensor, cond: Tensor, cache: KVCache | None) -> Tensor:
        read = cache.length if cache else 0
        # Position 0 is the class token, position i holds token i - 1: only what the cache lacks is embedded.
        codes = self.to_codes(self.order.inputs(tokens)[:, max(read - 1, 0) :])
        x = self.tok_embeddings(codes).float()  # the residual stream stays float32 under autocast
        if read == 0:
            x = torch.cat([self.cls_embedding(cond).unsqueeze(1), x], 1)
        x = self.drop(x)
        rope = self.rope[read : read + x.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, self.order, cache, index)
        return self.norm(x)


def llamagen_teacher(config: LlamaGenConfig, tokenizer: Tokenizer) -> Teacher:
    """A LlamaGen teacher with fresh weights, ready to be trained or loaded."""
    backbone = LlamaGenBackbone(config, tokenizer.codebook.shape[1])
    output = nn.Linear(config.width, tokenizer.codebook.shape[0], bias=False)
    nn.init.zeros_(output.weight)
    return Teacher(backbone, output, tokenizer)


def rope_table(rows: int, columns: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of 2-D rotary positions, (1 + rows * columns, head_dim / 2, 2) float32.

    The first half of the angles turns with the row, the second with the column. The class token's row is zeros,
    not the identity (cos 1, sin 0): its queries and keys become exactly 0, as in the released models.
    """
    quarter = head_dim // 4
    frequency = base ** (-torch.arange(quarter, dtype=torch.float32) * 2 / (head_dim // 2))
    row = torch.arange(rows, dtype=torch.float32)[:, None, None] * frequency
    column = torch.arange(columns, dtype=torch.float32)[None, :, None] * frequency
    angles = torch.cat([row.expand(rows, columns, quarter), column.expand(rows, columns, quarter)], -1)
    grid = torch.stack([angles.cos(), angles.sin()], -1).flatten(0, 1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), grid])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (B, heads, L, head_dim) by the angles of rope (L, head_dim / 2, 2).

    As complex numbers: 3 to 8 times faster on a CPU than strided real arithmetic.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
