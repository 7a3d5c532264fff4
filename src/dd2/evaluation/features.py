"""Feature networks: what images are compared by. Inception, a classifier, or the user's own function."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dd2.checkpoints.runs import embedded
from dd2.data.scene_captions import agreement
from dd2.data.scenes import cut
from dd2.errors import InputError
from dd2.evaluation import inception
from dd2.evaluation.classifier import load_classifier
from dd2.evaluation.clean import Prepare, as_coco, as_stored
from dd2.evaluation.inception import SPATIAL_CHANNELS, Inception
from dd2.external import is_code, load_function
from dd2.files import fetched, file_digest, weights_digest
from dd2.images import byte_levels, to_uint8

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
        prepare: what brings one image as it is stored (uint8) to what `read` takes; images then may differ in size.
        agrees: from features and captions, whether images show what these say (B,); None where it cannot tell.
    """

    name: str
    digest: str
    read: Callable[[Tensor], Features]
    knows_labels: bool = False
    class_names: tuple[str, ...] = ()
    prepare: Prepare | None = None
    agrees: Callable[[Features, Sequence[str]], Tensor] | None = None


def open_features(spec: str, device: torch.device) -> FeatureNetwork:
    """The network that a command line names.

    Args:
        spec: "digits" (embedded), or a folder of dd2 train-classifier; "inception" (downloaded once), or a path to
            inception-2015-12-05.pt, read as ADM's evaluator does; "inception-clean" or "inception-coco", or either with @PATH,
            read as `CLEAN` says; or "module:function".
        device: where it runs.

    Raises:
        InputError: there is no such network.
    """
    if spec == "digits" or Path(spec).is_dir():
        return classifier_features(embedded("classifier") if spec == "digits" else Path(spec), device)
    name, _, path = spec.partition("@")
    if name == "inception" or name in CLEAN:
        file = Path(path) if path else fetched(inception.URL, inception.SHA256)
        return clean_features(name, file, device) if name in CLEAN else inception_features(file, device)
    if spec.endswith((".pt", ".pth")):
        return inception_features(Path(spec), device)
    return user_features(spec)


def classifier_features(folder: Path, device: torch.device) -> FeatureNetwork:
    """The penultimate layer of a classifier that was trained on real images only."""
    classifier = load_classifier(folder).to(device)
    sizes = classifier.config
    side = sizes.cells * sizes.image_size

    def read(images: Tensor) -> Features:
        expected = (sizes.image_channels, side, side)
        if tuple(images.shape[1:]) != expected:
            shapes = [" x ".join(map(str, shape)) for shape in (expected, images.shape[1:])]
            raise InputError(
                f"the classifier of {sizes.trained_on} reads {shapes[0]} images, these are {shapes[1]}; give --features "
                "CLASSIFIER of your data (dd2 train-classifier), module:function, or inception"
            )
        if sizes.cells > 1:
            pool = classifier.pool(classifier.maps(cut(images, sizes.cells)))
            held = classifier.output(pool).argmax(-1).view(len(images), -1)
            return {"pool": pool.view(len(images), -1), "cells": held.float()}
        maps = classifier.maps(images)
        pool = classifier.pool(maps)
        probabilities = classifier.output(pool).softmax(-1)
        return {"pool": pool, "spatial": maps[:, :SPATIAL_CHANNELS].flatten(1), "probabilities": probabilities}

    name = f"{sizes.trained_on} classifier, penultimate layer"
    if sizes.cells > 1:
        judges = sizes.trained_on == "scenes-cells"
        agrees = (lambda found, texts: agreement(texts, found["cells"].long())) if judges else None
        return FeatureNetwork(f"{name}, of {sizes.cells}^2 cells", weights_digest(classifier), read, agrees=agrees)
    return FeatureNetwork(name, weights_digest(classifier), read, knows_labels=True, class_names=classifier.class_names)


def inception_features(file: Path, device: torch.device) -> FeatureNetwork:
    """ADM's Inception from NVIDIA's file. Errors as `Inception`."""
    network = Inception(file, device)
    return FeatureNetwork("Inception of ADM (inception-2015-12-05.pt)", network.digest, network.read)


CLEAN: dict[str, tuple[Prepare, str]] = {
    "inception-clean": (as_stored, "clean-fid's resize"),
    "inception-coco": (as_coco, "middle square by Lanczos to 256, then clean-fid's resize (COCO-30k)"),
}
"""Inception as text-to-image papers read it: the name of the features -> what brings an image to it, and how that is called."""


def clean_features(name: str, file: Path, device: torch.device) -> FeatureNetwork:
    """Inception behind one of `CLEAN`. Errors as `Inception`."""
    network = Inception(file, device)
    prepare, said = CLEAN[name]
    digest = f"{network.digest} {name}"
    return FeatureNetwork(f"Inception (inception-2015-12-05.pt), {said}", digest, network.read_clean, prepare=prepare)


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
    if network.prepare is not None:
        return read_pictures(network, pictures(images), images.device)
    return _checked(network, network.read(on_uint8_grid(images)), len(images))


@torch.no_grad()
def read_pictures(network: FeatureNetwork, images: Sequence[np.ndarray], device: torch.device) -> Features:
    """As `read_features`, of images as they are stored, uint8 (H, W, channels), of any sizes; for networks that `prepare`."""
    assert network.prepare is not None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # Pillow resizes without Python's lock
        prepared = list(threads.map(network.prepare, images))
    return _checked(network, network.read(torch.stack(prepared).to(device)), len(images))


def pictures(images: Tensor) -> list[np.ndarray]:
    """Images (B, channels, H, W) in about [-1, 1] as they would be stored, each uint8 (H, W, channels)."""
    return list(to_uint8(images))


def _checked(network: FeatureNetwork, found: Features, count: int) -> Features:
    if "pool" not in found:
        raise InputError(f"features {network.name} gave {sorted(found)}; a dictionary must have 'pool'")
    for name, values in found.items():
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != count:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"features {network.name}: {name} must be ({count}, F), got {shape}")
        if not torch.isfinite(values).all():
            raise InputError(f"features {network.name}: {name} hold NaN or infinity; the images or the network are broken")
    if (p := found.get("probabilities")) is not None and not ((p >= 0).all() and ((p.float().sum(1) - 1).abs() < 1e-2).all()):
        raise InputError(
            f"features {network.name}: probabilities must not be negative and must sum to 1 in every row, as an inception score "
            "of others means nothing; give them after the softmax"
        )
    return {name: values.detach().float().cpu() for name, values in found.items()}
