"""metrics.jsonl: one JSON object per logged iteration, consistent across interruptions."""

import contextlib
import json
from pathlib import Path
from typing import Any

from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.processes import rank


class MetricsLog:
    """Append-only log of a run.

    Args:
        path: the metrics.jsonl file.
        tensorboard: a folder for TensorBoard's event files, or None.

    Raises:
        InputError: TensorBoard is asked for but not installed.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self._writer: Any = None
        if tensorboard is not None and rank() == 0:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise InputError('loop.tensorboard needs TensorBoard: pip install "dd2[logs]"') from error
            self._writer = SummaryWriter(str(tensorboard))

    def rewind(self, stage: str, step: int) -> None:
        """Forget rows of `stage` beyond `step` and a torn last line, so that a resumed run repeats none."""
        if rank() != 0 or not self.path.exists():
            return
        rows = [row for row in self.rows() if row.get("stage") != stage or row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add one row and flush it; the first process alone does."""
        if rank() != 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{row['stage']}/{name}", value, row["step"])
            self._writer.flush()

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; lines torn by a kill, or by hand, are passed over."""
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
                        rows.append(row)
        return rows

    def reproducible_rows(self) -> list[dict[str, Any]]:
        """All whole rows without their times: what must be equal in two runs of the same command."""
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in self.rows()]
