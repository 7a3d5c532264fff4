"""Teachers whose tokens are codes: a classifier over the codebook gives next-token probabilities, and Eq. 1 their score."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dd2.device import tile_rows
from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.files import weights_digest
from dd2.precision import in_float32
from dd2.scores import CodeMixture
from dd2.seeding import image_uniforms, one_each
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.conditions import Conditions
from dd2.teachers.filtering import Sampling, filtered, guided
from dd2.tokenizers.base import CodeTokenizer, nearest_ids


class CodeTeacher(Teacher):
    """An AR model over codes.

    Args:
        backbone: features of the AR order.
        output: classifier over the codebook, (..., D) -> (..., V).
        tokenizer: images to ids and back.
        conditions: what labels stand for.

    Attributes:
        num_codes: V.
    """

    stored_as = "ids"
    tokenizer: CodeTokenizer  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, backbone: Backbone, output: nn.Module, tokenizer: CodeTokenizer, conditions: Conditions) -> None:
        super().__init__(backbone, tokenizer, conditions)
        if type(self).logits is not CodeTeacher.logits or hasattr(self, "log_p"):
            raise InputError(
                f"{type(self).__name__} has logits or log_p of its own, which sampling and training would not ask: override "
                "features (what the classifier reads) or classify (features to logits) instead"
            )
        self.output, self.num_codes = output, len(tokenizer.codebook)

    @property
    def stored_parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "output": self.output}

    @property
    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The classifier (`classify`)."""
        return (self.output,)

    @property
    def codebook(self) -> Tensor:
        """(V, C) standardised codes, the codebook of Eq. 1."""
        return self.backbone.to_tokens(self.tokenizer.codebook)

    def given(self, tokens: Tensor, cond: Tensor, sampling: Sampling, known: Tensor | None = None) -> CodeMixture:
        return CodeMixture(self.distribution(tokens, cond, sampling), self.codebook)

    def sample(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
    ) -> Tensor:
        drawn = self.codebook[self.generate(cond, sampling, seeds, prefix, first_step)]
        return drawn if prefix is None else torch.cat([prefix, drawn], 1)

    def ids(self, tokens: Tensor) -> Tensor:
        """Nearest codes of standardised tokens: (..., C) -> (...) int64."""
        return nearest_ids(tokens, self.codebook)

    def snap(self, tokens: Tensor) -> Tensor:
        return self.codebook[self.ids(tokens)]

    def stored(self, tokens: Tensor) -> Tensor:
        """(B, n) ids, uint16 where V allows it."""
        return self.ids(tokens).cpu().to(torch.uint16 if len(self.tokenizer.codebook) <= 2**16 else torch.int32)

    def restored(self, kept: Tensor) -> Tensor:
        return self.codebook[kept.long().to(self.device)]

    @torch.no_grad()
    def standardise(self, kept: Tensor | None = None) -> None:
        """Mean and deviation of the codes of samples (N, n), or of all codes alike."""
        codes = self.tokenizer.codebook.double()
        counts = torch.ones(len(codes)) if kept is None else kept.flatten().int().bincount(minlength=len(codes)).cpu()
        share = (counts.double() / counts.sum()).to(codes.device).unsqueeze(-1)
        mean = (share * codes).sum(0)
        self.backbone.normalise_by(mean, (share * (codes - mean).square()).sum(0).sqrt())

    def check_ode(self, steps: int) -> None:
        """Nothing: `OdeConfig` has refused what cannot be."""

    def fingerprint(self) -> str:
        # The standardisation is set from the samples, not the other way round.
        return weights_digest(self.backbone, self.output, without="token_")

    def check(self, sampling: Sampling) -> str:
        sampling.refuse_masked()
        self.cfg_weights(sampling)
        return ""

    def logits(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C), (B, ...) -> (B, n, V) float32 logits of p(. | tokens of earlier steps, cond)."""
        return self.classify(self.features(tokens, cond))

    def classify(self, features: Tensor) -> Tensor:
        """Features (..., D) to logits (..., V), in float32 whatever the autocast: guidance multiplies their errors."""
        return in_float32(self.output, features)

    def cfg_weights(self, sampling: Sampling) -> Tensor:
        """Guidance weight s of each step, (S,), in null + s (conditional - null); 1 is no guidance.

        What a cfg_scale means is the family's convention: families override this.
        """
        return torch.full((self.order.num_steps,), 1.0 if sampling.cfg_scale is None else sampling.cfg_scale)

    @torch.no_grad()
    def distribution(self, tokens: Tensor, cond: Tensor, sampling: Sampling) -> CodeDistribution:
        """The sampling distribution at every position (B, n), after cfg, temperature, top-k and top-p; without gradient.

        Logits of all V codes exist for a tile of positions at a time.
        """
        weights = self._guidance(sampling)
        if weights is None:
            return self._filtered(self.features(tokens, cond), None, sampling)
        both = torch.cat([cond, self.backbone.null_condition(cond)])
        features = self.features(tokens.repeat(2, 1, 1), both)
        return self._filtered(features, weights.to(tokens.device)[self.order.step_of], sampling)

    def _filtered(self, features: Tensor, weights: Tensor | None, sampling: Sampling) -> CodeDistribution:
        """The sampling distribution (B, m) from features (B, m, D), or (2 B, m, D) with the unconditional ones behind.

        Args:
            features: of m positions.
            weights: (m,) of the guidance; None where there is none.
            sampling: temperature, top-k, top-p.
        """
        halves = [features] if weights is None else list(features.chunk(2))
        rows = [half.flatten(0, 1) for half in halves]
        by_row = None if weights is None else weights.repeat(len(halves[0])).unsqueeze(-1)  # (B m, 1)
        step, parts = tile_rows(self.num_codes, features.device), []
        for start in range(0, max(len(rows[0]), 1), step):
            part = slice(start, start + step)
            logits = self.classify(rows[0][part])
            if by_row is not None:
                logits = guided(logits, self.classify(rows[1][part]), by_row[part])
            parts.append(filtered(logits, sampling))
        return CodeDistribution.cat(parts).view(*halves[0].shape[:2])

    def _guidance(self, sampling: Sampling) -> Tensor | None:
        """Guidance weights (S,), or None where no step is guided."""
        weights = self.cfg_weights(sampling)
        return None if bool((weights == 1).all()) else weights

    def generate(
        self,
        cond: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        prefix: Tensor | None = None,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> Tensor:
        """Sample codes with the key/value cache, one seed per image. Arguments as `sample` and `walk`.

        Returns:
            (B, m) ids of the sampled positions.

        Raises:
            ValueError: the seeds or the prefix do not fit.
        """
        one_each(cond, seeds)
        uniforms = image_uniforms(seeds, (self.order.n,)).to(self.device)
        return self.walk(cond, sampling, lambda step, found: found.draw(uniforms[:, step]), prefix, first_step, last_step)

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
        """Go through the AR steps with the key/value cache, choosing each step's codes from their distribution.

        Args:
            cond: (B, ...) conditions.
            sampling: the sampling distribution.
            choose: (positions of the step, their distribution (B, positions)) -> ids (B, positions).
            prefix: (B, p, C) standardised tokens of the steps before `first_step`.
            first_step, last_step: steps to choose; `last_step` itself is not, None means to the end.

        Returns:
            (B, m) ids of the chosen positions.

        Raises:
            ValueError: the prefix does not fit.
        """
        codebook = self.codebook
        given = codebook.new_zeros(len(cond), 0, codebook.shape[-1]) if prefix is None else prefix
        tokens = self.order.checked_prefix(given, first_step)
        weights = self._guidance(sampling)
        both = cond if weights is None else torch.cat([cond, self.backbone.null_condition(cond)])
        cache = self.backbone.new_cache()
        ids = [torch.zeros(len(cond), 0, dtype=torch.long, device=cond.device)]
        for index, step in list(enumerate(self.order.steps))[first_step:last_step]:
            seen = tokens if weights is None else tokens.repeat(2, 1, 1)
            features = self.backbone.next_features(cache, seen, both)
            by_position = None if weights is None else weights[index].to(features.device).expand(features.shape[1])
            ids.append(choose(step, self._filtered(features, by_position, sampling)))
            tokens = torch.cat([tokens, codebook[ids[-1]]], 1)
        return torch.cat(ids, 1)


def require_codes(teacher: Teacher, what: str) -> CodeTeacher:
    """A teacher over codes.

    Args:
        teacher: any.
        what: needs codes, for the message.

    Raises:
        InputError: its tokens are no codes.
    """
    if not isinstance(teacher, CodeTeacher):
        raise InputError(
            f"{what} needs a teacher over codes, with next-token probabilities; the tokens of a {type(teacher).__name__} "
            "are continuous"
        )
    return teacher
