"""A small image classifier: labels for accuracy, and its penultimate layer as a feature network where Inception does not fit."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.checkpoints.folder import check_sizes, construct, load_weights, names_in, names_said, read_config, write_model
from dd2.errors import InputError
from dd2.files import atomic_folder
from dd2.processes import first_process_only


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a classifier; the defaults are the digits'."""

    image_size: int = 16
    """Height and width of the images: 4 times a power of two."""
    image_channels: int = 1
    """1 (grey) or 3 (RGB)."""
    num_classes: int = 10
    """Classes."""
    width: int = 16
    """Channels of the first convolution; the others have twice as many."""
    features: int = 64
    """Channels of the penultimate layer."""
    trained_on: str = "digits"
    """What it was trained on; printed beside every number made with it."""
    cells: int = 1
    """Cells on a side of the images that it is for: each is read by itself, as an image of image_size."""

    def __post_init__(self) -> None:
        """Refuse sizes that no such network has."""
        halved = self.image_size // 4
        if self.image_size % 4 or halved < 2 or halved & (halved - 1):
            raise InputError(f"classifier image_size must be 8, 16, 32, 64 or another 4 * 2^k, got {self.image_size}")
        if self.image_channels not in (1, 3) or min(self.num_classes, self.width, self.features, self.cells) < 1:
            raise InputError("classifier image_channels must be 1 or 3, and num_classes, width, features and cells at least 1")


class Classifier(nn.Module):
    """Convolutions that halve the image down to 4 x 4, and two linear layers.

    Attributes:
        class_names: of its classes in order, where the data named them.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width, halvings = config.width, (config.image_size // 4).bit_length() - 1
        self.conv1 = nn.Conv2d(config.image_channels, width, 3, padding=1)
        for index in range(halvings):
            convolution = nn.Conv2d(width if index == 0 else 2 * width, 2 * width, 3, stride=2, padding=1)
            self.add_module(f"conv{index + 2}", convolution)
        self.halvings = halvings
        self.hidden = nn.Linear(2 * width * 16, config.features)
        self.output = nn.Linear(config.features, config.num_classes)

    def maps(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) in [-1, 1] -> (B, 2 width, 4, 4) activations of the last convolution."""
        x = images
        for index in range(self.halvings + 1):
            x = F.silu(self.get_submodule(f"conv{index + 1}")(x))
        return x

    def pool(self, maps: Tensor) -> Tensor:
        """(B, 2 width, 4, 4) -> (B, features) activations of the penultimate layer."""
        return F.silu(self.hidden(maps.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, num_classes) logits."""
        return self.output(self.pool(self.maps(images)))


@first_process_only
def save_classifier(folder: Path, classifier: Classifier, dtype: torch.dtype = torch.float32) -> None:
    """Write a classifier folder."""
    config = {"kind": "classifier", "config": asdict(classifier.config), **names_said(classifier.class_names)}
    with atomic_folder(folder) as partial:
        write_model(partial, classifier, config, dtype)


def load_classifier(folder: Path) -> Classifier:
    """Read a classifier folder, in evaluation mode and float32.

    Raises:
        InputError: it is missing, damaged or something else.
    """
    config = read_config(folder, "classifier")
    sizes = construct(ClassifierConfig, config.get("config"), folder / "config.json")
    check_sizes(sizes, folder / "model.safetensors", folder / "config.json")
    classifier = Classifier(sizes)
    load_weights(folder, classifier)
    classifier.class_names = names_in(config, sizes.num_classes, folder / "config.json")
    return classifier.eval().requires_grad_(False)
