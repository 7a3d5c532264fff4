"""Training curves as a picture."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7b7b7b"
"""Grey that can be read on white and on black."""

SMOOTHED = 20
"""Points that a curve needs for a moving average; the mean of fewer is a flat line that says nothing."""

PANELS = (
    ("tune", "student/loss", "Stage 1: velocity regression (GTS)"),
    ("dd1", "student/cross_entropy", "DD1: cross-entropy of the first head"),
    ("dd1", "student/squared_error", "DD1: squared error of the second head"),
    ("regress", "generator/right_codes", "Before stage 2: codes that the regression gets right"),
    ("csd", "validation", "Stage 2: distance in the teacher's features"),
    ("csd", "generator/score_difference", "Stage 2: score difference"),
    ("csd", "generator/match", "Stage 2: distance between sequences"),
    ("csd", "guidance/loss", "Stage 2: guidance network"),
    ("csd", "generator/loss", "Stage 2: generator (CSD)"),
    ("csd", "generator/to_nearest_code", "Stage 2: distance to the nearest code"),
    ("csd", "generator/grad_norm", "Stage 2: generator's gradient norm"),
    ("csd", "generator/lr", "Stage 2: generator's learning rate"),
)
"""(stage, number of metrics.jsonl, title)."""

EXPLAINED = {
    "Stage 1: velocity regression (GTS)": (
        "Falls steeply, then slowly. It cannot be judged by its height alone: the AR-diffusion row of the table tells."
    ),
    "DD1: cross-entropy of the first head": "Falls like any regression; what is left at the end is what one pass cannot tell.",
    "DD1: squared error of the second head": "The same, in standard deviations of tokens.",
    "Before stage 2: codes that the regression gets right": (
        "Rises and levels off at what one pass can tell of the teacher's own map from noise to data."
    ),
    "Stage 2: distance in the teacher's features": (
        "The progress meter: the average generator's Fréchet distance to teacher samples, at every checkpoint. Falls, and then "
        "stays; if it rises for long, export the best checkpoint (dd2 export RUN OUT --step best)."
    ),
    "Stage 2: score difference": (
        "Root mean square of the two posterior means' difference: should fall as generator and teacher come together."
    ),
    "Stage 2: distance between sequences": (
        "What csd.match trains on, before it is divided by itself. If it falls while the distance in the teacher's features "
        "rises, it is being gamed: lower csd.match.weight or the generator's rate."
    ),
    "Stage 2: guidance network": (
        "Starts high, drops within tens of iterations, then falls slowly as the generator's tokens become codes. Its level is "
        "the variance of eps - x_0 given x_t; over codes, the generator's entropy in nats a token. A slow rise means the "
        "guidance network falls behind: raise K or its rate."
    ),
    "Stage 2: generator (CSD)": (
        "No progress meter. SiD's expectation is 0 at alpha = 1 when the guidance network is perfect; DMD's shows half "
        "the weighted squared score difference, which should fall, but also shrinks when both networks are wrong alike."
    ),
    "Stage 2: distance to the nearest code": (
        "How far generated tokens are from the codebook, in standard deviations. Should fall: the tokens become codes."
    ),
    "Stage 2: generator's gradient norm": "Steady or falling. Spikes that do not calm down call for a lower rate.",
    "Stage 2: generator's learning rate": "The raw weights only become good as this decays; until then the EMA is better.",
}
"""How to read each panel, by title."""


def explained(rows: list[dict[str, Any]]) -> dict[str, str]:
    """How to read the panels that have data, by title."""
    return {title: EXPLAINED[title] for stage, number, title in PANELS if len(_series(rows, stage, number)) > 1}


def curves(rows: list[dict[str, Any]]) -> bytes:
    """PNG of the panels that have data; grey is what was logged, blue its moving average where the points are many enough."""
    panels = [(title, _series(rows, stage, number)) for stage, number, title in PANELS]
    panels = [(title, series) for title, series in panels if len(series) > 1]
    rows = max(1, -(-len(panels) // 3))
    figure = _blank(12, 3.2 * rows)
    for index, (title, series) in enumerate(panels):
        axes = _axes(figure, rows, 3, index + 1)
        steps, values = zip(*series, strict=True)
        if len(values) < SMOOTHED:
            axes.plot(steps, values, color="tab:blue", linewidth=1.2, marker="o", markersize=3)
        else:
            axes.plot(steps, values, color="0.65", linewidth=0.8)
            axes.plot(steps, _smooth(list(values)), color="tab:blue", linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=8)
    return figure_png(figure)


def figure_of(width: float, height: float) -> tuple["Figure", "Axes"]:
    """A figure of inches with one pair of axes, for light and dark pages alike: no background, and grey writing."""
    figure = _blank(width, height)
    return figure, _axes(figure, 1, 1, 1)


def _blank(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _axes(figure: "Figure", rows: int, columns: int, number: int) -> "Axes":
    axes = figure.add_subplot(rows, columns, number, facecolor="none")
    axes.tick_params(colors=INK, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
        part.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.grid(alpha=0.3)
    return axes


def figure_png(figure: "Figure") -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _series(rows: list[dict[str, Any]], stage: str, number: str) -> list[tuple[int, float]]:
    return [(row["step"], row[number]) for row in rows if row.get("stage") == stage and isinstance(row.get(number), int | float)]


def _smooth(values: list[float]) -> list[float]:
    """Centred mean over about a twentieth of the curve."""
    reach = max(1, len(values) // 40)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
