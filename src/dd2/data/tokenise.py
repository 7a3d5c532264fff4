"""Images to tokens, once, before training."""

import torch
from torch import Tensor

from dd2.data.source import ImageData
from dd2.seeding import stream
from dd2.tokenizers.base import Tokenizer

ENCODED = 32
"""Images in the encoder at a time."""


@torch.no_grad()
def tokenise(
    tokenizer: Tokenizer, data: ImageData, split: str, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What a tokenizer makes of augmented images, and their labels (count,).

    Returns:
        Ids (count, n) of codes; of a KL tokenizer tokens (count, n, C), each image's drawn from its posterior; and the labels.
    """
    found, labels = [], []
    for start in range(0, count, 512):
        images, classes = data.batch(split, min(512, count - start), stream(seed, "tokenise", split, start))
        random = stream(seed, "tokenise", split, start, "posterior", device=device)
        # The encoder sees few at a time: at 256 pixels one of its activations takes 34 MB an image.
        found += [tokenizer.encode_for_training(part.to(device), random) for part in images.split(ENCODED)]
        labels.append(classes.to(device))
    return torch.cat(found), torch.cat(labels)
