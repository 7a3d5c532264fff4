"""Where the paper's tables are reproduced: teachers small enough, with the configurations of both methods."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dd2.commands.dd1 import DD1RunConfig
from dd2.commands.distill_config import DistillConfig
from dd2.commands.train_classifier import ClassifierSizes, TrainClassifierConfig
from dd2.commands.train_teacher import TrainTeacherConfig
from dd2.commands.train_tokenizer import TrainTokenizerConfig
from dd2.config import load_config
from dd2.errors import InputError
from dd2.teachers.families import sizes_of
from dd2.tokenizers.autoencoder import VQConfig
from dd2.training.schedule import OptimConfig


@dataclass(frozen=True)
class Bench:
    """A teacher, and how it is distilled and evaluated.

    Attributes:
        distill, dd1: both methods at the full budget, DD2 by the recipe that proved best.
        paper: DD2 by the paper's, for the tables about it.
        ar_steps: the teacher's passes per image.
        minutes: of one DD2 distillation (samples and both stages) at the full budget, on the machine it is meant for.
        steps: Table 2's passes, the generator's own included.
        skips: AR steps that skip-m leaves out.
        tokenizer, teacher, classifier: what is trained first; None where it is embedded.
    """

    distill: DistillConfig
    paper: DistillConfig
    dd1: DD1RunConfig
    ar_steps: int
    minutes: float
    steps: tuple[int, ...]
    skips: tuple[int, ...]
    tokenizer: TrainTokenizerConfig | None = None
    teacher: TrainTeacherConfig | None = None
    classifier: TrainClassifierConfig | None = None

    def scaled(self, budget: float) -> "Bench":
        """The same with the iterations of both methods that `budget` minutes per DD2 distillation allow."""
        share = budget / self.minutes if budget else 1.0

        def part(iterations: int) -> int:
            return max(1, round(iterations * share))

        def scaled(run: DistillConfig) -> DistillConfig:
            tune = replace(run.tune, iterations=part(run.tune.iterations))
            csd = replace(run.csd, iterations=part(run.csd.iterations))
            regress = run.regress
            if regress.iterations:
                regress = replace(regress, iterations=part(regress.iterations))
            return replace(run, tune=tune, regress=regress, csd=csd)

        train = replace(self.dd1.train, iterations=part(self.dd1.train.iterations))
        dd1 = replace(self.dd1, train=train)
        return replace(self, distill=scaled(self.distill), paper=scaled(self.paper), dd1=dd1)


def open_bench(name: str, images: str = "", teacher: str = "") -> Bench:
    """A bench by name.

    Args:
        name: see `BENCHES`.
        images: the data of benches of real images, a folder or zip.
        teacher: a trained teacher's folder, instead of training one.

    Raises:
        InputError: there is no such bench, or its images are missing.
    """
    if name not in BENCHES:
        raise InputError(f"there is no bench {name}; the benches are {', '.join(BENCHES)}")
    bench = BENCHES[name](images)
    if teacher:
        bench = replace(bench, tokenizer=None, teacher=None)
        runs = {name: replace(getattr(bench, name), teacher=teacher) for name in ("distill", "paper", "dd1")}
        bench = replace(bench, **runs)
    return bench


def _digits(images: str) -> Bench:
    runs = (
        load_config(DistillConfig, "digits"),
        load_config(DistillConfig, "digits_paper"),
        load_config(DD1RunConfig, "digits_dd1"),
    )
    return Bench(*runs, 16, 4.2, (1, 3, 5, 9), (2,))


def _digits_var(images: str) -> Bench:
    return Bench(
        load_config(DistillConfig, "digits_var"),
        load_config(DistillConfig, "digits_var_paper"),
        load_config(DD1RunConfig, "digits_var_dd1"),
        4,
        10.3,
        (1, 2, 3, 4),
        (1, 2),
        load_config(TrainTokenizerConfig, "digits_var_tokenizer"),
        load_config(TrainTeacherConfig, "digits_var_teacher"),
    )


def _fashion(images: str) -> Bench:
    _need_images("fashion", images)
    first = (
        replace(load_config(TrainTokenizerConfig, "fashion_tokenizer"), data=images),
        replace(load_config(TrainTeacherConfig, "fashion_teacher"), data=images),
        replace(load_config(TrainClassifierConfig, "fashion_classifier"), data=images),
    )
    runs = (
        load_config(DistillConfig, "fashion"),
        load_config(DistillConfig, "fashion_paper"),
        load_config(DD1RunConfig, "fashion_dd1"),
    )
    return Bench(*runs, 64, 25.0, (1, 9, 17, 33), (8,), *first)


def _need_images(name: str, images: str) -> None:
    if not images:
        raise InputError(f"bench {name} needs the real images: give --images, a folder or zip of {name}")


@dataclass(frozen=True)
class _Images:
    """What differs between the benches of real images."""

    size: int
    channels: int
    codes: int
    multipliers: tuple[int, ...]
    patch_nums: tuple[int, ...]
    width: int
    depth: int
    minutes: float


REAL = {
    "fashion": _Images(32, 1, 256, (1, 2, 2), (1, 2, 3, 4, 6, 8), 192, 8, 8.0),
    "cifar10": _Images(32, 3, 512, (1, 2, 2), (1, 2, 3, 4, 6, 8), 256, 10, 10.0),
    "imagenette64": _Images(64, 3, 1024, (1, 2, 2, 4), (1, 2, 3, 4, 6, 8), 320, 12, 12.0),
}
"""Benches of real images, meant for one data-centre GPU; their sizes were never run there."""


def _real(name: str, next_scale: bool) -> Callable[[str], Bench]:
    def build(images: str) -> Bench:
        _need_images(name, images)
        sizes = REAL[name]
        vq = VQConfig(
            codebook_size=sizes.codes,
            code_dim=16,
            image_size=sizes.size,
            image_channels=sizes.channels,
            channels=64,
            multipliers=sizes.multipliers,
            z_channels=64,
        )
        own = sizes_of(sizes.depth, sizes.width, sizes.width // 32, next_scale)
        rate = OptimConfig(lr=1e-3, decay="cosine", warmup=200, weight_decay=0.05)
        tokenizer = TrainTokenizerConfig(
            data=images,
            iterations=20_000,
            batch=128,
            tokenizer=vq,
            patch_nums=sizes.patch_nums if next_scale else (),
            optim=OptimConfig(lr=5e-4, decay="cosine", warmup=200, betas=(0.9, 0.99)),
        )
        teacher = TrainTeacherConfig(
            data=images,
            token_images=200_000,
            iterations=20_000,
            optim=rate,
            teacher=own.teacher,
            var=own.var,
        )
        channels = ClassifierSizes(image_size=sizes.size, image_channels=sizes.channels, width=64, features=256)
        classifier = TrainClassifierConfig(data=images, iterations=8000, classifier=channels)
        kind = "digits_var" if next_scale else "digits"
        paper = load_config(DistillConfig, f"{kind}_paper")
        tune = replace(paper.tune, iterations=10_000, batch=128)
        csd = replace(paper.csd, iterations=6000, batch=128)
        paper = replace(paper, teacher_samples=100_000, tune=tune, csd=csd)
        best = load_config(DistillConfig, kind)
        regress = replace(best.regress, iterations=30_000, batch=128, pairs=100_000)
        best = replace(best, teacher_samples=100_000, regress=regress, csd=replace(best.csd, iterations=3000, batch=128))
        job = load_config(DD1RunConfig, f"{kind}_dd1")
        positions = len(sizes.patch_nums) if next_scale else sizes.patch_nums[-1] ** 2
        heads_of = replace(job.heads, logits_steps=positions)
        job = replace(job, pairs=100_000, heads=heads_of, train=replace(job.train, iterations=80_000, batch=128))
        steps, skips = ((1, 2, 3, 4), (1, 2)) if next_scale else ((1, 9, 17, 33), (8,))
        return Bench(best, paper, job, positions, sizes.minutes, steps, skips, tokenizer, teacher, classifier)

    return build


BENCHES: dict[str, Callable[[str], Bench]] = {
    "digits": _digits,
    "digits_var": _digits_var,
    **{name: _real(name, False) for name in REAL},
    **{f"{name}_var": _real(name, True) for name in REAL},
    "fashion": _fashion,
}
