"""dd2 align-decoder: the tokenizer's decoder trained so that a generator's images match a reference in given features."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dd2.checkpoints.native import save_generator
from dd2.checkpoints.record import RunRecord
from dd2.checkpoints.runs import FinishedRun, open_run
from dd2.commands.run_folder import copy_parts, read_seconds, start_run, write_seconds
from dd2.config import RunFolder
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.features import FeatureNetwork, open_features, read_features
from dd2.evaluation.metrics import check_channels
from dd2.evaluation.reference import Reference, open_reference
from dd2.frechet import FeatureStatistics, GaussianFit
from dd2.method.decoder import DecoderConfig, DecoderMatch, decoder_stage, trainable_decoder
from dd2.processes import say
from dd2.progress import progress
from dd2.tokenizers.base import DecoderAlignment
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples


@dataclass(frozen=True)
class AlignDecoderConfig:
    """Train the decoder of a finished run's tokenizer; generator, codes and encoder stay as they are.

    Writes OUT, a run folder as RUN is one, whose generator/ has the new decoder: dd2 evaluate OUT names it in every table, and
    shows the teacher with it as well. The teacher's images are the reference unless another is named, so no real image is
    needed. Features that were trained on prove nothing: evaluate with others too.
    """

    run: RunFolder
    """Run folder of dd2 distill or dd2 dd1."""
    out: Path = Path("runs/aligned_decoder")
    """Folder to write; an interrupted run in it is resumed."""
    features: tuple[str, ...] = ("digits",)
    """Networks to match in, as in dd2 evaluate; their gradients are needed."""
    reference: str = "teacher"
    """"teacher": its samples by the tokenizer's own decoder; or as in dd2 evaluate: statistics of the one network, or images."""
    count: int = 50_000
    """Teacher samples of the reference, as far as the run has them."""
    batch: int = 250
    """Images at a time when the reference is looked at."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The training."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""
    text_encoder: str = ""
    """Where the text encoder lies on this machine, if not where the model says."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    seed: int = 0
    """Seed of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse nothing to match, and counts too small."""
        if not self.features or len(set(self.features)) < len(self.features):
            raise InputError("features must name at least one network, and each once")
        if self.count < 2 or self.batch < 1:
            raise InputError(f"count must be at least 2 and batch at least 1, got {self.count} and {self.batch}")


def align_decoder(config: AlignDecoderConfig) -> Path:
    """Run the training, or what is left of it.

    Returns:
        The generator's folder.
    """
    device = pick_device(config.device)
    run = open_run(config.run, device, trust=config.trust, text_encoder=config.text_encoder)
    if run.generator.code:
        raise InputError(
            f"{config.run}: the teacher is code of yours, which decodes in its own way; there is no decoder to train"
        )
    if (before := run.generator.tokenizer.aligned) is not None:
        raise InputError(f"the decoder of {config.run} is {before} already; give the run that it was made from")
    tokenizer = trainable_decoder(run.generator.tokenizer)
    networks = {spec: open_features(spec, device) for spec in config.features}
    reads = {spec: _differentiable(network) for spec, network in networks.items()}
    channels = _check_gradients(run, networks)
    if config.out.resolve() == config.run.resolve():
        raise InputError(f"out {config.out} is the run itself; choose another folder")
    if not (config.run / "seconds.json").is_file():
        raise InputError(f"{config.run} lacks seconds.json; run its command again, which writes it")
    references = {spec: _opened_reference(config, network, channels[spec], device) for spec, network in networks.items()}
    record = dataclasses.replace(run.record, command="align-decoder", teacher=str(_teacher_of(config.run, run.record)))
    trainer = Trainer(config.out, config.seed, config.loop, device, start_run(config.out, config, "align-decoder", record))
    copy_parts(config.run, config.out, "teacher_samples", "ar_diffusion")
    samples = TeacherSamples.load(config.out / "teacher_samples", run.teacher)
    start = time.perf_counter()
    fits = {
        spec: _of_teacher(config, run, samples, networks[spec]) if reference is None else reference.fits["pool"]
        for spec, reference in references.items()
    }
    match = DecoderMatch(reads, fits, config.decoder, device)
    seconds = {**read_seconds(config.run), "reference": time.perf_counter() - start}
    seconds["decoder"] = trainer.run(decoder_stage(run.generator, tokenizer, samples, match, config.decoder))
    write_seconds(config.out, seconds)
    matched = "the teacher's images"
    if (reference := references[config.features[0]]) is not None:
        matched = f"{Path(config.reference).name} (SHA-256 {reference.described['sha256'][:12]})"
    names, digests = zip(*((network.name, network.digest) for network in networks.values()), strict=True)
    tokenizer.aligned = DecoderAlignment(matched, names, digests, config.decoder.iterations)
    folder = config.out / "generator"
    save_generator(folder, dataclasses.replace(run.generator, tokenizer=tokenizer))
    say(f"wrote {folder}, whose decoder is {tokenizer.aligned}")
    return folder


def _teacher_of(run: Path, record: RunRecord) -> str | Path:
    """What the teacher is called from another folder: stage 0's own copy lies in the run."""
    adapted = run / "teacher"
    return adapted.resolve() if adapted.is_dir() else record.teacher


def _differentiable(network: FeatureNetwork) -> Callable[[Tensor], Tensor]:
    return lambda images: network.read(images)["pool"]


def _check_gradients(run: FinishedRun, networks: dict[str, FeatureNetwork]) -> dict[str, int]:
    """The channels of each network, whose features must have a gradient."""
    shape, channels = run.teacher.tokenizer.image_shape, {}
    for spec, network in networks.items():
        images = torch.zeros(2, *shape, device=run.generator.device, requires_grad=True)
        if network.prepare is not None:
            raise InputError(
                f"the decoder is trained through its features, and {network.name} resizes stored images without gradient"
            )
        channels[spec] = read_features(network, images)["pool"].shape[1]  # refuses other sizes, and what is no features
        if not network.read(images)["pool"].requires_grad:
            raise InputError(f"features {spec} give no gradient; a function that is matched must not switch gradients off")
    return channels


def _opened_reference(
    config: AlignDecoderConfig, network: FeatureNetwork, channels: int, device: torch.device
) -> Reference | None:
    """A reference that is no teacher, checked against the network."""
    if config.reference == "teacher":
        return None
    path, cache = Path(config.reference), config.run / "features"
    found = open_reference(path, network, device, cache, config.batch)
    check_channels(channels, found)
    return found


def _of_teacher(config: AlignDecoderConfig, run: FinishedRun, samples: TeacherSamples, network: FeatureNetwork) -> GaussianFit:
    statistics = FeatureStatistics()
    rows = torch.arange(min(config.count, len(samples)))
    with torch.no_grad(), progress(f"reference, {network.name}", len(rows), "img") as bar:
        for part in rows.split(config.batch):
            tokens, labels = samples.take(part)
            statistics.add(read_features(network, run.teacher.decode(tokens, run.teacher.conditions(labels)))["pool"])
            bar.update(len(part))
    fit = statistics.fit()
    if len(rows) <= len(fit.mean):
        say(f"note: {len(rows)} teacher samples for {len(fit.mean)} features of {network.name}: their covariance is singular")
    return fit
