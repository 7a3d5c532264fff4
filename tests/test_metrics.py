"""Every metric against an independent implementation or a closed form, on random features and on real digits."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dd2.checkpoints.runs import embedded
from dd2.data import digits
from dd2.data.idx import IdxImages
from dd2.errors import InputError
from dd2.evaluation.bank import feature_bank
from dd2.evaluation.features import classifier_features
from dd2.evaluation.inception_score import inception_score
from dd2.evaluation.kid import kernel_distance
from dd2.evaluation.metrics import (
    MetricConfig,
    frechet_infinity,
    interval_of_mean,
    scores,
    spread_of_halves,
    warnings,
    within_class_spread,
)
from dd2.evaluation.neighbours import nearest_distance, neighbour_scores
from dd2.evaluation.path_length import path_length, slerp
from dd2.evaluation.reference import Reference, of_bank
from dd2.frechet import FeatureStatistics, frechet_distance
from dd2.seeding import image_noise, image_uniforms
from dd2.training.store import Store


class Passed(nn.Module):
    """Gives torchmetrics our features as "images"."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x


def random_features(seed: int, count: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 16, generator=g)
    return torch.randn(count, 16, generator=g) @ mix + seed


def digit_features(seed: int, count: int) -> Tensor:
    network = classifier_features(embedded("classifier"), torch.device("cpu"))
    images, _ = digits.batch("train", count, torch.Generator().manual_seed(seed))
    return network.read(images)["pool"]


def real_features(seed: int, count: int) -> Tensor:
    """Of Fashion-MNIST where the data sets lie beside the repository (or in $DD2_DATA), else of held-out digits."""
    file = Path(os.environ.get("DD2_DATA", "../shared/data")) / "fashion-mnist.zip"
    g = torch.Generator().manual_seed(seed)
    images, _ = IdxImages(file, 16).batch("test", count, g) if file.exists() else digits.batch("test", count, g)
    return classifier_features(embedded("classifier"), torch.device("cpu")).read(images)["pool"]


@pytest.fixture(params=[random_features, digit_features, real_features], ids=["random", "digits", "real"])
def two(request) -> tuple[Tensor, Tensor]:
    return request.param(1, 500), request.param(2, 400) * 1.05


def fitted(x: Tensor):
    statistics = FeatureStatistics()
    statistics.add(x)
    return statistics.fit()


def test_frechet_against_torchmetrics(two):
    real, fake = two
    oracle = FrechetInceptionDistance(feature=Passed(real.shape[1]), normalize=True).set_dtype(torch.float64)
    oracle.update(real.double(), real=True)
    oracle.update(fake.double(), real=False)
    assert frechet_distance(fitted(fake), fitted(real)) == pytest.approx(float(oracle.compute()), rel=1e-6)
    assert frechet_distance(fitted(real), fitted(real)) == pytest.approx(0, abs=1e-6)


def test_inception_score_against_torchmetrics(two):
    logits = two[0][:, :10]
    oracle = InceptionScore(feature=Passed(10), splits=1)
    oracle.update(logits)
    mean, deviation = inception_score(logits.softmax(1), splits=1)
    assert mean == pytest.approx(float(oracle.compute()[0]), rel=1e-6)
    assert deviation == 0
    certain = torch.eye(10).repeat(50, 1)
    assert inception_score(certain, splits=5)[0] == pytest.approx(10, rel=0.05)  # shuffled: every part sees all classes
    assert inception_score(torch.full((20, 10), 0.1), splits=2) == pytest.approx((1, 0), abs=1e-9)


def test_kernel_distance_against_torchmetrics(two):
    real, fake = two[0][:300], two[1][:300]
    oracle = KernelInceptionDistance(feature=Passed(real.shape[1]), subsets=1, subset_size=300, normalize=True)
    oracle.set_dtype(torch.float64)
    oracle.update(real.double(), real=True)
    oracle.update(fake.double(), real=False)
    assert kernel_distance(real, fake, subsets=1, subset_size=300)[0] == pytest.approx(float(oracle.compute()[0]), rel=1e-6)
    same = kernel_distance(random_features(1, 400), random_features(1, 800)[400:], subsets=20, subset_size=200)
    assert abs(same[0]) < 3 * same[1]


def test_neighbours_against_prdc(two, monkeypatch):
    real, fake = two
    expected = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=3)
    for block in (64, 2048):
        monkeypatch.setattr("dd2.evaluation.neighbours.BLOCK", block)
        found = neighbour_scores(real, fake)
        for name in ("precision", "recall", "density", "coverage"):
            assert float(found[name].double().mean()) == pytest.approx(expected[name], rel=1e-6), name
    nearest = torch.cdist(fake.double(), real.double()).min(1).values
    torch.testing.assert_close(nearest_distance(fake, real).double(), nearest, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="more than 3"):
        neighbour_scores(real[:3], fake)


def test_intervals_cover_what_repeated_sampling_gives():
    """The spread over halves of one sample estimates the spread over fresh samples."""
    reference = fitted(random_features(1, 20_000))
    draws = random_features(2, 30_000).split(500)
    truth = torch.tensor([frechet_distance(fitted(x), reference) for x in draws]).std()
    estimate = torch.tensor(
        [spread_of_halves(x, lambda rows: frechet_distance(fitted(rows), reference), 20, 0) for x in draws[:10]]
    )
    assert float(estimate.mean()) == pytest.approx(float(truth), rel=0.35)
    coins = (random_features(5, 40_000)[:, 0] > 5).float().view(100, 400)
    covered = [(part.mean() - coins.mean()).abs() < interval_of_mean(part) for part in coins]
    assert 88 <= sum(map(int, covered)) <= 100


def test_extrapolation_removes_the_bias_of_few_samples():
    everything = random_features(3, 60_000)
    reference = fitted(everything[:40_000])
    draws = everything[40_000:].split(1000)
    plain = torch.tensor([frechet_distance(fitted(x), reference) for x in draws]).mean()
    extrapolated = torch.tensor([frechet_infinity(x, reference, 0) for x in draws]).mean()
    assert abs(extrapolated) < plain / 4


def test_scores_of_a_bank(tmp_path):
    labels = torch.arange(120) % 3

    def make(index: Tensor) -> dict[str, Tensor]:
        pool = random_features(1, 120)[index]
        return {"pool": pool, "spatial": pool[:, :5], "probabilities": pool.softmax(1)}

    bank = feature_bank(tmp_path, "a", {"a": 1}, 120, 50, make)
    reference = of_bank(feature_bank(tmp_path, "b", {"b": 1}, 120, 7, make), {})
    found = scores(bank, reference, MetricConfig(fid_infinity=True))
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["sfid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    intervals = {f"{name}_95" for name in ("frechet", "sfid", "inception_score", "precision", "recall", "density", "coverage")}
    assert intervals <= found.keys()
    assert {"frechet_infinity", "inception_score", "kid", "density"} <= found.keys()
    pool = bank.load("pool")
    spreads = [np.trace(np.cov(pool[labels == c].double().numpy().T)) for c in range(3)]
    assert within_class_spread(pool, labels) == pytest.approx(np.mean(spreads), rel=1e-9)
    assert within_class_spread(pool[labels == 0], labels[labels == 0]) == pytest.approx(spreads[0])  # classes may be missing
    with pytest.raises(InputError, match="another network"):
        scores(bank, of_bank(_narrow(tmp_path), {}), MetricConfig())


def test_counts_too_small_to_mean_anything_get_a_word():
    def said(count: int, features: int, known: int | None, pool: int | None, of: str = "x.npz", neighbours: int = 3) -> str:
        described = {"reference": of} | ({} if known is None else {"count": known})
        values = None if pool is None else torch.zeros(pool, features)
        found = warnings(
            count, features, Reference({}, values, described), MetricConfig(neighbours=neighbours), {"inception_score"}
        )
        return " | ".join(found)

    assert said(50_000, 2048, None, None) == ""
    assert said(50_000, 64, 50_000, 50_000) == ""
    assert said(10_000, 64, 10_000, 10_000, "teacher") == ""
    assert said(10_000, 64, None, None).startswith("10,000 images: the Fréchet distance is biased")
    assert said(16, 16, None, None, "teacher").startswith("16 images for 16 features: the covariance is singular")
    assert "reference has 3 images for 64 features" in said(50_000, 64, 3, 3)
    assert "200 images in 10 splits" in said(200, 64, None, None)
    assert "50 neighbours (--metrics.neighbours) need more images of each kind than 40" in said(60, 8, 40, 40, neighbours=50)
    assert "KID is by subsets of 900 images" in said(50_000, 64, 900, 900)


def _narrow(folder) -> Store:
    return feature_bank(folder, "c", {"c": 1}, 20, 20, lambda index: {"pool": random_features(1, 20)[index, :3]})


def test_a_bank_resumes_and_repairs(tmp_path, monkeypatch):
    monkeypatch.setattr("dd2.evaluation.bank.SHARD", 10)
    drawn: list[int] = []

    def make(index: Tensor) -> dict[str, Tensor]:
        drawn.extend(index.tolist())
        if len(drawn) == 20 and not repaired:
            raise KeyboardInterrupt
        return {"pool": index.float().unsqueeze(1)}

    repaired = False
    with pytest.raises(KeyboardInterrupt):
        feature_bank(tmp_path, "a", {}, 35, 5, make)
    repaired = True
    drawn.clear()
    bank = feature_bank(tmp_path, "a", {}, 35, 5, make)
    assert drawn == list(range(10, 35))  # the first file was whole
    assert bank.load("pool").flatten().tolist() == list(range(35))
    bank.files[1].write_bytes(bank.files[1].read_bytes()[:40])
    drawn.clear()
    assert torch.equal(feature_bank(tmp_path, "a", {}, 35, 4, make).load("pool"), bank.load("pool"))
    assert drawn == list(range(10, 20))
    assert feature_bank(tmp_path, "a", {"other": 1}, 5, 5, make).files[0].parent != bank.files[0].parent


def test_slerp_keeps_the_gaussian_norm():
    a, b = torch.randn(2, 200, 3000).unbind()
    for t in (0.0, 0.25, 0.5, 1.0):
        z = slerp(a, b, torch.full((200,), t))
        assert z.norm(dim=1).mean() == pytest.approx(3000**0.5, rel=0.01)
    torch.testing.assert_close(slerp(a, b, torch.zeros(200)), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(200)), b, rtol=1e-4, atol=1e-4)


def test_path_length_of_a_linear_generator_is_the_closed_form():
    """f(z) = c Q z with Q orthogonal: |f'|² = c² (l'² + l² θ²), l the interpolated length and θ the angle between the ends."""
    shape, seeds, scale = (6, 4), range(300), 3.0
    orthogonal = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    labels = torch.zeros(300, dtype=torch.long)
    found, error = path_length(
        lambda noise, _: scale * noise.flatten(1).double() @ orthogonal, shape, labels, seeds, epsilon=1e-3, trim=0.0
    )
    a, b = image_noise(seeds, (2, 24)).double().unbind(1)
    t = image_uniforms(seeds, ()).double() * (1 - 1e-3)
    angle = (a * b).sum(1).div(a.norm(dim=1) * b.norm(dim=1)).acos()
    difference = b.norm(dim=1) - a.norm(dim=1)
    exact = scale**2 * (difference**2 + (a.norm(dim=1) + t * difference) ** 2 * angle**2)
    assert found == pytest.approx(float(exact.mean()), rel=2e-3)
    assert error == pytest.approx(float(exact.std() / 300**0.5), rel=0.05)
    trimmed, _ = path_length(lambda noise, _: noise.flatten(1) * scale, shape, labels, seeds, epsilon=1e-3, trim=0.1)
    assert trimmed == pytest.approx(float(exact.sort().values[30:270].mean()), rel=5e-3)
    with pytest.raises(InputError, match="at least 3 paths"):
        path_length(lambda noise, _: noise.flatten(1), shape, labels[:2], range(2))
