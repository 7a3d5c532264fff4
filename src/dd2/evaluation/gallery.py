"""Pictures of a distilled run: methods side by side, nearest training images, walks through the noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dd2.evaluation.features import FeatureNetwork, read_features
from dd2.evaluation.neighbours import squared_distances
from dd2.evaluation.path_length import slerp
from dd2.images import grid
from dd2.sampling import Ways
from dd2.seeding import image_noise

COLUMNS = 20
"""Images beside each other."""

CAPTION = 22
"""Pixels of a heading."""

GAP = 12
"""Pixels between methods beside each other."""

LONGEST = 60
"""Characters of a prompt that are shown."""


def titled(blocks: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Grids of images (N, channels, H, W) under each other, each under its title; the same index in the same place."""
    drawn = [(heading, grid(images, min(COLUMNS, len(images)))) for heading, images in blocks]
    width = max(block.width for _, block in drawn)
    sheet = Image.new("RGB", (width, sum(block.height + CAPTION for _, block in drawn)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for heading, block in drawn:
        draw.text((4, top + 4), heading, fill="black", font_size=14)
        sheet.paste(block, (0, top + CAPTION))
        top += block.height + CAPTION
    return sheet


def captioned(texts: Sequence[str], drawn: Mapping[str, Tensor]) -> Image.Image:
    """Prompts, each above its images by every method, side by side.

    Args:
        texts: N prompts.
        drawn: title of a method -> images (N, k, channels, H, W).
    """
    blocks = {title: [grid(images, len(images)) for images in each] for title, each in drawn.items()}
    widths = {title: max(block.width for block in made) for title, made in blocks.items()}
    high = max(block.height for made in blocks.values() for block in made)
    sheet = Image.new("RGB", (sum(widths.values()) + GAP * (len(blocks) - 1), CAPTION + len(texts) * (high + CAPTION)), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for title, made in blocks.items():
        draw.text((left + 4, 2), title, fill="black", font_size=14)
        for row, block in enumerate(made):
            sheet.paste(block, (left, 2 * CAPTION + row * (high + CAPTION)))
        left += widths[title] + GAP
    for row, text in enumerate(texts):
        line = " ".join(text.split())
        draw.text(
            (4, CAPTION + row * (high + CAPTION) + 3), line[:LONGEST] + "…" * (len(line) > LONGEST), fill="#404040", font_size=13
        )
    return sheet


@dataclass(frozen=True)
class Nearest:
    """How near generated images come to training images, in features.

    Attributes:
        images: the first `COLUMNS` samples, then the training image nearest to each.
        distance: mean distance of samples to their nearest training image.
        held_out: the same of real images that were not trained on: a copying model is much nearer than these.
    """

    images: Tensor
    distance: float
    held_out: float


@torch.inference_mode()
def nearest_training(network: FeatureNetwork, samples: Tensor, training: Tensor, held_out: Tensor) -> Nearest:
    """Is it memorising? Samples, training and held-out images, each (N, channels, H, W) in [-1, 1]."""
    known = torch.cat([read_features(network, part)["pool"] for part in training.split(500)])

    def nearest(images: Tensor) -> tuple[Tensor, Tensor]:
        squared = squared_distances(torch.cat([read_features(network, part)["pool"] for part in images.split(500)]), known)
        best = squared.min(1)
        return best.values.sqrt(), best.indices

    distance, index = nearest(samples)
    shown = torch.cat([samples[:COLUMNS], training[index[:COLUMNS]]]).cpu()
    return Nearest(shown, float(distance.mean()), float(nearest(held_out)[0].mean()))


@torch.inference_mode()
def interpolations(ways: Ways, rows: int = 4, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Walks along great circles of the noise, its length kept, the label fixed: (rows * columns, channels, H, W)."""
    generator = ways.generator
    device, shape = generator.device, generator.student.backbone.token_shape
    ends = image_noise([seed + row for row in range(rows)], (2, *shape)).to(device)
    labels = generator.conditions.default_labels(torch.arange(rows, device=device))
    walks = []
    for row in range(rows):
        a, b = (end.flatten().expand(columns, -1) for end in ends[row])
        noise = slerp(a, b, torch.linspace(0, 1, columns, device=device)).view(columns, *shape)
        cond = generator.conditions(labels[row].expand(columns))
        walks.append(ways.decode(ways.of_noise(noise, cond), cond).cpu())
    return torch.cat(walks)
