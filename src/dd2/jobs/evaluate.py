"""dd2 evaluate: honest numbers and pictures of a distilled run, beside its teacher's."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dd2.baselines.marginal import MarginalSampler
from dd2.checkpoints.runs import embedded, open_run
from dd2.config import flat
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.features import digits_features, user_features
from dd2.evaluation.report import write_report
from dd2.evaluation.score import Scorer, few_steps
from dd2.files import writable_folder, write_atomic
from dd2.jobs.distill import read_seconds
from dd2.sampling import first_redrawn_step
from dd2.training.samples import TeacherSamples


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a distilled run against its teacher. Writes metrics.json, samples.png, curves.png and report.html into RUN.

    The Fréchet distance (FD) is to `count` samples of the teacher in the features of a network; "floor" is the FD of as
    many other teacher samples, "onestep_marginal" that of independent tokens, and gap_closed how far the generator
    got from the second to the first. The teacher samples as it did in distillation.
    """

    run: Path
    """Run folder of dd2 distill."""
    count: int = 10_000
    """Images per method."""
    batch: int = 500
    """Images at a time."""
    seed: int = 0
    """Seed of the evaluation; training never uses its streams."""
    steps: tuple[int, ...] = (1,)
    """1 is the generator alone; each k > 1 adds a row in which the teacher redraws the last k - 1 AR steps (Alg. 4)."""
    features: str = "digits"
    """"digits" (classifier trained on real digits only), or module:function mapping images in [-1, 1] to (B, F)."""
    classifier: str = "digits"
    """Folder of a digits classifier, or "digits" for the embedded one."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts too small for a covariance."""
        if self.count < 2 or self.batch < 1:
            raise InputError(f"count must be at least 2 and batch at least 1, got {self.count} and {self.batch}")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score the run and write the results into its folder.

    Returns:
        The content of metrics.json.
    """
    start = time.perf_counter()
    device = pick_device(config.device)
    run = open_run(config.run, device)
    writable_folder(config.run, "run folder")
    spent = read_seconds(config.run)
    if "distill" not in spent or not (config.run / "versions.json").is_file():
        raise InputError(f"{config.run} lacks seconds.json or versions.json; run dd2 distill on it again, which writes them")
    if config.features == "digits":
        if run.teacher.tokenizer.image_shape != (1, 16, 16):
            raise InputError(
                f"features 'digits' reads 1 x 16 x 16 images, this run makes {run.teacher.tokenizer.image_shape}; "
                "give your own feature function with --features module:function"
            )
        folder = embedded("classifier") if config.classifier == "digits" else Path(config.classifier)
        network = digits_features(folder, device)
    else:
        network = user_features(config.features)
    for k in config.steps:
        first_redrawn_step(run.teacher.order, k)  # refuses before anything is drawn
    samples = TeacherSamples.load(config.run / "teacher_samples")
    marginal = MarginalSampler(samples.ids, samples.labels)
    scorer = Scorer(run.teacher, network, run.sampling, config.count, config.batch, config.seed)
    numbers, images = scorer.run(run.generator, run.ar_diffusion, marginal, sorted({k for k in config.steps if k > 1}))
    seconds = {**spent, "evaluate": time.perf_counter() - start}
    seconds["total"] = sum(seconds.values())
    numbers |= {
        "seconds": seconds,
        "count": config.count,
        "features": network.name,
        "evaluation": {key: value for key, value in flat(config).items() if key not in ("run", "device")},
    }
    write_atomic(config.run / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    write_report(config.run, numbers, images)
    print(summary(numbers))
    print(f"wrote {config.run}/metrics.json, samples.png, curves.png and report.html")
    return numbers


def summary(numbers: dict[str, Any]) -> str:
    """The few numbers that matter, as a table for the terminal."""
    lines = ["", f"{'':22}{'Fréchet':>10}{'teacher NLL':>14}{'accuracy':>10}"]
    rows = {
        "teacher (floor)": ("floor", "teacher"),
        "AR-diffusion": ("ar_diffusion", "ar_diffusion"),
        "generator": ("generator", "generator"),
        "generator, nearest": ("generator_nearest", "generator_nearest"),
        **{f"with the teacher, {k} steps": (few_steps(k), few_steps(k)) for k in numbers["evaluation"]["steps"] if k > 1},
        "onestep* (independent)": ("onestep_marginal", "onestep_marginal"),
    }
    for title, (frechet, other) in rows.items():
        if frechet in numbers["frechet"]:
            accuracy = numbers["accuracy"].get(other)
            shown = f"{accuracy:10.3f}" if accuracy is not None else f"{'':>10}"
            lines.append(f"{title:22}{numbers['frechet'][frechet]:10.2f}{numbers['teacher_nll'][other]:14.1f}{shown}")
    faster = f"{numbers['speedup_vs_teacher']:.1f} times faster than the teacher (batch {numbers['speedup_batch']})"
    lines.append(f"gap closed {numbers['gap_closed']:.3f}, {faster}")
    lines.append("")
    return "\n".join(lines)
