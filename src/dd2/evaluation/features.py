"""Feature networks: what images are compared by. The digits classifier, or the user's own function."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.evaluation.classifier import load_classifier


@dataclass(frozen=True)
class FeatureNetwork:
    """A named feature function.

    Attributes:
        name: printed beside every number made with it.
        features: images (B, channels, H, W) in [-1, 1] -> (B, F).
        classify: images -> predicted labels (B,), or None where the network has no classes.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None


def digits_features(folder: Path, device: torch.device) -> FeatureNetwork:
    """The penultimate layer of a digits classifier that was trained on real digits only."""
    classifier = load_classifier(folder).to(device)
    return FeatureNetwork("digits classifier, penultimate layer", classifier.features, lambda x: classifier(x).argmax(-1))


def user_features(spec: str) -> FeatureNetwork:
    """A function `module:function` of the user's, found in the current folder or among installed packages.

    Raises:
        InputError: there is no such module or function.
    """
    module_name, _, function = spec.partition(":")
    if not (module_name and function):
        raise InputError(f"features must be 'digits' or 'module:function', got {spec!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"features {spec}: the module cannot be imported ({error})") from error
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, function, None)):
        raise InputError(f"features {spec}: module {module_name} has no function {function}")
    return FeatureNetwork(spec, getattr(module, function))
