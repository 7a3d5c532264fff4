"""Images to code ids, once, before training."""

import torch
from torch import Tensor

from dd2.data.source import ImageData
from dd2.seeding import stream
from dd2.tokenizers.base import Tokenizer


@torch.no_grad()
def tokenise(
    tokenizer: Tokenizer, data: ImageData, split: str, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids (count, n) and labels (count,) of augmented images."""
    ids, labels = [], []
    for start in range(0, count, 512):
        images, classes = data.batch(split, min(512, count - start), stream(seed, "tokenise", split, start))
        ids.append(tokenizer.encode(images.to(device)))
        labels.append(classes.to(device))
    return torch.cat(ids), torch.cat(labels)
