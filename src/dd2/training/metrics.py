"""metrics.jsonl: one JSON object per logged iteration, consistent across interruptions."""

import json
from pathlib import Path
from typing import Any

from dd2.files import write_atomic


class MetricsLog:
    """Append-only log of a run.

    Args:
        path: the metrics.jsonl file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, stage: str, step: int) -> None:
        """Forget rows of `stage` beyond `step` and a torn last line, so that a resumed run repeats none."""
        if not self.path.exists():
            return
        rows = [row for row in self.rows() if row.get("stage") != stage or row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add one row and flush it."""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows."""
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # a line torn by a kill
        return rows
