"""The key/value cache of step-by-step generation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of every layer, (B, kv_heads, T, head_dim), for the T positions read so far."""

    keys: list[Tensor]
    values: list[Tensor]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values and return all of them."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
        return self.keys[layer], self.values[layer]

    @property
    def length(self) -> int:
        """T, the positions read so far."""
        return self.keys[-1].shape[2] if self.keys else 0
