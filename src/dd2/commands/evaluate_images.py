"""dd2 evaluate --images: anybody's images against a reference."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dd2.errors import InputError
from dd2.evaluation.clip import ClipScore
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.features import FeatureNetwork
from dd2.evaluation.images import ImageSet
from dd2.evaluation.metrics import mean_with_interval, scores, warnings
from dd2.evaluation.reference import image_bank, open_reference
from dd2.evaluation.summary import described
from dd2.fields import flat
from dd2.files import writable_folder, write_atomic
from dd2.processes import rank, say
from dd2.progress import progress
from dd2.text.prompts import Prompts, read_prompts


def evaluate_images(
    config: EvaluateConfig, network: FeatureNetwork, clips: Sequence[ClipScore], device: torch.device
) -> dict[str, Any]:
    """Score a set of images; what `evaluate` does with --images."""
    assert config.images is not None
    path = Path(os.path.realpath(config.images))
    images = ImageSet(path)
    say(images.said())
    balance = _checked_draws(config, images)
    shown = _prompts(config, images) if clips else None
    out = path.with_name(f"{path.name}.dd2")
    writable_folder(out, "folder beside the images")
    digest = images.digest()
    cache = config.cache or out / "features"
    reference = open_reference(Path(config.reference), network, device, cache, config.batch)
    bank = image_bank(images, network, device, cache, config.batch, digest)
    if rank() != 0:
        return {}
    found = scores(bank, reference, config.metrics, config.seed)
    if shown is not None:
        found |= _clip_scores(images, *shown, clips, config.batch)
    numbers = {
        "metrics": {"images": found},
        "count": len(images),
        "features": network.name,
        "features_digest": network.digest,
        "evaluation": {
            **{key: value for key, value in flat(config).items() if key.startswith(("metrics.", "seed", "features"))},
            **({} if shown is None else {**shown[0].described(), "clip_digests": {clip.name: clip.digest for clip in clips}}),
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


def _prompts(config: EvaluateConfig, images: ImageSet) -> tuple[Prompts, list[int]]:
    """What images are to show, and their numbers in that order: names with numbers in them are in the order of those.

    Raises:
        InputError: there are none, or not as many as images.
    """
    source = config.prompts or str(images.path / "captions.txt")
    found = read_prompts(source)
    if len(found) != len(images):
        raise InputError(
            f"prompts {source} are {len(found):,}, the images {len(images):,}: give one for each image, in their order"
        )
    natural = [[int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)] for name in images.names]
    order = sorted(range(len(natural)), key=lambda row: natural[row]) if natural else list(range(len(images)))
    return found, order


def _clip_scores(
    images: ImageSet, prompts: Prompts, order: Sequence[int], clips: Sequence[ClipScore], batch: int
) -> dict[str, float]:
    """Mean and interval of each score."""
    found: dict[str, float] = {}
    for clip in clips:
        parts = []
        with progress(clip.name, len(order), "img") as bar:
            for start in range(0, len(order), batch):
                rows = torch.tensor(order[start : start + batch])
                parts.append(clip(images.pictures(rows), prompts.texts[start : start + batch]).double())
                bar.update(len(rows))
        found |= mean_with_interval(clip.name, torch.cat(parts))
    return found


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
