"""A teacher whose joint distribution over all V^n sequences is a table: Proposition 1 can be checked exactly on it."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dd2.distribution import CodeDistribution
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import ClassLabels
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig
from dd2.tokenizers.base import CodeTokenizer, nearest_ids


class CodesOnly(CodeTokenizer):
    """A tokenizer over given codes (V, C); its "images" are the codes' first channel, (B, 1, 1, n)."""

    codes: Tensor

    def __init__(self, codes: Tensor, positions: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.positions = positions

    @property
    def codebook(self) -> Tensor:
        return self.codes

    @property
    def num_positions(self) -> int:
        return self.positions

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 1, self.positions

    def encode(self, images: Tensor) -> Tensor:
        return (images.flatten(1).unsqueeze(-1) - self.codes[:, 0]).abs().argmin(-1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return codes[:, :, 0].view(-1, *self.image_shape)


class TableTeacher(CodeTeacher):
    """p(q_i | q_<i) read off a table; one class.

    Args:
        joint: (V, …, V) probabilities of the n tokens.
        depth, width: size of the untrained backbone that students copy.
    """

    joint: Tensor

    def __init__(self, joint: Tensor, depth: int = 3, width: int = 48) -> None:
        codes = torch.eye(joint.shape[0])
        sizes = LlamaGenConfig(depth=depth, width=width, heads=3, ffn_multiple=16, rows=1, columns=joint.ndim, num_classes=1)
        super().__init__(LlamaGenBackbone(sizes, codes), nn.Identity(), CodesOnly(codes, joint.ndim), ClassLabels(1))
        self.register_buffer("joint", joint)
        self.standardise()

    def features(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, V) log-probabilities: the classifier behind them is the identity."""
        ids = nearest_ids(tokens, self.codebook)
        rows = []
        for position in range(self.order.n):
            later = tuple(range(position + 1, self.order.n))
            marginal = self.joint.sum(later) if later else self.joint
            conditional = marginal / marginal.sum(-1, keepdim=True).clamp_min(1e-30)
            rows.append(conditional[tuple(ids[:, i] for i in range(position))].expand(len(tokens), -1))
        # An impossible prefix has no next token; a uniform row keeps Eq. 1 defined there.
        p = torch.stack(rows, 1)
        p = torch.where(p.sum(-1, keepdim=True) > 0, p, torch.full_like(p, 1 / p.shape[-1]))
        return p.log()

    @torch.no_grad()
    def walk(
        self,
        cond: Tensor,
        sampling: Sampling,
        choose: Callable[[slice, CodeDistribution], Tensor],
        prefix: Tensor | None = None,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> Tensor:
        """As `CodeTeacher.walk`: a table needs no cache."""
        ids = torch.zeros(len(cond), self.order.n, dtype=torch.long)
        if prefix is not None:
            ids[:, :first_step] = nearest_ids(prefix, self.codebook)
        for step in self.order.steps[first_step:last_step]:
            ids[:, step] = choose(step, self.distribution(self.codebook[ids], cond, sampling)[:, step])
        return ids[:, first_step:last_step]

    def fingerprint(self) -> str:
        return super().fingerprint() + hashlib.sha256(self.joint.cpu().numpy().tobytes()).hexdigest()

    def sequences(self, count: int, random: torch.Generator) -> Tensor:
        """Ids (count, n) from the joint distribution."""
        flat = torch.multinomial(self.joint.flatten(), count, replacement=True, generator=random)
        return torch.stack(torch.unravel_index(flat, self.joint.shape), 1)


def independent(joint: Tensor) -> Tensor:
    """The product of the marginals of `joint`: what set prediction reaches at best."""
    product = torch.ones_like(joint)
    for axis in range(joint.ndim):
        others = tuple(i for i in range(joint.ndim) if i != axis)
        shape = [1] * joint.ndim
        shape[axis] = -1
        product = product * joint.sum(others).view(shape)
    return product


def total_variation(ids: Tensor, joint: Tensor) -> float:
    """Total variation distance between the frequencies of sequences (N, n) and `joint`, in [0, 1]."""
    weights = torch.tensor([joint.shape[0] ** i for i in reversed(range(joint.ndim))])
    counts = torch.bincount((ids.cpu() * weights).sum(-1), minlength=joint.numel()).double()
    return float((counts / counts.sum() - joint.flatten().double()).abs().sum() / 2)
