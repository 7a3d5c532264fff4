"""MAR as a teacher: continuous tokens, known in any order, each drawn by a diffusion head."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dd2.device import full_precision
from dd2.errors import InputError
from dd2.files import weights_digest
from dd2.scores import Solver, follow_ode
from dd2.seeding import one_each, stream
from dd2.teachers.base import Teacher
from dd2.teachers.conditions import ClassLabels
from dd2.teachers.diffusion_score import COSINE, DiffusionScore
from dd2.teachers.filtering import Sampling, guided
from dd2.teachers.mar_network import MAR, MARConfig
from dd2.teachers.masked import FillStep, MaskedBackbone, fill_steps, known_before, masked_after
from dd2.tokenizers.kl import KLTokenizer

ODE_LEVEL = 985
"""Highest level that the ODE starts from, t = 0.98: at the last ones long steps multiply an error of the head by thousands."""

Noise = Callable[[int, int, Tensor], Tensor]
"""(AR step, draw within it from 0, positions (B, n) that are drawn) -> standard normal (positions, C), batch by batch."""


class MARBackbone(MaskedBackbone):
    """The network as students copy it, head and all."""

    def __init__(self, config: MARConfig, steps: int) -> None:
        super().__init__(config.rows * config.columns, steps, config.decoder_width, config.code_dim)
        self.config, self.mar = config, MAR(config)

    def features_given(self, tokens: Tensor, known: Tensor | None, cond: Tensor) -> Tensor:
        return self.mar.features(tokens, known, cond)

    def head(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.mar.head(x, index, features)

    def forget_head(self) -> None:
        self.mar.diffloss.net.init_weights()

    def condition_features(self, features: Tensor, cond: Tensor) -> Tensor:
        """The class's embedding, as wide as the decoder."""
        return self.mar.decoder_embed(self.mar.class_embeddings(cond))

    def null_condition(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, self.config.num_classes)


class MARTeacher(Teacher):
    """An AR model over continuous tokens in any order.

    Args:
        config: sizes.
        tokenizer: tokens to images.
        steps: AR steps unless the sampling says otherwise.
    """

    stored_as = "latents"
    backbone: MARBackbone  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: MARConfig, tokenizer: KLTokenizer, steps: int = 64) -> None:
        if tokenizer.config.z_channels != config.code_dim:
            raise InputError(
                f"the tokenizer's tokens have {tokenizer.config.z_channels} channels, the transformer reads {config.code_dim}: "
                "they were not trained together; give the tokenizer of this teacher"
            )
        positions = config.rows * config.columns
        super().__init__(MARBackbone(config, min(steps, positions)), tokenizer, ClassLabels(config.num_classes))

    @property
    def mar(self) -> MAR:
        """The network."""
        return self.backbone.mar

    def null_condition(self, cond: Tensor) -> Tensor:
        """Labels (B,) of no class."""
        return self.backbone.null_condition(cond)

    def given(self, tokens: Tensor, cond: Tensor, sampling: Sampling, known: Tensor | None = None) -> DiffusionScore:
        """The conditional score of the positions that are not known.

        Args:
            tokens: (B, n, C) clean tokens.
            cond: (B,) labels.
            sampling: guidance.
            known: (B, n) which of them are known; at least one position must not be.

        Raises:
            ValueError: it is not told, or all are.
        """
        if known is None or bool(known.all()):
            raise ValueError("a masked teacher needs to be told which tokens are known (known_sets), and not all may be")
        factor, after = self._guidance(sampling), self._known_after(sampling)
        scale = torch.tensor([factor(after(count) / self.order.n) for count in known.sum(1).tolist()], device=tokens.device)
        features, null = self.features_given(tokens, known, cond, sampling)
        return DiffusionScore(self.backbone, features, known, null, scale.unsqueeze(1))

    def features_given(self, tokens: Tensor, known: Tensor, cond: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
        """Features (B, n, D) as `MaskedBackbone.features_given`, and those without the condition where there is guidance."""
        features = self.backbone.features_given(tokens, known, cond)
        return features, None if _unguided(sampling) else self.backbone.features_given(tokens, known, self.null_condition(cond))

    def known_sets(self, batch: int, sampling: Sampling, random: torch.Generator) -> Tensor:
        """What the sampler has drawn before one of its steps, each as likely, in a random order: so the steps that it takes
        decide how large the sets are, which are never whole.
        """
        before = torch.tensor(known_before(self.order.n, self._steps(sampling)), device=random.device)
        sizes = before[torch.randint(len(before), (batch, 1), generator=random, device=random.device)]
        return torch.rand(batch, self.order.n, generator=random, device=random.device).argsort(1) < sizes

    def num_steps(self, sampling: Sampling) -> int:
        return self._steps(sampling)

    def in_steps(self, sampling: Sampling, steps: int) -> Sampling:
        return replace(sampling, ar_steps=steps)

    def redrawn(
        self, tokens: Tensor, read: Tensor, cond: Tensor, sampling: Sampling, seeds: Sequence[int], first_step: int
    ) -> Tensor:
        """The last groups of each image's order are drawn again."""
        return self.sample(cond, sampling, seeds, prefix=tokens, first_step=first_step)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
    ) -> Tensor:
        """Whole images, one seed each, whose order and noise depend on it alone.

        Args:
            cond: (B,) labels.
            sampling: steps, guidance, temperature.
            seeds: B seeds.
            prefix: (B, n, C) tokens, of which those that the first steps would have drawn are kept.
            first_step: the step to begin with.

        Returns:
            (B, n, C) tokens.
        """
        one_each(cond, seeds)
        n, channels = self.backbone.token_shape
        orders = torch.stack([torch.randperm(n, generator=stream("image", "order", int(seed))) for seed in seeds])
        steps = fill_steps(orders.to(self.device), self._steps(sampling), self._guidance(sampling))
        tokens = torch.zeros(len(seeds), n, channels, device=self.device) if prefix is None else prefix.clone()
        return fill(self, tokens, cond, steps[first_step:], sampling, _noise_of(seeds, channels), first_step)

    @torch.no_grad()
    def follow_ode(self, noise: Tensor, cond: Tensor, sampling: Sampling, steps: int, solver: Solver) -> Tensor:
        """As `Teacher.follow_ode`, along one order for all images: with another for each, noise alone would not decide them. It
        starts at `ODE_LEVEL` at most.
        """
        self.check_ode(steps)
        n = self.order.n
        order = torch.randperm(n, generator=stream("order of the ODE")).to(noise.device)
        levels = [*COSINE.respaced(steps, self._ode_level).rect_flow_levels.flip(0).tolist(), 0.0]
        tokens = torch.zeros_like(noise)
        for step in fill_steps(order.expand(len(noise), -1), self._steps(sampling), self._guidance(sampling)):
            rows = step.drawn
            features, null = self.features_given(tokens, step.known, cond, sampling)
            null = None if null is None else null[rows]
            factor = noise.new_full((int(rows.sum()),), step.guidance)
            known = torch.zeros_like(factor, dtype=torch.bool)
            score = DiffusionScore(self.backbone, features[rows], known, null, factor)
            tokens = tokens.clone()
            tokens[rows] = follow_ode(score, noise[rows], levels, solver).to(tokens.dtype)
        return tokens

    def check_ode(self, steps: int) -> None:
        if not 2 <= steps <= self._ode_level + 1:
            raise InputError(f"regress.ode.steps must be in 2 to {self._ode_level + 1} for a masked teacher, got {steps}")

    @property
    def _ode_level(self) -> int:
        return min(self.mar.config.start, ODE_LEVEL)

    def snap(self, tokens: Tensor) -> Tensor:
        return tokens

    def stored(self, tokens: Tensor) -> Tensor:
        """(B, n, C) float32."""
        return tokens.float().cpu()

    def restored(self, kept: Tensor) -> Tensor:
        return kept.to(self.device)

    def standardise(self, kept: Tensor) -> None:
        """Nothing: the tokenizer's scale has done it."""

    def fingerprint(self) -> str:
        return f"{weights_digest(self.mar)} from level {self.mar.config.start}"

    def check(self, sampling: Sampling) -> str:
        masked_after(self.order.n, self._steps(sampling))
        COSINE.respaced(sampling.diffusion_steps, self.mar.config.start)
        unused = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("cfg_interval", -1)) if getattr(sampling, name) != off]
        return f"{', '.join(unused)} have no effect: a MAR teacher draws no codes" if unused else ""

    def _steps(self, sampling: Sampling) -> int:
        return sampling.ar_steps or self.order.num_steps

    def _known_after(self, sampling: Sampling) -> Callable[[int], int]:
        """How many tokens the sampler counts as known after the step that begins with so many, which decides its guidance."""
        n = self.order.n
        after = [n - left for left in masked_after(n, self._steps(sampling))]
        return lambda known: next((count for count in after if count > known), after[-1])

    def _guidance(self, sampling: Sampling) -> Callable[[float], float]:
        scale = 1.0 if sampling.cfg_scale is None else sampling.cfg_scale
        if _unguided(sampling):
            return lambda share: 1.0
        return (lambda share: scale) if sampling.cfg_schedule == "constant" else (lambda share: 1 + (scale - 1) * share)


def _unguided(sampling: Sampling) -> bool:
    return sampling.cfg_scale in (None, 1.0)


def _noise_of(seeds: Sequence[int], channels: int) -> Noise:
    """Noise of each image's own, whatever the batch that it is drawn in."""

    def noise(step: int, draw: int, drawn: Tensor) -> Tensor:
        parts = [
            torch.randn(count, channels, generator=stream("image", "mar", int(seed), step, draw))
            for seed, count in zip(seeds, drawn.sum(1).tolist(), strict=True)
        ]
        return torch.cat(parts).to(drawn.device)

    return noise


@torch.no_grad()
def fill(
    teacher: MARTeacher,
    tokens: Tensor,
    labels: Tensor,
    steps: Sequence[FillStep],
    sampling: Sampling,
    noise: Noise,
    first_step: int = 0,
) -> Tensor:
    """Draw the tokens of each step, given those known before it, as the official sampler does.

    Args:
        teacher: whose network.
        tokens: (B, n, C) what is known so far.
        labels: (B,) classes.
        steps: see `fill_steps`.
        sampling: diffusion steps, temperature; guidance is in the steps.
        noise: where randomness comes from.
        first_step: number of the first of `steps`.

    Returns:
        (B, n, C) all tokens.
    """
    chain = COSINE.respaced(sampling.diffusion_steps, teacher.mar.config.start).to(tokens.device)
    indices = chain.indices.tolist()
    for number, step in enumerate(steps, first_step):
        features, null = teacher.features_given(tokens, step.known, labels, sampling)
        features, null = features[step.drawn], None if null is None else null[step.drawn]
        x = noise(number, 0, step.drawn)
        for draw, k in enumerate(reversed(range(len(indices))), 1):
            level = torch.full((len(x),), k, device=x.device)
            index = torch.full_like(level, indices[k])
            eps, fraction = teacher.mar.head(x, index, features)
            if null is not None:
                eps = guided(eps, teacher.mar.head(x, index, null)[0], step.guidance)
            with full_precision(x.device):
                x = chain.step_back(x, level, eps, fraction, sampling.temperature * noise(number, draw, step.drawn))
        tokens = tokens.clone()
        tokens[step.drawn] = x.to(tokens.dtype)
    return tokens
