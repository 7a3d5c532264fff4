"""The teacher's deterministic map from noise to data: the flow-matching ODE of Eq. 1's velocity, token by token in AR order.

It is what DD1 regresses (arXiv 2412.17153, whose training code was never released; this follows its text), and what a DD2
generator can start from (`dd2.method.regress`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.scores import CodeMixture, Solver, follow_ode
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import token_noise
from dd2.training.samples import TeacherSamples, sample_seed
from dd2.training.store import taken


@dataclass(frozen=True)
class OdeConfig:
    """How noise is turned into data."""

    solver: Solver = "heun"
    """heun (two velocities a step) or euler."""
    steps: int = 50
    """Steps per token from noise to data."""

    def __post_init__(self) -> None:
        """Refuse fewer than one step."""
        if self.steps < 1:
            raise InputError(f"ode.steps must be at least 1, got {self.steps}")


class Pairs:
    """Noise with its data, made by the ODE once and kept on disk in the teacher's form: the noise is drawn again from its seed.

    Args:
        folder: where they are kept.
        teacher: standardised already, as that decides the scale of the noise.
        sampling: the distribution whose ODE is solved.
        ode: solver and steps.
        count: pairs.
        seed: the run's seed.
        batch: pairs made at a time.
        standardised_by: number of teacher samples that decided the standardisation.

    Raises:
        InputError: the folder holds other pairs.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        sampling: Sampling,
        ode: OdeConfig,
        count: int,
        seed: int,
        *,
        batch: int = 64,
        standardised_by: int = 0,
    ) -> None:
        self.teacher, self.seed = teacher, seed

        def draw(cond: Tensor, seeds: list[int]) -> Tensor:
            noise = token_noise(teacher.backbone, seeds)
            if not isinstance(teacher, CodeTeacher):
                return teacher.follow_ode(noise, cond, sampling, ode.steps, ode.solver)
            return teacher.codebook[data_of_noise(teacher, noise, cond, sampling, steps=ode.steps, solver=ode.solver)]

        how = {"ode": list(asdict(ode).values()), "standardise_samples": standardised_by}
        self.samples = TeacherSamples.prepare(folder, teacher, sampling, count, seed, batch, draw=draw, title="pairs", how=how)

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random pairs on the random stream's device: noise (size, n, C), its ids (size, n), or of a teacher without codes its
        tokens (size, n, C), and labels (size,).
        """
        rows = self.samples.random_rows(size, random)
        kept, labels = taken(self.samples.kept, rows).to(random.device), self.samples.labels[rows].to(random.device)
        data = kept.long() if isinstance(self.teacher, CodeTeacher) else self.teacher.restored(kept)
        return token_noise(self.teacher.backbone, [sample_seed(self.seed, int(row)) for row in rows]), data, labels


@torch.no_grad()
def data_of_noise(
    teacher: CodeTeacher, noise: Tensor, cond: Tensor, sampling: Sampling, *, steps: int = 50, solver: Solver = "heun"
) -> Tensor:
    """The sequence that the ODE makes of each noise: a deterministic map whose images of normal noise follow the teacher.

    Step by step along the AR order with the key/value cache, all positions of a step at once, each conditioned on the codes that
    the earlier steps ended at.

    Args:
        teacher: the frozen AR model.
        noise: (B, n, C) standard normal.
        cond: (B, ...) conditions.
        sampling: the distribution whose ODE is solved.
        steps: ODE steps per token, of equal length from t = 1 to 0.
        solver: Euler, or Heun's second-order steps (two velocities each; the last one is Euler's, as the velocity ends at t = 0).

    Returns:
        (B, n) ids.
    """
    codebook = teacher.codebook
    return teacher.walk(
        cond, sampling, lambda step, found: flow_to_codes(noise[:, step], found, codebook, steps=steps, solver=solver)
    )


@torch.no_grad()
def data_given(noise: Tensor, mixture: CodeMixture, ode: OdeConfig) -> Tensor:
    """Where each position's ODE ends given the tokens that its distribution was conditioned on, all positions at once.

    `data_of_noise` gives its only fixed point: a sequence that is its own result is the ODE's data of that noise, as its first
    step is right whatever the rest, its second given the first, and so on (Jacobi's iteration of a triangular system).

    Args:
        noise: (B, n, C) standard normal.
        mixture: the teacher's conditional score given some sequence.
        ode: solver and steps.

    Returns:
        (B, n) ids.
    """
    return flow_to_codes(noise, mixture.prior, mixture.codebook, steps=ode.steps, solver=ode.solver)


def flow_to_codes(noise: Tensor, prior: CodeDistribution, codebook: Tensor, *, steps: int, solver: Solver) -> Tensor:
    """The code at which each token's ODE ends.

    Args:
        noise: (*P, C) where it starts.
        prior: of each position P.
        codebook: (V, C) standardised codes.
        steps, solver: as `data_of_noise`.

    Returns:
        (*P) ids, each of a code that can be drawn.

    Raises:
        InputError: steps below 1, or another solver.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise InputError(f'the ODE needs at least 1 step and solver "euler" or "heun", got {steps} and {solver!r}')
    levels = torch.linspace(1, 0, steps + 1).tolist()
    return prior.nearest(follow_ode(CodeMixture(prior, codebook), noise, levels, solver), codebook)
