"""Deterministic weights of the golden models, as a function of each official key and shape."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_weight(key: str, shape: list[int]) -> Tensor:
    """Value of parameter `key`, float32 holding float16-representable numbers."""
    draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    tables = ("embedding.weight", "tok_embeddings", "embedding_table", "class_emb", "lvl_embed")
    if any(name in key for name in tables):
        value = draw  # look-up tables: unit normal
    elif len(shape) == 3 or (len(shape) == 4 and shape[0] == 1):
        value = 0.4 * draw  # positions, attention scales, shared adaLN tables
    elif len(shape) >= 2:
        value = 1.2 * draw / np.sqrt(np.prod(shape[1:]))  # linear and convolution weights
    elif key.endswith("weight"):
        value = 1 + 0.05 * draw  # norm gains
    else:
        value = 0.05 * draw  # biases
    return torch.from_numpy(value.astype(np.float16).astype(np.float32))


def golden_model(name: str, shapes: str) -> dict[str, Tensor]:
    """The official state dict of one part of a golden model."""
    return golden_state(golden_sizes(name)[shapes])


def golden_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """An official state dict of the given shapes, without the buffers that the official classes build themselves."""
    built = ("codebook_used", "lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
    return {key: golden_weight(key, shape) for key, shape in shapes.items() if not key.endswith(built)}


def golden_sizes(name: str) -> dict[str, Any]:
    """Sizes, key tables and settings of a golden model, or a full-size model's key table."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_values(name: str) -> dict[str, Tensor]:
    """Inputs and outputs of a golden model."""
    return load_file(GOLDEN / f"{name}_io.safetensors")
