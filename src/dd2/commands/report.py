"""dd2 report: several evaluated runs on one page."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dd2.checkpoints.runs import FinishedRun, open_run
from dd2.commands.evaluate import comparison, evaluation_of, ways_of
from dd2.data.source import open_data
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.features import FeatureNetwork, open_features
from dd2.evaluation.gallery import interpolations, nearest_training, titled
from dd2.evaluation.latency import read_points
from dd2.evaluation.report import METRICS, Section, page
from dd2.external import check_trust, is_code
from dd2.files import write_atomic
from dd2.images import png
from dd2.precision import Precision
from dd2.processes import say
from dd2.records import read_record
from dd2.sampling import Ways
from dd2.seeding import seed_of, stream

TRAINING_IMAGES = 5000
"""Training images among which the nearest is looked for."""

SAMPLES = 500
"""Samples whose distance to training images is measured."""


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained page about evaluated runs: samples of all methods at the same labels, numbers, curves, speed, nearest
    training images, walks through the noise. Opens without a network.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Run folders after dd2 evaluate."""
    out: Path = Path("report.html")
    """The page."""
    data: str = ""
    """Images that the teacher was trained on ("digits", a folder or a zip), for the nearest ones; by default those of the
    embedded teacher, and none for others."""
    points: Path | None = None
    """Others' models for the plot of quality against latency: a JSON list of {"name", "seconds" (an image), "frechet"}."""
    seed: int = 0
    """Seed of the samples that are compared with training images, and of the walks."""
    precision: Precision | None = None
    """Arithmetic in which the pictures are drawn; None: as the run was evaluated."""
    text_encoder: str = ""
    """Where the text encoder lies on this machine, if not where the model says."""
    trust: tuple[str, ...] = ()
    """Modules of yours that runs may import, because their teacher or their features were module:function."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse a page about nothing, or under another ending."""
        if not self.runs:
            raise InputError("name at least one run: dd2 report RUN [RUN ...] --out report.html")
        if self.out.suffix != ".html":
            raise InputError(f"out must end in .html, got {self.out}")


def report(config: ReportConfig) -> None:
    """Write the page.

    Raises:
        InputError: a run has not been evaluated.
    """
    others = read_points(config.points) if config.points else []
    sections = [_section(config, run.resolve()) for run in config.runs]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config.out, page(sections, others))
    say(f"wrote {config.out}")


def _section(config: ReportConfig, folder: Path) -> Section:
    device = pick_device(config.device)
    numbers = read_record(folder / "metrics.json", METRICS, f"run dd2 evaluate {folder}, which writes it")
    run = open_run(folder, device, trust=config.trust, text_encoder=config.text_encoder)
    evaluation = evaluation_of(folder, numbers, config.trust)
    evaluation = evaluation if config.precision is None else replace(evaluation, precision=config.precision)
    ways = ways_of(run, evaluation)
    if is_code(evaluation.features):
        check_trust(evaluation.features, config.trust, folder)
    network = open_features(evaluation.features, device)
    scorer, methods = comparison(evaluation, run, ways, network)
    images = scorer.shown(methods)
    pictures = []
    data = config.data or ("digits" if run.record.teacher == "digits" else "")
    if data:
        pictures.append(_nearest(config, run, ways, network, data))
    walk = titled([("from one noise to another, the label of each row kept", interpolations(ways, seed=config.seed))])
    text = "Noise along the great circle between two draws, its length kept. Jumps are where a token changes its code."
    pictures.append(("a walk through the noise", text, png(walk)))
    return Section(folder, numbers, images, pictures)


def _nearest(config: ReportConfig, run: FinishedRun, ways: Ways, network: FeatureNetwork, name: str) -> tuple[str, str, bytes]:
    """Random samples above the training images nearest to them."""
    channels, size, _ = run.teacher.tokenizer.image_shape
    data = open_data(name, size, channels)
    training, _ = data.batch("train", TRAINING_IMAGES, stream("report", "train", config.seed))
    held_out, _ = data.batch("test", SAMPLES, stream("report", "test", config.seed))
    device = run.generator.device
    cond = run.generator.conditions.default(SAMPLES, device)
    with torch.inference_mode():
        seeds = [seed_of("report", config.seed, i) for i in range(SAMPLES)]
        samples = ways.decode(ways.one_step()(cond, seeds), cond)
    found = nearest_training(network, samples, training.to(device), held_out.to(device))
    text = (
        f"Each sample above the nearest of {TRAINING_IMAGES:,} training images (augmented as in training), in the features of "
        f"the metrics. Mean distance of {SAMPLES} samples {found.distance:.2f}; of real images that nobody trained on "
        f"{found.held_out:.2f}. Copies would be much nearer than those."
    )
    return "nearest training images", text, png(titled([("samples, and under them their nearest", found.images)]))
