"""A LlamaGen teacher with a continuous input layer in place of its embedding table (App. E.4)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dd2.errors import InputError
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.llamagen import CodeMLP, CodeTable, LlamaGenBackbone, LlamaGenTeacher, llamagen_teacher


def adapted_copy(original: Teacher, hidden: int = 0) -> LlamaGenTeacher:
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
    tokenizer = require_codes(original, "stage 0").tokenizer
    adapted = llamagen_teacher(config, tokenizer).to(backbone.token_mean.device)
    kept = {key: value for key, value in original.state_dict().items() if ".tok_embeddings." not in key}
    missing = adapted.load_state_dict(kept, strict=False).missing_keys
    assert all(".tok_embeddings." in key for key in missing)
    adapted.conditions, adapted.usual_sampling = original.conditions, original.usual_sampling
    _standardise_input(input_layer(adapted), tokenizer.codebook)
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
