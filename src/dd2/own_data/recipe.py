"""The five runs of dd2 own-data, from sizes and counts."""

from dataclasses import dataclass, replace
from pathlib import Path

from dd2.commands.distill_config import DistillConfig
from dd2.commands.train_classifier import ClassifierSizes, TrainClassifierConfig
from dd2.commands.train_teacher import TrainTeacherConfig
from dd2.commands.train_tokenizer import TrainTokenizerConfig
from dd2.config import load_config
from dd2.evaluation.config import EvaluateConfig
from dd2.method.config import CSDConfig
from dd2.tokenizers.autoencoder import VQConfig
from dd2.training.loop import LoopConfig
from dd2.training.schedule import OptimConfig

STAGES = ("tokenizer", "teacher", "classifier", "one_step", "evaluate")
"""In order; the first four have a run folder of that name."""

SIDES = (16, 32, 64, 128, 256)
"""Heights and widths that images can have."""


@dataclass(frozen=True)
class Sizes:
    """Of the networks.

    Attributes:
        name: what plan.json calls them.
        codes: V, of the tokenizer.
        channels: of its first convolution.
        depth, width, heads: of the teacher, and so of generator and guidance network.
        lr: the teacher's learning rate.
        images: that they need to generalise, about.
        gpu: they are too slow without one.
    """

    name: str
    codes: int
    channels: int
    depth: int
    width: int
    heads: int
    lr: float
    images: int
    gpu: bool = False


SIZES = (
    Sizes("large", 1024, 32, 12, 384, 6, 4e-4, 30_000, gpu=True),
    Sizes("medium", 512, 16, 6, 128, 4, 1e-3, 4_000),
    Sizes("small", 256, 16, 4, 96, 4, 1e-3, 0),
)
"""The larger, the more images and time they need. Medium is docs/results/fashion.md's."""


@dataclass(frozen=True)
class Counts:
    """How much of everything.

    Attributes:
        tokenizer, teacher, classifier, regress, guidance, csd: iterations.
        token_images: augmented images that the teacher learns from.
        samples: sequences of the teacher, and as many pairs.
        evaluated: images per method.
        batch: of every training.
    """

    tokenizer: int
    token_images: int
    teacher: int
    classifier: int
    samples: int
    regress: int
    guidance: int
    csd: int
    evaluated: int
    batch: int = 64


@dataclass(frozen=True)
class Task:
    """What the user gave, and what it holds.

    Attributes:
        data: folder or zip.
        size: height and width.
        channels: 1 or 3.
        images: to train on.
        classes: how many.
        features: of the evaluation, where the user has some; else a classifier is trained.
        seed, device: of all runs.
    """

    data: str
    size: int
    channels: int
    images: int
    classes: int
    features: str = ""
    seed: int = 0
    device: str = "auto"

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that it needs."""
        return tuple(stage for stage in STAGES if not (stage == "classifier" and self.features))


@dataclass(frozen=True)
class Runs:
    """The configurations of the five runs."""

    tokenizer: TrainTokenizerConfig
    teacher: TrainTeacherConfig
    classifier: TrainClassifierConfig
    one_step: DistillConfig
    evaluate: EvaluateConfig


def runs(task: Task, sizes: Sizes, counts: Counts, out: Path, *, stop: bool = True) -> Runs:
    """The runs below a folder; a training that diverges stops, or goes on."""
    made = Runs(
        _tokenizer(task, sizes, counts, out / "tokenizer"),
        _teacher(task, sizes, counts, out),
        TrainClassifierConfig(
            data=task.data,
            out=out / "classifier",
            seed=task.seed,
            device=task.device,
            iterations=counts.classifier,
            classifier=ClassifierSizes(task.size, task.channels),
            loop=_loop(counts.classifier),
        ),
        _one_step(task, counts, out),
        EvaluateConfig(
            run=out / "one_step",
            count=max(2, counts.evaluated // task.classes) * task.classes,
            features=task.features or str(out / "classifier" / "classifier"),
            batch=min(250, counts.evaluated),
            device=task.device,
        ),
    )
    if stop:
        return made
    going_on = {name: replace(run, loop=replace(run.loop, stop_on=())) for name, run in vars(made).items() if name != "evaluate"}
    return replace(made, **going_on)


def side_of_tokens(size: int) -> int:
    """Tokens in a row: 8 up to 64 px, 16 beyond, at least 4 px each."""
    return min(8 if size <= 64 else 16, size // 4)


def _tokenizer(task: Task, sizes: Sizes, counts: Counts, out: Path) -> TrainTokenizerConfig:
    halvings = (task.size // side_of_tokens(task.size)).bit_length() - 1
    conv = VQConfig(
        codebook_size=sizes.codes,
        code_dim=8,
        image_size=task.size,
        image_channels=task.channels,
        channels=sizes.channels,
        multipliers=(1, 2, 2, 4, 4)[: halvings + 1],
        res_blocks=1,
        z_channels=32,
        groups=8,
    )
    return TrainTokenizerConfig(
        data=task.data,
        out=out,
        seed=task.seed,
        device=task.device,
        iterations=counts.tokenizer,
        batch=min(32, counts.batch),
        tokenizer=conv,
        optim=OptimConfig(lr=1e-3, decay="cosine", warmup=50, betas=(0.9, 0.99)),
        loop=_loop(counts.tokenizer),
    )


def _teacher(task: Task, sizes: Sizes, counts: Counts, out: Path) -> TrainTeacherConfig:
    base = load_config(TrainTeacherConfig, "fashion_teacher")
    network = replace(base.teacher, depth=sizes.depth, width=sizes.width, heads=sizes.heads)
    return replace(
        base,
        tokenizer=out / "tokenizer" / "tokenizer",
        data=task.data,
        out=out / "teacher",
        seed=task.seed,
        device=task.device,
        token_images=counts.token_images,
        iterations=counts.teacher,
        batch=counts.batch,
        keep="best",
        teacher=network,
        optim=replace(base.optim, lr=sizes.lr, warmup=min(100, counts.teacher // 10)),
        loop=_loop(counts.teacher),
    )


def _one_step(task: Task, counts: Counts, out: Path) -> DistillConfig:
    base = load_config(DistillConfig, "fashion")
    regress = replace(
        base.regress,
        iterations=counts.regress,
        guidance_iterations=counts.guidance,
        pairs=counts.samples,
        batch=counts.batch,
        optim=replace(base.regress.optim, warmup=min(100, counts.regress // 10)),
    )
    csd: CSDConfig = replace(
        base.csd,
        iterations=counts.csd,
        batch=counts.batch,
        validation=min(base.csd.validation, counts.samples),
        generator=replace(base.csd.generator, warmup=min(30, counts.csd // 10)),
    )
    return replace(
        base,
        teacher=str(out / "teacher" / "teacher"),
        out=out / "one_step",
        seed=task.seed,
        device=task.device,
        teacher_samples=counts.samples,
        sample_batch=min(512, counts.samples),
        regress=regress,
        csd=csd,
        loop=_loop(max(counts.regress, counts.csd)),
    )


def _loop(iterations: int) -> LoopConfig:
    """About eight checkpoints and four previews; a run that diverges ends."""
    return LoopConfig(
        log_every=max(1, min(20, iterations // 4)),
        save_every=max(1, iterations // 8),
        preview_every=max(1, iterations // 4),
        stop_on=("divergence",),
    )
