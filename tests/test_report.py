"""What a report draws: quality against latency, curves of few points, pages for dark rooms and phones."""

import json

import pytest

from dd2.cli import main
from dd2.errors import InputError
from dd2.evaluation import plots
from dd2.evaluation.latency import Point, latency_plot, latency_rows, points_of, read_points

NUMBERS = {
    "methods": {
        "teacher": "Teacher, 16 AR steps",
        "generator": "Generator, one step",
        "generator_4_steps": "Generator and teacher, 4 steps",
        "teacher_skip_2": "Teacher without its last 2 AR steps (skip-2)",
        "onestep_marginal": "onestep*",
    },
    "metrics": {
        **{name: {"frechet": value} for name, value in (("teacher", -0.5), ("generator", 4.0), ("generator_4_steps", 3.0))},
        "teacher_skip_2": {"frechet": 20.0},
        "onestep_marginal": {"frechet": 50.0},
    },
    "speed": [
        {
            "batch": size,
            "seconds_per_image": {"teacher": t, "generator": g, "generator_4_steps": 2 * g, "teacher_skip_2": 0.9 * t},
        }
        for size, t, g in ((16, 0.004, 0.001), (1, 0.03, 0.005))
    ],
}


def test_points_are_of_the_smallest_batch():
    found = {point.name: point for point in points_of("mine", NUMBERS)}
    assert found["Generator, one step"] == Point("Generator, one step", 0.005, 4.0, "mine: generator", "1 step")
    assert found["Generator and teacher, 4 steps"].label == "4 steps"
    assert found["Generator and teacher, 4 steps"].series == "mine: generator"
    assert found["Teacher, 16 AR steps"].frechet == -0.5  # in the table as it is, though no logarithmic axis has it
    assert found[NUMBERS["methods"]["teacher_skip_2"]].label == "skip-2"
    assert "onestep*" not in found  # was not timed
    assert points_of("mine", {**NUMBERS, "speed": []}) == []
    assert latency_plot(list(found.values())).startswith(b"\x89PNG")
    assert latency_plot([Point("a $x^$ b", 1, 1), Point("nan", 1, float("nan"))]).startswith(b"\x89PNG")
    rows = latency_rows([*found.values(), Point("<b>theirs</b>", 0.001, 9.0)])
    assert rows.index("&lt;b&gt;theirs") < rows.index("Generator, one step")  # the fastest first, and no markup


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"name": "a"}]',
        '[{"name": "a", "seconds": 0, "frechet": 1}]',
        '[{"name": 1, "seconds": 1, "frechet": 1}]',
    ],
)
def test_what_is_no_list_of_points(text, tmp_path, capsys):
    file = tmp_path / "points.json"
    file.write_text(text)
    with pytest.raises(InputError, match="points"):
        read_points(file)
    assert main(["report", "run", "--points", str(file), "--out", str(tmp_path / "r.html")]) == 2
    assert "points.json" in capsys.readouterr().err


def test_points_of_others(tmp_path):
    file = tmp_path / "points.json"
    file.write_text(json.dumps([{"name": "a GAN", "seconds": 0.1, "frechet": 3}, {"name": "b", "seconds": 1, "frechet": 2.5}]))
    assert read_points(file) == [Point("a GAN", 0.1, 3), Point("b", 1, 2.5)]


@pytest.mark.parametrize(("count", "smoothed"), [(2, False), (plots.SMOOTHED - 1, False), (plots.SMOOTHED, True)])
def test_few_points_are_not_smoothed(count, smoothed, monkeypatch):
    """The mean of two is a flat line that says nothing."""
    calls = []
    monkeypatch.setattr(plots, "_smooth", lambda values: calls.append(values) or values)
    plots.curves([{"stage": "csd", "step": step, "validation": 1.0 / step} for step in range(1, count + 1)])
    assert bool(calls) == smoothed
