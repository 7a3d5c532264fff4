"""dd2 inspect: what a checkpoint is, from its names and shapes alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dd2.checkpoints.describe import describe
from dd2.processes import say


@dataclass(frozen=True)
class InspectConfig:
    """Say what a checkpoint is: family, sizes, flags, parameters. The numbers in it are not read.

    Knows dd2's own folders and official VAR and LlamaGen files.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A .pth, .pt or .safetensors file, or a folder written by dd2."""


def inspect(config: InspectConfig) -> dict[str, str]:
    """Print and return the description."""
    found = describe(config.path)
    width = max(map(len, found))
    for name, value in found.items():
        say(f"{name:{width}}  {value}")
    return found
