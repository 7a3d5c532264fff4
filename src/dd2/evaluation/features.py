"""Feature networks: what images are compared by. Inception, a classifier, or the user's own function."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd2.checkpoints.runs import embedded
from dd2.errors import InputError
from dd2.evaluation import inception
from dd2.evaluation.classifier import load_classifier
from dd2.evaluation.inception import SPATIAL_CHANNELS, Inception
from dd2.external import is_code, load_function
from dd2.files import fetched, file_digest, weights_digest
from dd2.images import byte_levels

Features = dict[str, Tensor]
"""Of B images: "pool" (B, F); where the network has them, "spatial" (B, S) for sFID and "probabilities" (B, K)."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A named feature function.

    Attributes:
        name: printed beside every number made with it.
        digest: hash of the weights or of the user's source; features on disk are found again under it.
        read: images (B, channels, H, W) in [-1, 1] -> features.
        knows_labels: whether the most probable class is a label of the evaluated model, so that accuracy means something.
        class_names: what it calls those classes, where it knows.
    """

    name: str
    digest: str
    read: Callable[[Tensor], Features]
    knows_labels: bool = False
    class_names: tuple[str, ...] = ()


def open_features(spec: str, device: torch.device) -> FeatureNetwork:
    """The network that a command line names.

    Args:
        spec: "digits" (embedded), or a folder of dd2 train-classifier; "inception" (downloaded once), or a path to
            inception-2015-12-05.pt; or "module:function".
        device: where it runs.

    Raises:
        InputError: there is no such network.
    """
    if spec == "digits" or Path(spec).is_dir():
        return classifier_features(embedded("classifier") if spec == "digits" else Path(spec), device)
    if spec == "inception":
        return inception_features(fetched(inception.URL, inception.SHA256), device)
    if spec.endswith((".pt", ".pth")):
        return inception_features(Path(spec), device)
    return user_features(spec)


def classifier_features(folder: Path, device: torch.device) -> FeatureNetwork:
    """The penultimate layer of a classifier that was trained on real images only."""
    classifier = load_classifier(folder).to(device)
    sizes = classifier.config

    def read(images: Tensor) -> Features:
        expected = (sizes.image_channels, sizes.image_size, sizes.image_size)
        if tuple(images.shape[1:]) != expected:
            shapes = [" x ".join(map(str, shape)) for shape in (expected, images.shape[1:])]
            raise InputError(
                f"the classifier of {sizes.trained_on} reads {shapes[0]} images, these are {shapes[1]}; give --features "
                "CLASSIFIER of your data (dd2 train-classifier), module:function, or inception"
            )
        maps = classifier.maps(images)
        pool = classifier.pool(maps)
        probabilities = classifier.output(pool).softmax(-1)
        return {"pool": pool, "spatial": maps[:, :SPATIAL_CHANNELS].flatten(1), "probabilities": probabilities}

    name = f"{sizes.trained_on} classifier, penultimate layer"
    return FeatureNetwork(name, weights_digest(classifier), read, knows_labels=True, class_names=classifier.class_names)


def inception_features(file: Path, device: torch.device) -> FeatureNetwork:
    """ADM's Inception from NVIDIA's file. Errors as `Inception`."""
    network = Inception(file, device)
    return FeatureNetwork("Inception of ADM (inception-2015-12-05.pt)", network.digest, network.read)


def user_features(spec: str) -> FeatureNetwork:
    """A function `module:function` of the user's, found in the current folder or among installed packages.

    It maps images (B, channels, H, W) in [-1, 1] to (B, F), or to a dictionary of `Features`. Features on disk are kept under
    the hash of the module's file: weights that it loads from elsewhere should be named there.

    Raises:
        InputError: there is no such module or function.
    """
    if not is_code(spec):
        raise InputError(
            f"features must be 'digits', a classifier's folder, 'inception', its path (.pt) or 'module:function', got {spec!r}"
        )
    called = load_function(spec, "features")

    def read(images: Tensor) -> Features:
        found: Any = called(images)
        return dict(found) if isinstance(found, Mapping) else {"pool": found}

    source = getattr(sys.modules[spec.partition(":")[0]], "__file__", None)
    digest = file_digest(Path(source)) if source else spec
    return FeatureNetwork(spec, digest, read)


def on_uint8_grid(images: Tensor) -> Tensor:
    """Images in about [-1, 1] as they come back from a PNG: clamped and rounded to 256 levels."""
    return byte_levels(images) / 127.5 - 1


@torch.no_grad()
def read_features(network: FeatureNetwork, images: Tensor) -> Features:
    """Features of a batch, rounded to bytes first, checked and on the CPU in float32.

    Raises:
        InputError: the network gives something else than features, or numbers that are not finite.
    """
    found = network.read(on_uint8_grid(images))
    if "pool" not in found:
        raise InputError(f"features {network.name} gave {sorted(found)}; a dictionary must have 'pool'")
    for name, values in found.items():
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(images):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"features {network.name}: {name} must be ({len(images)}, F), got {shape}")
        if not torch.isfinite(values).all():
            raise InputError(f"features {network.name}: {name} hold NaN or infinity; the images or the network are broken")
    if (p := found.get("probabilities")) is not None and not ((p >= 0).all() and ((p.float().sum(1) - 1).abs() < 1e-2).all()):
        raise InputError(
            f"features {network.name}: probabilities must not be negative and must sum to 1 in every row, as an inception score "
            "of others means nothing; give them after the softmax"
        )
    return {name: values.detach().float().cpu() for name, values in found.items()}
