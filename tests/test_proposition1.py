"""Proposition 1 by enumeration: the one-step generator's joint distribution approaches the teacher's."""

import pytest
import torch

from dd2.teachers.filtering import Sampling
from dd2.teachers.table import TableTeacher, independent, total_variation
from dd2.trajectory import data_of_noise
from enumeration import distil_table
from proposition1 import configurations, random_joint

EQUAL_PAIRS = torch.tensor([[0.5, 0.0], [0.0, 0.5]])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def test_independent_tokens_are_far_away():
    assert distance(independent(EQUAL_PAIRS), EQUAL_PAIRS) == 0.5
    assert distance(independent(random_joint()), random_joint()) == pytest.approx(0.44, abs=0.05)


def test_table_teacher_is_its_table():
    joint = random_joint()
    teacher = TableTeacher(joint)
    cond = torch.zeros(50_000, dtype=torch.long)
    uniforms_ids = teacher.sequences(200_000, torch.Generator().manual_seed(0))
    assert total_variation(uniforms_ids, joint) < 0.01
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    log_p = teacher.distribution(teacher.codebook[every], cond[:64], Sampling()).dense()
    product = log_p.gather(-1, every.unsqueeze(-1)).sum((1, 2)).exp()
    torch.testing.assert_close(product, joint.flatten())
    drawn = teacher.generate(cond[:20_000], Sampling(), range(20_000))
    assert total_variation(drawn, joint) < 0.03  # whose own sampling error is about 0.02
    noise = torch.randn(20_000, 3, 4, generator=torch.Generator().manual_seed(0))
    assert total_variation(data_of_noise(teacher, noise, cond[:20_000], Sampling(), steps=30), joint) < 0.03
    kept = teacher.codebook[drawn[:, :1]]
    assert teacher.generate(cond[:20_000], Sampling(), range(20_000), prefix=kept, first_step=1).equal(drawn[:, 1:])
    impossible = TableTeacher(EQUAL_PAIRS)
    assert torch.isfinite(impossible.logits(torch.randn(9, 2, 2), cond[:9]).amax(-1)).all()


@pytest.mark.parametrize(
    ("joint", "iterations", "limit"),
    [
        pytest.param(EQUAL_PAIRS, 80, 0.05, marks=pytest.mark.long),
        pytest.param(random_joint(), 200, 0.15, marks=pytest.mark.long),
    ],
    ids=["equal pairs", "random"],
)
@pytest.mark.e2e
def test_distilled_joint_distribution(tmp_path, joint, iterations, limit):
    head, tune, csd = configurations("dmd", iterations, decay="constant")
    assert distil_table(tmp_path, joint, head, tune, csd) <= limit
