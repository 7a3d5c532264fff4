"""Every metric of one set of images against a reference, from features on disk."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from scipy import stats
from torch import Tensor

from dd2.errors import InputError
from dd2.evaluation.bank import SHARD
from dd2.evaluation.inception_score import inception_score
from dd2.evaluation.kid import kernel_distance
from dd2.evaluation.neighbours import neighbour_scores
from dd2.evaluation.reference import Reference
from dd2.frechet import GaussianFit, fit_gaussian, frechet_distance
from dd2.training.store import Store

FEW = 100
"""Images in a split of the inception score, below which it says little."""


@dataclass(frozen=True)
class MetricConfig:
    """What is computed, and how."""

    neighbours: int = 3
    """K of precision, recall, density and coverage."""
    splits: int = 10
    """Splits of the inception score."""
    kid_subsets: int = 100
    """Pairs of subsets of KID."""
    kid_size: int = 1000
    """Images in each."""
    halves: int = 10
    """Random halves of the samples whose spread gives the 95 % intervals of the Fréchet distance, sFID and IS; 0 gives none."""
    fid_infinity: bool = False
    """Also extrapolate the Fréchet distance to infinitely many samples."""

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        if min(self.neighbours, self.splits, self.kid_subsets) < 1 or self.kid_size < 2 or self.halves < 0 or self.halves % 2:
            raise InputError("metrics: neighbours, splits, kid_subsets from 1, kid_size from 2, halves even and from 0")


def scores(bank: Store, reference: Reference, config: MetricConfig, seed: int = 0) -> dict[str, float]:
    """The numbers of one set of images.

    Returns:
        "frechet" (FID for Inception) and, as far as network and reference allow, "frechet_infinity", "sfid", "inception_score",
        "kid", "precision", "recall", "density", "coverage"; each NAME_95 is the half width of NAME's 95 % interval for other
        samples of the same generator ("kid_sd" and "inception_score_sd" are the spreads over subsets and splits).
    """
    pool = bank.load("pool")
    check_channels(pool.shape[1], reference)
    found = _with_interval("frechet", pool, lambda rows: frechet_distance(_fit(rows), reference.fits["pool"]), config, seed)
    if config.fid_infinity:
        found["frechet_infinity"] = frechet_infinity(pool, reference.fits["pool"], seed)
    if "spatial" in bank.names() and "spatial" in reference.fits:
        spatial = reference.fits["spatial"]
        found |= _with_interval("sfid", bank.load("spatial"), lambda rows: frechet_distance(_fit(rows), spatial), config, seed)
    if "probabilities" in bank.names():
        probabilities, splits = bank.load("probabilities"), max(1, min(config.splits, len(pool) // 2))  # halves have some too
        _, found["inception_score_sd"] = inception_score(probabilities, splits, seed)
        value = partial(inception_score, splits=splits, seed=seed)
        found |= _with_interval("inception_score", probabilities, lambda rows: value(rows)[0], config, seed)
    if reference.pool is not None:
        found["kid"], found["kid_sd"] = kernel_distance(reference.pool, pool, config.kid_subsets, config.kid_size, seed)
        if min(len(pool), len(reference.pool)) > config.neighbours:
            for name, each in neighbour_scores(reference.pool, pool, config.neighbours).items():
                found |= mean_with_interval(name, each)
    return found


def _with_interval(
    name: str, values: Tensor, metric: Callable[[Tensor], float], config: MetricConfig, seed: int
) -> dict[str, float]:
    found = {name: metric(values)}
    if config.halves and len(values) >= 8:
        # A half and its complement vary together: as many degrees of freedom as pairs.
        quantile = float(stats.t.ppf(0.975, config.halves // 2))
        found[f"{name}_95"] = quantile * spread_of_halves(values, metric, config.halves, seed)
    return found


def spread_of_halves(values: Tensor, metric: Callable[[Tensor], float], halves: int, seed: int) -> float:
    """Standard deviation of a metric over random halves of the samples.

    A half drawn without replacement varies about its whole by as much as the whole about the truth, so this estimates the
    whole's standard error.

    Args:
        values: (N, …) what was kept of the samples.
        metric: some rows of it -> the number.
        halves: even.
        seed: of the halves.
    """
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(halves // 2):
        order = torch.randperm(len(values), generator=random)
        found += [metric(values[rows]) for rows in order.chunk(2)]
    return float(torch.tensor(found, dtype=torch.float64).std())


def interval_of_mean(each: Tensor) -> float:
    """Half width of the 95 % interval of the mean of (N,) independent values, N > 1."""
    return 1.96 * float(each.double().std()) / len(each) ** 0.5


def mean_with_interval(name: str, each: Tensor) -> dict[str, float]:
    """NAME, the mean of (N,) independent values, and NAME_95, half the width of its 95 % interval."""
    return {name: float(each.mean()), f"{name}_95": interval_of_mean(each)}


def frechet_infinity(pool: Tensor, reference: GaussianFit, seed: int, points: int = 15) -> float:
    """The Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv 1911.07023): at N samples it is
    biased by about a constant / N, so a line in 1 / N is fitted through random subsets.
    """
    check_extrapolation(len(pool), pool.shape[1])
    smallest = max(len(pool) // 10, 2 * pool.shape[1])  # below, covariances are singular and the bias is no line
    random = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, len(pool), points).long()
    values = [frechet_distance(_fit(pool[torch.randperm(len(pool), generator=random)[:size]]), reference) for size in sizes]
    x = torch.stack([torch.ones(points, dtype=torch.float64), 1 / sizes.double()], 1)
    return float(torch.linalg.lstsq(x, torch.tensor(values, dtype=torch.float64).unsqueeze(1)).solution[0, 0])


def check_extrapolation(count: int, features: int) -> None:
    """Refuse `frechet_infinity` of too few images."""
    if count < 4 * features:
        raise InputError(f"--metrics.fid-infinity with {features} features needs {4 * features} images, got {count}")


def within_class_spread(pool: Tensor, labels: Tensor) -> float:
    """Mean over classes of the total variance of features: how varied the images of one class are."""
    spreads = [pool[labels == c].double().var(0).sum() for c in labels.unique() if int((labels == c).sum()) > 1]
    return float(torch.stack(spreads).mean()) if spreads else 0.0


def warnings(count: int, features: int, reference: Reference, config: MetricConfig, measured: Collection[str] = ()) -> list[str]:
    """What a reader must know before comparing a number with a paper's.

    Args:
        count: images of each method.
        features: channels of the features.
        reference: what they were compared with.
        config: of the metrics.
        measured: what `scores` gave.
    """
    said = []
    known, of_teacher = reference.described.get("count"), reference.described.get("reference") == "teacher"
    if count < 50_000 and not of_teacher:
        said.append(
            f"{count:,} images: the Fréchet distance is biased upwards against the papers' 50,000 (--metrics.fid-infinity helps)"
        )
    if count <= features:
        said.append(f"{count:,} images for {features:,} features: the covariance is singular, the distance says little")
    if not of_teacher and isinstance(known, int) and known <= features:
        said.append(f"the reference has {known:,} images for {features:,} features: a distance to it says little")
    if "inception_score" in measured and count // config.splits < FEW:
        said.append(f"{count:,} images in {min(config.splits, count // 2)} splits: an inception score of so few says little")
    if reference.pool is None:
        return said
    fewest = min(count, len(reference.pool))
    if fewest <= config.neighbours:
        said.append(
            f"precision, recall, density and coverage are not measured: {config.neighbours} neighbours (--metrics.neighbours) "
            f"need more images of each kind than {fewest:,}"
        )
    if fewest < config.kid_size:
        said.append(f"KID is by subsets of {fewest:,} images, as there are no {config.kid_size:,} (--metrics.kid-size)")
    return said


def _fit(pool: Tensor) -> GaussianFit:
    return fit_gaussian(pool.split(SHARD))


def check_channels(found: int, reference: Reference) -> None:
    """Refuse a reference of another network, as far as the number of its features tells."""
    expected = len(reference.fits["pool"].mean)
    if found != expected:
        raise InputError(f"the features have {found} channels, the reference {expected}: it was made with another network")
