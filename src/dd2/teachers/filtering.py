"""From logits to the teacher's sampling distribution: guidance, temperature, top-k, top-p."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dd2.distribution import CodeDistribution
from dd2.errors import InputError

MASKED: dict[str, Any] = {"cfg_schedule": "linear", "ar_steps": 0, "diffusion_steps": 100}
"""Settings of masked models, and what they usually are."""


@dataclass(frozen=True)
class Sampling:
    """How the teacher samples. The distribution that results is the one that is distilled."""

    cfg_scale: float | None = None
    """Classifier-free guidance in the teacher's own convention; None is no guidance and costs one teacher pass instead of
    two. LlamaGen: null + s (cond - null), so 1 is none. VAR: s = 1 + cfg_scale k / (S - 1) at scale k, so 0 is none."""
    cfg_interval: int = -1
    """LlamaGen: guide only the first token and the cfg_interval + 1 that follow, as its sampler counts; -1 guides all."""
    temperature: float = 1.0
    """Divides the logits, > 0. MAR: scales the noise of the sampler's steps, which no score knows; what is distilled is 1's."""
    top_k: int = 0
    """Keep the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of codes that holds this probability, in (0, 1]."""
    cfg_schedule: Literal["linear", "constant"] = "linear"
    """MAR: guidance grows with the share of known tokens from 1 to cfg_scale, or is cfg_scale throughout."""
    ar_steps: int = 0
    """MAR: steps that an image is drawn in, up to its tokens; 0 is the teacher's own (64)."""
    diffusion_steps: int = 100
    """MAR: steps of the head's diffusion per token, 2 to 1000."""

    def described(self) -> dict[str, Any]:
        """Its fields; those of masked models only where they are not as usual: other models' samples are not known by them."""
        usual = {name: default for name, default in MASKED.items() if getattr(self, name) == default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in usual}

    def refuse_masked(self) -> None:
        """For teachers that have a fixed order.

        Raises:
            InputError: settings of masked models are given.
        """
        if given := [name for name in MASKED if name in self.described()]:
            raise InputError(f"sampling.{given[0]} belongs to MAR's sampler; this teacher has an order of its own: leave it out")

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if self.cfg_scale is not None and not math.isfinite(self.cfg_scale):
            raise InputError(f"sampling.cfg_scale must be finite, got {self.cfg_scale}")
        if self.cfg_interval < -1:
            raise InputError(f"sampling.cfg_interval must be -1 (guide all tokens) or more, got {self.cfg_interval}")
        if not self.temperature > 0:
            raise InputError(f"sampling.temperature must be > 0, got {self.temperature}; for greedy use top_k 1")
        if self.top_k < 0:
            raise InputError(f"sampling.top_k must be >= 0 (0 keeps all codes), got {self.top_k}")
        if self.cfg_schedule not in ("linear", "constant"):
            raise InputError(f'sampling.cfg_schedule must be "linear" or "constant", got {self.cfg_schedule!r}')
        if self.ar_steps < 0 or self.diffusion_steps < 2:
            raise InputError(
                f"sampling.ar_steps must be >= 0 and diffusion_steps at least 2, got {self.ar_steps} and {self.diffusion_steps}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class OtherSampling:
    """Where a teacher samples in another way than its run was distilled to; None: as distilled."""

    cfg_scale: float | None = None
    """The teacher's guidance scale; None: as distilled."""
    cfg_interval: int | None = None
    """LlamaGen: guide the first cfg_interval + 2 tokens only; None: as distilled."""
    temperature: float | None = None
    """The teacher's temperature; None: as distilled."""
    top_k: int | None = None
    """The teacher's top-k; None: as distilled."""
    top_p: float | None = None
    """The teacher's top-p; None: as distilled."""
    cfg_schedule: Literal["linear", "constant"] | None = None
    """MAR: guidance that grows with the share of known tokens, or not; None: as distilled."""
    ar_steps: int | None = None
    """MAR: AR steps of the teacher; None: as distilled."""
    diffusion_steps: int | None = None
    """MAR: steps of the head's diffusion per token; None: as distilled."""

    @property
    def given(self) -> dict[str, Any]:
        """What differs, by the names of `Sampling`."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
        return {name: value for name, value in found.items() if value is not None}

    def applied(self, distilled: Sampling) -> Sampling:
        """The sampling that results. Errors as `Sampling`."""
        return dataclasses.replace(distilled, **self.given)


def guided(logits: Tensor, null_logits: Tensor, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance: null + s (conditional - null), in float32; all (..., V), s broadcast to them."""
    null_logits = null_logits.float()
    return null_logits + weight * (logits.float() - null_logits)


def filtered(logits: Tensor, sampling: Sampling) -> CodeDistribution:
    """The distribution after temperature, then top-k, then top-p, as in LlamaGen's and VAR's samplers.

    Of equally likely codes at the edge of top-k as many are kept as fit.

    Args:
        logits: (..., V), already guided.
        sampling: what to apply; its cfg_scale is not used here.

    Returns:
        Normalised over the kept codes, float32; the codes that are cut off are left out.
    """
    logits = logits.float() / sampling.temperature
    codes = logits.shape[-1]
    if 0 < sampling.top_k < codes:
        kept, ids = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        kept, ids = logits.sort(dim=-1, descending=True)
    else:
        return CodeDistribution.over_all(logits.log_softmax(-1))
    if sampling.top_p < 1 and kept.numel():
        p = kept.softmax(-1)
        before = p.cumsum(-1) - p
        before[..., 0] = 0  # the likeliest code always stays
        stays = before < sampling.top_p
        if not 0 < sampling.top_k < codes:  # top-k bounds their number already, and this look waits for a GPU
            most = int(stays.sum(-1).max())
            stays, kept, ids = stays[..., :most], kept[..., :most], ids[..., :most]
        kept = kept.masked_fill(~stays, -math.inf)
    ids = torch.where(kept == -math.inf, ids[..., :1], ids)  # one that can be drawn: the likeliest comes first
    ids, order = ids.sort(dim=-1)
    return CodeDistribution.of_kept(kept.gather(-1, order).log_softmax(-1), ids, codes)
