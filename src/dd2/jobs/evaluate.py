"""dd2 evaluate: honest numbers and pictures of a distilled run beside its teacher's, or of anybody's images."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from dd2.baselines.marginal import MarginalSampler
from dd2.baselines.skip import kept_steps
from dd2.checkpoints.runs import FinishedRun, open_run
from dd2.config import flat
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.features import FeatureNetwork, open_features, read_features
from dd2.evaluation.metrics import check_channels, check_extrapolation, warnings
from dd2.evaluation.reference import Reference, open_reference
from dd2.evaluation.report import Section, write_run_report
from dd2.evaluation.score import Method, Scorer
from dd2.evaluation.speed import speed_numbers
from dd2.evaluation.summary import summary
from dd2.files import writable_folder, write_atomic
from dd2.images import export_npz
from dd2.jobs.evaluate_images import evaluate_images
from dd2.jobs.run_folder import read_seconds
from dd2.processes import barrier, rank
from dd2.sampling import first_redrawn_step
from dd2.training.samples import TeacherSamples, samples_identity, weights_digest


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run, or images.

    Returns:
        What was stored.
    """
    device = pick_device(config.device)
    network = open_features(config.features, device)
    return evaluate_images(config, network, device) if config.images else _evaluate_run(config, network, device)


def _evaluate_run(config: EvaluateConfig, network: FeatureNetwork, device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    run = open_run(config.run, device)
    writable_folder(config.run, "run folder")
    spent = read_seconds(config.run)
    if "distill" not in spent or not (config.run / "versions.json").is_file():
        raise InputError(f"{config.run} lacks seconds.json or versions.json; run dd2 distill on it again, which writes them")
    for k in config.steps:
        first_redrawn_step(run.teacher.order, k)  # refuses before anything is drawn
    for m in config.skip:
        kept_steps(run.teacher.order, m)
    labels = run.teacher.backbone.num_labels
    if config.count % labels and not config.allow_unbalanced:
        raise InputError(
            f"count {config.count} is no multiple of the {labels} labels, so the classes are unbalanced; choose another count, "
            "or give --allow-unbalanced"
        )
    samples = TeacherSamples.load(config.run / "teacher_samples")
    scorer, methods = comparison(config, run, network, samples)
    reference = _reference(config, scorer, network, device)
    channels = len(reference.fits["pool"].mean)
    if config.metrics.fid_infinity:
        check_extrapolation(config.count, channels)
    found = read_features(network, torch.zeros(2, *run.teacher.tokenizer.image_shape, device=device))["pool"].shape[1]
    check_channels(found, reference)  # before anything is drawn
    numbers = scorer.run(methods, _digests(config, run, methods, len(samples.ids)), reference)
    if config.path_length:
        numbers["path_length"] = scorer.path_length(run.generator, config.path_length, config.epsilon)
    barrier()  # speed is measured when the other processes rest
    if rank() != 0:
        return numbers
    if config.speed:
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
    write_run_report(Section(config.run, numbers, scorer.shown(methods)))
    print(summary(numbers))
    print(f"wrote {config.run}/metrics.json, samples.png, curves.png and report.html")
    if config.export is not None:
        _export(config, scorer, methods["generator"])
    return numbers


def evaluation_of(run: Path, numbers: dict[str, Any]) -> EvaluateConfig:
    """The evaluation that gave a run's metrics.json, as far as it decides what is drawn."""
    made = numbers["evaluation"]
    same = {name: made[name] for name in ("count", "features", "batch", "seed")}
    return EvaluateConfig(run=run, steps=tuple(made["steps"]), skip=tuple(made["skip"]), **same)


def comparison(
    config: EvaluateConfig, run: FinishedRun, network: FeatureNetwork, samples: TeacherSamples
) -> tuple[Scorer, dict[str, Method]]:
    """What draws and scores a run's methods, and the methods."""
    banks = config.cache or config.run / "features"
    scorer = Scorer(run.teacher, network, run.sampling, config.count, config.batch, config.seed, banks, config.metrics)
    further = sorted({k for k in config.steps if k > 1})
    marginal = MarginalSampler(samples.ids, samples.labels)
    return scorer, scorer.methods(run.generator, run.ar_diffusion, marginal, further, config.skip)


def _digests(config: EvaluateConfig, run: FinishedRun, methods: dict[str, Method], count: int) -> dict[str, str | None]:
    """Hash of the weights that each method samples from, beyond the teacher's."""
    generator = weights_digest(run.generator.student)
    digests: dict[str, str | None] = {name: generator for name in methods if name.startswith("generator")}
    digests["onestep_marginal"] = f"{samples_identity(config.run / 'teacher_samples')} {count}"
    if run.ar_diffusion is not None:
        digests["ar_diffusion"] = weights_digest(run.ar_diffusion.student)
    return digests


def _reference(config: EvaluateConfig, scorer: Scorer, network: FeatureNetwork, device: torch.device) -> Reference:
    if config.reference == "teacher":
        return scorer.teacher_reference()
    return open_reference(Path(config.reference), network, device, scorer.banks, config.batch)


def _export(config: EvaluateConfig, scorer: Scorer, generator: Any) -> None:
    assert config.export is not None

    def draw(index: torch.Tensor) -> torch.Tensor:
        return generator(scorer.labels(index), scorer.seeds("methods", index))[0]

    order = torch.randperm(config.count, generator=torch.Generator().manual_seed(config.seed))
    with torch.inference_mode():
        export_npz(config.export, order, config.batch, draw)
    print(f"wrote {config.count} shuffled images to {config.export}")
