"""The transformer and the VQ model against the official code's outputs."""

import json

import pytest
import torch
from torch import Tensor, nn

from dd2.teachers.base import Teacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.vq import VQTokenizer
from golden_weights import GOLDEN, golden_model, golden_values


class EmbeddingOfNearest(nn.Module):
    """The official input layer, an embedding table, behind exact codes."""

    def __init__(self, table: Tensor, codebook: Tensor) -> None:
        super().__init__()
        self.table, self.codebook = table, codebook

    def forward(self, codes: Tensor) -> Tensor:
        return self.table[(codes @ self.codebook.T).argmax(-1)]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    sizes = json.loads((GOLDEN / "llamagen_tiny.json").read_text())
    tokenizer = VQTokenizer(
        VQConfig(
            codebook_size=sizes["vocab_size"],
            code_dim=sizes["vq"]["codebook_embed_dim"],
            image_size=16,
            channels=sizes["vq"]["ch"],
            multipliers=tuple(sizes["vq"]["ch_mult"]),
            z_channels=sizes["vq"]["z_channels"],
        )
    )
    tokenizer.load_state_dict(golden_model("llamagen_tiny", "vq_shapes"))
    weights = golden_model("llamagen_tiny", "gpt_shapes")
    config = LlamaGenConfig(
        depth=sizes["n_layer"],
        width=sizes["dim"],
        heads=sizes["n_head"],
        ffn_multiple=sizes["multiple_of"],
        rows=sizes["grid"],
        columns=sizes["grid"],
        num_classes=sizes["num_classes"],
    )
    table = weights.pop("tok_embeddings.weight")
    output = nn.Linear(sizes["dim"], sizes["vocab_size"], bias=False)
    output.load_state_dict({"weight": weights.pop("output.weight")})
    backbone = LlamaGenBackbone(config, 8, EmbeddingOfNearest(table, tokenizer.codebook.detach()))
    weights["cls_embedding.weight"] = weights.pop("cls_embedding.embedding_table.weight")
    outcome = backbone.load_state_dict(weights, strict=False)
    assert sorted(outcome.missing_keys) == ["token_mean", "token_std"]
    assert not outcome.unexpected_keys
    return Teacher(backbone, output, tokenizer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return golden_values("llamagen_tiny")


def test_tokenizer(teacher, values):
    images = values["images"]
    assert torch.equal(teacher.tokenizer.encode(images), values["encoded_ids"].view(len(images), -1))
    torch.testing.assert_close(teacher.tokenizer.decode(values["ids"]), values["decoded"], atol=1e-4, rtol=0)
    torch.testing.assert_close(teacher.tokenizer.codebook, values["codebook"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("standardised", [False, True])
def test_logits(teacher, values, standardised):
    backbone = teacher.backbone
    codebook = teacher.tokenizer.codebook
    backbone.standardise(codebook if standardised else torch.tensor([[-1.0] * 8, [1.0] * 8]))
    tokens, cond = teacher.codebook[values["ids"]], values["cond"]
    torch.testing.assert_close(teacher.logits(tokens, cond), values["logits"], atol=1e-4, rtol=0)
    null = teacher.logits(tokens, teacher.null_condition(cond))
    torch.testing.assert_close(null, values["logits_uncond"], atol=1e-4, rtol=0)


def test_greedy_guided_generation(teacher, values):
    scale = json.loads((GOLDEN / "llamagen_tiny.json").read_text())["greedy_cfg_scale"]
    cond = values["cond"]
    ids = teacher.generate(cond, Sampling(cfg_scale=scale, top_k=1), range(len(cond)))
    assert torch.equal(ids, values["greedy_cfg_ids"])
