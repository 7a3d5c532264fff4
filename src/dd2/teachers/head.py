"""Teachers that draw continuous tokens from a velocity head: the stage-1 model, itself an AR model (AR-diffusion)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.files import weights_digest
from dd2.scores import HeadScore
from dd2.seeding import image_noise, one_each
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.conditions import Conditions
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import Tokenizer

EULER_STEPS = 10
"""Of each token, as in the paper (App. B.3)."""


def token_noise(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """The noise of all tokens, (B, n, C) on the backbone's device; image i's from seeds[i] alone."""
    return image_noise(seeds, backbone.token_shape).to(backbone.device)


@torch.no_grad()
def draw_by_head(
    backbone: Backbone,
    head: nn.Module,
    cond: Tensor,
    noise: Tensor,
    *,
    euler_steps: int = EULER_STEPS,
    prefix: Tensor | None = None,
    first_step: int = 0,
) -> Tensor:
    """AR-diffusion: step by step along the AR order, each token by Euler steps from t = 1 to 0 through the head.

    Args:
        backbone: features of the next step, with a key/value cache.
        head: (x_t, t, features) -> velocity.
        cond: (B, ...) conditions.
        noise: (B, n, C) where each token starts.
        euler_steps: per token.
        prefix, first_step: as `Teacher.sample`.

    Returns:
        (B, n, C) standardised tokens.

    Raises:
        InputError: euler_steps below 1.
        ValueError: the prefix does not fit.
    """
    if euler_steps < 1:
        raise InputError(f"euler_steps must be at least 1, got {euler_steps}")
    tokens = backbone.order.checked_prefix(noise[:, :0] if prefix is None else prefix, first_step)
    levels = torch.linspace(1, 0, euler_steps + 1).tolist()
    cache = backbone.new_cache()
    for step in backbone.order.steps[first_step:]:
        given = HeadScore(head, backbone.next_features(cache, tokens, cond))
        x = noise[:, step]
        for level, following in itertools.pairwise(levels):
            x = x - (level - following) * given.velocity(x, x.new_full(x.shape[:-1], level))
        tokens = torch.cat([tokens, x], 1)
    return tokens


class HeadTeacher(Teacher):
    """An AR-diffusion model as teacher: continuous tokens, and its head is the conditional score.

    Its standardisation is the one that it was trained with. What it draws was decided when it was trained: guidance,
    temperature, top-k and top-p have no effect.

    Args:
        backbone: features of the AR order.
        head: (x_t (..., B, n, C), t (..., B, n), features (B, n, D)) -> velocity (..., B, n, C).
        tokenizer: tokens to images.
        conditions: what labels stand for.
        euler_steps: per token, when it is sampled.
    """

    stored_as = "latents"

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        tokenizer: Tokenizer,
        conditions: Conditions,
        euler_steps: int = EULER_STEPS,
    ) -> None:
        super().__init__(backbone, tokenizer, conditions)
        self.head, self.euler_steps = head, euler_steps

    def given(self, tokens: Tensor, cond: Tensor, sampling: Sampling, known: Tensor | None = None) -> HeadScore:
        return HeadScore(self.head, self.features(tokens, cond))

    def sample(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
    ) -> Tensor:
        one_each(cond, seeds)
        noise, euler_steps = token_noise(self.backbone, seeds), self.euler_steps
        return draw_by_head(self.backbone, self.head, cond, noise, euler_steps=euler_steps, prefix=prefix, first_step=first_step)

    def snap(self, tokens: Tensor) -> Tensor:
        return tokens

    def stored(self, tokens: Tensor) -> Tensor:
        """(B, n, C) float32 in the tokenizer's space."""
        return self.backbone.to_codes(tokens.float()).cpu()

    def restored(self, kept: Tensor) -> Tensor:
        return self.backbone.to_tokens(kept.to(self.device))

    def standardise(self, kept: Tensor) -> None:
        """Nothing: the head works in the standardisation that it was trained with."""

    def fingerprint(self) -> str:
        return f"{weights_digest(self.backbone, self.head)} {self.euler_steps} Euler steps"

    def check(self, sampling: Sampling) -> str:
        sampling.refuse_masked()
        neutral = Sampling(cfg_scale=sampling.cfg_scale if sampling.cfg_scale in (None, 1.0) else None)
        if sampling == neutral:
            return ""
        return "guidance, temperature, top-k and top-p have no effect: an AR-diffusion teacher draws as it was trained to"
