"""LlamaGen's transformers and VQ model against the official code's outputs and key tables."""

import pytest
import torch
from torch import Tensor

from dd2.checkpoints import load_llamagen
from dd2.checkpoints.foreign import official_shapes
from dd2.checkpoints.llamagen import ENCODERS, gpt_config, gpt_origins, vq_config, vq_ignored
from dd2.checkpoints.native import load_teacher, save_teacher
from dd2.commands.distill_config import DistillConfig, with_usual_sampling
from dd2.method.config import TuneConfig
from dd2.teachers.adaptation import adapted_copy
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenBackbone, LlamaGenConfig, llamagen_teacher
from dd2.text.captions import caption_condition
from dd2.text.encoder import EncoderSpec
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.vq import VQTokenizer
from golden_weights import golden_model, golden_sizes, golden_state, golden_values

NAMES = ("llamagen_tiny", "llamagen_t2i_tiny")


def load(name: str) -> CodeTeacher:
    vq = golden_model("llamagen_tiny", "vq_shapes")
    return load_llamagen({"model": golden_model(name, "gpt_shapes")}, {"model": vq}, num_heads=2, image_size=16)


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(name) -> CodeTeacher:
    return load(name)


@pytest.fixture(scope="module")
def values(name) -> dict[str, Tensor]:
    return golden_values(name)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_tokenizer():
    tokenizer, values = load("llamagen_tiny").tokenizer, golden_values("llamagen_tiny")
    images = values["images"]
    assert torch.equal(tokenizer.encode(images), values["encoded_ids"].view(len(images), -1))
    close(tokenizer.codebook[tokenizer.encode(images)].transpose(1, 2).view(values["quantized"].shape), values["quantized"])
    close(tokenizer.decode(values["ids"]), values["decoded"])
    torch.testing.assert_close(tokenizer.codebook, values["codebook"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("standardised", [False, True])
def test_logits(teacher, values, standardised):
    if standardised:
        teacher.standardise()
    else:
        teacher.backbone.normalise_by(torch.zeros(8), torch.ones(8))
    tokens, cond = teacher.codebook[values["ids"]], values["cond"]
    close(teacher.logits(tokens, cond), values["logits"])
    close(teacher.logits(tokens, teacher.backbone.null_condition(cond)), values["logits_uncond"])


def test_greedy_guided_generation(name, teacher, values):
    cond = values["cond"]
    sampling = Sampling(cfg_scale=golden_sizes(name)["greedy_cfg_scale"], top_k=1)
    assert torch.equal(teacher.generate(cond, sampling, range(len(cond))), values["greedy_cfg_ids"])


def test_a_mask_of_words_only_changes_nothing():
    teacher, values = load("llamagen_t2i_tiny"), golden_values("llamagen_t2i_tiny")
    cond, tokens = values["cond"], teacher.codebook[values["ids"]]
    close(teacher.logits(tokens, caption_condition(cond, torch.ones(cond.shape[:2]))), values["logits"])


def test_what_a_converted_text_teacher_remembers(tmp_path, capsys):
    """Its encoder and its authors' sampling, in its folder and after stage 0, and that these are meant where no sampling is
    given.
    """
    original = load("llamagen_t2i_tiny")
    save_teacher(tmp_path / "teacher", original)
    adapted = adapted_copy(load_teacher(tmp_path / "teacher"))
    for found in (original, load_teacher(tmp_path / "teacher"), adapted):
        assert isinstance(labels := found.conditions, CaptionLabels)
        assert labels.encoder == EncoderSpec("flan-t5", "", length=labels.length, channels=labels.channels)
        assert found.usual_sampling == Sampling(cfg_scale=7.5, top_k=1000)
        assert found.usually(Sampling(), Sampling()) == Sampling(cfg_scale=7.5, top_k=1000)
        assert found.usually(Sampling(top_k=5), Sampling()) == Sampling(cfg_scale=7.5, top_k=5)
    assert "cfg_scale 7.5, top_k 1000" in capsys.readouterr().err
    config = DistillConfig(tune=TuneConfig(sampling=Sampling(top_k=3)))
    changed = with_usual_sampling(config, original)
    assert (changed.tune.sampling, changed.csd.sampling) == (
        Sampling(cfg_scale=None, top_k=3),
        Sampling(cfg_scale=7.5, top_k=1000),
    )
    assert ENCODERS[2048] == "google/flan-t5-xl"
    assert load("llamagen_tiny").usual_sampling is None


def test_grouped_heads_load_and_cache():
    """Grouped key/value heads, as the official class builds them with n_kv_head: fewer rows of wqkv."""
    shapes = dict(golden_sizes("llamagen_tiny")["gpt_shapes"])
    for layer in range(2):
        shapes[f"layers.{layer}.attention.wqkv.weight"] = [64 + 2 * 32, 64]
    teacher = load_llamagen(golden_state(shapes), golden_model("llamagen_tiny", "vq_shapes"), num_heads=2, image_size=16)
    assert isinstance(teacher.backbone, LlamaGenBackbone)
    assert teacher.backbone.config.kv_heads == 1
    labels = torch.tensor([1, 2, 3])
    ids = teacher.generate(labels, Sampling(top_k=1), range(3))
    logits = teacher.logits(teacher.codebook[ids], labels)
    assert torch.equal(logits.argmax(-1), ids)
    # The same as separate heads whose keys and values are copies.
    state = golden_state(shapes)
    for layer in range(2):
        q, k, v = state[f"layers.{layer}.attention.wqkv.weight"].split([64, 32, 32])
        state[f"layers.{layer}.attention.wqkv.weight"] = torch.cat([q, k, k, v, v])
    full = load_llamagen(state, golden_model("llamagen_tiny", "vq_shapes"), num_heads=2, image_size=16)
    close(full.logits(full.codebook[ids], labels), logits)


@pytest.mark.parametrize(
    ("table", "width", "depth"), [("keys_llamagen_GPT-B_c2i", 768, 12), ("keys_llamagen_GPT-L_c2i", 1024, 24)]
)
def test_full_size_transformer_tables_match_exactly(table, width, depth):
    keys = golden_sizes(table)
    config = gpt_config({k: torch.empty(s, device="meta") for k, s in keys.items()}, 16)
    assert (config.width, config.depth, config.heads, config.ffn_multiple) == (width, depth, width // 64, 256)
    with torch.device("meta"):
        teacher = llamagen_teacher(config, VQTokenizer(VQConfig()))
    shapes = {k: tuple(v.shape) for k, v in teacher.state_dict().items() if not k.startswith("tokenizer.")}
    assert official_shapes(gpt_origins(shapes), shapes) == {k: tuple(v) for k, v in keys.items()}


def test_vq8_has_its_published_size():
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig(multipliers=(1, 2, 2, 4)))
    assert tokenizer.num_positions == 32 * 32
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(70.1e6, rel=1e-3)


def test_full_size_vq_and_text_tables_match_exactly():
    keys = golden_sizes("keys_llamagen_vq16")
    assert vq_config({k: torch.empty(s, device="meta") for k, s in keys.items()}, 256) == VQConfig()
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig())
    shapes = {k: tuple(v.shape) for k, v in tokenizer.state_dict().items()}
    assert shapes == {k: tuple(v) for k, v in keys.items() if not vq_ignored(k)}
    keys = golden_sizes("keys_llamagen_t2i_first_layer")
    config = gpt_config({k: torch.empty(s, device="meta") for k, s in keys.items()}, 16)
    assert (config.caption_dim, config.caption_length, config.condition_positions) == (2048, 120, 120)
    with torch.device("meta"):
        teacher = llamagen_teacher(config, tokenizer)
    shapes = {k: tuple(v.shape) for k, v in teacher.state_dict().items() if not k.startswith("tokenizer.")}
    assert official_shapes(gpt_origins(shapes), shapes) == {k: tuple(v) for k, v in keys.items()}


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"),
    [(768, 12, 12, 110.9), (1024, 24, 16, 342.9), (1280, 36, 20, 774.7), (1536, 48, 24, 1411), (3200, 24, 32, 3096.7)],
)
def test_published_sizes(width, depth, heads, millions):
    config = LlamaGenConfig(depth=depth, width=width, heads=heads, input_layer="table")
    with torch.device("meta"):
        teacher = llamagen_teacher(config, VQTokenizer(VQConfig()))
    count = sum(p.numel() for part in (teacher.backbone, teacher.output) for p in part.parameters())
    assert count == pytest.approx(millions * 1e6, rel=4e-4)
