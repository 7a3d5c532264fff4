"""Fréchet distance against scipy and closed forms; likelihood and the marginal baseline against enumeration."""

import numpy as np
import pytest
import scipy.linalg
import torch

from dd2.baselines.marginal import MarginalSampler
from dd2.baselines.skip import skipped
from dd2.errors import InputError
from dd2.evaluation.likelihood import teacher_nll
from dd2.evaluation.plots import EXPLAINED, PANELS, curves
from dd2.evaluation.speed import seconds_per_call
from dd2.frechet import FeatureStatistics, GaussianFit, frechet_distance
from dd2.teachers.filtering import Sampling
from dd2.training.samples import TeacherSamples
from models import tiny_teacher, tiny_var


def fit(features: torch.Tensor, batch: int = 10**9) -> GaussianFit:
    statistics = FeatureStatistics()
    for part in features.split(batch):
        statistics.add(part)
    return statistics.fit()


def features(seed: int, count: int = 300, size: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=g)
    return torch.randn(count, size, generator=g) @ mix + 5 * torch.randn(size, generator=g)


def test_statistics_are_those_of_numpy_whatever_the_batches():
    x = features(0) + 1000
    for batch in (7, 100, 300):
        gaussian = fit(x, batch)
        np.testing.assert_allclose(gaussian.mean, x.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(x.double().numpy().T), rtol=1e-8)


def test_frechet_distance_against_scipy():
    a, b = fit(features(1)), fit(features(2))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    mean = float((a.mean - b.mean).square().sum())
    expected = mean + float(a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(np.real(root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_in_closed_form_and_singular():
    eye = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    assert frechet_distance(GaussianFit(zero, eye), GaussianFit(zero + 2, 9 * eye)) == pytest.approx(12 + 3 * 4)
    flat = torch.diag(torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert frechet_distance(GaussianFit(zero, flat), GaussianFit(zero, flat)) == pytest.approx(0, abs=1e-12)
    few = fit(features(3, count=4))  # fewer samples than channels
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_bad_statistics():
    with pytest.raises(InputError, match="NaN"):
        fit(torch.full((3, 2), float("nan")))
    with pytest.raises(InputError, match="at least 2"):
        fit(torch.zeros(1, 2))
    with pytest.raises(InputError, match="different size"):
        frechet_distance(fit(torch.randn(5, 2)), fit(torch.randn(5, 3)))


def test_teacher_nll_is_the_sum_of_conditional_log_probabilities():
    teacher = tiny_teacher()
    cond = torch.tensor([0, 1, 2])
    ids = teacher.generate(cond, Sampling(), range(3))
    by_hand = torch.zeros(3)
    for position in range(16):
        log_p = teacher.logits(teacher.codebook[ids], cond)[:, position].log_softmax(-1)
        by_hand -= log_p[torch.arange(3), ids[:, position]]
    torch.testing.assert_close(teacher_nll(teacher, ids, cond, batch=2), by_hand)


def test_marginal_sampler_draws_the_frequencies_of_class_and_position():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    ids = torch.randint(5, (400, 3), generator=g)
    ids[labels == 1, 0] = 2  # one class always has code 2 at position 0
    ids[:, 2] = ids[:, 1]  # correlated positions, which the baseline must lose
    samples = TeacherSamples(tiny_teacher(), ids.to(torch.uint16), labels)
    drawn = MarginalSampler(samples).kept(torch.arange(20_000) % 2, range(20_000)).long()
    odd = drawn[1::2]
    assert (odd[:, 0] == 2).all()
    expected = ids[labels == 1, 1].bincount(minlength=5) / 200
    torch.testing.assert_close(odd[:, 1].bincount(minlength=5) / 10_000, expected, atol=0.02, rtol=0)
    together = (odd[:, 1] == odd[:, 2]).float().mean()
    assert together == pytest.approx(float(expected.square().sum()), abs=0.02)
    of_all = MarginalSampler(samples, "dataset").kept(torch.arange(20_000) % 2, range(20_000)).long()
    for odd_or_even in (of_all[::2], of_all[1::2]):  # every class has the frequencies of the whole data set
        torch.testing.assert_close(
            odd_or_even[:, 0].bincount(minlength=5) / 10_000, ids[:, 0].bincount(minlength=5) / 400, atol=0.02, rtol=0
        )
    latents = torch.randn(400, 3, 2, generator=g)
    continuous = MarginalSampler(TeacherSamples(tiny_teacher(), latents, labels)).kept(torch.tensor([0, 1]), [5, 6])
    for row, label in ((0, 0), (1, 1)):
        for position in range(3):  # each is a teacher sample's own token at that place
            assert (continuous[row, position] == latents[labels == label, position]).all(-1).sum() == 1


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_skip_m_is_the_start_of_the_teachers_own_sequence(build):
    teacher, cond = build(), torch.tensor([0, 1, 2])
    teacher.standardise()
    ids = teacher.generate(cond, Sampling(), range(3))
    kept = teacher.order.steps[-2].start
    codes = teacher.tokenizer.codebook[ids[:, :kept]]
    if build is tiny_var:  # scales that are missing add nothing
        expected = teacher.tokenizer.decode_codes(codes)
    else:
        rest = teacher.backbone.token_mean.expand(3, teacher.order.n - kept, -1)
        expected = teacher.tokenizer.decode_codes(torch.cat([codes, rest], 1))
    assert torch.equal(skipped(teacher, cond, Sampling(), range(3), 2), expected)
    for m in (0, teacher.order.num_steps):
        with pytest.raises(InputError, match="skip must be 1"):
            skipped(teacher, cond, Sampling(), range(3), m)


def test_speed_takes_turns_and_the_median():
    calls = []
    taken = seconds_per_call({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert set(taken) == {"a", "b"}


def test_curves_need_no_particular_stage():
    rows = [{"stage": "csd", "step": i, "guidance/loss": 1 / i, "generator/loss": 0.1} for i in range(1, 10)]
    assert curves(rows).startswith(b"\x89PNG")
    assert curves([]).startswith(b"\x89PNG")


def test_every_panel_is_explained():
    assert {title for _, _, title in PANELS} == set(EXPLAINED)
