"""The digits classifier: labels for accuracy, and its penultimate layer as the feature network of the demo's metric."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.checkpoints.native import load_weights, read_config, write_model
from dd2.files import atomic_folder
from dd2.training.stage import Losses

FEATURES = 64
"""Channels of the penultimate layer."""


class DigitsClassifier(nn.Module):
    """A small convolutional network over (B, 1, 16, 16) digits, trained on real digits only."""

    def __init__(self) -> None:
        super().__init__()
        width = 16
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.hidden = nn.Linear(2 * width * 16, FEATURES)
        self.output = nn.Linear(FEATURES, 10)

    def maps(self, images: Tensor) -> Tensor:
        """(B, 1, 16, 16) in [-1, 1] -> (B, 32, 4, 4) activations of the last convolution."""
        x = F.silu(self.conv1(images))
        x = F.silu(self.conv2(x))
        return F.silu(self.conv3(x))

    def pool(self, maps: Tensor) -> Tensor:
        """(B, 32, 4, 4) -> (B, 64) activations of the penultimate layer."""
        return F.silu(self.hidden(maps.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 16, 16) -> (B, 10) logits."""
        return self.output(self.pool(self.maps(images)))


def classifier_loss(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> Losses:
    """Cross-entropy and accuracy of one batch."""
    logits = classifier(images)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy.detach()}


def save_classifier(folder: Path, classifier: DigitsClassifier, dtype: torch.dtype = torch.float32) -> None:
    """Write a classifier folder."""
    with atomic_folder(folder) as partial:
        write_model(partial, classifier, {"kind": "classifier"}, dtype)


def load_classifier(folder: Path) -> DigitsClassifier:
    """Read a classifier folder, in evaluation mode and float32."""
    read_config(folder, "classifier")
    classifier = DigitsClassifier()
    load_weights(folder, classifier)
    return classifier.eval().requires_grad_(False)
