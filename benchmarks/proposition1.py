"""Proposition 1 on a random teacher with V = 4, n = 3: total variation distance against generator steps, SiD and SIM beside DMD.

    python benchmarks/proposition1.py [--starts stage1 ode codes] [--distances dmd sid sim] [--iterations 1350]

From stage 1, as in the paper; from the teacher's ODE (regress.iterations of dd2 distill); and with networks over codes from the
ODE on the generator's own tokens. Prints a table, writes benchmarks/results/proposition1.json (the other curves in it stay) and
docs/results/proposition1.png.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dd2.losses import Distance
from dd2.method.config import CSDConfig, NetworksConfig, RegressConfig, TuneConfig
from dd2.student import HeadConfig
from dd2.teachers.filtering import Sampling
from dd2.teachers.table import independent
from dd2.training.schedule import NoiseLevelConfig, OptimConfig
from dd2.trajectory import OdeConfig
from enumeration import distil_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "proposition1.json"
NAMES: dict[Distance, str] = {"dmd": "DMD", "sid": "SiD", "sim": "SIM"}
STARTS = {"stage1": "from stage 1", "ode": "from the teacher's ODE", "codes": "over codes, from the ODE on own tokens"}


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
        validation=0,
        generator=OptimConfig(lr=1e-3, **rates),
        guidance=OptimConfig(lr=2e-3, **rates),
    )
    return HeadConfig(depth=3, width=64, frequencies=16), tune, csd


def from_ode(d: Distance, iterations: int) -> tuple[HeadConfig, TuneConfig, CSDConfig, RegressConfig]:
    """The same with the generator's start from the teacher's ODE, from where small steps are enough."""
    head, tune, csd = configurations(d, iterations)
    optim = OptimConfig(lr=3e-3, decay="cosine", betas=(0.9, 0.99))
    regress = RegressConfig(
        iterations=1500,
        guidance_iterations=300,
        pairs=60_000,
        ode=OdeConfig(steps=30),
        batch=512,
        accumulate=1,
        ema=0.998,
        optim=optim,
    )
    csd = replace(
        csd,
        generator_draws=4,
        ema=0.995,
        generator=replace(csd.generator, lr=1.5e-4),
        guidance=replace(csd.guidance, lr=1e-3, decay="constant"),
    )
    return head, tune, csd, regress


def main() -> None:
    """Run both distances from the chosen starts and write the table, the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--distances", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--iterations", type=int, default=1350)
    arguments = parser.parse_args()
    joint = random_joint()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"curves": {}}
    results["independent"] = float((independent(joint) - joint).abs().sum() / 2)
    for start in arguments.starts:
        for d in arguments.distances:
            results["curves"][f"{start}/{d}"] = curve_of(joint, start, d, arguments.iterations)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"independent tokens: {results['independent']:.3f}\n")
    for start in STARTS:
        found = {NAMES[d]: results["curves"][f"{start}/{d}"] for d in NAMES if f"{start}/{d}" in results["curves"]}
        if found:
            print(f"{STARTS[start]}: " + ", ".join(f"{name} {curve['seconds']:.0f} s" for name, curve in found.items()))
            print(f"\n| steps | {' | '.join(found)} |\n|---:|" + "---:|" * len(found))
            at = {name: dict(curve["curve"]) for name, curve in found.items()}
            for step in sorted({step for curve in at.values() for step in curve}):
                cells = (f"{curve[step]:.3f}" if step in curve else "" for curve in at.values())
                print(f"| {step} | {' | '.join(cells)} |")
            print()
    plot(results)


def curve_of(joint: torch.Tensor, start: str, d: Distance, iterations: int) -> dict[str, Any]:
    """Total variation against steps, and the seconds it took."""
    curve: list[tuple[int, float]] = []

    def measured(step: int, distance: float) -> None:
        curve.append((step, distance))
        print(f"{start}, {d}, step {step}: {distance:.4f}", flush=True)

    head, tune, csd, regress = from_ode(d, iterations) if start != "stage1" else (*configurations(d, iterations), None)
    kinds = NetworksConfig()
    if start == "codes":
        kinds = NetworksConfig(generator="codes", guidance="codes")
        regress = replace(regress, own_share=1.0, iterations=500) if regress else None
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, iterations // 15)
        distil_table(Path(folder), joint, head, tune, csd, regress=regress, kinds=kinds, measured=measured, measure_every=every)
    seconds = round(time.perf_counter() - begun, 1)
    return {"curve": curve, "iterations": iterations, "seconds": seconds, "torch": str(torch.__version__)}


def plot(results: dict[str, Any]) -> None:
    """All curves in one picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results["curves"].items():
        start, d = name.split("/")
        line = "-" if start == "stage1" else "--"
        axes.plot(*zip(*result["curve"], strict=True), line, marker="o", markersize=3, label=f"{NAMES[d]}, {STARTS[start]}")
    axes.axhline(results["independent"], color="0.5", linestyle=":", label="independent tokens")
    axes.axhline(0.03, color="0.8", linewidth=0.8)
    axes.set(xlabel="generator steps", ylabel="total variation distance", yscale="log", title="Proposition 1, V = 4, n = 3")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(ROOT / "docs" / "results" / "proposition1.png"))


if __name__ == "__main__":
    main()
