"""Hyper-parameters of the stages (App. E). The defaults are the paper's for LlamaGen-L (Tables 10, 11)."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from dd2.errors import InputError
from dd2.losses import Distance
from dd2.masked_student import MaskedStudentConfig
from dd2.teachers.filtering import Sampling
from dd2.training.schedule import NoiseLevelConfig, OptimConfig
from dd2.trajectory import OdeConfig


@dataclass(frozen=True)
class AdaptConfig:
    """Stage 0, for teachers with an embedding table (official LlamaGen files); others skip it."""

    hidden: int = 0
    """Hidden channels of the continuous input layer; 0 means as many as the transformer's width."""
    fit_iterations: int = 10_000
    """Part (a): iterations that fit the new layer to the embedding table."""
    fit_batch: int = 4096
    """Codes per iteration of part (a)."""
    fit: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, decay="cosine"))
    """Optimiser of part (a)."""
    data: str = "teacher"
    """Sequences of part (b). "teacher": its own samples, with its distribution as the target. "digits", or a folder or zip of
    CLASS/IMAGE files, for a teacher of texts of pictures with captions: code ids of real images (the paper)."""
    sequences: int = 50_000
    """Sequences of part (b)."""
    iterations: int = 20_000
    """Part (b): iterations that train the whole model."""
    batch: int = 32
    """Sequences per micro-batch of part (b)."""
    accumulate: int = 8
    """Micro-batches per optimiser step of part (b)."""
    class_dropout: float = 0.1
    """Share of sequences under the null condition, so that classifier-free guidance stays what it was."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, decay="cosine"))
    """Optimiser of part (b)."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        _counts("adapt", self, ("fit_batch", "sequences", "batch", "accumulate"), ("hidden", "fit_iterations", "iterations"))
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"adapt.class_dropout must be in [0, 1), got {self.class_dropout}")


@dataclass(frozen=True)
class NetworksConfig:
    """What the trained networks are: the paper's, or beyond it the teacher's own classifier (dd2.code_student)."""

    generator: Literal["velocity", "codes"] = "velocity"
    """velocity: the paper's head (a copy of a masked teacher's own, MAR), continuous tokens. codes: the teacher's classifier
    decides a code at every position, and the gradient passes straight through."""
    guidance: Literal["velocity", "codes"] = "velocity"
    """velocity: the paper's head. codes: next-token probabilities of the generator's sequences, whose score is Eq. 1's. Where
    both are codes there is no stage 1."""
    level: int = MaskedStudentConfig.level
    """Of a masked teacher (MAR): the noise level, 0 to 999, at which the generator's copy of its head reads noise. Errors are
    multiplied by t / (1 - t), 9 at 928."""
    extra_layers: int = 0
    """Layers of the generator beyond the teacher's, identities to begin with. Needs generator codes."""
    rounds: int = 1
    """How often the generator's one pass goes over the tokens: each round after the first reads the codes that the round before
    decided, as the teacher would, and decides again. A pass costs as many times the operations; later rounds share their layers.
    Needs generator codes, and the regression, by which earlier rounds learn."""

    def __post_init__(self) -> None:
        """Refuse kinds that there are not."""
        for name in ("generator", "guidance"):
            if getattr(self, name) not in ("velocity", "codes"):
                raise InputError(f'networks.{name} must be "velocity" or "codes", got {getattr(self, name)!r}')
        _counts("networks", self, ("rounds",), ("extra_layers",))
        MaskedStudentConfig(self.level)  # refuses what is no level
        if self.extra_layers and self.generator != "codes":
            raise InputError("networks.extra_layers needs networks.generator codes")
        if self.rounds > 1 and self.generator != "codes":
            raise InputError("networks.rounds needs networks.generator codes")

    @property
    def need_stage1(self) -> bool:
        """Whether a network starts from stage 1's."""
        return "velocity" in (self.generator, self.guidance)


@dataclass(frozen=True)
class TuneConfig:
    """Stage 1, AR-diffusion tuning. Defaults: LlamaGen-L of Table 10."""

    head_iterations: int = 0
    """Iterations that train the head alone, first (VAR: 300k)."""
    iterations: int = 100_000
    """Iterations that train everything."""
    batch: int = 64
    """Sequences per micro-batch."""
    accumulate: int = 8
    """Micro-batches per optimiser step, shared out over the processes."""
    draws: int = 4
    """Noise draws m per sequence that share one backbone pass."""
    loss: Literal["gts", "diffusion"] = "gts"
    """gts: the teacher's closed-form velocity (Eq. 6). diffusion: the Monte-Carlo target (Table 7)."""
    sampling: Sampling = field(default_factory=lambda: Sampling(cfg_scale=2.0, top_k=8000))
    """The teacher's distribution, for the samples and for the target."""
    noise_level: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """Distribution of t."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    """Optimiser."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        _counts("tune", self, ("batch", "accumulate", "draws"), ("head_iterations", "iterations"))


@dataclass(frozen=True)
class RegressConfig:
    """Before stage 2, beyond the paper: the generator regresses the teacher's ODE, by squared error with a velocity head, by
    cross-entropy where it decides codes. Off by default.
    """

    iterations: int = 0
    """Iterations; 0 lets the generator start stage 2 as stage 1 left it (the paper)."""
    guidance_iterations: int = 0
    """Guidance updates on the frozen generator afterwards, so that stage 2 starts with its score."""
    pairs: int = 400_000
    """Pairs of noise and data, kept on disk."""
    own_share: float = 0.0
    """Share of every batch without a pair: its target at a position is where the ODE ends given the generator's own earlier
    tokens, one pass of the teacher instead of one a step. The ODE's data are the only fixed point. 1 needs no pairs at all."""
    ode: OdeConfig = field(default_factory=OdeConfig)
    """How data are made from noise, under csd.sampling."""
    batch: int = 128
    """Pairs per micro-batch."""
    accumulate: int = 8
    """Micro-batches per optimiser step, shared out over the processes."""
    ema: float = 0.999
    """Limit of the progressive EMA rate; stage 2 starts from the average."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, decay="cosine"))
    """Optimiser."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        _counts("regress", self, ("pairs", "batch", "accumulate"), ("iterations", "guidance_iterations"))
        if not 0 <= self.ema < 1:
            raise InputError(f"regress.ema must be in [0, 1), got {self.ema}")
        if not 0 <= self.own_share <= 1:
            raise InputError(f"regress.own_share must be in [0, 1], got {self.own_share}")
        if 0 < self.own_share < 1 and self.own_count in (0, self.batch):
            raise InputError(
                f"regress.own_share {self.own_share} of a batch of {self.batch} is {self.own_count} sequences; give 0, 1, or a "
                "share (or batch) that leaves both kinds some"
            )
        if self.guidance_iterations and not self.iterations:
            raise InputError("regress.guidance_iterations follow a regression; give regress.iterations too")

    @property
    def own_count(self) -> int:
        """Sequences of a micro-batch without a pair."""
        return round(self.own_share * self.batch)


@dataclass(frozen=True)
class MatchConfig:
    """Whole sequences matched to the teacher's samples in the teacher's features (`dd2.method.match`); off by default."""

    weight: float = 0.0
    """Weight of the distance, divided by its own value, beside the CSD loss; 0 matches nothing in stage 2."""
    distance: Literal["frechet", "mmd", "nystrom"] = "frechet"
    """frechet: between Gaussians, the generator's moments remembered. mmd: with a Gaussian kernel, against all of the reference.
    nystrom: the same against landmarks that stand for the reference."""
    features: tuple[str, ...] = ("mean", "projected", "tokens", "condition")
    """Of a sequence: the mean of the teacher's features over the positions; random projections of those of all positions, and of
    all tokens; the condition, which makes it the joint distribution that is matched."""
    projections: int = 256
    """Random projections of each kind."""
    beta: float = 0.98
    """Share of the remembered moments after an iteration."""
    prime: int = 4096
    """Sequences that the memory begins with."""
    reference: int = 50_000
    """Teacher samples that are matched; as many as there are where there are fewer."""
    landmarks: int = 1024
    """Of nystrom."""
    then_iterations: int = 0
    """A stage after stage 2: generator updates by the distance alone."""
    then_lr: float = 0.1
    """Factor on the generator's learning rate there."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        _counts("csd.match", self, ("projections", "prime", "reference", "landmarks"), ("then_iterations",))
        if not 0 <= self.beta < 1:
            raise InputError(f"csd.match.beta must be in [0, 1), got {self.beta}")
        if not (0 <= self.weight < math.inf and 0 < self.then_lr < math.inf):
            raise InputError("csd.match.weight must not be negative, and then_lr must be positive; both finite")
        if self.distance not in ("frechet", "mmd", "nystrom"):
            raise InputError(f'csd.match.distance must be "frechet", "mmd" or "nystrom", got {self.distance!r}')
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown or not self.features or len(set(self.features)) < len(self.features):
            found = unknown or self.features or "none"
            raise InputError(f"csd.match.features must be some of {', '.join(FEATURES)}, each once, got {found}")

    @property
    def on(self) -> bool:
        """Whether anything is matched."""
        return self.weight > 0 or self.then_iterations > 0


FEATURES = ("mean", "projected", "tokens", "condition")
"""What sequences can be matched in."""


@dataclass(frozen=True)
class CSDConfig:
    """Stage 2, conditional score distillation. Defaults: LlamaGen-L of Table 11."""

    iterations: int = 12_000
    """Generator updates."""
    k: int = 5
    """Guidance updates per generator update (App. C.4)."""
    share_generated: bool = False
    """The K guidance updates of an iteration learn from one batch of generated sequences, under fresh noise, instead of K: K - 1
    passes of the generator less."""
    batch: int = 128
    """Sequences per micro-batch."""
    accumulate: int = 8
    """Micro-batches per optimiser step, shared out over the processes."""
    guidance_draws: int = 4
    """Noise draws m per sequence of the guidance loss; a guidance network over codes needs none."""
    generator_draws: int = 1
    """Noise draws per sequence of the generator loss."""
    d: Distance = "sid"
    """Distance of Eq. 4: sid (Eq. 3), dmd (reverse KL) or sim (score implicit matching, pseudo-Huber)."""
    alpha: float = 1.0
    """SiD's alpha."""
    weight_floor: float = 1e-2
    """Lower bound of mean_C |q - x0_hat|, whose inverse weighs a token; raise it to trust small t less."""
    snap_teacher: bool = False
    """Condition the teacher on the nearest codes of the generated q_<i, which are all it was trained on."""
    snap_guidance: bool = False
    """Condition the guidance network on the nearest codes of the generated q_<i."""
    initialised: Literal["both", "guidance", "generator", "neither", "random"] = "both"
    """Which networks start from the stage-1 model; the others start as stage 1 did, the teacher's layers under a fresh head
    (Sec. 5.5, Table 4). random: both without anything of the teacher's."""
    regression_weight: float = 0.0
    """Weight of `regress`'s loss on the generator's own tokens, beside the CSD loss."""
    match: MatchConfig = field(default_factory=MatchConfig)
    """Whole sequences."""
    ema: float = 0.9999
    """Limit of the generator's progressive EMA rate."""
    further_emas: tuple[float, ...] = ()
    """Limits of further averages, kept in the checkpoints: dd2 export chooses among them."""
    sampling: Sampling = field(default_factory=lambda: Sampling(cfg_scale=2.0, top_k=900))
    """The teacher's distribution to match."""
    noise_level: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """Distribution of t."""
    generator: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, warmup=8000))
    """The generator's optimiser; warm-up counts generator updates (40k guidance updates / K)."""
    guidance: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    """The guidance network's optimiser; its schedule counts generator updates."""
    validation: int = 2048
    """Images of the average generator that every checkpoint is judged by: their Fréchet distance, in the teacher's own features,
    to as many of its samples (of its middle layer, where `match` trains on those of the last). The best checkpoint is kept. 0
    measures nothing."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        _counts(
            "csd",
            self,
            ("k", "batch", "accumulate", "guidance_draws", "generator_draws"),
            ("iterations", "validation"),
        )
        if self.validation == 1:
            raise InputError("csd.validation must be 0 or at least 2: one image has no spread")
        if self.d not in ("sid", "dmd", "sim"):
            raise InputError(f'csd.d must be "sid", "dmd" or "sim", got {self.d!r}')
        if not 0 <= self.regression_weight < math.inf:
            raise InputError(f"csd.regression_weight must not be negative, got {self.regression_weight}")
        limits = (self.ema, *self.further_emas)
        if not 0 <= self.ema < 1:
            raise InputError(f"csd.ema must be in [0, 1), got {self.ema}")
        if not all(0 <= limit < 1 for limit in limits) or len(set(limits)) < len(limits):
            raise InputError(f"csd.further_emas must be different numbers in [0, 1), and not csd.ema, got {limits}")


@dataclass(frozen=True)
class AlignConfig:
    """Performance alignment (App. C.3) and the second half of stage 2 that follows it; off by default."""

    iterations: int = 0
    """Guidance updates on the frozen EMA generator; 0 skips alignment."""
    then_iterations: int = 0
    """Generator updates afterwards."""
    then_k: int = 2
    """Guidance updates per generator update afterwards."""
    then_lr: float = 1.0
    """Factor on both learning rates afterwards; there is no second warm-up."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        _counts("align", self, ("then_k",), ("iterations", "then_iterations"))
        if self.then_lr <= 0:
            raise InputError(f"align.then_lr must be positive, got {self.then_lr}")

    def second_half(self, csd: CSDConfig) -> CSDConfig:
        """Stage 2 as it goes on after alignment."""
        generator = replace(csd.generator, lr=csd.generator.lr * self.then_lr, warmup=0)
        guidance = replace(csd.guidance, lr=csd.guidance.lr * self.then_lr, warmup=0)
        return replace(csd, iterations=self.then_iterations, k=self.then_k, generator=generator, guidance=guidance)


def _counts(section: str, config: object, positive: tuple[str, ...], non_negative: tuple[str, ...]) -> None:
    for name in positive:
        if getattr(config, name) < 1:
            raise InputError(f"{section}.{name} must be at least 1, got {getattr(config, name)}")
    for name in non_negative:
        if getattr(config, name) < 0:
            raise InputError(f"{section}.{name} must not be negative, got {getattr(config, name)}")
