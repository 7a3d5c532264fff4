"""VAR's transformer: the next-scale teacher. It reads continuous features as it is, so it needs no adaptation."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.order import Attend
from dd2.precision import Linear
from dd2.teachers.base import Backbone
from dd2.teachers.cache import KVCache
from dd2.teachers.captions import CaptionEmbedding, seen_words
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import conditions_of
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import BeforeLayer, LayerStack, add_first, append_identities
from dd2.teachers.next_scale import NextScaleOrder, order_of
from dd2.teachers.own_token import masked_attention, own_token_mask
from dd2.teachers.var_blocks import Block, HeadNorm, VARConfig
from dd2.tokenizers.base import CodeTokenizer
from dd2.tokenizers.multiscale import MultiScaleTokenizer


class VARBackbone(Backbone):
    """VAR's blocks, its class-conditional last norm included; module names follow the official checkpoints.

    With captions, which VAR's own models do not know, a condition is (B, P, caption_dim + 1) as LlamaGen's (`caption_condition`).
    Its words stand before the first scale, where all read them, and their mean takes the place of the class embedding.

    Args:
        config: sizes.
        order: scales and φ, from the tokenizer.
        code_dim: C, channels of a code.
    """

    def __init__(self, config: VARConfig, order: NextScaleOrder, code_dim: int) -> None:
        super().__init__(order, config.width, code_dim)
        self.config = config
        width, first = config.width, order.steps[0].stop
        self.pos_start = nn.Parameter(torch.empty(1, first, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, order.n, width))
        self.word_embed = nn.Linear(code_dim, width)
        if config.caption_dim:
            self.class_emb = CaptionEmbedding(config.caption_length, config.caption_dim, width)
            self.caption_position = nn.Parameter(torch.empty(1, config.caption_length, width))
        else:
            self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(order.num_steps, width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        last = max(config.depth - 1, 1)
        self.blocks = LayerStack(Block(config, config.drop_path * index / last) for index in range(config.depth))
        self.head_nm = HeadNorm(width)
        self._init_weights()

    def null_condition(self, cond: Tensor) -> Tensor:
        if isinstance(self.class_emb, CaptionEmbedding):
            return self.class_emb.null_condition(cond)
        return torch.full_like(cond, self.config.num_classes)

    @property
    def positions(self) -> int:
        return self.config.condition_positions + self.order.n

    @property
    def stack(self) -> LayerStack:
        """The transformer blocks."""
        return self.blocks

    def deepen(self, extra: int) -> None:
        append_identities(self.stack, extra)
        self.config = replace(self.config, depth=len(self.stack))

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        return self._run(tokens, cond, None)

    def own_features(self, tokens: Tensor, cond: Tensor, before: BeforeLayer) -> Tensor:
        """As `ReadsOwnToken.own_features`."""
        # The condition has the places of the teacher's first scale, and so their embeddings; every token has its own.
        given = self._given(cond)
        own = self._placed(self.word_embed(self.to_codes(tokens.float())), slice(0, self.order.n))
        before_tokens = given.before.shape[1]
        mask = own_token_mask(self.order, before_tokens)
        attend = masked_attention(mask if given.words is None else seen_words(mask, given.words))
        x = torch.cat([given.before, own], 1)
        return self._layers(x, given.embedding, attend, None, before)[:, before_tokens:]

    def told_features(self, tokens: Tensor, cond: Tensor, told: Tensor) -> Tensor:
        """As `IsTold.told_features`."""
        return self._run(tokens, cond, None, add_first(told, self.config.condition_positions))

    def new_cache(self) -> KVCache:
        return KVCache(self.positions)

    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> Tensor:
        step = next(step for step in self.order.steps if step.start == tokens.shape[1])
        return self._run(tokens, cond, cache)[:, step.start - step.stop :]

    def _run(self, tokens: Tensor, cond: Tensor, cache: KVCache | None, before: BeforeLayer | None = None) -> Tensor:
        """Features of the tokens' positions, less those that the cache has read."""
        given, first = self._given(cond), self.order.steps[0].stop
        read = max((cache.length if cache else 0) - self.config.condition_positions, 0)
        with full_precision(tokens.device):  # sums over many scales
            inputs = self.order.inputs(self.to_codes(tokens.float()))
        start = max(read, first)
        x = self._placed(self.word_embed(inputs[:, start - first :]), slice(start, first + inputs.shape[1]))
        held = x.shape[1] if read else x.shape[1] + first
        x = x if read else torch.cat([given.before, x], 1)
        attend = self.order.attend if given.words is None else self._attend_caption(given.words, read, read + held)
        return self._layers(x, given.embedding, attend, cache, before)[:, -held:]

    def _given(self, cond: Tensor) -> "_Given":
        first = self.order.steps[0]
        if not isinstance(self.class_emb, CaptionEmbedding):
            embedding = self.class_emb(cond)
            return _Given(embedding, self._placed(embedding.unsqueeze(1) + self.pos_start, first), None)
        features, words = self.class_emb(cond).float(), self.class_emb.words(cond)
        words = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if words is None else words
        share = (words / words.sum(1, keepdim=True).clamp_min(1)).unsqueeze(-1)
        embedding = (features * share).sum(1)
        before = [features + self.caption_position, self._placed(embedding.unsqueeze(1) + self.pos_start, first)]
        return _Given(embedding, torch.cat(before, 1), words)

    def _attend_caption(self, words: Tensor, read: int, stop: int) -> Attend:
        """Attention of token positions read … stop - 1, and of the caption's own where read is 0."""
        level = self.order.step_of[:stop]
        seen = torch.cat([level.new_full((words.shape[1],), -1), level])
        queries = seen if read == 0 else level[read:]
        mask = (queries[:, None] >= seen).unsqueeze(0)
        return masked_attention(seen_words(mask, words))

    def _placed(self, x: Tensor, positions: slice) -> Tensor:
        """With the embeddings of scale and position; the residual stream stays float32 under autocast."""
        return x.float() + self.lvl_embed(self.order.step_of[positions]) + self.pos_1LC[:, positions]

    def _layers(
        self, x: Tensor, class_embedding: Tensor, attend: Attend, cache: KVCache | None, before: BeforeLayer | None = None
    ) -> Tensor:
        shared = self.config.shared_aln
        modulation = self.shared_ada_lin(class_embedding).view(-1, 1, 6, self.width) if shared else class_embedding
        return self.head_nm(self.blocks.run(x, modulation, attend, cache=cache, before=before), class_embedding)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """VAR's own: small adaLN gates, so that every block starts close to the identity."""
        std = math.sqrt(1 / self.width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        captions = [self.caption_position] if self.config.caption_dim else []
        for position in (self.pos_start, self.pos_1LC, *captions):
            nn.init.trunc_normal_(position, std=std)
        for name, module in self.named_modules():
            if name.endswith(("attn.proj", "ffn.fc2")) and isinstance(module, nn.Linear):
                module.weight.div_(math.sqrt(2 * self.config.depth))
            if name.endswith("ada_lin.1") and isinstance(module, nn.Linear):
                module.weight.mul_(0.5)
                if not name.startswith("head_nm"):
                    module.weight[: 2 * self.width].mul_(2e-5)
        for block in self.blocks:
            if isinstance(block, Block) and hasattr(block, "ada_gss"):
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(1e-5)


@dataclass(frozen=True)
class _Given:
    """What the condition is to the layers.

    Attributes:
        embedding: (B, D) that scales, shifts and gates.
        before: (B, p, D) what stands before the second scale: the first one's positions, behind those of a caption.
        words: (B, P) bool of a caption; None of a class.
    """

    embedding: Tensor
    before: Tensor
    words: Tensor | None


class VARTeacher(CodeTeacher):
    """VAR, whose guidance grows with the scale; `cfg_scale` is VAR's own number: 0 is no guidance, 1.5 its usual one."""

    def cfg_weights(self, sampling: Sampling) -> Tensor:
        if sampling.cfg_interval >= 0:
            raise InputError("sampling.cfg_interval belongs to LlamaGen's sampler; VAR's guidance grows with the scale instead")
        ratio = torch.arange(self.order.num_steps) / max(self.order.num_steps - 1, 1)
        return 1 + (sampling.cfg_scale or 0.0) * ratio


def var_teacher(config: VARConfig, tokenizer: CodeTokenizer) -> VARTeacher:
    """A VAR teacher with fresh weights, ready to be trained or loaded.

    Raises:
        InputError: the tokenizer is not a multi-scale one.
    """
    if not isinstance(tokenizer, MultiScaleTokenizer):
        raise InputError(f"a VAR teacher needs a multi-scale tokenizer, got {type(tokenizer).__name__}")
    codes, channels = tokenizer.codebook.shape
    backbone = VARBackbone(config, order_of(tokenizer), channels)
    output = Linear(config.width, codes)
    nn.init.trunc_normal_(output.weight, std=0.02 * math.sqrt(1 / config.width / 3))
    nn.init.zeros_(output.bias)
    return VARTeacher(backbone, output, tokenizer, conditions_of(config))
