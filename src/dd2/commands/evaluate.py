"""dd2 evaluate: honest numbers and pictures of a distilled run beside its teacher's, or of anybody's images."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dd2.baselines.marginal import MarginalSampler
from dd2.baselines.skip import kept_steps
from dd2.checkpoints.runs import FinishedRun, Texts, open_run
from dd2.commands.evaluate_images import evaluate_images
from dd2.commands.guidance import guidance_of
from dd2.commands.run_folder import read_seconds
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.clip import ClipScore
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.curve import Point, curve_numbers, curve_plot, draw_checkpoints
from dd2.evaluation.features import FeatureNetwork, open_features, read_features
from dd2.evaluation.gallery import captioned
from dd2.evaluation.health import signs
from dd2.evaluation.methods import Method, absent, in_steps, methods, one_step_method
from dd2.evaluation.metrics import check_channels, check_extrapolation, warnings
from dd2.evaluation.reference import Reference, open_reference
from dd2.evaluation.report import Section, write_run_report
from dd2.evaluation.score import Scorer
from dd2.evaluation.speed import speed_numbers
from dd2.evaluation.summary import OWN_DECODER, summary
from dd2.fields import flat
from dd2.files import writable_folder, write_atomic
from dd2.images import png
from dd2.precision import name_of, pick_precision
from dd2.processes import rank, say
from dd2.provenance import commit, machine, read_versions
from dd2.sampling import Ways, first_redrawn_step
from dd2.teachers.code import require_codes
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.filtering import OtherSampling
from dd2.text.captions import listed
from dd2.text.prompts import EMBEDDED, Prompts
from dd2.training.health import findings
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples, samples_identity
from dd2.training.store import Store
from dd2.writers import NpzWriter


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run, or images.

    Returns:
        What was stored; empty on all processes but the first.
    """
    device = pick_device(config.device)
    pick_precision(config.precision, device)  # refuses before anything is read
    network = open_features(config.features, device)
    if config.path_length and network.prepare is not None:
        raise InputError(f"path_length needs features of images as they are drawn, and {network.name} resizes stored ones")
    clips = [ClipScore(spec, device) for spec in config.clip]
    if config.images:
        return evaluate_images(config, network, clips, device)
    return _evaluate_run(config, network, clips, device)


def _evaluate_run(
    config: EvaluateConfig, network: FeatureNetwork, clips: Sequence[ClipScore], device: torch.device
) -> dict[str, Any]:
    start = time.perf_counter()
    prompts = listed(config.prompts)
    run = open_run(config.run, device, prompts, config.trust, config.text_encoder)
    known = _known_prompts(run, prompts)
    place = config.run / "prompts" / _name_of(config.prompts, known) if config.prompts else config.run
    writable_folder(place, "run folder")
    spent = read_seconds(config.run)
    if not spent or not (config.run / "versions.json").is_file():
        raise InputError(f"{config.run} lacks seconds.json or versions.json; run dd2 distill on it again, which writes them")
    read_versions(config.run / "versions.json")  # refuses a damaged one before anything is drawn
    for k in config.steps:
        first_redrawn_step(run.teacher, run.sampling, k)  # refuses before anything is drawn
    for k in config.rounds:
        run.generator.student.in_rounds(k)
    for m in config.skip:
        kept_steps(require_codes(run.teacher, f"skip-{m}").order, m)
    for count in config.teacher_steps:
        in_steps(run.teacher, run.sampling, count)
    run.teacher.check(config.teacher_at.applied(run.sampling))
    labels = run.teacher.conditions.num_labels
    if config.count % labels and not config.allow_unbalanced:
        near = config.count // labels * labels
        raise InputError(
            f"count {config.count} is no multiple of the {labels} labels, so the classes are unbalanced; choose another count "
            f"({near if near > 1 else 2 * labels} or {near + labels}), or give --allow-unbalanced"
        )
    if clips and known is None:
        raise InputError(
            "clip needs captions whose texts are known, which this run's labels are not; leave it out, or give --prompts"
        )
    ways = ways_of(run, config)
    scorer, compared = comparison(config, run, ways, network)
    scorer = replace(scorer, clips=clips, groups=() if known is None else known.groups)
    reference = _reference(config, scorer, compared, network, device)
    channels = len(reference.fits["pool"].mean)
    if config.metrics.fid_infinity:
        check_extrapolation(config.count, channels)
    found = read_features(network, torch.zeros(2, *run.teacher.tokenizer.image_shape, device=device))["pool"].shape[1]
    check_channels(found, reference)  # before the methods are drawn
    points = _drawn_curve(config, run, spent, scorer) if config.curve else []
    banks = scorer.drawn(compared)  # all processes have waited for each other; what follows is done once
    if rank() != 0:
        return {}
    numbers = scorer.numbers(compared, banks, reference)
    if config.path_length:
        numbers["path_length"] = scorer.path_length(run.generator, config.path_length, config.epsilon)
    if config.speed:
        numbers |= speed_numbers(ways, compared, config.batch)
    pictures = []
    if points:
        floor, worst = numbers["frechet"]["floor"], numbers["frechet"]["onestep_marginal"]
        numbers["curve"] = curve_numbers(points, reference, floor, worst, network.knows_labels)
        plot = curve_plot({"generator": [numbers["curve"]]}, floor, worst)
        pictures.append(("Distance against training", "Every checkpoint that the run keeps, scored as its generator is.", plot))
    seconds = {**spent, "evaluate": time.perf_counter() - start}
    seconds["total"] = sum(seconds.values())
    decides = {key: value for key, value in flat(config).items() if key not in ("run", "device", "trust")}
    numbers |= {
        "seconds": seconds,
        "count": config.count,
        "features": network.name,
        "features_digest": network.digest,
        "evaluation": {
            **decides,
            **(known.described() if known is not None else {}),
            **({"clip_digests": {clip.name: clip.digest for clip in clips}} if clips else {}),
            "precision": scorer.precision,
            "made": {"machine": machine(device), "torch": str(torch.__version__), "commit": commit()},
            "reference": reference.described,
            "images_per_label": config.count / labels,
            "seeds": f"one per image, derived from {config.seed}",
            "rounding": "uint8, round(127.5 x + 127.5)",
            "sampling": run.sampling.described(),
            "decoder": str(run.generator.tokenizer.aligned or OWN_DECODER),
            "decoding": "tokens as drawn" + ("; nearest codes in generator_nearest" if "generator_nearest" in compared else ""),
        },
        "absent": absent(run.teacher),
        "warnings": [
            *signs(numbers["metrics"], numbers["gap_closed"]),
            *(f"training: {text}" for text in findings(MetricsLog(config.run / "metrics.jsonl").rows())),
            *warnings(config.count, channels, reference, config.metrics, numbers["metrics"]["generator"]),
            *_trained_on(run, network),
            *_other_classes(run, network),
            *_of_teacher(config, run),
            *_of_prompts(config),
        ],
    }
    write_atomic(place / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    texts, of_prompts = scorer.shown_prompts(compared)
    if texts:
        picture = png(captioned(texts, of_prompts))
        write_atomic(place / "prompts.png", picture)
        pictures.append(("Prompts", "Teacher and one step, at the same seeds.", picture))
    write_run_report(Section(config.run, numbers, scorer.shown(compared), pictures), place)
    say(summary(numbers))
    say(f"wrote {place}/metrics.json, samples.png, {'prompts.png, ' if texts else ''}curves.png and report.html")
    if config.export is not None:
        _export(config.export, config, scorer, compared["generator"])
    return numbers


def _known_prompts(run: FinishedRun, asked: Texts) -> Prompts | None:
    """What the labels of a run say, where they are captions whose texts are known.

    Args:
        run: opened with what was asked for.
        asked: prompts, the name of a file of features, or nothing: then they are the run's own captions.
    """
    conditions = run.teacher.conditions
    if not isinstance(conditions, CaptionLabels) or not conditions.class_names:
        return None
    named = asked or listed(run.record.captions)
    return named if isinstance(named, Prompts) else Prompts(conditions.class_names, named)


def _name_of(source: str, known: Prompts | None) -> str:
    """Of the folder of a list's results: two lists never share one."""
    if source in EMBEDDED:
        return source
    return f"{Path(source).stem}-{known.digest()[:8] if known is not None else 'features'}"


def _drawn_curve(config: EvaluateConfig, run: FinishedRun, spent: dict[str, float], scorer: Scorer) -> list[tuple[Point, Store]]:
    """Samples of every checkpoint. The ways are made anew for each: in half precision they hold copies of the weights."""
    return draw_checkpoints(config.run, run, spent, scorer, lambda: one_step_method(ways_of(run, config), run.teacher))


def _of_prompts(config: EvaluateConfig) -> list[str]:
    if not config.prompts:
        return []
    return [
        "onestep*, and with it gap_closed, is by frequencies of the whole data set: the prompts are not those of the teacher "
        "samples"
    ]


def _trained_on(run: FinishedRun, network: FeatureNetwork) -> list[str]:
    aligned = run.generator.tokenizer.aligned
    if aligned is None or network.digest not in aligned.digests:
        return []
    return [f"the decoder was trained on the distance in {network.name}: what is measured there proves nothing by itself"]


def _other_classes(run: FinishedRun, network: FeatureNetwork) -> list[str]:
    known, own = network.class_names, run.generator.conditions.class_names
    if isinstance(run.generator.conditions, CaptionLabels):
        return []
    if not known or not own or known == own:
        return []
    first = next((pair for pair in zip(own, known, strict=False) if pair[0] != pair[1]), (len(own), len(known)))
    return [
        f"the classes of {network.name} are others than the run's ({first[1]} in place of {first[0]}): accuracy means nothing"
    ]


def _of_teacher(config: EvaluateConfig, run: FinishedRun) -> list[str]:
    """What the kind of the teacher makes of the comparison."""
    if run.teacher.in_steps(run.sampling, 1) is None:
        return []
    found = []
    if run.teacher.num_steps(run.sampling) == 1:
        found.append("the teacher itself draws in one AR step, as onestep* does: gap_closed compares noise")
    if config.marginal != "class":
        found.append("marginal has no effect: onestep* is the teacher in one AR step")
    if run.sampling.temperature != 1:
        found.append("the teacher's rows are drawn at another temperature than 1, which is what the generator learned")
    return found


def evaluation_of(run: Path, numbers: dict[str, Any], trust: tuple[str, ...]) -> EvaluateConfig:
    """The evaluation that gave a run's metrics.json, as far as it decides what is drawn."""
    made = numbers["evaluation"]
    same = {name: made[name] for name in ("count", "features", "batch", "seed", "prefix", "marginal")}
    same["precision"] = made.get("precision", "float32")
    same |= {name: tuple(made.get(name, ())) for name in ("steps", "skip", "teacher_steps")}
    at = {name: made.get(f"teacher_at.{name}") for name in OtherSampling.__dataclass_fields__}
    same |= {"teacher_at": OtherSampling(**at), "guidance": made.get("guidance", False)}
    return EvaluateConfig(run=run, trust=trust, **same)


def ways_of(run: FinishedRun, config: EvaluateConfig) -> Ways:
    """What an evaluation draws from."""
    ways = Ways(run.generator, run.teacher, run.sampling, run.ar_diffusion, config.prefix)
    return ways.in_precision(pick_precision(config.precision, run.generator.device))


def comparison(config: EvaluateConfig, run: FinishedRun, ways: Ways, network: FeatureNetwork) -> tuple[Scorer, dict[str, Method]]:
    """What draws and scores a run's methods, and the methods."""
    folder = config.run / "teacher_samples"
    samples = TeacherSamples.load(folder, run.teacher)
    banks = config.cache or config.run / "features"
    precision = name_of(ways.precision)
    scorer = Scorer(run.teacher, network, run.sampling, config.count, config.batch, config.seed, banks, precision, config.metrics)
    over = "dataset" if config.prompts else config.marginal
    marginal, made_of = MarginalSampler(samples, over), f"{samples_identity(folder)} {len(samples)}"
    guidance = guidance_of(config.run, run) if config.guidance else None
    rows = config.steps, config.skip, config.teacher_steps, config.teacher_at, guidance, config.rounds
    return scorer, methods(ways, run.teacher, marginal, made_of, *rows)


def _reference(
    config: EvaluateConfig, scorer: Scorer, compared: dict[str, Method], network: FeatureNetwork, device: torch.device
) -> Reference:
    if config.reference == "teacher":
        return scorer.teacher_reference(compared["teacher"])
    return open_reference(Path(config.reference), network, device, scorer.banks, config.batch)


def _export(out: Path, config: EvaluateConfig, scorer: Scorer, generator: Method) -> None:
    def draw(index: torch.Tensor) -> torch.Tensor:
        return generator.draw(scorer.labels(index), scorer.seeds("methods", index))[0]

    order = torch.randperm(config.count, generator=torch.Generator().manual_seed(config.seed))
    writable_folder(out.parent, "output folder")
    with NpzWriter(out) as writer, torch.inference_mode():
        for index in order.split(config.batch):
            writer.add(draw(index), scorer.labels(index).tolist(), scorer.seeds("methods", index))
    say(f"wrote {config.count} shuffled images to {out}")
