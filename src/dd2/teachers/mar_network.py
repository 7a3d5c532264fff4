"""MAR's transformer (arXiv 2406.11838): an encoder over the known tokens, a decoder over all positions, a diffusion head on each.

Module names are those of the official files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.teachers.diffusion import STEPS, DiffusionHead
from dd2.teachers.layers import LayerStack, xavier_linears


@dataclass(frozen=True)
class MARConfig:
    """Sizes of a MAR; the defaults are MAR-B's."""

    width: int = 768
    """Channels of the encoder."""
    depth: int = 12
    """Layers of the encoder."""
    heads: int = 12
    """Attention heads of the encoder."""
    decoder_width: int = 768
    """Channels of the decoder, D."""
    decoder_depth: int = 12
    """Layers of the decoder."""
    decoder_heads: int = 12
    """Attention heads of the decoder."""
    mlp_ratio: float = 4.0
    """Hidden channels of the layers' MLPs over their width."""
    head_depth: int = 6
    """Blocks of the diffusion head."""
    head_width: int = 1024
    """Channels of the diffusion head."""
    rows: int = 16
    """Tokens per column."""
    columns: int = 16
    """Tokens per row."""
    code_dim: int = 16
    """Channels of a token, C."""
    num_classes: int = 1000
    """Classes."""
    buffer: int = 64
    """Rows in front of the tokens that hold the class."""
    start: int = 999
    """Noise level that sampling starts from. At the last, the official one, an error of the head is multiplied by 20,000, which
    models of short training do not survive; 985 (t = 0.98) multiplies by 50 and leaves as little of the data."""
    dropout: float = 0.1
    """In training: of attention weights, projections and MLPs."""
    class_dropout: float = 0.1
    """In training: share of images whose class is hidden, which guidance needs."""

    def __post_init__(self) -> None:
        """Refuse sizes that no such model has."""
        for name in (
            *("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads", "head_depth", "head_width"),
            *("rows", "columns", "code_dim", "num_classes", "buffer"),
        ):
            if getattr(self, name) < 1:
                raise InputError(f"mar.{name} must be at least 1, got {getattr(self, name)}")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise InputError(f"mar.{width} {getattr(self, width)} must be a multiple of mar.{heads} {getattr(self, heads)}")
        if not 1 <= self.start < STEPS:
            raise InputError(f"mar.start must be in 1 to {STEPS - 1}, got {self.start}")
        if not self.mlp_ratio > 0 or not (0 <= self.dropout < 1 and 0 <= self.class_dropout < 1):
            raise InputError("mar.mlp_ratio must be positive, and mar.dropout and mar.class_dropout in [0, 1)")


class Attention(nn.Module):
    """Multi-head attention in which everything sees everything that is there."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, there: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), GELU in its exact form."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.mlp = Mlp(width, round(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, there: Tensor | None, cache: None, layer: int) -> Tensor:
        """X (B, L, width); `there` (B, 1, 1, L) which rows exist, None where all do. There is no cache."""
        x = x + self.attn(self.norm1(x), there)
        return x + self.mlp(self.norm2(x))

    def branch_ends(self) -> tuple[nn.Module, nn.Module]:
        """As `ResidualLayer.branch_ends`."""
        return self.attn.proj, self.mlp.fc2


class DiffusionLoss(nn.Module):
    """The place of the head in the official files."""

    def __init__(self, net: DiffusionHead) -> None:
        super().__init__()
        self.net = net


class MAR(nn.Module):
    """The network: known tokens and a class to features of every position, and the head on them.

    Args:
        config: sizes.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, rows = config.width, config.decoder_width, config.buffer + config.rows * config.columns
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = nn.Linear(config.code_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, width))
        self.encoder_blocks = LayerStack(
            Block(width, config.heads, config.mlp_ratio, config.dropout) for _ in range(config.depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, inner))
        self.decoder_blocks = LayerStack(
            Block(inner, config.decoder_heads, config.mlp_ratio, config.dropout) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.rows * config.columns, inner))
        self._init_weights()
        self.diffloss = DiffusionLoss(DiffusionHead(config.code_dim, inner, config.head_width, config.head_depth))

    def _init_weights(self) -> None:
        xavier_linears(self)
        embeddings = (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned)
        for parameter in (self.class_emb.weight, self.fake_latent, self.mask_token, *embeddings):
            nn.init.normal_(parameter, std=0.02)

    @property
    def n(self) -> int:
        """Positions of an image."""
        return self.config.rows * self.config.columns

    def class_embeddings(self, labels: Tensor) -> Tensor:
        """(B, width) of labels (B,), `num_classes` for none."""
        return torch.cat([self.class_emb.weight, self.fake_latent])[labels]

    def encode(self, tokens: Tensor, known: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The encoder, over the class and the known tokens alone.

        Args:
            tokens: (B, n, C); what stands where nothing is known does not matter.
            known: (B, n) booleans, as many in every row, or not; None where all are: then nothing is looked at.
            labels: (B,) classes, `num_classes` for none.

        Returns:
            (B, buffer + k, width) the encoder's output, k the most tokens that a row knows; and, unless all are known, (B, k)
            their positions, and whether there is one.
        """
        config, classes = self.config, self.class_embeddings(labels)
        x = torch.cat([classes.unsqueeze(1).expand(-1, config.buffer, -1), self.z_proj(tokens.to(self.z_proj.weight.dtype))], 1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        if known is None:
            return self.encoder_norm(self.encoder_blocks.run(x, None)), None, None
        counts = known.sum(1)
        most = int(counts.max()) if len(counts) else 0
        positions = torch.argsort(known.logical_not().to(torch.uint8), dim=1, stable=True)[:, :most]  # the known ones, ascending
        there = torch.arange(most, device=known.device) < counts.unsqueeze(1)
        rows = x[:, config.buffer :].gather(1, positions.unsqueeze(-1).expand(-1, -1, config.width))
        x = torch.cat([x[:, : config.buffer], rows], 1)
        mask = None
        if not bool(there.all()):
            mask = torch.cat([there.new_ones(there.shape[0], config.buffer), there], 1)[:, None, None]
        return self.encoder_norm(self.encoder_blocks.run(x, mask)), positions, there

    def features(self, tokens: Tensor, known: Tensor | None, labels: Tensor) -> Tensor:
        """z, the condition of the head at every position, (B, n, D); at known ones it means nothing. Arguments as `encode`."""
        config = self.config
        encoded, positions, there = self.encode(tokens, known, labels)
        inner = self.decoder_embed(encoded)
        if positions is not None and there is not None:
            rows = self.mask_token.to(inner.dtype).expand(inner.shape[0], self.n, -1)
            index = positions.unsqueeze(-1).expand(-1, -1, config.decoder_width)
            placed = torch.where(there.unsqueeze(-1), inner[:, config.buffer :], rows.gather(1, index))
            inner = torch.cat([inner[:, : config.buffer], rows.scatter(1, index, placed)], 1)
        x = self.decoder_norm(self.decoder_blocks.run(inner + self.decoder_pos_embed_learned, None))
        return x[:, config.buffer :] + self.diffusion_pos_embed_learned

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The head: at the last levels what it predicts is multiplied by thousands."""
        return (self.diffloss,)

    def head(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `DiffusionHead.forward`, in float32 whatever the autocast."""
        with full_precision(x.device):
            return self.diffloss.net(x.float(), index, features.float())
