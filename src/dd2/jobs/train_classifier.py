"""dd2 train-classifier: train the digits classifier behind the demo's accuracy and Fréchet distance."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from dd2.data import digits
from dd2.errors import InputError
from dd2.evaluation.classifier import DigitsClassifier, classifier_loss, save_classifier
from dd2.jobs.run_folder import start_run
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Losses, Stage, Update


@dataclass(frozen=True)
class TrainClassifierConfig:
    """Train the digits classifier on real digits only. Writes OUT/classifier/, metrics.jsonl and checkpoints/."""

    out: Path = Path("runs/classifier")
    """Run folder; an interrupted run in it is resumed."""
    seed: int = 0
    """Seed of the weights and of every step."""
    iterations: int = 1500
    """Optimiser steps."""
    batch: int = 128
    """Images per step."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, decay="cosine", weight_decay=0.01))
    """Optimiser."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50, save_every=500))
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if min(self.iterations, self.batch) < 1:
            raise InputError("iterations and batch must be at least 1")


def train_classifier(config: TrainClassifierConfig) -> Path:
    """Run the training, or what is left of it, and print the accuracy on held-out digits.

    Returns:
        The classifier's folder.
    """
    hint = start_run(config.out, config, "train-classifier")
    torch.manual_seed(config.seed)
    classifier = DigitsClassifier()

    def loss(random: torch.Generator) -> Losses:
        return classifier_loss(classifier, *digits.batch("train", config.batch, random))

    update = Update("classifier", list(classifier.parameters()), config.optim, loss)
    stage = Stage("classifier", config.iterations, [update], {"classifier": classifier})
    Trainer(config.out, config.seed, config.loop, torch.device("cpu"), hint).run(stage)
    images, labels = digits.load("test")
    with torch.no_grad():
        correct = classifier(digits.enlarge(images)).argmax(-1) == labels
    print(f"accuracy on {len(labels)} held-out digits: {correct.float().mean():.4f}")
    folder = config.out / "classifier"
    save_classifier(folder, classifier)
    return folder
