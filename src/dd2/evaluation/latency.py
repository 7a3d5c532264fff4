"""Quality against latency: what a second an image buys, of every way to draw, and of others' models."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dd2.errors import InputError
from dd2.evaluation.plots import INK, figure_of, figure_png
from dd2.records import read_list

LOWEST = 0.01
"""Distances are drawn no lower: a floor below 0 has no place on a logarithmic axis."""


@dataclass(frozen=True)
class Point:
    """One way to draw.

    Attributes:
        name: what it is called.
        seconds: an image, decoding included.
        frechet: its distance to the reference.
        series: which points belong together, and are joined by a line.
        label: what is written beside it; its name unless given.
    """

    name: str
    seconds: float
    frechet: float
    series: str = ""
    label: str = ""


def points_of(run: str, numbers: dict[str, Any]) -> list[Point]:
    """The methods of an evaluated run at the smallest batch that was timed: there latency is what a user waits."""
    entries = sorted(numbers.get("speed", []), key=lambda entry: entry["batch"])
    if not entries:
        return []
    taken, found = entries[0]["seconds_per_image"], []
    for name, title in numbers["methods"].items():
        if name in taken and "frechet" in numbers["metrics"][name]:
            found.append(Point(title, taken[name], numbers["metrics"][name]["frechet"], *_place(run, name)))
    return found


def _place(run: str, name: str) -> tuple[str, str]:
    """Series and label of a method."""
    if name.startswith("teacher_skip_"):
        return f"{run}: teacher without its last steps", f"skip-{name.removeprefix('teacher_skip_')}"
    for start in ("generator", "teacher"):
        if name.startswith(start):
            steps = name.removeprefix(start).removesuffix("_steps").strip("_")
            return f"{run}: {start}", f"{steps} steps" if steps else {"generator": "1 step"}.get(start, start)
    return f"{run}: {name}", name


def read_points(file: Path) -> list[Point]:
    """Others' points: a JSON list of {"name": …, "seconds": an image, "frechet": …}, measured as the reader vouches.

    Raises:
        InputError: the file is no such list, or a number is not positive.
    """
    shape = {"name": str, "seconds": float, "frechet": float, "series?": str}
    found = read_list(file, shape, 'give [{"name": "…", "seconds": 0.1, "frechet": 3.2}, …]')
    for entry in found:
        if not all(0 < entry[name] < math.inf for name in ("seconds", "frechet")):
            raise InputError(f"{file}: seconds and frechet of {entry['name']} must be positive numbers")
    names = ("name", "seconds", "frechet", "series")
    return [Point(**{name: entry[name] for name in names if name in entry}) for entry in found]


def latency_plot(points: Sequence[Point]) -> bytes:
    """The points as a PNG file, both axes logarithmic; lower and further left is better."""
    figure, axes = figure_of(7, 4.2)
    points = [point for point in points if math.isfinite(point.frechet)]
    series = list(dict.fromkeys(point.series or point.name for point in points))
    for index, name in enumerate(series):
        mine = sorted((p for p in points if (p.series or p.name) == name), key=lambda p: p.seconds)
        x, y = [1000 * p.seconds for p in mine], [max(p.frechet, LOWEST) for p in mine]
        axes.plot(x, y, marker="o", markersize=5, linewidth=1, color=f"C{index % 10}", label=_literal(name))
        for point in mine:
            place = (1000 * point.seconds, max(point.frechet, LOWEST))
            axes.annotate(
                _literal(point.label or point.name),
                place,
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
                color=f"C{index % 10}",
            )
    axes.set(xlabel="milliseconds an image", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.margins(x=0.15, y=0.12)
    axes.legend(fontsize=8, labelcolor=INK, facecolor="none")
    return figure_png(figure)


def _literal(text: str) -> str:
    """Text that is no formula."""
    return text.replace("$", r"\$")


def latency_rows(points: Sequence[Point]) -> str:
    """The same as rows of an HTML table."""
    return "".join(
        f"<tr><td>{html.escape(point.name)}</td><td>{1000 * point.seconds:.2f}</td><td>{point.frechet:.2f}</td></tr>"
        for point in sorted(points, key=lambda point: point.seconds)
    )
