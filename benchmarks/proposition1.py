"""Proposition 1 on a random teacher with V = 4, n = 3: total variation distance against generator steps, SiD beside DMD.

    python benchmarks/proposition1.py [--iterations 3000]

Prints a table, writes benchmarks/results/proposition1.json and docs/results/proposition1.png.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dd2.losses import Distance
from dd2.stages.config import CSDConfig, TuneConfig
from dd2.student import HeadConfig
from dd2.teachers.filtering import Sampling
from dd2.teachers.table import independent
from dd2.training.schedule import NoiseLevelConfig, OptimConfig
from enumeration import distil_table

ROOT = Path(__file__).resolve().parent.parent


def random_joint(codes: int = 4, positions: int = 3, seed: int = 2) -> torch.Tensor:
    """A random distribution over codes^positions sequences, far from independent."""
    draw = torch.randn([codes] * positions, generator=torch.Generator().manual_seed(seed))
    return (1.2 * draw).flatten().softmax(0).view(draw.shape)


def configurations(
    d: Distance, iterations: int, decay: Literal["constant", "cosine"] = "cosine"
) -> tuple[HeadConfig, TuneConfig, CSDConfig]:
    """The sizes and rates of every enumeration in tests and benchmarks."""
    rates: dict[str, Any] = {"decay": decay, "betas": (0.5, 0.99)}
    tune = TuneConfig(
        iterations=300,
        batch=512,
        accumulate=1,
        draws=2,
        sampling=Sampling(),
        optim=OptimConfig(lr=2e-3, decay="cosine", betas=(0.5, 0.99)),
    )
    csd = CSDConfig(
        iterations=iterations,
        k=3,
        batch=512,
        accumulate=1,
        guidance_draws=1,
        generator_draws=2,
        d=d,
        snap_teacher=True,
        ema=0.99,
        sampling=Sampling(),
        noise_level=NoiseLevelConfig(low=0.3),
        generator=OptimConfig(lr=1e-3, **rates),
        guidance=OptimConfig(lr=2e-3, **rates),
    )
    return HeadConfig(depth=3, width=64, frequencies=16), tune, csd


def main() -> None:
    """Run both distances and write the table, the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3000)
    iterations = parser.parse_args().iterations
    joint = random_joint()
    baseline = float((independent(joint) - joint).abs().sum() / 2)
    results: dict[str, object] = {"independent": baseline, "iterations": iterations, "torch": str(torch.__version__)}
    for d in ("dmd", "sid"):
        curve: list[tuple[int, float]] = []
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            distil_table(
                Path(folder),
                joint,
                *configurations(d, iterations),
                measured=lambda step, distance, curve=curve: curve.append((step, distance)),
                measure_every=iterations // 15,
            )
        results[d] = {"curve": curve, "seconds": round(time.perf_counter() - start, 1)}
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "proposition1.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"independent tokens: {baseline:.3f}\n\n| steps | DMD | SiD |\n|---:|---:|---:|")
    for (step, dmd), (_, sid) in zip(results["dmd"]["curve"], results["sid"]["curve"], strict=True):  # pyright: ignore
        print(f"| {step} | {dmd:.3f} | {sid:.3f} |")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for d in ("dmd", "sid"):
        axes.plot(*zip(*results[d]["curve"], strict=True), marker="o", label=d.upper())  # pyright: ignore
    axes.axhline(baseline, color="0.5", linestyle="--", label="independent tokens")
    axes.set(xlabel="generator steps", ylabel="total variation distance", yscale="log", title="Proposition 1, V = 4, n = 3")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(ROOT / "docs" / "results" / "proposition1.png"))


if __name__ == "__main__":
    main()
