"""Hyper-parameters of the stages (App. E). The defaults are the paper's for LlamaGen-L (Tables 10, 11)."""

from dataclasses import dataclass, field, replace
from typing import Literal

from dd2.errors import InputError
from dd2.losses import Distance
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
    CLASS/IMAGE files: code ids of real images (the paper)."""
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
    """Before stage 2, beyond the paper: the generator regresses the teacher's ODE; off by default."""

    iterations: int = 0
    """Iterations; 0 lets the generator start stage 2 as stage 1 left it (the paper)."""
    guidance_iterations: int = 0
    """Guidance updates on the frozen generator afterwards, so that stage 2 starts with its score."""
    pairs: int = 400_000
    """Pairs of noise and data, kept on disk."""
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
        if self.guidance_iterations and not self.iterations:
            raise InputError("regress.guidance_iterations follow a regression; give regress.iterations too")


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
    """Noise draws m per sequence of the guidance loss."""
    generator_draws: int = 1
    """Noise draws per sequence of the generator loss."""
    d: Distance = "sid"
    """Distance of Eq. 4: sid (Eq. 3) or dmd (reverse KL)."""
    alpha: float = 1.0
    """SiD's alpha."""
    weight_floor: float = 1e-2
    """Lower bound of mean_C |q - x0_hat|, whose inverse weighs a token; raise it to trust small t less."""
    snap_teacher: bool = False
    """Condition the teacher on the nearest codes of the generated q_<i, which are all it was trained on."""
    snap_guidance: bool = False
    """Condition the guidance network on the nearest codes of the generated q_<i."""
    initialised: Literal["both", "guidance", "generator", "neither"] = "both"
    """Which networks start from the stage-1 model; the others start as stage 1 did, the teacher's layers under a fresh head
    (Sec. 5.5, Table 4)."""
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
    to as many of its samples. The best checkpoint is kept. 0 measures nothing."""

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
        if self.d not in ("sid", "dmd"):
            raise InputError(f'csd.d must be "sid" or "dmd", got {self.d!r}')
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
