"""What dd2 plan is asked: a distillation's configuration, and the GPUs it is planned for."""

import re
from dataclasses import dataclass
from pathlib import Path

from dd2.commands.distill_config import DistillConfig
from dd2.errors import InputError

GB = 1e9


@dataclass(frozen=True)
class PlanConfig(DistillConfig):
    """What a distillation needs: dd2 plan configs/var_d16.yaml --model var_d16 --gpus 8 --memory 80GB.

    Networks are laid out without weights, and nothing is computed. Parameters and operations are exact; memory adds up
    what must be there at once; time assumes a share of the peak rate.
    """

    model: str = ""
    """A released model (var_d16 …, llamagen_b …) whose sizes to plan with; by default the teacher's folder."""
    gpus: int = 1
    """Processes, one GPU each."""
    memory: str = "80GB"
    """Of each GPU."""
    tflops: float = 990.0
    """Peak rate of a GPU in the configured precision (H100, bfloat16: 990)."""
    utilisation: float = 0.35
    """Share of the peak rate that is reached."""
    rates: Path | None = None
    """Results of dd2 bench train on such a GPU: its measured rate in place of tflops and utilisation."""

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        super().__post_init__()
        if self.gpus < 1 or self.tflops <= 0 or not 0 < self.utilisation <= 1:
            raise InputError("gpus must be at least 1, tflops positive, utilisation in (0, 1]")
        if not re.fullmatch(r"\d+(\.\d+)?\s*(GB)?", self.memory):
            raise InputError(f"memory must be a number of gigabytes such as 80GB, got {self.memory!r}")

    @property
    def bytes_per_gpu(self) -> float:
        """Memory of each GPU."""
        return float(self.memory.removesuffix("GB")) * GB
