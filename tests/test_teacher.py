"""The teacher interface: order, filtering, cached generation."""

import math

import pytest
import torch

from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.order import RasterOrder
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling, filtered, guided
from dd2.teachers.llamagen import LlamaGenConfig
from dd2.teachers.next_scale import NextScaleOrder
from dd2.tokenizers.base import nearest_ids
from dd2.tokenizers.vq import VQTokenizer
from models import TINY_VQ, tiny_teacher, tiny_text, tiny_var

LABELS = torch.tensor([0, 1, 2, 0, 1])


MAKERS = {
    "llamagen": tiny_teacher,
    "llamagen-grouped": lambda: tiny_teacher(kv_heads=1),
    "llamagen-text": tiny_text,
    "var": tiny_var,
    "var-shared-adaln": lambda: tiny_var(shared_aln=True),
    "var-without-qk-norm": lambda: tiny_var(attn_l2_norm=False),
}


@pytest.fixture(scope="module", params=MAKERS)
def teacher(request) -> CodeTeacher:
    return MAKERS[request.param]()


@pytest.fixture
def cond(teacher) -> torch.Tensor:
    return teacher.conditions(LABELS)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg_scale=2.0, temperature=0.8, top_k=7, top_p=0.9)])
def test_cached_generation_follows_the_full_forward_pass(teacher, cond, sampling):
    """Redrawing every token from the full pass's log p with the same numbers gives the same sequence."""
    from dd2.seeding import image_uniforms

    ids = teacher.generate(cond, sampling, range(5))
    log_p = teacher.distribution(teacher.codebook[ids], cond, sampling).dense()
    assert torch.equal(CodeDistribution.over_all(log_p).draw(image_uniforms(range(5), (teacher.order.n,))), ids)
    assert len(torch.unique(ids)) > 4


def test_cached_features_equal_the_full_forward_pass(teacher, cond):
    steps = teacher.order.steps
    tokens = torch.randn(5, teacher.order.n, 4)
    full = teacher.features(tokens, cond)
    cache = teacher.backbone.new_cache()
    for index in sorted({0, 1, 2, len(steps) // 2, len(steps) - 1}):  # one step at a time, and several at once
        step = teacher.backbone.next_features(cache, tokens[:, : steps[index].start], cond)
        torch.testing.assert_close(step, full[:, steps[index]], atol=1e-5, rtol=1e-5)


def test_position_sees_only_earlier_steps(teacher, cond):
    tokens = torch.randn(5, teacher.order.n, 4)
    before = teacher.features(tokens, cond)
    step = teacher.order.steps[teacher.order.num_steps // 2]
    for position in {step.start, step.stop - 1}:
        changed = tokens.clone()
        changed[:, position] += 1
        after = teacher.features(changed, cond)
        torch.testing.assert_close(before[:, : step.stop], after[:, : step.stop])
        assert ((before - after)[:, step.stop :].abs().amax((0, 2)) > 1e-4).all()
    other_class = teacher.features(tokens, teacher.conditions((LABELS + 1) % 3))
    assert ((before - other_class).abs().amax((0, 2)) > 1e-4).all()


def test_prefix_and_seed_decide_the_continuation(teacher, cond):
    """Alg. 4: at every step, redrawing the rest after the same prefix with the same seeds gives the same tokens."""
    seeds = [9, 8, 7, 6, 5]
    for sampling in (Sampling(), Sampling(cfg_scale=1.7, top_k=6)):
        whole = teacher.generate(cond, sampling, seeds)
        for index, step in enumerate(teacher.order.steps):
            prefix = teacher.codebook[whole[:, : step.start]]
            rest = teacher.generate(cond, sampling, seeds, prefix=prefix, first_step=index)
            assert torch.equal(rest, whole[:, step.start :])
    whole = teacher.generate(cond, Sampling(), seeds)
    assert torch.equal(teacher.generate(cond[2:3], Sampling(), [7]), whole[2:3])  # the batch does not matter
    with pytest.raises(ValueError, match=f"prefix of {teacher.order.steps[2].start}"):
        teacher.generate(cond, Sampling(), range(5), prefix=teacher.codebook[whole], first_step=2)
    with pytest.raises(ValueError, match="one seed per condition"):
        teacher.generate(cond, Sampling(), range(4))


def test_a_teacher_that_overrides_what_nobody_asks_is_refused():
    """Sampling and training read `features` and `classify`; a distribution of its own elsewhere would be ignored in silence."""
    given = tiny_teacher()
    for name in ("logits", "log_p"):
        own = type("Own", (CodeTeacher,), {name: lambda *_: None})
        with pytest.raises(InputError, match=r"override features .* or classify"):
            own(given.backbone, given.output, given.tokenizer, given.conditions)


def test_guidance_conventions(teacher, cond):
    """None is no guidance for everybody; numbers mean what the family's authors mean by them."""
    tokens = teacher.codebook[teacher.generate(cond, Sampling(), range(5))]
    logits, null = teacher.logits(tokens, cond), teacher.logits(tokens, teacher.backbone.null_condition(cond))
    torch.testing.assert_close(teacher.distribution(tokens, cond, Sampling()).dense(), logits.log_softmax(-1))
    found = teacher.distribution(tokens, cond, Sampling(cfg_scale=1.5)).dense()
    if isinstance(teacher.order, NextScaleOrder):  # (1 + t) cond - t null, t = cfg k / (S - 1)
        t = torch.tensor([0.0] + [0.75] * 4 + [1.5] * 16).unsqueeze(-1)
        expected, none = (1 + t) * logits - t * null, 0.0
    else:
        expected, none = null + 1.5 * (logits - null), 1.0
    torch.testing.assert_close(found, expected.log_softmax(-1))
    torch.testing.assert_close(teacher.distribution(tokens, cond, Sampling(cfg_scale=none)).dense(), logits.log_softmax(-1))


def test_guidance_can_end_early():
    """LlamaGen's cfg_interval: the first token and the cfg_interval + 1 that follow are guided, the rest are not."""
    teacher = tiny_teacher()
    for interval, guided_tokens in ((-1, 16), (0, 2), (3, 5), (20, 16)):
        sampling = Sampling(cfg_scale=3.0, cfg_interval=interval)
        assert teacher.cfg_weights(sampling).tolist() == [3.0] * guided_tokens + [1.0] * (16 - guided_tokens)
    sampling = Sampling(cfg_scale=3.0, cfg_interval=3)
    ids = teacher.generate(LABELS, sampling, range(5))
    log_p = teacher.distribution(teacher.codebook[ids], LABELS, sampling).dense()
    plain, whole = (teacher.distribution(teacher.codebook[ids], LABELS, Sampling(cfg_scale=s)).dense() for s in (None, 3.0))
    torch.testing.assert_close(log_p[:, :5], whole[:, :5])
    torch.testing.assert_close(log_p[:, 5:], plain[:, 5:])
    with pytest.raises(InputError, match="cfg_interval belongs to LlamaGen"):
        tiny_var().generate(LABELS, sampling, range(5))


def test_standardisation_changes_no_logit(teacher, cond):
    ids = torch.randint(12, (5, teacher.order.n), generator=torch.Generator().manual_seed(0))
    before = teacher.logits(teacher.codebook[ids], cond)
    teacher.standardise(ids)
    tokens = teacher.codebook[ids]
    torch.testing.assert_close(teacher.logits(tokens, cond), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std((0, 1), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert torch.equal(nearest_ids(tokens, teacher.codebook), ids)


def test_filters():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert filtered(logits, Sampling(top_k=2)).dense().exp().tolist()[0] == pytest.approx([0.625, 0.375, 0, 0])
    assert filtered(logits, Sampling(top_p=0.7)).dense().exp().tolist()[0] == pytest.approx([0.625, 0.375, 0, 0])
    assert filtered(logits, Sampling(top_p=0.01)).dense().exp().tolist()[0] == pytest.approx([1, 0, 0, 0])
    assert filtered(logits, Sampling(top_k=9)).dense().exp().tolist()[0] == pytest.approx([0.5, 0.3, 0.15, 0.05])
    # top-k comes before top-p: of the two kept codes the first alone holds 0.6
    assert filtered(logits, Sampling(top_k=2, top_p=0.6)).dense().exp().tolist()[0] == pytest.approx([1, 0, 0, 0])
    warm = filtered(logits, Sampling(temperature=0.5)).dense().exp()
    torch.testing.assert_close(warm, torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]) / 0.365)
    assert torch.isneginf(filtered(logits, Sampling(top_k=1)).dense())[0].tolist() == [False, True, True, True]


def test_guidance_is_extrapolation():
    cond, null = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(guided(cond, null, 1.0), cond)
    torch.testing.assert_close(guided(cond, null, 0.0), null)
    torch.testing.assert_close(guided(cond, null, 3.0), cond + 2 * (cond - null))


def test_draw_follows_the_distribution():
    p = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount(CodeDistribution.over_all(p.log().expand(10_000, -1)).draw(uniforms), minlength=6) / 10_000
    torch.testing.assert_close(counts, p, atol=2e-4, rtol=0)
    edges = CodeDistribution.over_all(p.log().expand(2, -1)).draw(torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 4]


def test_raster_order():
    order = RasterOrder(2, 3)
    assert (order.n, order.num_steps, order.steps[4]) == (6, 6, slice(4, 5))
    codes = torch.arange(12.0).view(1, 6, 2)
    assert torch.equal(order.inputs(codes), codes[:, :5])
    assert order.inputs(codes[:, :0]).shape == (1, 0, 2)


def test_mismatched_parts_are_refused():
    teacher = tiny_teacher()
    from dd2.teachers.llamagen import llamagen_teacher

    with pytest.raises(InputError, match="not trained together"):
        llamagen_teacher(LlamaGenConfig(depth=1, width=16, heads=2, rows=5, columns=4), VQTokenizer(TINY_VQ))
    with pytest.raises(InputError, match="whole multiple of 4"):
        LlamaGenConfig(width=30, heads=4)
    with pytest.raises(InputError, match="multiple of kv_heads"):
        LlamaGenConfig(width=64, heads=4, kv_heads=3)
    for wrong in (
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"cfg_scale": math.inf},
    ):
        with pytest.raises(InputError):
            Sampling(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="reads images"):
        teacher.tokenizer.encode(torch.zeros(1, 3, 16, 16))
