"""Stage 2: conditional score distillation (Alg. 1). The guidance network learns the generator's own conditional
velocity (Eq. 5); the generator is moved until teacher and guidance agree at every position (Eq. 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dd2.code_student import CodeGuidance
from dd2.losses import Losses, csd_loss, fcs_loss
from dd2.method.config import CSDConfig
from dd2.method.match import SequenceMatch, self_normalised
from dd2.method.regress import code_loss, code_mixture
from dd2.student import ArDiffusion, Drawn, OneStepNetwork
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.training.timing import Timed, part
from dd2.trajectory import OdeConfig, data_given

Guidance = ArDiffusion | CodeGuidance
"""A guidance network of either kind."""


def guidance_loss(
    guidance: Guidance, q: Tensor, teacher: Teacher, cond: Tensor, config: CSDConfig, random: torch.Generator
) -> Losses:
    """The guidance network learns the generator's own conditional score: by the Fake Conditional Score loss (Eq. 5) with
    `config.guidance_draws` noise draws a sequence (App. C.2), or over codes by the likelihood of its sequences.

    Args:
        guidance: what is trained.
        q: (B, n, C) tokens of the generator, without gradient.
        teacher: whose nearest codes the condition q_<i is snapped to under `config.snap_guidance`, or over codes in any case.
        cond: (B, ...) conditions.
        config: draws, noise levels, snapping.
        random: random stream of this step.
    """
    if isinstance(guidance, CodeGuidance):
        with torch.no_grad():
            ids = require_codes(teacher, "a guidance network over codes").ids(q)
            codes = teacher.restored(ids)
        with part("guidance"):
            return guidance.nll(codes, ids, cond), {}
    with torch.no_grad():
        condition = teacher.snap(q) if config.snap_guidance else q
    known = teacher.known_sets(len(q), config.sampling, random)
    t, eps = _noise(q, config.guidance_draws, config, random)
    with part("guidance"):
        found = guidance.given(condition, cond, known)
        return fcs_loss(found, q, found.levels(t), eps), {}


class SharedBatches:
    """The generator's batches of one iteration, drawn at its first guidance update and read again by the others.

    Args:
        micro_batches: of one update, on this process; 0 shares nothing.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches, self._calls = micro_batches, 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def next(self, draw: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The tokens and conditions of the next micro-batch."""
        if not self.micro_batches:
            return draw()
        if len(self._kept) < self.micro_batches:
            self._kept.append(draw())
        self._calls += 1
        return self._kept[(self._calls - 1) % self.micro_batches]

    def clear(self) -> None:
        """The iteration is over."""
        self._kept.clear()
        self._calls = 0


def generator_loss(
    generator: OneStepNetwork,
    guidance: Guidance,
    teacher: Teacher,
    cond: Tensor,
    config: CSDConfig,
    random: torch.Generator,
    *,
    match: SequenceMatch | None = None,
    ode: OdeConfig | None = None,
) -> Losses:
    """Conditional Score Distillation loss (Eq. 4) and what the configuration adds; its gradient reaches the generator alone.

    Args:
        generator: what is trained.
        guidance, teacher: the two conditional scores; neither backbone is differentiated.
        cond: (B, ...) conditions.
        config: the distance, the teacher's distribution, draws that share the passes of all three backbones, noise levels,
            and whose condition q_<i is snapped to the nearest codes.
        random: random stream of this step.
        match: the distance between whole sequences under `config.match.weight`.
        ode: the teacher's ODE, regressed on the generator's own tokens under `config.regression_weight`.

    Returns:
        The loss, the score difference (see `csd_loss`); where they are there the regression's loss and the distance, and where a
        condition is snapped and tokens are no codes, their root-mean-square distance to the nearest ones.
    """
    noise, drawn = _drawn(generator, cond, random)
    q = drawn.tokens.float()
    snap_guidance = config.snap_guidance or isinstance(guidance, CodeGuidance)
    known = teacher.known_sets(len(q), config.sampling, random)
    with torch.no_grad():
        detached = q.detach()
        snapped = teacher.snap(detached) if config.snap_teacher or snap_guidance else detached
        with part("teacher"):
            wanted = teacher.given(snapped if config.snap_teacher else detached, cond, config.sampling, known)
        with part("guidance"):
            found = guidance.given(snapped if snap_guidance else detached, cond, known)
    t, eps = _noise(q, config.generator_draws, config, random)
    loss, difference = csd_loss(
        q.expand(eps.shape),
        found.levels(wanted.levels(t)),
        eps,
        Timed(wanted, "eq1"),
        Timed(found, "guidance"),
        d=config.d,
        alpha=config.alpha,
        weight_floor=config.weight_floor,
    )
    numbers = {"score_difference": difference}
    if ode is not None:
        with part("eq1"):
            ids = data_given(noise, code_mixture(wanted), ode)
        regression, shares = code_loss(drawn, require_codes(teacher, "csd.regression_weight"), ids)
        loss = loss + config.regression_weight * regression
        numbers |= {"regression": regression.detach(), **shares}
    if match is not None:
        with part("match"):
            distance = match(q, cond)
        loss = loss + config.match.weight * self_normalised(distance)
        numbers["match"] = distance.detach()
    if snapped is not detached and drawn.logits is None:  # a teacher without codes gives the tokens back
        numbers["to_nearest_code"] = (detached - snapped).square().mean().sqrt()
    return loss, numbers


def match_loss(generator: OneStepNetwork, cond: Tensor, random: torch.Generator, match: SequenceMatch) -> Losses:
    """The distance between whole sequences alone. Arguments as `generator_loss`."""
    _, drawn = _drawn(generator, cond, random)
    with part("match"):
        distance = match(drawn.tokens.float(), cond)
    return self_normalised(distance), {"match": distance.detach()}


def generated(generator: OneStepNetwork, cond: Tensor, random: torch.Generator) -> Tensor:
    """G(eps) of fresh noise under cond (B, ...), (B, n, C) float32."""
    return _drawn(generator, cond, random)[1].tokens.float()


def _drawn(generator: OneStepNetwork, cond: Tensor, random: torch.Generator) -> tuple[Tensor, Drawn]:
    """Fresh noise (B, n, C) and what the generator makes of it."""
    noise = torch.randn((len(cond), *generator.backbone.token_shape), generator=random, device=cond.device)
    with part("generator"):
        return noise, generator.draw(noise, cond)


def _noise(q: Tensor, draws: int, config: CSDConfig, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels (draws, B, n), one per token, and noise (draws, B, n, C)."""
    t = config.noise_level.draw((draws, *q.shape[:-1]), random)
    return t, torch.randn((draws, *q.shape), generator=random, device=q.device)
