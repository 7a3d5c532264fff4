"""The student in both roles, and every way to sample."""

import pytest
import torch
from torch import nn

from dd2.errors import InputError
from dd2.sampling import ar_diffusion, one_step, refine
from dd2.scores import posterior_mean
from dd2.student import HeadConfig, Student
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.base import nearest_ids
from models import TINY_HEAD, tiny_teacher

LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture
def student() -> Student:
    student = Student.from_teacher(tiny_teacher(), TINY_HEAD)
    g = torch.Generator().manual_seed(0)
    for parameter in student.head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2, generator=g)
    return student.eval()


def test_from_teacher_copies_the_backbone_and_starts_at_velocity_zero():
    teacher = tiny_teacher()
    fresh = Student.from_teacher(teacher, TINY_HEAD)
    noise = torch.randn(4, 16, 4)
    assert torch.equal(fresh.features(noise, LABELS), teacher.features(noise, LABELS))
    assert torch.equal(fresh.as_generator(noise, LABELS), noise)
    assert all(p.requires_grad for p in fresh.parameters())
    with torch.no_grad():
        next(fresh.backbone.parameters()).add_(1)
    assert not torch.equal(next(fresh.backbone.parameters()), next(teacher.backbone.parameters()))


def test_head_of_the_paper_adds_few_parameters():
    """Table 1: with the head VAR-d16 has 329M, so that the head holds about 23M (width 1024, C = 32)."""
    with torch.device("meta"):
        from dd2.student import VelocityHead

        count = sum(p.numel() for p in VelocityHead(32, 1024, HeadConfig()).parameters())
    assert 8e6 < count < 21e6


def test_generator_is_autoregressive_in_the_noise(student):
    noise = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(0))
    changed = noise.clone()
    changed[:, 9] += 1
    before, after = (student.as_generator(x, LABELS) for x in (noise, changed))
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert ((before - after)[:, 9:].abs().amax((0, 2)) > 1e-5).all()


def test_seeds_belong_to_images(student):
    whole = one_step(student, LABELS, [5, 6, 7, 8])
    assert torch.allclose(one_step(student, LABELS[2:3], [7]), whole[2:3], atol=1e-5)
    assert not torch.allclose(one_step(student, LABELS, [5, 6, 7, 9])[3], whole[3])
    diffused = ar_diffusion(student, LABELS, [5, 6, 7, 8])
    assert torch.allclose(ar_diffusion(student, LABELS[1:2], [6]), diffused[1:2], atol=1e-2)
    with pytest.raises(ValueError, match="one seed per condition"):
        one_step(student, LABELS, [1])


class ExactVelocity(nn.Module):
    """The closed-form velocity of a known mixture in place of the head: AR-diffusion must then draw its codes."""

    def __init__(self, log_p: torch.Tensor, codebook: torch.Tensor) -> None:
        super().__init__()
        self.log_p, self.codebook = log_p, codebook

    def forward(self, x_t, t, features):
        t = t.clamp(1e-3, 1 - 1e-3)
        x0_hat = posterior_mean(x_t, t, self.log_p.expand(*t.shape, -1), self.codebook)
        return (x_t - x0_hat) / t.unsqueeze(-1)


def test_ar_diffusion_with_the_exact_velocity_draws_the_distribution(student):
    teacher = tiny_teacher()
    p = torch.tensor([0.5, 0.3, 0.2] + [0.0] * 9)
    codebook = teacher.codebook * 2
    student.head = ExactVelocity(p.log(), codebook)  # pyright: ignore[reportAttributeAccessIssue]
    tokens = ar_diffusion(student, torch.zeros(200, dtype=torch.long), range(200), euler_steps=60)
    ids = nearest_ids(tokens, codebook)
    assert (tokens - codebook[ids]).abs().max() < 0.05
    frequency = torch.bincount(ids.flatten(), minlength=12) / ids.numel()
    torch.testing.assert_close(frequency, p, atol=0.04, rtol=0)
    with pytest.raises(InputError, match="euler_steps"):
        ar_diffusion(student, LABELS, range(4), euler_steps=0)


def test_refine_keeps_the_prefix_and_redraws_the_rest(student):
    teacher, seeds = tiny_teacher(), [1, 2, 3, 4]
    codebook = teacher.codebook
    alone = one_step(student, LABELS, seeds)
    assert torch.equal(refine(student, teacher, LABELS, Sampling(), seeds, 1), alone)
    tokens = refine(student, teacher, LABELS, Sampling(), seeds, 5)
    ids = nearest_ids(tokens, codebook)
    assert torch.equal(tokens[:, :12], alone[:, :12])
    assert torch.equal(tokens[:, 12:], codebook[ids[:, 12:]])
    rest = teacher.generate(LABELS, Sampling(), seeds, prefix=codebook[ids[:, :12]], first_step=12)
    assert torch.equal(ids[:, 12:], rest)
    as_drawn = refine(student, teacher, LABELS, Sampling(), seeds, 5, prefix="generated")
    read = teacher.generate(LABELS, Sampling(), seeds, prefix=alone[:, :12], first_step=12)
    assert torch.equal(nearest_ids(as_drawn[:, 12:], codebook), read)
    assert torch.equal(as_drawn[:, :12], alone[:, :12])
    everything = refine(student, teacher, LABELS, Sampling(), seeds, 17)
    assert torch.equal(nearest_ids(everything, codebook), teacher.generate(LABELS, Sampling(), seeds))
    for steps in (0, 18):
        with pytest.raises(InputError, match="steps must be 1"):
            refine(student, teacher, LABELS, Sampling(), seeds, steps)
