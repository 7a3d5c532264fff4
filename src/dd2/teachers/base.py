"""What a teacher is: the one interface behind which every AR model stands.

A `Backbone` reads tokens and gives features; a `Teacher` adds the classifier over the codebook, the tokenizer and
sampling. Students copy the backbone. Tokens are standardised everywhere outside a backbone: (code - mean) / std per
channel, so that the data lie on the scale of the noise; the backbone itself reads codes in the tokenizer's space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.order import Order
from dd2.seeding import image_uniforms
from dd2.teachers.filtering import Sampling, draw, filtered_log_p, guided
from dd2.tokenizers.base import Tokenizer

Inject = Callable[[int, Tensor], Tensor]
"""(index of a layer, the residual stream (B, L, D) before it) -> the stream that the layer reads."""


def call_layer(layer: nn.Module, *arguments: Any) -> Tensor:
    """A layer's output."""
    return layer(*arguments)


class Backbone(nn.Module, ABC):
    """A transformer over the AR order, without its classifier.

    Attributes:
        order: the AR order.
        width: D, the channels of the features.
        token_mean, token_std: (C,) buffers of the standardisation; 0 and 1 until `standardise` sets them.
        recompute: compute each layer again in the backward pass instead of keeping what is inside it (activation
            checkpointing).
        layer_call: how a layer is called where no cache is used; `dd2.training.layers.prepare_layers` sets a compiled one.
    """

    order: Order
    width: int
    token_mean: Tensor
    token_std: Tensor

    def __init__(self, order: Order, width: int, code_dim: int) -> None:
        super().__init__()
        self.order, self.width, self.recompute = order, width, False
        self.layer_call: Callable[..., Tensor] = call_layer
        self.register_buffer("token_mean", torch.zeros(code_dim))
        self.register_buffer("token_std", torch.ones(code_dim))

    @torch.no_grad()
    def standardise(self, codebook: Tensor, ids: Tensor | None = None) -> None:
        """Set mean and std per channel to those of teacher samples.

        Args:
            codebook: (V, C) codes in the tokenizer's space.
            ids: samples' code ids, of any shape and integer type; None weighs all codes alike.
        """
        codes = codebook.double()
        counts = torch.ones(len(codes)) if ids is None else ids.flatten().int().bincount(minlength=len(codes)).cpu()
        share = (counts.double() / counts.sum()).to(codes.device).unsqueeze(-1)
        mean = (share * codes).sum(0)
        self.token_mean.copy_(mean)
        self.token_std.copy_((share * (codes - mean).square()).sum(0).sqrt().clamp_min(1e-6))

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Standardised tokens (..., C) to the tokenizer's space."""
        return tokens * self.token_std + self.token_mean

    def to_tokens(self, codes: Tensor) -> Tensor:
        """Codes (..., C) in the tokenizer's space to standardised tokens."""
        return (codes - self.token_mean) / self.token_std

    @abstractmethod
    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features of all positions at once: (B, n, C), cond (B, ...) -> (B, n, D).

        Position i sees the condition and the tokens of earlier steps only.
        """

    @property
    def positions(self) -> int:
        """Positions that the layers read in a whole pass."""
        return self.order.n

    @property
    def transformer_layers(self) -> nn.ModuleList:
        """The transformer layers in order: the units that are sharded, compiled and recomputed."""
        lists = [child for child in self.children() if isinstance(child, nn.ModuleList)]
        return lists[0] if lists else nn.ModuleList()

    def run_layer(self, layer: nn.Module, x: Tensor, *arguments: Any, cache: Any, index: int) -> Tensor:
        """The output of layer number `index`, layer(x, *arguments, cache, index); every pass of a backbone runs its layers by
        this.
        """
        if cache is not None:  # a new length each step, and no gradient: neither compiled nor recomputed
            return layer(x, *arguments, cache, index)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer_call, layer, x, *arguments, None, index, use_reentrant=False)  # pyright: ignore
        return self.layer_call(layer, x, *arguments, None, index)

    @property
    def num_layers(self) -> int:
        """Layers that `own_features` runs."""
        if type(self).own_features is Backbone.own_features:
            raise InputError(f"{type(self).__name__} has no own_features, which DD1's student needs")
        return len(self.transformer_layers)

    def own_features(self, tokens: Tensor, cond: Tensor, inject: Inject) -> Tensor:
        """Features of the same layers when every position also reads its own token: DD1's student (arXiv 2412.17153).

        Args:
            tokens: (B, n, C), each embedded as it is, at its own position behind the condition; no sums over scales.
            cond: (B, ...) conditions.
            inject: adds to the stream before each of the `num_layers` layers.

        Returns:
            (B, n, D). Position i sees the condition, the tokens of earlier steps, and token i.
        """
        raise InputError(f"{type(self).__name__} has no own_features, which DD1's student needs")

    @abstractmethod
    def null_condition(self, cond: Tensor) -> Tensor:
        """The condition of the unconditional model, shaped like `cond`."""

    @property
    def continuous(self) -> bool:
        """Whether it reads tokens between the codes; one that does not must be adapted first (App. E.4, dd2 adapt)."""
        return True

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Labels that `conditions` knows: classes, or captions."""

    def use_captions(self, file: Path) -> None:
        """Let the captions of a file (dd2 text-features) be the labels of a text-conditional model.

        Raises:
            InputError: the model is not text-conditional, or the file does not fit it.
        """
        raise InputError(f"captions {file} were given, but this model is conditioned on classes")

    def captions_digest(self) -> str:
        """Hash of the captions in use; empty for class-conditional models."""
        return ""

    def conditions(self, labels: Tensor) -> Tensor:
        """Integer labels (N,) in 0 … num_labels - 1 to conditions (N, ...); for class-conditional models they are the same."""
        return labels

    def default_labels(self, indices: Tensor) -> Tensor:
        """Labels of images of the given indices (N,) when the user names none: balanced, in turn."""
        return indices % self.num_labels

    def default_conditions(self, count: int) -> Tensor:
        """Conditions of the first `count` images when the user names no labels, on the backbone's device."""
        return self.conditions(self.default_labels(torch.arange(count, device=self.token_mean.device)))

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty key/value cache for `next_features`."""

    @abstractmethod
    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features of the next step's positions, reading only what the cache has not seen.

        Args:
            cache: from `new_cache`, used with the same batch throughout; updated in place.
            tokens: (B, p, C) the tokens of all steps decided so far; p is 0 at the start.
            cond: (B, ...) conditions.

        Returns:
            (B, positions of the next step, D), equal to `forward` at those positions.
        """


class Teacher(nn.Module):
    """A pre-trained AR model with its tokenizer.

    Args:
        backbone: features of the AR order.
        output: classifier over the codebook, (..., D) -> (..., V).
        tokenizer: images to ids and back.
    """

    def __init__(self, backbone: Backbone, output: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.num_positions != backbone.order.n:
            raise InputError(
                f"the tokenizer gives {tokenizer.num_positions} tokens an image, the transformer has "
                f"{backbone.order.n} positions: they were not trained together; give the tokenizer of this teacher"
            )
        self.backbone, self.output, self.tokenizer = backbone, output, tokenizer

    @property
    def order(self) -> Order:
        """The AR order: n positions, S steps."""
        return self.backbone.order

    @property
    def codebook(self) -> Tensor:
        """(V, C) standardised codes, the codebook of Eq. 1."""
        return self.backbone.to_tokens(self.tokenizer.codebook)

    def null_condition(self, cond: Tensor) -> Tensor:
        """The unconditional model's condition, shaped like `cond`."""
        return self.backbone.null_condition(cond)

    def features(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C), (B, ...) -> (B, n, D); position i sees `cond` and the tokens of earlier steps only."""
        return self.backbone(tokens, cond)

    def logits(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C), (B, ...) -> (B, n, V) float32 logits of p(. | tokens of earlier steps, cond)."""
        return self.classify(self.features(tokens, cond))

    def classify(self, features: Tensor) -> Tensor:
        """Features (..., D) to logits (..., V), in float32 whatever the autocast: guidance multiplies their errors."""
        with full_precision(features.device):
            return self.output(features.float())

    def cfg_weights(self, sampling: Sampling) -> Tensor:
        """Guidance weight s of each step, (S,), in null + s (conditional - null); 1 is no guidance.

        What a cfg_scale means is the family's convention: families override this.
        """
        return torch.full((self.order.num_steps,), 1.0 if sampling.cfg_scale is None else sampling.cfg_scale)

    def log_p(self, tokens: Tensor, cond: Tensor, sampling: Sampling) -> Tensor:
        """(B, n, V) log of the sampling distribution after cfg, temperature, top-k, top-p; -inf where cut off."""
        weights = self._guidance(sampling)
        if weights is None:
            return filtered_log_p(self.logits(tokens, cond), sampling)
        both = self.logits(tokens.repeat(2, 1, 1), torch.cat([cond, self.null_condition(cond)]))
        logits, null_logits = both.chunk(2)
        by_position = weights.to(logits.device)[self.order.step_of].unsqueeze(-1)  # (n, 1)
        return filtered_log_p(guided(logits, null_logits, by_position), sampling)

    def _guidance(self, sampling: Sampling) -> Tensor | None:
        """Guidance weights (S,), or None where no step is guided."""
        weights = self.cfg_weights(sampling)
        return None if bool((weights == 1).all()) else weights

    def generate(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
    ) -> Tensor:
        """Sample sequences with the key/value cache, one seed per image.

        Args:
            cond: (B, ...) conditions.
            sampling: the sampling distribution.
            seeds: B seeds. A position's draw depends on its image's seed alone, so the same prefix and seed give
                the same continuation wherever generation starts (up to rounding in the logits).
            prefix, first_step: as `walk`.

        Returns:
            (B, n - p) ids of the sampled positions.

        Raises:
            ValueError: the seeds or the prefix do not fit.
        """
        if len(seeds) != len(cond):
            raise ValueError(f"generate needs one seed per condition: {len(cond)} conditions, {len(seeds)} seeds")
        uniforms = image_uniforms(seeds, (self.order.n,)).to(self.codebook.device)
        return self.walk(cond, sampling, lambda step, log_p: draw(log_p, uniforms[:, step]), prefix, first_step)

    @torch.no_grad()
    def walk(
        self,
        cond: Tensor,
        sampling: Sampling,
        choose: Callable[[slice, Tensor], Tensor],
        prefix: Tensor | None = None,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> Tensor:
        """Go through the AR steps with the key/value cache, choosing each step's codes from their distribution.

        Args:
            cond: (B, ...) conditions.
            sampling: the sampling distribution.
            choose: (positions of the step, log p (B, positions, V)) -> ids (B, positions).
            prefix: (B, p, C) standardised tokens of the steps before `first_step`.
            first_step, last_step: steps to choose; `last_step` itself is not, None means to the end.

        Returns:
            (B, m) ids of the chosen positions.

        Raises:
            ValueError: the prefix does not fit.
        """
        steps = self.order.steps
        start = steps[first_step].start if first_step < len(steps) else self.order.n
        codebook = self.codebook
        tokens = codebook.new_zeros(len(cond), 0, codebook.shape[-1]) if prefix is None else prefix
        if tokens.shape[1] != start:
            raise ValueError(f"first_step {first_step} needs a prefix of {start} tokens, got {tokens.shape[1]}")
        weights = self._guidance(sampling)
        both = cond if weights is None else torch.cat([cond, self.null_condition(cond)])
        cache = self.backbone.new_cache()
        ids = [torch.zeros(len(cond), 0, dtype=torch.long, device=cond.device)]
        for index, step in list(enumerate(steps))[first_step:last_step]:
            seen = tokens if weights is None else tokens.repeat(2, 1, 1)
            logits = self.classify(self.backbone.next_features(cache, seen, both))
            if weights is not None:
                logits = guided(*logits.chunk(2), float(weights[index]))
            ids.append(choose(step, filtered_log_p(logits, sampling)))
            tokens = torch.cat([tokens, codebook[ids[-1]]], 1)
        return torch.cat(ids, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Standardised continuous tokens (B, n, C) to images (B, channels, H, W) in about [-1, 1]."""
        return self.tokenizer.decode_codes(self.backbone.to_codes(tokens))
