"""Performance alignment (App. C.3): bring generator and guidance network back together."""

import torch

from dd2.student import OneStepNetwork


@torch.no_grad()
def load_average(generator: OneStepNetwork, average: OneStepNetwork) -> None:
    """Give the generator its EMA weights. The guidance network is then trained alone (`guidance_loss`) until it has
    learned this generator's score, and stage 2 goes on from there.
    """
    generator.load_state_dict(average.state_dict())
