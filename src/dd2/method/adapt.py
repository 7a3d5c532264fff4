"""Stage 0: give a teacher over codes a continuous input layer in place of its embedding table (App. E.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.losses import Losses
from dd2.teachers.code import CodeTeacher
from dd2.teachers.train import with_dropout


def fit_loss(layer: nn.Module, codebook: Tensor, table: Tensor) -> Losses:
    """Part (a): squared error between mlp(c_i) and emb(i), relative to the table's variance; all codes, or a batch of them.

    Args:
        layer: what is trained.
        codebook: (V, C) codes in the tokenizer's space.
        table: (V, D) the official embeddings.
    """
    error = F.mse_loss(layer(codebook).float(), table.float())
    return error / table.float().var(), {}


def adapt_loss(
    adapted: CodeTeacher, original: CodeTeacher | None, ids: Tensor, cond: Tensor, class_dropout: float, random: torch.Generator
) -> Losses:
    """Part (b): the whole model again an AR model of the same sequences.

    Args:
        adapted: what is trained.
        original: its next-token distribution is the target (samples of the teacher); None takes the ids themselves (images).
        ids: (B, n) codes.
        cond: (B, ...) conditions.
        class_dropout: share of sequences under the null condition, so that guidance stays what it was.
        random: random stream of this step.
    """
    cond = with_dropout(adapted, cond, class_dropout, random)
    log_q = adapted.logits(adapted.codebook[ids], cond).log_softmax(-1)
    if original is None:
        return F.nll_loss(log_q.flatten(0, 1), ids.flatten()), {}
    with torch.no_grad():
        log_p = original.logits(original.codebook[ids], cond).log_softmax(-1)
    return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean"), {}


@torch.no_grad()
def compare(adapted: CodeTeacher, original: CodeTeacher, ids: Tensor, cond: Tensor, batch: int) -> dict[str, float]:
    """How far the adapted teacher is from the original on held-out samples of the latter.

    Returns:
        In nats per token: "kl", KL(original || adapted) of the next-token distributions; "nll", the adapted teacher's
        negative log-likelihood of the samples; "nll_original", the original's.
    """
    totals = {"kl": 0.0, "nll": 0.0, "nll_original": 0.0}
    for part, c in zip(ids.split(batch), cond.split(batch), strict=True):
        log_q = adapted.logits(adapted.codebook[part], c).log_softmax(-1)
        log_p = original.logits(original.codebook[part], c).log_softmax(-1)
        totals["kl"] += float((log_p.exp() * (log_p - log_q)).sum())
        totals["nll"] -= float(log_q.gather(-1, part.unsqueeze(-1)).sum())
        totals["nll_original"] -= float(log_p.gather(-1, part.unsqueeze(-1)).sum())
    return {name: total / ids.numel() for name, total in totals.items()}
