"""What images are compared with: a teacher's samples, real images, or published statistics."""

import io
import json
import os
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dd2.data.pictures import READ_ERRORS
from dd2.errors import InputError
from dd2.evaluation.bank import feature_bank
from dd2.evaluation.features import FeatureNetwork, read_features, read_pictures
from dd2.evaluation.images import ImageSet
from dd2.files import file_digest, writable_folder
from dd2.frechet import GaussianFit, fit_gaussian
from dd2.processes import say
from dd2.training.store import Store

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Keys of ADM's reference files."""


LARGEST_POOL = 50_000
"""Images that nearest neighbours are looked for among; the time grows with its square."""


@dataclass(frozen=True)
class Reference:
    """Statistics, and features where there are images.

    Attributes:
        fits: "pool" and, where known, "spatial".
        pool: (N, F) features for precision, recall and KID, or None where only statistics are known.
        described: what it is, with its hash and count: printed beside every number.
        groups: of each row of pool the category that it belongs to, where it is known; else empty.
    """

    fits: dict[str, GaussianFit]
    pool: Tensor | None
    described: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()


def of_bank(bank: Store, described: dict[str, Any]) -> Reference:
    """A reference from features on disk; at most `LARGEST_POOL` images, evenly spaced, serve precision, recall and KID."""
    fits = {name: fit_gaussian(bank.stream(name)) for name in STATISTICS if name in bank.names()}
    kept = -(-bank.count // LARGEST_POOL)  # every kept-th
    pool = torch.cat([part[::kept] for part in bank.stream("pool")])
    return Reference(fits, pool, {**described, "images_for_precision_and_recall": len(pool)})


def open_reference(path: Path, network: FeatureNetwork, device: torch.device, cache: Path, batch: int) -> Reference:
    """An .npz of statistics (ADM's keys), or images: folder, zip, .npz.

    Features of images are kept under the hash of images and network in a folder beside them, PATH.dd2, or in `cache` where that
    cannot be written, and found there the next time.

    Raises:
        InputError: there is no such reference, or it cannot be read.
    """
    path = Path(os.path.realpath(path))
    if path.suffix == ".npz" and path.is_file() and "mu.npy" in _names(path):
        return _statistics(path, network, device, batch, cache)
    images = ImageSet(path, "reference")
    say(images.said())
    described = {"reference": str(path), "sha256": images.digest(), "count": len(images)}
    root = path.with_name(f"{path.name}.dd2") / "features"
    try:
        writable_folder(root, "folder beside the reference")
    except InputError:
        root = cache
    found = of_bank(image_bank(images, network, device, root, batch, described["sha256"]), described)
    folders = tuple(name.rpartition("/")[0].rpartition("/")[2] for name in images.names)
    return replace(found, groups=folders if found.pool is not None and len(folders) == len(found.pool) else ())


def image_bank(images: ImageSet, network: FeatureNetwork, device: torch.device, root: Path, batch: int, digest: str) -> Store:
    """Features of somebody's images."""
    identity = {"images": digest, "network": [network.name, network.digest]}

    def make(index: Tensor) -> dict[str, Tensor]:
        if network.prepare is not None:
            return read_pictures(network, images.pictures(index), device)
        return read_features(network, images[index].to(device))

    return feature_bank(root, f"features of {images.path.name}", identity, len(images), batch, make)


def statistics_file(reference: Reference) -> bytes:
    """Statistics in ADM's format, as the bytes of an .npz."""
    arrays: dict[str, Any] = {}
    for name, keys in STATISTICS.items():
        if name in reference.fits:
            values = reference.fits[name].mean.numpy(), reference.fits[name].covariance.numpy()
            arrays |= dict(zip(keys, values, strict=True))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, described=np.array(json.dumps(reference.described)))
    return buffer.getvalue()


def _statistics(path: Path, network: FeatureNetwork, device: torch.device, batch: int, cache: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {key: np.asarray(content[key]) for keys in STATISTICS.values() for key in keys if key in content}
            made = json.loads(str(content["described"])) if "described" in content else {}
    except READ_ERRORS as error:
        raise InputError(f"reference {path} cannot be read ({error}); copy it again") from error
    if not isinstance(made, dict):
        raise InputError(f"reference {path}: described is no JSON object; make it again with dd2 reference")
    fits = _checked_fits(path, arrays)
    digest = file_digest(path)
    described = {**made, "reference": str(path), "sha256": digest}
    if made.get("features_digest", network.digest) != network.digest:
        raise InputError(
            f"reference {path} was made with other features ({made.get('features')}), not {network.name}; make it again"
        )
    pool = None
    if "arr_0.npy" in _names(path):  # ADM's files hold 10,000 images for precision and recall alone
        images = ImageSet(path, "reference")
        pool = image_bank(images, network, device, cache, batch, digest).load("pool")
        described["images_for_precision_and_recall"] = len(images)
    return Reference(fits, pool, described)


def _checked_fits(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, GaussianFit]:
    """Means and covariances that are some.

    Raises:
        InputError: they are not; the message names the array.
    """
    fits: dict[str, GaussianFit] = {}
    for name, (mean, covariance) in STATISTICS.items():
        if mean not in arrays or covariance not in arrays:
            continue
        for key in (mean, covariance):
            if arrays[key].dtype.kind not in "fiu":
                raise InputError(f"reference {path}: {key} is {arrays[key].dtype}, it must hold real numbers; make it again")
        mu, sigma = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
        if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not mu.size:
            raise InputError(f"reference {path}: {mean} {mu.shape} and {covariance} {sigma.shape} must be (F,) and (F, F)")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"reference {path}: {mean} or {covariance} holds NaN or infinity; make it again")
        largest = np.abs(sigma).max()
        if np.abs(sigma - sigma.T).max() > 1e-4 * largest or np.linalg.eigvalsh(sigma)[0] < -1e-3 * largest:
            raise InputError(
                f"reference {path}: {covariance} is no covariance: symmetric, without negative variances; make it again"
            )
        fits[name] = GaussianFit(torch.from_numpy(mu), torch.from_numpy(sigma))
    if "pool" not in fits:
        raise InputError(f"reference {path} needs both mu and sigma; make it with dd2 reference")
    return fits


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except READ_ERRORS as error:
        raise InputError(f"reference {path} cannot be read ({error}); copy it again") from error
