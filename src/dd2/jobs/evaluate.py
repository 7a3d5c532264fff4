"""dd2 evaluate: honest numbers and pictures of a distilled run beside its teacher's, or of anybody's images."""

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dd2.baselines.marginal import MarginalSampler
from dd2.checkpoints.runs import FinishedRun, embedded, open_run
from dd2.config import flat
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.features import FeatureNetwork, open_features, read_features
from dd2.evaluation.images import ImageSet
from dd2.evaluation.metrics import MetricConfig, check_channels, check_extrapolation, scores, warnings
from dd2.evaluation.reference import Reference, image_bank, open_reference
from dd2.evaluation.report import write_report
from dd2.evaluation.score import Scorer, few_steps
from dd2.evaluation.speed import speed_numbers
from dd2.files import writable_folder, write_atomic
from dd2.images import export_npz
from dd2.jobs.distill import read_seconds
from dd2.processes import barrier, rank
from dd2.sampling import first_redrawn_step
from dd2.training.samples import TeacherSamples, samples_identity, weights_digest


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a distilled run against its teacher, or a set of images, and store beside each number what decides it.

    Writes metrics.json, samples.png, curves.png and report.html into RUN; features are kept in RUN/features, so that an
    interrupted evaluation goes on where it stopped, and torchrun splits it over processes. The Fréchet distance (FD; FID with
    --features inception-2015-12-05.pt) is to `reference`; with the teacher as reference its own row, from other seeds, is the
    floor. gap_closed is how far the generator got from independent tokens (onestep_marginal) to the teacher's row. The teacher
    samples as it did in distillation.
    """

    run: Path = Path()
    """Run folder of dd2 distill."""
    images: Path | None = None
    """Score all of these images instead of a run: a folder, a zip, or an .npz with arr_0 (uint8 NHWC). Needs a reference."""
    reference: str = "teacher"
    """"teacher"; statistics (ADM's .npz, or made by dd2 reference); or images: a folder, zip or .npz."""
    count: int = 10_000
    """Images per method (papers: 50,000), the same number of every class."""
    steps: tuple[int, ...] = (1,)
    """1 is the generator alone; each k > 1 adds a row in which the teacher redraws the last k - 1 AR steps (Alg. 4)."""
    features: str = "digits"
    """"digits" (classifier trained on real digits only); "inception" (ADM's, fetched once) or a path to inception-2015-12-05.pt;
    or module:function of your own."""
    classifier: str = "digits"
    """Folder of a digits classifier, or "digits" for the embedded one."""
    metrics: MetricConfig = field(default_factory=MetricConfig)
    """Metrics and their settings."""
    path_length: int = 0
    """Paths of the generator's perceptual path length (paper's Table 5); 0 leaves it out."""
    epsilon: float = 1e-4
    """Step of the path length."""
    export: Path | None = None
    """Also write the generator's images as an .npz for ADM's evaluator: arr_0, uint8 NHWC, shuffled."""
    allow_unbalanced: bool = False
    """Score a count that is no multiple of the number of labels, or images with more of one label than of another."""
    allow_duplicates: bool = False
    """Score images that were drawn with the same seed more than once."""
    batch: int = 500
    """Images at a time."""
    seed: int = 0
    """Seed of the evaluation; training never uses its streams."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts too small for a covariance, and requests that contradict each other."""
        if self.count < 2 or self.batch < 1:
            raise InputError(f"count must be at least 2 and batch at least 1, got {self.count} and {self.batch}")
        if self.path_length < 0 or 0 < self.path_length < 3 or not 0 < self.epsilon < 1:
            raise InputError(
                f"path_length must be 0 or at least 3 and epsilon in (0, 1), got {self.path_length} and {self.epsilon}"
            )
        if self.images is not None and (self.path_length or self.steps != (1,)):
            raise InputError("path_length and steps need a run: images alone cannot be drawn again")
        if self.images is not None and self.reference == "teacher":
            raise InputError("images have no teacher: give --reference, e.g. ADM's .npz or a folder of real images")
        if self.export is not None and (self.export.suffix != ".npz" or self.images is not None):
            raise InputError("export must be an .npz, and goes with a run, not with images")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run, or images.

    Returns:
        What was stored.
    """
    device = pick_device(config.device)
    folder = embedded("classifier") if config.classifier == "digits" else Path(config.classifier)
    network = open_features(config.features, folder, device)
    return _evaluate_images(config, network, device) if config.images else _evaluate_run(config, network, device)


def _evaluate_run(config: EvaluateConfig, network: FeatureNetwork, device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    run = open_run(config.run, device)
    writable_folder(config.run, "run folder")
    spent = read_seconds(config.run)
    if "distill" not in spent or not (config.run / "versions.json").is_file():
        raise InputError(f"{config.run} lacks seconds.json or versions.json; run dd2 distill on it again, which writes them")
    for k in config.steps:
        first_redrawn_step(run.teacher.order, k)  # refuses before anything is drawn
    labels = run.teacher.backbone.num_labels
    if config.count % labels and not config.allow_unbalanced:
        raise InputError(
            f"count {config.count} is no multiple of the {labels} labels, so the classes are unbalanced; choose another count, "
            "or give --allow-unbalanced"
        )
    banks = config.run / "features"
    scorer = Scorer(run.teacher, network, run.sampling, config.count, config.batch, config.seed, banks, config.metrics)
    reference = _reference(config, scorer, network, device, banks)
    channels = len(reference.fits["pool"].mean)
    if config.metrics.fid_infinity:
        check_extrapolation(config.count, channels)
    found = read_features(network, torch.zeros(2, *run.teacher.tokenizer.image_shape, device=device))["pool"].shape[1]
    check_channels(found, reference)  # before anything is drawn
    methods, digests = _methods(config, run, scorer)
    numbers = scorer.run(methods, digests, reference)
    if config.path_length:
        numbers["path_length"] = scorer.path_length(run.generator, config.path_length, config.epsilon)
    barrier()  # speed is measured when the other processes rest
    if rank() != 0:
        return numbers
    numbers |= speed_numbers(run.teacher, run.sampling, run.generator, config.batch)
    seconds = {**spent, "evaluate": time.perf_counter() - start}
    seconds["total"] = sum(seconds.values())
    decides = {key: value for key, value in flat(config).items() if key not in ("run", "device")}
    numbers |= {
        "seconds": seconds,
        "count": config.count,
        "features": network.name,
        "features_digest": network.digest,
        "evaluation": {
            **decides,
            "reference": reference.described,
            "images_per_label": config.count / labels,
            "seeds": f"one per image, derived from {config.seed}",
            "rounding": "uint8, round(127.5 x + 127.5)",
            "sampling": {key.rpartition(".")[2]: value for key, value in flat(run.sampling).items()},
            "decoding": "continuous tokens, and nearest codes in generator_nearest",
        },
        "warnings": warnings(config.count, channels, reference.described),
    }
    write_atomic(config.run / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    write_report(config.run, numbers, scorer.shown(methods))
    print(summary(numbers))
    print(f"wrote {config.run}/metrics.json, samples.png, curves.png and report.html")
    if config.export is not None:
        _export(config, scorer, methods["generator"])
    return numbers


def _methods(config: EvaluateConfig, run: FinishedRun, scorer: Scorer) -> tuple[dict[str, Any], dict[str, str | None]]:
    samples = TeacherSamples.load(config.run / "teacher_samples")
    further = sorted({k for k in config.steps if k > 1})
    methods = scorer.methods(run.generator, run.ar_diffusion, MarginalSampler(samples.ids, samples.labels), further)
    generator = weights_digest(run.generator.student)
    digests: dict[str, str | None] = {name: generator for name in methods if name.startswith("generator")}
    digests["onestep_marginal"] = f"{samples_identity(config.run / 'teacher_samples')} {len(samples.ids)}"
    if run.ar_diffusion is not None:
        digests["ar_diffusion"] = weights_digest(run.ar_diffusion.student)
    return methods, digests


def _reference(config: EvaluateConfig, scorer: Scorer, network: FeatureNetwork, device: torch.device, banks: Path) -> Reference:
    if config.reference == "teacher":
        return scorer.teacher_reference()
    return open_reference(Path(config.reference), network, device, banks, config.batch)


def _evaluate_images(config: EvaluateConfig, network: FeatureNetwork, device: torch.device) -> dict[str, Any]:
    assert config.images is not None
    path = config.images.resolve()
    images = ImageSet(path)
    balance = _checked_draws(config, images)
    out = path.with_name(f"{path.name}.dd2")
    writable_folder(out, "folder beside the images")
    digest = images.digest()
    reference = open_reference(Path(config.reference), network, device, out / "features", config.batch)
    bank = image_bank(images, network, device, out / "features", config.batch, digest)
    found = scores(bank, reference, config.metrics, config.seed)
    if rank() != 0:
        return found
    numbers = {
        "metrics": {"images": found},
        "count": len(images),
        "features": network.name,
        "features_digest": network.digest,
        "evaluation": {
            **{key: value for key, value in flat(config).items() if key.startswith(("metrics.", "seed", "features"))},
            "images": str(path),
            "sha256": digest,
            "seeds": "unknown" if images.seeds is None else f"{len(set(images.seeds))} different ones",
            "images_per_label": balance,
            "reference": reference.described,
            "rounding": "uint8, as stored",
        },
        "warnings": warnings(len(images), len(reference.fits["pool"].mean), reference.described),
    }
    write_atomic(out / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    print("\n".join(f"{name:22}{value:12.4f}" for name, value in found.items()))
    print(described(numbers))
    print(f"wrote {out}/metrics.json")
    return numbers


def _checked_draws(config: EvaluateConfig, images: ImageSet) -> str:
    """Refuse repeated seeds and unbalanced labels, as far as the images tell; how many there are of each label."""
    if images.seeds is not None and len(set(images.seeds)) < len(images.seeds) and not config.allow_duplicates:
        twice = len(images.seeds) - len(set(images.seeds))
        raise InputError(
            f"images {config.images}: {twice} of {len(images)} were drawn with a seed that another one has, so they may be "
            "duplicates; draw them with a seed each, or give --allow-duplicates"
        )
    if images.labels is None:
        return "unknown"
    counts = Counter(images.labels)
    fewest, most = min(counts.values()), max(counts.values())
    if fewest < most and not config.allow_unbalanced:
        raise InputError(
            f"images {config.images} are unbalanced: {fewest} to {most} of each of {len(counts)} labels; draw as many of every "
            "label, or give --allow-unbalanced"
        )
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _export(config: EvaluateConfig, scorer: Scorer, generator: Any) -> None:
    assert config.export is not None

    def draw(index: torch.Tensor) -> torch.Tensor:
        return generator(scorer.labels(index), scorer.seeds("methods", index))[0]

    order = torch.randperm(config.count, generator=torch.Generator().manual_seed(config.seed))
    with torch.inference_mode():
        export_npz(config.export, order, config.batch, draw)
    print(f"wrote {config.count} shuffled images to {config.export}")


def summary(numbers: dict[str, Any]) -> str:
    """The few numbers that matter, as a table for the terminal, and what decides them."""
    lines = ["", f"{'':24}{'Fréchet':>9}{'95 %':>8}{'prec.':>8}{'recall':>8}{'teacher NLL':>13}{'accuracy':>10}"]
    rows = {
        "teacher": "teacher (floor)" if numbers["evaluation"]["reference"].get("reference") == "teacher" else "teacher",
        "ar_diffusion": "AR-diffusion",
        "generator": "generator",
        "generator_nearest": "generator, nearest",
        **{few_steps(k): f"with the teacher, {k} steps" for k in numbers["evaluation"]["steps"] if k > 1},
        "onestep_marginal": "onestep* (independent)",
    }
    for name, title in rows.items():
        if name in numbers["metrics"]:
            found = numbers["metrics"][name]
            cells = [("frechet", 9, 2), ("frechet_95", 8, 2), ("precision", 8, 3), ("recall", 8, 3), ("teacher_nll", 13, 1)]
            cells.append(("accuracy", 10, 3))
            shown = "".join(f"{found[key]:{width}.{digits}f}" if key in found else " " * width for key, width, digits in cells)
            lines.append(f"{title:24}{shown}")
    faster = f"{numbers['speedup_vs_teacher']:.1f} times faster than the teacher (batch {numbers['speedup_batch']})"
    lines.append(f"gap closed {numbers['gap_closed']:.3f}, {faster}")
    lines.append(described(numbers))
    lines.append("")
    return "\n".join(lines)


def described(numbers: dict[str, Any]) -> str:
    """What decides the numbers, and what to beware of."""
    reference = numbers["evaluation"]["reference"]
    digest = f", SHA-256 {reference['sha256'][:12]}" if "sha256" in reference else ""
    count = f", {reference['count']:,} images" if "count" in reference else ""
    features = f"{numbers['features']}, hash {numbers['features_digest'][:12]}"
    lines = [f"{numbers['count']:,} images against {reference['reference']}{count}{digest}; features: {features}"]
    decides = numbers["evaluation"]
    if "sampling" in decides:
        shown = ", ".join(f"{key} {value}" for key, value in decides["sampling"].items())
        balance = f"{decides['images_per_label']:g} images per label; seeds: {decides['seeds']}"
        lines.append(f"{balance}; {decides['rounding']}; teacher: {shown}")
    return "\n".join([*lines, *(f"warning: {text}" for text in numbers["warnings"])])
