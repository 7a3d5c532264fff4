"""VAR's transformer and VQVAE against the official code's outputs and key tables."""

import pytest
import torch
from torch import Tensor

from dd2.checkpoints import load_var
from dd2.checkpoints.foreign import official_shapes
from dd2.checkpoints.var import (
    PATCH_NUMS_256,
    PATCH_NUMS_512,
    var_config,
    var_ignored,
    var_origins,
    vqvae_config,
    vqvae_ignored,
    vqvae_origins,
)
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.var import VARBackbone, var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.tokenizers.multiscale import MultiScaleTokenizer
from dd2.tokenizers.pyramid import shared_phi
from golden_weights import golden_model, golden_sizes, golden_state, golden_values

SIZES = golden_sizes("var_tiny")


@pytest.fixture(scope="module")
def teacher() -> CodeTeacher:
    transformer, vqvae = golden_model("var_tiny", "var_shapes"), golden_model("var_tiny", "vqvae_shapes")
    return load_var(transformer, vqvae, patch_nums=SIZES["patch_nums"])


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return golden_values("var_tiny")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_tokenizer(teacher, values):
    tokenizer = teacher.tokenizer
    assert torch.equal(tokenizer.encode(values["images"]), values["encoded_ids"])
    close(tokenizer.f_hat(tokenizer.codebook[values["ids"]]), values["f_hat"])
    close(tokenizer.decode(values["ids"]), values["decoded"])


@pytest.mark.parametrize("standardised", [False, True])
def test_logits_and_inputs(teacher, values, standardised):
    if standardised:
        teacher.standardise()
    else:
        teacher.backbone.normalise_by(torch.zeros(8), torch.ones(8))
    tokens, labels = teacher.codebook[values["ids"]], values["labels"]
    close(teacher.order.inputs(teacher.backbone.to_codes(tokens)), values["var_input"])
    close(teacher.logits(tokens, labels), values["logits"])
    close(teacher.logits(tokens, teacher.backbone.null_condition(labels)), values["logits_uncond"])


def test_greedy_guided_image(teacher, values):
    labels = values["labels"]
    ids = teacher.generate(labels, Sampling(cfg_scale=SIZES["greedy_cfg"], top_k=1), range(len(labels)))
    close((teacher.tokenizer.decode(ids) + 1) / 2, values["greedy_cfg_image"])


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_variants_load_with_their_flags_inferred(shared_aln, attn_l2_norm):
    """State dicts in the official layout of all variants, as their classes would save them."""
    shapes = dict(SIZES["var_shapes"])
    for block in range(SIZES["depth"]):
        if not attn_l2_norm:
            del shapes[f"blocks.{block}.attn.scale_mul_1H11"]
        if shared_aln:
            for kind in ("weight", "bias"):
                shapes[f"shared_ada_lin.1.{kind}"] = shapes.pop(f"blocks.{block}.ada_lin.1.{kind}")
            shapes[f"blocks.{block}.ada_gss"] = [1, 1, 6, SIZES["embed_dim"]]
    state = golden_state(shapes)
    teacher = load_var(state, golden_model("var_tiny", "vqvae_shapes"), patch_nums=SIZES["patch_nums"], num_heads=2)
    assert isinstance(teacher.backbone, VARBackbone)
    config = teacher.backbone.config
    assert (config.shared_aln, config.attn_l2_norm, config.heads) == (shared_aln, attn_l2_norm, 2)
    own = teacher.state_dict()
    for key, origin in var_origins({k: tuple(v.shape) for k, v in own.items() if not k.startswith("tokenizer.")}).items():
        assert torch.equal(own[key], state[origin.key]), key
    labels = torch.tensor([1, 2, 10])
    tokens = teacher.codebook[teacher.generate(labels, Sampling(), range(3))]
    assert teacher.logits(tokens, labels).isfinite().all()


def test_full_size_key_tables_match_exactly():
    tables = golden_sizes("keys_var_d16"), golden_sizes("keys_vae_ch160v4096z32")
    transformer, vqvae = ({k: torch.empty(s, device="meta") for k, s in table.items()} for table in tables)
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(vqvae_config(vqvae, PATCH_NUMS_256))
        teacher = var_teacher(var_config(transformer), tokenizer)
    assert var_config(transformer) == VARConfig()  # the defaults are d16
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    expected = official_shapes(vqvae_origins(shapes), shapes)
    assert expected == {k: tuple(v) for k, v in tables[1].items() if not vqvae_ignored(k)}
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(108.9e6, rel=1e-3)
    shapes = {key: tuple(value.shape) for key, value in teacher.state_dict().items() if not key.startswith("tokenizer.")}
    expected = official_shapes(var_origins(shapes), shapes)
    assert expected == {k: tuple(v) for k, v in tables[0].items() if not var_ignored(k)}


@pytest.mark.parametrize(
    ("depth", "shared", "millions"),
    [(16, False, 310.3), (20, False, 600.9), (24, False, 1033.4), (30, False, 2010.0), (36, True, 2353.9)],
)
def test_published_sizes(depth, shared, millions):
    sides = PATCH_NUMS_512 if depth == 36 else PATCH_NUMS_256
    table = {k: torch.empty(s, device="meta") for k, s in golden_sizes("keys_vae_ch160v4096z32").items()}
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(vqvae_config(table, sides))
        teacher = var_teacher(VARConfig(depth=depth, width=64 * depth, heads=depth, shared_aln=shared), tokenizer)
    count = sum(p.numel() for part in (teacher.backbone, teacher.output) for p in part.parameters())
    assert count == pytest.approx(millions * 1e6, rel=2e-4)


def test_phi_table_is_float64s():
    assert shared_phi(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert shared_phi(1, 4) == (0,)
