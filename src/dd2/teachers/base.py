"""What a teacher is: the one interface behind which every AR model stands.

A `Backbone` reads tokens and gives features; students copy it. A `Teacher` is asked for one thing by the stages, its
conditional score (`given`), and for samples. Tokens are standardised everywhere outside a backbone: (code - mean) / std per
channel, so that the data lie on the scale of the noise; the backbone itself reads codes in the tokenizer's space.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.order import Order
from dd2.precision import in_precision
from dd2.processes import note
from dd2.scores import ConditionalScore, Solver
from dd2.teachers.conditions import Conditions
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import Tokenizer


class Backbone(nn.Module, ABC):
    """A transformer over the AR order, without what decides the token.

    Attributes:
        order: the AR order.
        width: D, the channels of the features.
        token_mean, token_std: (C,) buffers of the standardisation; 0 and 1 until `normalise_by` sets them.
    """

    order: Order
    width: int
    token_mean: Tensor
    token_std: Tensor

    def __init__(self, order: Order, width: int, code_dim: int) -> None:
        super().__init__()
        self.order, self.width = order, width
        self.register_buffer("token_mean", torch.zeros(code_dim))
        self.register_buffer("token_std", torch.ones(code_dim))

    @torch.no_grad()
    def normalise_by(self, mean: Tensor, std: Tensor) -> None:
        """Set the standardisation: mean and std (C,) of codes in the tokenizer's space; std is held above 1e-6."""
        self.token_mean.copy_(mean)
        self.token_std.copy_(std.clamp_min(1e-6))

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Standardised tokens (..., C) to the tokenizer's space."""
        return tokens * self.token_std + self.token_mean

    def to_tokens(self, codes: Tensor) -> Tensor:
        """Codes (..., C) in the tokenizer's space to standardised tokens."""
        return (codes - self.token_mean) / self.token_std

    @property
    def token_shape(self) -> tuple[int, int]:
        """(n, C) of one image's tokens, and of its noise."""
        return self.order.n, len(self.token_mean)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.token_mean.device

    @property
    def positions(self) -> int:
        """Positions that the layers read in a whole pass."""
        return self.order.n

    @property
    def continuous(self) -> bool:
        """Whether it reads tokens between the codes; one that does not must be adapted first (App. E.4, dd2 adapt)."""
        return True

    def deepen(self, extra: int) -> None:
        """Append layers that change nothing until they are trained, in place; `config` must then say the new depth.

        Raises:
            InputError: it cannot be deepened, which is the default.
        """
        raise InputError(f"a {type(self).__name__} cannot be made deeper (Backbone.deepen); use networks.extra_layers 0")

    @abstractmethod
    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features of all positions at once: (B, n, C), cond (B, ...) -> (B, n, D).

        Position i sees the condition and the tokens of earlier steps only.
        """

    def condition_features(self, features: Tensor, cond: Tensor) -> Tensor:
        """(B, D) features that know the condition cond (B, ...) alone, from those of all positions (B, n, D): the first one's."""
        return features[:, self.order.steps[0].start]

    @abstractmethod
    def null_condition(self, cond: Tensor) -> Tensor:
        """The condition of the unconditional model, shaped like `cond`."""

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty key/value cache for `next_features`, which may write into it in place: for use without gradients."""

    @abstractmethod
    def next_features(self, cache: Any, tokens: Tensor, cond: Tensor) -> Tensor:
        """Features of the next step's positions, reading only what the cache has not seen.

        Args:
            cache: from `new_cache`, used with the same batch throughout; updated in place.
            tokens: (B, p, C) the tokens of all steps decided so far; p is 0 at the start.
            cond: (B, ...) conditions.

        Returns:
            (B, positions of the next step, D), equal to `forward` at those positions.
        """


class Teacher(nn.Module, ABC):
    """A pre-trained AR model with its tokenizer.

    Args:
        backbone: features of the AR order.
        tokenizer: images to tokens and back.
        conditions: what labels stand for.

    Attributes:
        code: the module:function that builds it, where it comes from one.
        usual_sampling: what it is drawn with unless somebody says otherwise, where its authors say; else None.
        stored_as: what `stored` gives is called on disk ("ids", "latents").

    Raises:
        InputError: tokenizer and backbone have different numbers of tokens.
    """

    code: str = ""
    usual_sampling: Sampling | None = None
    stored_as: str

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, conditions: Conditions) -> None:
        super().__init__()
        if tokenizer.num_positions != backbone.order.n:
            raise InputError(
                f"the tokenizer gives {tokenizer.num_positions} tokens an image, the transformer has "
                f"{backbone.order.n} positions: they were not trained together; give the tokenizer of this teacher"
            )
        self.backbone, self.tokenizer, self.conditions = backbone, tokenizer, conditions

    @property
    def order(self) -> Order:
        """The AR order: n positions, S steps."""
        return self.backbone.order

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.backbone.device

    @property
    def stored_parts(self) -> dict[str, nn.Module]:
        """The modules of its folder's weights, by name; the tokenizer has a folder of its own."""
        return {"backbone": self.backbone}

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """Modules that are called in float32, whatever the autocast around them."""
        return ()

    def usually(self, given: Sampling, default: Sampling) -> Sampling:
        """The sampling that is meant where nobody has set another than a command's default: the teacher's usual one, which is
        said.
        """
        if self.usual_sampling is None:
            return given
        usual = {
            name: value
            for name, value in self.usual_sampling.described().items()
            if getattr(given, name) == getattr(default, name) != value
        }
        if usual:
            said = ", ".join(f"{name} {value}" for name, value in usual.items())
            note(f"the teacher is sampled as its authors do where nothing else is set: {said}")
        return replace(given, **usual)

    def student_backbone(self) -> Backbone:
        """A backbone for a student to train: a copy of this one."""
        return copy.deepcopy(self.backbone).requires_grad_(True)

    def features(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C), (B, ...) -> (B, n, D); position i sees `cond` and the tokens of earlier steps only."""
        return self.backbone(tokens, cond)

    def decode(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Standardised tokens (B, n, C), drawn under cond (B, ...), to images (B, channels, H, W) in about [-1, 1]."""
        return self.tokenizer.decode_tiled(self.backbone.to_codes(tokens))

    def in_precision(self, dtype: torch.dtype) -> "Teacher":
        """The same for drawing in `dtype`, under autocast; weights that need none are shared (`dd2.precision`)."""
        lowered = {}
        for name, part in self.named_children():
            if isinstance(part, Tokenizer):
                lowered[name] = part.in_precision(dtype)
            else:
                lowered[name] = part if part in self.float32_parts else in_precision(part, dtype)
        same = copy.copy(self)
        same._modules = lowered  # the copy's own; everything else is shared
        return same

    def known_sets(self, batch: int, sampling: Sampling, random: torch.Generator) -> Tensor | None:
        """Random sets (batch, n) of known positions, where it has no order of its own: what `given` needs then; else None."""
        return None

    def num_steps(self, sampling: Sampling) -> int:
        """AR steps of an image."""
        return self.order.num_steps

    def in_steps(self, sampling: Sampling, steps: int) -> Sampling | None:
        """The sampling that draws an image in so many AR steps, where their number is free; None where the model has its own."""
        return None

    def redrawn(
        self, tokens: Tensor, read: Tensor, cond: Tensor, sampling: Sampling, seeds: Sequence[int], first_step: int
    ) -> Tensor:
        """Sequences (B, n, C) whose last AR steps it draws again (Alg. 4).

        Args:
            tokens: (B, n, C) the sequences; what the steps before hold is kept.
            read: the same as it reads them.
            cond, sampling, seeds, first_step: as `sample`.
        """
        start = self.order.steps[first_step].start
        drawn = self.sample(cond, sampling, seeds, prefix=read[:, :start], first_step=first_step)
        return torch.cat([tokens[:, :start], drawn[:, start:]], 1)

    @abstractmethod
    def given(self, tokens: Tensor, cond: Tensor, sampling: Sampling, known: Tensor | None = None) -> ConditionalScore:
        """The conditional score at every position (Eq. 1).

        Args:
            tokens: (B, n, C) clean tokens.
            cond: (B, ...) conditions.
            sampling: the distribution.
            known: (B, n) which tokens are given, from `known_sets`; None where that gives None: then those of earlier steps are.
        """

    @abstractmethod
    def sample(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
    ) -> Tensor:
        """Whole sequences, one seed per image.

        Args:
            cond: (B, ...) conditions.
            sampling: the sampling distribution.
            seeds: B seeds. A position's draw depends on its image's seed alone, so the same prefix and seed give the same
                continuation wherever sampling starts (up to rounding).
            prefix: (B, p, C) standardised tokens of the steps before `first_step`, which are kept.
            first_step: the step to begin with.

        Returns:
            (B, n, C) standardised tokens.

        Raises:
            ValueError: the seeds or the prefix do not fit.
        """

    def follow_ode(self, noise: Tensor, cond: Tensor, sampling: Sampling, steps: int, solver: Solver) -> Tensor:
        """Where the flow-matching ODE of its score leads from noise (B, n, C), token after token: (B, n, C), a deterministic
        map whose images of normal noise follow the teacher. Of teachers over codes, `dd2.trajectory` knows it.

        Raises:
            InputError: it has no such map, which is the default.
        """
        self.check_ode(steps)
        raise TypeError(f"{type(self).__name__}.check_ode allows a map from noise to data that follow_ode does not give")

    def check_ode(self, steps: int) -> None:
        """Look at `follow_ode`'s number of steps before it is used.

        Raises:
            InputError: there is no such map, or not in so many steps.
        """
        raise InputError(f"regress.* needs a map from noise to data, which a {type(self).__name__} lacks (Teacher.follow_ode)")

    @abstractmethod
    def snap(self, tokens: Tensor) -> Tensor:
        """The nearest tokens that it can draw, (..., C); the tokens themselves where it draws any."""

    @abstractmethod
    def stored(self, tokens: Tensor) -> Tensor:
        """Sequences (B, n, C) that it drew as they are kept on disk: what survives another standardisation, on the CPU."""

    @abstractmethod
    def restored(self, kept: Tensor) -> Tensor:
        """What `stored` gave, of any batch, as standardised tokens (B, n, C) on its device."""

    @abstractmethod
    def standardise(self, kept: Tensor) -> None:
        """Set the standardisation to that of samples in the form of `stored`; nothing where it belongs to the model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the weights that decide what it samples."""

    def check(self, sampling: Sampling) -> str:
        """Look at sampling settings before they are used.

        Returns:
            What has no effect on this teacher, as a sentence; empty where everything has.

        Raises:
            InputError: they contradict what it is.
        """
        return ""
