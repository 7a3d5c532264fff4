"""Images to code ids, once, before training."""

import torch
from torch import Tensor

from dd2.data.source import ImageData
from dd2.seeding import stream
from dd2.tokenizers.base import CodeTokenizer

ENCODED = 32
"""Images in the encoder at a time."""


@torch.no_grad()
def tokenise(
    tokenizer: CodeTokenizer, data: ImageData, split: str, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids (count, n) and labels (count,) of augmented images."""
    ids, labels = [], []
    for start in range(0, count, 512):
        images, classes = data.batch(split, min(512, count - start), stream(seed, "tokenise", split, start))
        # The encoder sees few at a time: at 256 pixels one of its activations takes 34 MB an image.
        ids += [tokenizer.encode(part.to(device)) for part in images.split(ENCODED)]
        labels.append(classes.to(device))
    return torch.cat(ids), torch.cat(labels)
