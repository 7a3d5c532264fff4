"""Features on disk: what makes evaluation stream, resume after an interruption, and split over processes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dd2.files import write_atomic
from dd2.processes import rank
from dd2.training.store import Make, Store

SHARD = 2000
"""Images per file."""

FORMAT = 2
"""Raise it when drawing or reading images changes, so that features of older code are not taken for the new code's."""


def feature_bank(root: Path, title: str, identity: dict[str, Any], count: int, batch: int, make: Make) -> Store:
    """What is kept of `count` images; what is missing is made.

    Args:
        root: parent of the banks of a run.
        title: shown beside the progress bar.
        identity: everything that decides what the images and features are; another identity is another folder.
        count: images.
        batch: images at a time.
        make: draws and reduces them.
    """
    identity = {**identity, "format": FORMAT}
    key = json.dumps(identity, sort_keys=True, default=str)
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        write_atomic(folder / "identity.json", json.dumps(identity, indent=2, default=str) + "\n")
    return Store.filled(folder, count, SHARD, batch, make, title, "img")
