"""What a table is made of: rows of runs, columns of numbers, and the claims that are checked."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dd2.evaluation.columns import COLUMNS as MEASURED
from dd2.evaluation.columns import Column
from dd2.evaluation.score import gap_closed
from dd2.reproduce.workshop import Cell, Changes


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: what it is called.
        method: whose numbers of the evaluation it shows.
        cell: seed -> the run.
        paper: the paper's numbers for it, ImageNet 256 px, as text.
        steps: network passes per image.
    """

    label: str
    method: str
    cell: Callable[[int], Cell]
    paper: str = ""
    steps: int = 1


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows.

    Attributes:
        text: in words.
        better, worse: labels of the rows.
        column: the number compared.
        higher: whether higher is better.
        at_most: also, the better row's training seconds are at most this share of the worse row's.
    """

    text: str
    better: str
    worse: str
    column: str = "gap"
    higher: bool = True
    at_most: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table on a bench.

    Attributes:
        title, paper: what it is about, and what the paper reports.
        rows: lines.
        columns: numbers shown.
        claims: what is checked.
        evaluation: further fields of the evaluation of its runs.
        note: what a reader must know.
        curves: whether the page also shows the distance at every checkpoint of stage 2.
    """

    title: str
    paper: str
    rows: list[Row]
    columns: tuple[str, ...]
    claims: list[Claim]
    evaluation: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    curves: bool = False

    def of_rows(self, labels: tuple[str, ...]) -> "Table":
        """The same of these rows alone, with the claims that compare two of them."""
        claims = [claim for claim in self.claims if claim.better in labels and claim.worse in labels]
        return replace(self, rows=[row for row in self.rows if row.label in labels], claims=claims)


COLUMNS = MEASURED | {
    "frechet": Column("FD", ".2f"),
    "gap": Column("gap closed", ".3f"),
    "path_length": Column("path length", ".3g"),
    "seconds": Column("training s", ".0f"),
    "milliseconds": Column("ms/image", ".2f"),
}
"""Those of an evaluation, and what only tables have."""

USUAL = ("frechet", "gap", "precision", "recall", "teacher_nll", "accuracy")


def value(numbers: dict[str, Any], method: str, column: str) -> float | None:
    """A number of one evaluation; None where the method has none."""
    found = numbers["metrics"].get(method)
    if column in ("floor", "worst"):
        return numbers["frechet"][{"floor": "floor", "worst": "onestep_marginal"}[column]]
    if column == "gap":
        return gap_closed(found["frechet"], numbers["frechet"]["floor"], numbers["frechet"]["onestep_marginal"])
    if column == "seconds":
        learned = method.startswith(("generator", "ar_diffusion"))
        parts = ("samples", "tune", "pairs", "regress", "csd", "dd1")
        return sum(numbers["seconds"].get(part, 0.0) for part in parts) if learned else None
    if column == "milliseconds":
        taken = numbers["speed"][0]["seconds_per_image"].get(method) if "speed" in numbers else None
        return 1000 * taken if taken is not None else None
    if column == "path_length":
        return numbers.get("path_length", {}).get(method, {}).get("mean")
    return found.get(column)


def dd2(*changes: tuple[str, Any]) -> Callable[[int], Cell]:
    """DD2 by the paper's recipe, with the given fields changed."""
    return lambda seed: Cell("dd2", seed, changes)


def best(*changes: tuple[str, Any]) -> Callable[[int], Cell]:
    """DD2 by the bench's own recipe, with the given fields changed."""
    return lambda seed: Cell("best", seed, changes)


def dd1(*changes: tuple[str, Any]) -> Callable[[int], Cell]:
    """DD1, with the given fields changed."""
    return lambda seed: Cell("dd1", seed, changes)


def aligned(align: Changes) -> Callable[[int], Cell]:
    """DD2 with alignment and the second half of stage 2 after it."""
    return lambda seed: Cell("dd2", seed, align, continues=Cell("dd2", seed))
