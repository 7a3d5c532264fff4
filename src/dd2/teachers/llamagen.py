"""LlamaGen's transformer: the raster-order teacher, conditioned on a class or on a caption."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.order import Order, RasterOrder
from dd2.precision import Linear
from dd2.teachers.base import Backbone
from dd2.teachers.cache import KVCache
from dd2.teachers.captions import CaptionEmbedding, attention_mask
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import conditions_of
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import BeforeLayer, LayerStack, add_first, append_identities
from dd2.tokenizers.base import CodeTokenizer, nearest_ids


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
    """Class labels; label num_classes is the null class of classifier-free guidance. Unused with captions."""
    caption_dim: int = 0
    """Channels of caption features; 0 is a class-conditional model."""
    caption_length: int = 120
    """Positions of a caption. Unused without captions."""
    caption_rope: Literal["zero", "identity"] = "zero"
    """What 2-D RoPE does at the condition's positions. zero: their queries and keys become 0, as in the released models, so that
    all words are attended to evenly. identity: nothing, so that words are found by what they are."""
    input_layer: Literal["mlp", "table"] = "mlp"
    """mlp: continuous codes (App. E.4). table: the official embedding table, which only takes exact codes (before dd2 adapt)."""
    code_hidden: int = 0
    """Hidden channels of the continuous input layer; 0 means as many as the width."""
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
        if self.caption_rope not in ("zero", "identity"):
            raise InputError(f'llamagen caption_rope must be "zero" or "identity", got {self.caption_rope!r}')
        if self.input_layer not in ("mlp", "table"):
            raise InputError(f'llamagen input_layer must be "mlp" or "table", got {self.input_layer!r}')
        if self.caption_dim < 0 or self.code_hidden < 0 or self.caption_length < 1:
            raise InputError("llamagen caption_dim and code_hidden must not be negative, caption_length at least 1")
        if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
            raise InputError(f"llamagen heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def condition_positions(self) -> int:
        """Positions that the condition takes before the tokens."""
        return self.caption_length if self.caption_dim else 1

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the SwiGLU block."""
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple


class Attention(nn.Module):
    """Multi-head attention with 2-D rotary positions, grouped key/value heads and a cache."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.width // config.heads
        self.wqkv = Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, order: Order, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, width = x.shape
        qkv = self.wqkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, h + 2 kv, L, head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if mask is None:
            mixed = order.attend(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.kv_heads != self.heads)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = SwiGLU(config.width, config.ffn_width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, order: Order, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), rope, mask, order, cache, layer))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))

    def branch_ends(self) -> tuple[nn.Module, nn.Module]:
        """As `ResidualLayer.branch_ends`."""
        return self.attention.wo, self.feed_forward.w2


class CodeMLP(nn.Module):
    """The continuous input layer that stands in for the embedding table (App. E.4): (..., C) -> (..., D)."""

    def __init__(self, code_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(code_dim, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, codes: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(codes)))


class CodeTable(nn.Embedding):
    """The official input layer: a row per code. Tokens are looked up by their nearest code, so it has no use for others.

    Args:
        codebook: (V, C) codes in the tokenizer's space.
        width: D.
    """

    codebook: Tensor

    def __init__(self, codebook: Tensor, width: int) -> None:
        super().__init__(len(codebook), width)
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) codes -> (..., D)."""
        return super().forward(nearest_ids(input, self.codebook))


class LlamaGenBackbone(Backbone):
    """LlamaGen's layers; module names follow the official checkpoints.

    With captions a condition is (B, P, caption_dim + 1): the features of P positions, and in the last channel 1 for a word
    and 0 for padding (`caption_condition`); features alone, (B, P, caption_dim), are all words.

    Args:
        config: sizes.
        codebook: (V, C) codes in the tokenizer's space.
    """

    rope: Tensor

    def __init__(self, config: LlamaGenConfig, codebook: Tensor) -> None:
        code_dim = codebook.shape[1]
        super().__init__(RasterOrder(config.rows, config.columns), config.width, code_dim)
        self.config = config
        if config.caption_dim:
            self.cls_embedding = CaptionEmbedding(config.caption_length, config.caption_dim, config.width)
        else:
            self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)
        if config.input_layer == "table":
            self.tok_embeddings = CodeTable(codebook, config.width)
        else:
            self.tok_embeddings = CodeMLP(code_dim, config.code_hidden or config.width, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.layers = LayerStack(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        given, still = config.condition_positions, config.caption_rope == "identity"
        rope = rope_table(config.rows, config.columns, config.width // config.heads, given, still=still)
        self.register_buffer("rope", rope, persistent=False)
        self.apply(_init_weights)

    @property
    def continuous(self) -> bool:
        return self.config.input_layer == "mlp"

    def null_condition(self, cond: Tensor) -> Tensor:
        if isinstance(self.cls_embedding, CaptionEmbedding):
            return self.cls_embedding.null_condition(cond)
        return torch.full_like(cond, self.config.num_classes)

    @property
    def stack(self) -> LayerStack:
        """The transformer layers."""
        return self.layers

    def deepen(self, extra: int) -> None:
        append_identities(self.layers, extra)
        self.config = replace(self.config, depth=len(self.layers))

    @property
    def positions(self) -> int:
        return self.order.n - 1 + self.config.condition_positions

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        return self._run(self.order.inputs(tokens), cond, None)[:, self.config.condition_positions - 1 :]

    def own_features(self, tokens: Tensor, cond: Tensor, before: BeforeLayer) -> Tensor:
        """As `ReadsOwnToken.own_features`."""
        return self._run(tokens, cond, None, before)[:, self.config.condition_positions :]

    def told_features(self, tokens: Tensor, cond: Tensor, told: Tensor) -> Tensor:
        """As `IsTold.told_features`."""
        first = self.config.condition_positions - 1
        return self._run(self.order.inputs(tokens), cond, None, add_first(told, first))[:, first:]

    def new_cache(self) -> KVCache:
        return KVCache(self.positions)

    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> Tensor:
        return self._run(self.order.inputs(tokens), cond, cache)[:, -1:]

    def _run(self, tokens: Tensor, cond: Tensor, cache: KVCache | None, before: BeforeLayer | None = None) -> Tensor:
        """Features of the condition's positions and the tokens behind them, less those that the cache has read."""
        read, given = cache.length if cache else 0, self.config.condition_positions
        codes = self.to_codes(tokens[:, max(read - given, 0) :])
        x = self.tok_embeddings(codes).float()  # the residual stream stays float32 under autocast
        if read == 0:
            x = torch.cat([self.cls_embedding(cond).view(cond.shape[0], given, -1), x], 1)
        x = self.drop(x)
        held = slice(read, read + x.shape[1])
        words = self.cls_embedding.words(cond) if isinstance(self.cls_embedding, CaptionEmbedding) else None
        mask = None if words is None else attention_mask(words, held.start, held.stop)
        return self.norm(self.layers.run(x, self.rope[held], mask, self.order, cache=cache, before=before))


class LlamaGenTeacher(CodeTeacher):
    """LlamaGen, whose guidance may end early: only the first tokens are guided under `cfg_interval`."""

    def cfg_weights(self, sampling: Sampling) -> Tensor:
        weights = super().cfg_weights(sampling)
        if sampling.cfg_interval >= 0:
            # Counted from the second token, as the official sampler does: the first is always guided.
            weights[sampling.cfg_interval + 2 :] = 1
        return weights


def llamagen_teacher(config: LlamaGenConfig, tokenizer: CodeTokenizer) -> LlamaGenTeacher:
    """A LlamaGen teacher with fresh weights, ready to be trained or loaded."""
    backbone = LlamaGenBackbone(config, tokenizer.codebook)
    output = Linear(config.width, tokenizer.codebook.shape[0], bias=False)
    nn.init.zeros_(output.weight)
    return LlamaGenTeacher(backbone, output, tokenizer, conditions_of(config))


def rope_table(rows: int, columns: int, head_dim: int, given: int = 1, base: float = 10000.0, *, still: bool = False) -> Tensor:
    """Cosines and sines of 2-D rotary positions, (given + rows * columns, head_dim / 2, 2) float32.

    The first half of the angles turns with the row, the second with the column. The rows of the `given` positions of the
    condition are zeros, not the identity (cos 1, sin 0): their queries and keys become exactly 0, as in the released models;
    `still` makes them the identity.
    """
    quarter = head_dim // 4
    frequency = base ** (-torch.arange(quarter, dtype=torch.float32) * 2 / (head_dim // 2))
    row = torch.arange(rows, dtype=torch.float32)[:, None, None] * frequency
    column = torch.arange(columns, dtype=torch.float32)[None, :, None] * frequency
    angles = torch.cat([row.expand(rows, columns, quarter), column.expand(rows, columns, quarter)], -1)
    grid = torch.stack([angles.cos(), angles.sin()], -1).flatten(0, 1)
    condition = torch.zeros(given, head_dim // 2, 2)
    condition[..., 0] = float(still)
    return torch.cat([condition, grid])


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
