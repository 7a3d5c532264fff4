"""dd2 evaluate --images: anybody's images against a reference."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dd2.errors import InputError
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.features import FeatureNetwork
from dd2.evaluation.images import ImageSet
from dd2.evaluation.metrics import scores, warnings
from dd2.evaluation.reference import image_bank, open_reference
from dd2.evaluation.summary import described
from dd2.fields import flat
from dd2.files import writable_folder, write_atomic
from dd2.processes import rank, say


def evaluate_images(config: EvaluateConfig, network: FeatureNetwork, device: torch.device) -> dict[str, Any]:
    """Score a set of images; what `evaluate` does with --images."""
    assert config.images is not None
    path = Path(os.path.realpath(config.images))
    images = ImageSet(path)
    say(images.said())
    balance = _checked_draws(config, images)
    out = path.with_name(f"{path.name}.dd2")
    writable_folder(out, "folder beside the images")
    digest = images.digest()
    cache = config.cache or out / "features"
    reference = open_reference(Path(config.reference), network, device, cache, config.batch)
    bank = image_bank(images, network, device, cache, config.batch, digest)
    if rank() != 0:
        return {}
    found = scores(bank, reference, config.metrics, config.seed)
    numbers = {
        "metrics": {"images": found},
        "count": len(images),
        "features": network.name,
        "features_digest": network.digest,
        "evaluation": {
            **{key: value for key, value in flat(config).items() if key.startswith(("metrics.", "seed", "features"))},
            "images": str(path),
            "sha256": digest,
            "seeds": "unknown" if images.seeds is None else f"{len(set(images.seeds))} different ones",
            "images_per_label": balance,
            "reference": reference.described,
            "rounding": "uint8, as stored",
        },
        "warnings": warnings(len(images), len(reference.fits["pool"].mean), reference, config.metrics, found),
    }
    write_atomic(out / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    say("\n".join(f"{name:22}{value:12.4f}" for name, value in found.items()))
    say(described(numbers))
    say(f"wrote {out}/metrics.json")
    return numbers


def _checked_draws(config: EvaluateConfig, images: ImageSet) -> str:
    """Refuse repeated seeds and unbalanced labels, as far as the images tell; how many there are of each label."""
    if images.seeds is not None and len(set(images.seeds)) < len(images.seeds) and not config.allow_duplicates:
        twice = len(images.seeds) - len(set(images.seeds))
        raise InputError(
            f"images {config.images}: {twice} of {len(images)} were drawn with a seed that another one has, so they may be "
            "duplicates; draw them with a seed each, or give --allow-duplicates"
        )
    if images.labels is None:
        return "unknown"
    counts = Counter(images.labels)
    fewest, most = min(counts.values()), max(counts.values())
    if fewest < most and not config.allow_unbalanced:
        raise InputError(
            f"images {config.images} are unbalanced: {fewest} to {most} of each of {len(counts)} labels; draw as many of every "
            "label, or give --allow-unbalanced"
        )
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"
