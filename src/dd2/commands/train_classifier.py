"""dd2 train-classifier: the network behind accuracy and Fréchet distance where Inception does not fit."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.commands.run_folder import start_run
from dd2.data.source import first_shape, open_data
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from dd2.losses import Losses
from dd2.processes import say
from dd2.seeding import on_cpu
from dd2.training.health import loss_rises
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update

HELD_OUT = 20
"""Batches of held-out images that the accuracy is measured on."""


@dataclass(frozen=True)
class ClassifierSizes:
    """Sizes of a classifier to train; its classes come from the data."""

    image_size: int | None = None
    """Height and width of the images, 4 times a power of two; None: the nearest one to those of the first image."""
    image_channels: int | None = None
    """1 (grey) or 3 (RGB); None: those of the first image."""
    width: int = 16
    """Channels of the first convolution; the others have twice as many."""
    features: int = 64
    """Channels of the penultimate layer."""
    cells: int = 1
    """Cells on a side of the images that it will read, where the data are single cells (scenes-cells: 2)."""

    def resolved(self, data: str) -> "ClassifierSizes":
        """The same with the sizes that the data decides, which are said."""
        if self.image_size is not None and self.image_channels is not None:
            return self
        channels, *sides = first_shape(data)
        size = min((4 * 2**k for k in range(1, 7)), key=lambda size: abs(math.log(size / min(sides))))
        found = replace(
            self,
            image_size=size if self.image_size is None else self.image_size,
            image_channels=channels if self.image_channels is None else self.image_channels,
        )
        say(
            f"classifier of {found.image_channels} x {found.image_size} x {found.image_size} images, as the first is {channels} "
            f"x {sides[0]} x {sides[1]} (classifier.image_size and image_channels give another size)"
        )
        return found


@dataclass(frozen=True)
class TrainClassifierConfig:
    """Train a classifier on real images only, for dd2 evaluate --features OUT/classifier.

    Writes OUT/classifier/, metrics.jsonl and checkpoints/.
    """

    data: str = "digits"
    """"digits" or "scenes-cells" (embedded), or a folder or zip of CLASS/IMAGE files or of MNIST's."""
    out: Path = Path("runs/classifier")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the weights and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    iterations: int = 1500
    """Optimiser steps."""
    batch: int = 128
    """Images per step."""
    classifier: ClassifierSizes = field(default_factory=ClassifierSizes)
    """Sizes."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, decay="cosine", weight_decay=0.01))
    """Optimiser."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50, save_every=500))
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if min(self.iterations, self.batch) < 1:
            raise InputError("iterations and batch must be at least 1")


def train_classifier(config: TrainClassifierConfig) -> Path:
    """Run the training, or what is left of it, and print the accuracy on held-out images.

    Returns:
        The classifier's folder.
    """
    device = pick_device(config.device)
    config = replace(config, classifier=config.classifier.resolved(config.data))
    image_size, image_channels = config.classifier.image_size or 0, config.classifier.image_channels or 0
    data = open_data(config.data, image_size, image_channels)
    if data.captions:
        raise InputError(f"a classifier needs classes, and {config.data} has captions; of the scenes, give --data scenes-cells")
    given, name = config.classifier, Path(config.data).stem
    sizes = ClassifierConfig(image_size, image_channels, data.num_classes, given.width, given.features, name, given.cells)
    hint = start_run(config.out, config, "train-classifier")
    torch.manual_seed(config.seed)
    classifier = Classifier(sizes).to(device)
    classifier.class_names = data.class_names

    def loss(random: torch.Generator) -> Losses:
        images, labels = data.batch("train", config.batch, on_cpu(random))
        return classifier_loss(classifier, images.to(device), labels.to(device))

    update = Update("classifier", list(classifier.parameters()), config.optim, loss, replicated=True)
    stage = Stage("classifier", config.iterations, [update], {"classifier": classifier}, signs=(loss_rises("classifier/loss"),))
    Trainer(config.out, config.seed, config.loop, device, hint).run(stage)
    random, right = torch.Generator().manual_seed(config.seed), []
    with torch.no_grad():
        for _ in range(HELD_OUT):
            images, labels = data.batch("test", config.batch, random)
            right.append((classifier(images.to(device)).argmax(-1).cpu() == labels).float().mean())
    say(f"accuracy on {HELD_OUT * config.batch:,} draws of held-out images: {torch.stack(right).mean():.4f}")
    folder = config.out / "classifier"
    save_classifier(folder, classifier)
    return folder


def classifier_loss(classifier: Classifier, images: Tensor, labels: Tensor) -> Losses:
    """Cross-entropy and accuracy of one batch."""
    logits = classifier(images)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy.detach()}
