"""The codes that can be drawn and their probabilities: what filtering leaves, against the dense distribution."""

import math

import pytest
import torch

from dd2.distribution import CodeDistribution
from dd2.teachers.filtering import Sampling, filtered
from dd2.tokenizers.base import nearest_ids
from models import tiny_teacher

CODES = 200


def logits_of(rows: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, CODES, generator=torch.Generator().manual_seed(seed))


def cut_by_hand(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Dense log-probabilities, row by row, in float64."""
    rows = []
    for row in logits.double() / sampling.temperature:
        order = row.argsort(descending=True)[: sampling.top_k or len(row)]
        p = row[order].softmax(0)
        kept = order[: 1 + int((p.cumsum(0) < sampling.top_p).sum())]
        log_p = torch.full_like(row, -math.inf)
        log_p[kept] = row[kept].log_softmax(0)
        rows.append(log_p)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), None),
        (Sampling(top_k=CODES), None),
        (Sampling(top_k=1), 1),
        (Sampling(top_k=30), 30),
        (Sampling(top_k=30, temperature=0.7), 30),
        (Sampling(top_p=0.7), 99),
        (Sampling(top_k=30, top_p=0.9), 30),
        (Sampling(top_k=150), None),
    ],
)
def test_filtering_keeps_the_codes_that_can_be_drawn_and_no_others(sampling, kept):
    logits = logits_of()
    found = filtered(logits, sampling)
    torch.testing.assert_close(found.dense().double(), cut_by_hand(logits, sampling), atol=1e-5, rtol=1e-5)
    if kept is None:  # all of them, or so many that their numbers would take more room than the codes left out
        assert found.ids is None
    else:
        assert found.ids is not None
        assert found.ids.dtype == torch.int32
        assert found.log_p.shape[-1] <= kept
        assert (found.ids.diff(dim=-1) >= 0).all()
        for log_p, ids in zip(found.log_p, found.ids, strict=True):  # what cannot be drawn is a copy of what can
            assert set(ids.tolist()) == set(ids[log_p > -math.inf].tolist())


def test_one_number_draws_the_same_code_from_either_form():
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(top_k=30), Sampling(top_p=0.6), Sampling(top_k=1)):
        found = filtered(logits_of(), sampling)
        assert torch.equal(found.draw(uniforms), CodeDistribution.over_all(found.dense()).draw(uniforms))


def test_the_nearest_code_is_one_that_can_be_drawn():
    g = torch.Generator().manual_seed(2)
    tokens, codebook = torch.randn(64, 4, generator=g), torch.randn(CODES, 4, generator=g)
    found = filtered(logits_of(), Sampling(top_p=0.6))
    distance = torch.cdist(tokens, codebook).masked_fill(found.dense() == -math.inf, math.inf)
    assert torch.equal(found.nearest(tokens, codebook), distance.argmin(-1))
    assert torch.equal(CodeDistribution.over_all(found.dense()).nearest(tokens, codebook), distance.argmin(-1))


def test_parts_that_keep_different_numbers_of_codes_join():
    logits = logits_of()
    for sampling in (Sampling(top_p=0.3), Sampling(top_p=0.6), Sampling(top_p=0.9)):
        whole = filtered(logits, sampling)
        parts = CodeDistribution.cat([filtered(part, sampling) for part in logits.split(7)])
        torch.testing.assert_close(parts.dense(), whole.dense())
        torch.testing.assert_close(parts.view(8, 8)[:, 3].dense(), whole.dense().view(8, 8, -1)[:, 3])


def test_tiles_change_neither_a_teachers_distribution_nor_the_nearest_codes(monkeypatch):
    teacher = tiny_teacher()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(len(teacher.codebook), (4, teacher.order.n), generator=g)
    tokens, cond, sampling = teacher.codebook[ids], torch.tensor([0, 1, 2, 1]), Sampling(cfg_scale=2.0, top_p=0.5)
    noisy = tokens + torch.randn(tokens.shape, generator=g)
    whole, snapped = teacher.distribution(tokens, cond, sampling).dense(), nearest_ids(noisy, teacher.codebook)
    for module in ("teachers.code", "distribution"):
        monkeypatch.setattr(f"dd2.{module}.tile_rows", lambda columns, device: 3)
    torch.testing.assert_close(teacher.distribution(tokens, cond, sampling).dense(), whole)
    assert torch.equal(nearest_ids(noisy, teacher.codebook), snapped)
