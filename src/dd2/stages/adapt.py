"""Stage 0: give a LlamaGen teacher a continuous input layer in place of its embedding table (App. E.4)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.teachers.base import Teacher
from dd2.teachers.llamagen import CodeMLP, CodeTable, LlamaGenBackbone, llamagen_teacher
from dd2.training.stage import Losses


def adapted_copy(original: Teacher, hidden: int = 0) -> Teacher:
    """A copy of a teacher whose embedding table is replaced by a fresh MLP.

    The MLP's first layer is scaled so that it sees the codebook standardised per channel, whatever the codes' scale.

    Args:
        original: a LlamaGen teacher with its official input layer.
        hidden: hidden channels of the MLP; 0 means as many as the transformer's width.

    Raises:
        InputError: the teacher reads continuous codes already.
    """
    backbone = require_table(original)
    config = replace(backbone.config, input_layer="mlp", code_hidden=hidden)
    adapted = llamagen_teacher(config, original.tokenizer).to(backbone.token_mean.device)
    kept = {key: value for key, value in original.state_dict().items() if ".tok_embeddings." not in key}
    missing = adapted.load_state_dict(kept, strict=False).missing_keys
    assert all(".tok_embeddings." in key for key in missing)
    if isinstance(adapted.backbone, LlamaGenBackbone):
        adapted.backbone.captions = backbone.captions
    _standardise_input(input_layer(adapted), original.tokenizer.codebook)
    return adapted.eval()


def require_table(original: Teacher) -> LlamaGenBackbone:
    """The backbone of a teacher that needs stage 0.

    Raises:
        InputError: the teacher reads continuous codes already.
    """
    backbone = original.backbone
    if not isinstance(backbone, LlamaGenBackbone) or backbone.continuous:
        raise InputError("this teacher reads continuous codes already: it needs no adaptation")
    return backbone


def input_layer(adapted: Teacher) -> CodeMLP:
    """The continuous input layer of an adapted teacher."""
    layer = adapted.backbone.tok_embeddings
    assert isinstance(layer, CodeMLP)
    return layer


def table_of(original: Teacher) -> Tensor:
    """The (V, D) embedding table of a teacher that has one."""
    layer = original.backbone.tok_embeddings
    assert isinstance(layer, CodeTable)
    return layer.weight.detach()


@torch.no_grad()
def _standardise_input(layer: CodeMLP, codebook: Tensor) -> None:
    """Fold (code - mean) / std into the first layer, drawn anew at the scale of standardised inputs."""
    mean, std = codebook.mean(0), codebook.std(0, correction=0).clamp_min(1e-6)
    nn.init.normal_(layer.fc1.weight, std=codebook.shape[1] ** -0.5)
    nn.init.normal_(layer.fc2.weight, std=layer.fc2.in_features**-0.5)
    nn.init.normal_(layer.fc1.bias)
    layer.fc1.weight.div_(std)
    layer.fc1.bias.sub_(layer.fc1.weight @ mean)


def fit_loss(layer: CodeMLP, codebook: Tensor, table: Tensor) -> Losses:
    """Part (a): squared error between mlp(c_i) and emb(i), relative to the table's variance; all codes, or a batch of them.

    Args:
        layer: what is trained.
        codebook: (V, C) codes in the tokenizer's space.
        table: (V, D) the official embeddings.
    """
    error = F.mse_loss(layer(codebook).float(), table.float())
    return error / table.float().var(), {}


def adapt_loss(
    adapted: Teacher, original: Teacher | None, ids: Tensor, cond: Tensor, class_dropout: float, random: torch.Generator
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
    dropped = torch.rand(len(cond), generator=random, device=random.device) < class_dropout
    cond = torch.where(dropped.view(-1, *[1] * (cond.ndim - 1)), adapted.null_condition(cond), cond)
    log_q = adapted.logits(adapted.codebook[ids], cond).log_softmax(-1)
    if original is None:
        return F.nll_loss(log_q.flatten(0, 1), ids.flatten()), {}
    with torch.no_grad():
        log_p = original.logits(original.codebook[ids], cond).log_softmax(-1)
    return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean"), {}


@torch.no_grad()
def compare(adapted: Teacher, original: Teacher, ids: Tensor, cond: Tensor, batch: int) -> dict[str, float]:
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
