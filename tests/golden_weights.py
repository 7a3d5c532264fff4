"""Deterministic weights of the golden models, as a function of each official key and shape."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_weight(key: str, shape: list[int]) -> Tensor:
    """Value of parameter `key`, float32 holding float16-representable numbers."""
    draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if "embedding.weight" in key or "tok_embeddings" in key or "embedding_table" in key:
        value = draw  # look-up tables: unit normal
    elif len(shape) >= 2:
        value = 1.2 * draw / np.sqrt(np.prod(shape[1:]))  # linear and convolution weights
    elif key.endswith("weight"):
        value = 1 + 0.05 * draw  # norm gains
    else:
        value = 0.05 * draw  # biases
    return torch.from_numpy(value.astype(np.float16).astype(np.float32))


def golden_model(name: str, shapes: str) -> dict[str, Tensor]:
    """The official state dict of one part of a golden model."""
    table = json.loads((GOLDEN / f"{name}.json").read_text())[shapes]
    built_by_the_class = ("codebook_used",)
    return {k: golden_weight(k, s) for k, s in table.items() if not k.endswith(built_by_the_class)}


def golden_values(name: str) -> dict[str, Tensor]:
    """Inputs and outputs of a golden model."""
    return load_file(GOLDEN / f"{name}_io.safetensors")
