"""The key/value cache of step-by-step generation."""

from torch import Tensor


class KVCache:
    """Keys and values of every layer, (B, kv_heads, T, head_dim), for the T positions read so far.

    Room for all positions is taken at once: growing by copying would move T^2 / 2 rows a layer.

    Args:
        capacity: positions of a whole sequence.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._filled: list[int] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values and return all of them, as views."""
        if layer == len(self._rows):
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._rows.append((k.new_empty(shape), v.new_empty(shape)))
            self._filled.append(0)
        start = self._filled[layer]
        stop = self._filled[layer] = start + k.shape[2]
        keys, values = self._rows[layer]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        return keys[:, :, :stop], values[:, :, :stop]

    @property
    def length(self) -> int:
        """T, the positions read so far."""
        return self._filled[-1] if self._filled else 0
