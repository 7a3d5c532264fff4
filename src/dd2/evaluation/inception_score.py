"""Inception score (Salimans et al. 2016, arXiv 1606.03498), for any classifier."""

import torch
from torch import Tensor

from dd2.errors import InputError


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Exp of the mean KL divergence between p(y | x) and p(y), per split.

    Args:
        probabilities: (N, K) of N images; shuffled here, because splits of class-ordered images would see few classes each.
        splits: parts of equal size; ADM's evaluator uses parts of 5,000, which is 10 at 50,000 images.
        seed: of the shuffle.

    Returns:
        Mean and standard deviation over the splits, at least 1.

    Raises:
        InputError: there are fewer images than splits.
    """
    if splits < 1 or len(probabilities) < splits:
        raise InputError(f"an inception score over {splits} splits needs at least that many images, got {len(probabilities)}")
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in probabilities[order].double().tensor_split(splits):
        marginal = part.mean(0, keepdim=True)
        kl = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(kl.sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
