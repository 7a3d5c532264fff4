"""A teacher's next-token distribution, carried as the codes that can be drawn and their probabilities.

Every setting of the paper keeps few codes (900 of 16,384 for LlamaGen, 900 of 4,096 for VAR): all that follows filtering, Eq. 1
and the draws, is a sum over those alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.device import full_precision, tile_rows


@dataclass(frozen=True)
class CodeDistribution:
    """Probabilities over V codes at each of the positions P.

    Attributes:
        log_p: (*P, K) log-probabilities of K codes, -inf where one cannot be drawn.
        num_codes: V.
        ids: (*P, K) int32, the codes, ascending; those that cannot be drawn are copies of one that can. None where K = V and
            the codes are all in order.
    """

    log_p: Tensor
    num_codes: int
    ids: Tensor | None = None

    @classmethod
    def over_all(cls, log_p: Tensor) -> "CodeDistribution":
        """From log-probabilities (*P, V) of all codes."""
        return cls(log_p, log_p.shape[-1])

    @classmethod
    def of_kept(cls, log_p: Tensor, ids: Tensor, num_codes: int) -> "CodeDistribution":
        """From the kept codes (*P, K) of each position; stored whichever way is smaller."""
        if 2 * log_p.shape[-1] >= num_codes:
            return cls.over_all(_scattered(log_p, ids, num_codes))
        return cls(log_p, num_codes, ids.int())

    @classmethod
    def cat(cls, parts: Sequence["CodeDistribution"]) -> "CodeDistribution":
        """Along the first position dimension; the parts may keep different numbers of codes."""
        if len(parts) == 1:
            return parts[0]
        if any(part.ids is None for part in parts):
            return cls.over_all(torch.cat([part.dense() for part in parts]))
        most = max(part.log_p.shape[-1] for part in parts)
        padded = [part._padded(most) for part in parts]
        log_p, ids = (torch.cat(tensors) for tensors in zip(*padded, strict=True))
        return cls(log_p, parts[0].num_codes, ids)

    @property
    def positions(self) -> torch.Size:
        """The shape P."""
        return self.log_p.shape[:-1]

    def __getitem__(self, index: Any) -> "CodeDistribution":
        """Some of the positions."""
        return CodeDistribution(self.log_p[index], self.num_codes, None if self.ids is None else self.ids[index])

    def view(self, *positions: int) -> "CodeDistribution":
        """The same with the positions in another shape."""
        ids = None if self.ids is None else self.ids.reshape(*positions, self.ids.shape[-1])
        return CodeDistribution(self.log_p.reshape(*positions, self.log_p.shape[-1]), self.num_codes, ids)

    def dense(self) -> Tensor:
        """(*P, V) log-probabilities of all codes."""
        return self.log_p if self.ids is None else _scattered(self.log_p, self.ids, self.num_codes)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Sample by inverting the cumulative distribution in the order of the codes, so that one number per token decides.

        Args:
            uniforms: (*P) in [0, 1).

        Returns:
            (*P) int64 ids; a code of probability 0 is never drawn.
        """
        cumulative = self.log_p.double().exp().cumsum(-1)
        target = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
        return self._code(torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(self.log_p.shape[-1] - 1))

    def nearest(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """The code nearest to each token among those that can be drawn: tokens (*P, C), codebook (V, C) -> (*P) int64."""
        rows, found = tokens.reshape(-1, tokens.shape[-1]).to(codebook.dtype), []
        flat = self.view(len(rows))
        for tile, close in closeness(rows, codebook):
            part = flat[tile]
            close = close if part.ids is None else close.gather(-1, part.ids.long())
            found.append(part._code(close.masked_fill(part.log_p == -math.inf, -math.inf).argmax(-1)))
        return torch.cat(found).view(self.positions)

    def _code(self, place: Tensor) -> Tensor:
        """The code at each position's place among K."""
        return place if self.ids is None else self.ids.gather(-1, place.unsqueeze(-1)).squeeze(-1).long()

    def _padded(self, kept: int) -> tuple[Tensor, Tensor]:
        assert self.ids is not None
        missing = kept - self.log_p.shape[-1]
        # A copy of a position's last code, so that Eq. 1 never meets a code that the position does not have.
        copies = self.ids[..., -1:].expand(*self.positions, missing)
        return F.pad(self.log_p, (0, missing), value=-math.inf), torch.cat([self.ids, copies], -1)


def closeness(rows: Tensor, codebook: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """How near tokens (R, C) are to all codes (V, C), the larger the nearer, tile by tile: some of the rows, and (rows, V).

    In the precision of its arguments whatever the autocast.
    """
    half_norms, step = codebook.square().sum(-1) / 2, tile_rows(len(codebook), rows.device)
    for start in range(0, max(len(rows), 1), step):
        tile = slice(start, start + step)
        with full_precision(rows.device):
            close = torch.addmm(-half_norms, rows[tile], codebook.T)
        yield tile, close


def _scattered(log_p: Tensor, ids: Tensor, num_codes: int) -> Tensor:
    """(*P, V) from (*P, K); of several entries of one code the largest, as all but one are -inf."""
    dense = log_p.new_full((*log_p.shape[:-1], num_codes), -math.inf)
    return dense.scatter_reduce(-1, ids.long(), log_p, "amax")
