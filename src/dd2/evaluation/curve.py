"""Quality against training: every checkpoint that a run keeps, scored as its generator is."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dd2.checkpoints.runs import FinishedRun
from dd2.errors import InputError
from dd2.evaluation.methods import Method
from dd2.evaluation.plots import INK, figure_of, figure_png
from dd2.evaluation.reference import Reference
from dd2.evaluation.score import Scorer, gap_closed, likelihood_and_accuracy
from dd2.frechet import fit_gaussian, frechet_distance
from dd2.training.checkpoint import load_network, read_state, steps
from dd2.training.metrics import MetricsLog
from dd2.training.store import Store

AVERAGES = {
    "regress": "generator_ema",
    "csd": "generator_ema",
    "csd_aligned": "generator_ema",
    "match": "generator_ema",
    "dd1": "student_ema",
}
"""Stages that train what is shipped, in their order, and the checkpoint file of what is shipped."""

STAGES = ("regress", "guidance", "csd", "align", "csd_aligned", "match", "dd1")
"""Stages whose seconds add up; what comes before them is in seconds.json."""
BEFORE = ("adapt", "samples", "tune", "pairs")


@dataclass(frozen=True)
class Point:
    """A checkpoint: which it is, and the seconds of everything up to it."""

    stage: str
    step: int
    seconds: float
    validation: float | None


def draw_checkpoints(
    folder: Path, run: FinishedRun, spent: dict[str, float], scorer: Scorer, generator: Callable[[], Method]
) -> list[tuple[Point, Store]]:
    """The samples of every checkpoint, drawn by all processes.

    Args:
        folder: of the run.
        run: its networks; the generator's weights are replaced, and put back at the end.
        spent: content of seconds.json.
        scorer: draws and keeps them.
        generator: what draws from the generator as it is now.

    Raises:
        InputError: the run keeps no checkpoint, or one cannot be read.
    """
    student = run.generator.student
    shipped = {name: value.clone() for name, value in student.state_dict().items()}
    found: list[tuple[Point, Store]] = []
    for point, file in _checkpoints(folder, spent):
        load_network(file, student)
        title = f"{point.stage} {point.step}"
        found.append((point, scorer.bank(title, "generator", generator(), "methods")))
    student.load_state_dict(shipped)
    if not found:
        raise InputError(f"{folder} keeps no checkpoints of {', '.join(AVERAGES)}, so there is no curve; leave out --curve")
    return found


def _checkpoints(folder: Path, spent: dict[str, float]) -> list[tuple[Point, Path]]:
    rows = MetricsLog(folder / "metrics.jsonl").rows()
    found = []
    before = sum(spent.get(part, 0.0) for part in BEFORE)
    for stage in STAGES:
        taken = {row["step"]: row["seconds"] for row in rows if row["stage"] == stage and "seconds" in row}
        for step in steps(folder / "checkpoints" / stage) if stage in AVERAGES else []:
            checkpoint = folder / "checkpoints" / stage / f"{step:08d}"
            state = read_state(checkpoint)
            point = Point(stage, step, before + taken.get(step, state["seconds"]), state.get("validation"))
            found.append((point, checkpoint / f"{AVERAGES[stage]}.safetensors"))
        before += max(taken.values(), default=0.0)
    return found


def curve_numbers(
    drawn: list[tuple[Point, Store]], reference: Reference, floor: float, worst: float, knows_labels: bool
) -> list[dict[str, Any]]:
    """Numbers of every checkpoint.

    Args:
        drawn: from `draw_checkpoints`.
        reference: what distances are to.
        floor, worst: distances of the teacher and of independent tokens, between which `gap_closed` counts.
        knows_labels: of the feature network.
    """
    rows = []
    for point, bank in drawn:
        distance = frechet_distance(fit_gaussian(bank.stream("pool")), reference.fits["pool"])
        row = {**asdict(point), "frechet": distance, "gap_closed": gap_closed(distance, floor, worst)}
        row |= likelihood_and_accuracy(bank, knows_labels)
        rows.append(row)
    return rows


def curve_plot(curves: dict[str, list[list[dict[str, Any]]]], floor: float, worst: float, by: str = "seconds") -> bytes:
    """Fréchet distance against training as a PNG file.

    Args:
        curves: label -> the rows of each of its runs, drawn in one colour.
        floor, worst: drawn as lines.
        by: "seconds" or "step".
    """
    figure, axes = figure_of(7, 4)
    for index, (label, runs) in enumerate(curves.items()):
        for number, rows in enumerate(runs):
            x = [row[by] for row in rows]
            y = [row["frechet"] for row in rows]
            axes.plot(x, y, marker="o", markersize=3, color=f"C{index}", label=label if number == 0 else None)
    axes.axhline(floor, color="0.5", linestyle="--", label="teacher against itself (floor)")
    axes.axhline(worst, color="tab:red", linestyle=":", label="independent tokens (onestep*)")
    axes.set(xlabel={"seconds": "seconds of training", "step": "generator steps"}[by], ylabel="Fréchet distance", yscale="log")
    axes.legend(fontsize=8, labelcolor=INK, facecolor="none")
    return figure_png(figure)
