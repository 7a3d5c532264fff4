"""dd2 reference: statistics of real images, in the format of ADM's reference files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dd2.config import OutPath
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.features import open_features
from dd2.evaluation.reference import open_reference, statistics_file
from dd2.files import writable_folder, write_atomic
from dd2.processes import rank, say


@dataclass(frozen=True)
class ReferenceConfig:
    """Write mu, sigma (and mu_s, sigma_s where the network has spatial features) of images, for dd2 evaluate --reference.

    Use the images and the size that the number to compare with used: training images for generation FID, validation images
    for reconstruction FID.
    """

    images: Annotated[Path, tyro.conf.Positional]
    """Images: a folder, a zip, or an .npz with arr_0 (uint8 NHWC), all of one size."""
    out: OutPath
    """File to write, .npz."""
    features: str = "digits"
    """"digits", "inception", a path to inception-2015-12-05.pt, or module:function; the same as in dd2 evaluate."""
    batch: int = 500
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse other file types."""
        if self.out.suffix != ".npz" or self.batch < 1:
            raise InputError(f"out must end in .npz and batch be at least 1, got {self.out} and {self.batch}")
        if self.out.exists() and self.images.exists() and self.out.samefile(self.images):
            raise InputError(f"out {self.out} is the images themselves; name another file")


def reference(config: ReferenceConfig) -> Path:
    """Write the statistics."""
    device = pick_device(config.device)
    network = open_features(config.features, device)
    writable_folder(config.out.parent, "output folder")
    made = open_reference(config.images, network, device, Path(f"{config.out}.features"), config.batch)
    if "count" not in made.described or "features" in made.described:
        raise InputError(
            f"{config.images} holds statistics already; give images, or take it as it is with dd2 evaluate --reference"
        )
    made.described.update(features=network.name, features_digest=network.digest)
    if rank() != 0:
        return config.out
    write_atomic(config.out, statistics_file(made))
    say(f"wrote {', '.join(made.fits)} statistics of {made.described.get('count', 'the given')} images to {config.out}")
    return config.out
